"""LoRA adapters: what is read and what is refused, and logits against the adapter merged into transformers' weights."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from backends import CPU, variants
from ragged_requests import Chunk, Request, Runner
from safetensors.torch import load_file, save_file
from tiny_adapters import ATTENTION, EVERYTHING, merged, module_shapes, save_adapter
from torch import Tensor

from splitfuse.core.plan import StateSlots
from splitfuse.errors import AdapterError, ModelNotFoundError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.lora import Adapter
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.lora import read_adapter, resolve_adapter
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.hub import adapter_folder
from splitfuse.models.weights import load_decoder, stored_parameters
from splitfuse.runtime.batch import BatchBuilder


def read(adapter: Path, model: Path) -> Adapter:
    source = ModelFolder(model)
    spec = load_spec(source)
    return resolve_adapter(read_adapter(adapter), spec, stored_parameters(source.weights(), spec))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", folder)
    return folder


def shapes_of(model: Path, *endings: str) -> dict[str, tuple[int, int]]:
    return module_shapes(load_file(model / "model.safetensors"), endings)


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "broken-config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "config-list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    "no-weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickled": (pickled, "adapter_model.bin, which is pickled"),
    "cut-short": (cut_short, "not a whole safetensors file"),
    "other-kind": (edit_config(peft_type="IA3"), "peft_type must be LORA, not 'IA3'"),
    "rank-zero": (edit_config(r=0), "r must be a rank from 1 to 512, not 0"),
    "rank-flag": (edit_config(r=True), "r must be a rank from 1 to 512, not True"),
    "alpha-text": (edit_config(lora_alpha="8"), "lora_alpha must be a number from -1000000 to 1000000, not '8'"),
    "alpha-overflow": (edit_config(lora_alpha=10**400), "lora_alpha must be a number from -1000000 to 1000000, not 1"),
    "alpha-large": (edit_config(lora_alpha=1e308), "lora_alpha must be a number from -1000000 to 1000000, not 1e+308"),
    "alpha-nan": (edit_config(lora_alpha=math.nan), "lora_alpha must be a number from -1000000 to 1000000, not nan"),
    "alpha-of-pattern": (edit_config(alpha_pattern={"q_proj": 1e308}), "alpha_pattern must be an object of names of "),
    "rslora-text": (edit_config(use_rslora="yes"), "use_rslora must be true or false"),
    "bias": (edit_config(bias="all"), "bias must be none"),
    "dora": (edit_config(use_dora=True), "use_dora = True is not supported"),
    "lora-bias": (edit_config(lora_bias=True), "lora_bias = True is not supported"),
    "fan-in-fan-out": (edit_config(fan_in_fan_out=True), "fan_in_fan_out = True is not supported"),
    "modules-to-save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save = ['lm_head'] is not supported"),
    "experts": (edit_config(target_parameters=["mlp.experts.down_proj"]), "target_parameters = "),
    "unknown-field": (edit_config(use_newer_thing={"a": 1}), "use_newer_thing = {'a': 1} is not supported"),
    "pissa": (edit_config(init_lora_weights="pissa"), "init_lora_weights must be a start that leaves"),
    "number-as-start": (edit_config(init_lora_weights=1), "init_lora_weights must be a start that leaves"),
    "pattern-list": (edit_config(rank_pattern=["q_proj"]), "rank_pattern must be an object of names of modules"),
    "pattern-zero": (edit_config(rank_pattern={"q_proj": 0}), "rank_pattern must be an object of names of modules"),
    "pattern-regex": (
        edit_config(alpha_pattern={"(a+)+": 3}),
        "alpha_pattern has the key '(a+)+', a regular expression",
    ),
    "rank-of-config": (edit_config(r=8), "k_proj.lora_A.weight has the shape [4, 48], but the model and a rank of 8"),
    "rank-of-pattern": (edit_config(rank_pattern={"q_proj": 3}), "imply [3, 48]"),
    "b-shape": (
        edit_tensors(lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(47, 4)})),
        f"{Q}.lora_B.weight has the shape [47, 4]",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 48, dtype=torch.int8)})),
        f"{Q}.lora_A.weight is in torch.int8",
    ),
    "nan": (
        edit_tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)),
        f"{Q}.lora_A.weight holds numbers that are not finite",
    ),
    "beyond-bf16": (
        edit_tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(3.4e38)),
        f"{Q}.lora_B.weight holds numbers that are not finite, or beyond 65504",
    ),
    "one-side": (edit_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), f"lacks the tensor {Q}.lora_B.weight"),
    "no-tensors": (edit_tensors(lambda t: t.clear()), "has no tensors"),
    "two-names-of-one-module": (
        edit_tensors(
            lambda t: t.update(
                {
                    f"{Q.replace('layers', 'language_model.layers')}.lora_{s}.weight": t[f"{Q}.lora_{s}.weight"].clone()
                    for s in "AB"
                }
            )
        ),
        f"{Q}.lora_A.weight, which are two names of one module",
    ),
    "unknown-module": (
        edit_tensors(
            lambda t: t.update(
                {f"{Q.replace('0', '7')}.lora_{s}.weight": t[f"{Q}.lora_{s}.weight"].clone() for s in "AB"}
            )
        ),
        "has no module model.layers.7.self_attn.q_proj; adapters may change down_proj, gate_proj, k_proj, o_proj, ",
    ),
    "head": (
        edit_tensors(
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48),
                    "base_model.model.lm_head.lora_B.weight": torch.zeros(97, 4),
                }
            )
        ),
        "base_model.model.lm_head.lora_A.weight, but adapters of embeddings and output heads are not supported",
    ),
    "saved-module": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(97, 48)})),
        "the tensor base_model.model.lm_head.weight, which is not supported",
    ),
    "magnitudes": (
        edit_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(48)})),
        f"the tensor {Q}.lora_magnitude_vector, which is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_is_refused_by_name(case: str, llama: Path, tmp_path: Path) -> None:
    spoil, message = REFUSED[case]
    adapter = save_adapter(tmp_path / "adapter", shapes_of(llama, *ATTENTION))
    spoil(adapter)
    with pytest.raises(AdapterError, match=re.escape(message)):
        read(adapter, llama)


def test_adapter_of_experts_and_mixers_is_refused(tmp_path: Path) -> None:
    for variant, ending, kind in (
        ("qwen3-moe", "experts.0.down_proj", "experts and routers"),
        ("qwen3.5", "linear_attn.out_proj", "latent attention, recurrent mixers"),
        ("deepseek-v3", "self_attn.o_proj", "latent attention, recurrent mixers"),
    ):
        model = tmp_path / variant
        tiny_models.save(variant, model)
        shapes = dict(list(shapes_of(model, ending).items())[:1])
        with pytest.raises(AdapterError, match=f"but adapters of {kind}"):
            read(save_adapter(tmp_path / f"{variant}-adapter", shapes), model)


@pytest.mark.parametrize("path", ["a" * 300, "/" + "a" * 5000, "~no-such-user/adapter"])
def test_adapter_at_an_odd_path_is_not_found(path: str) -> None:
    with pytest.raises(ModelNotFoundError, match="is no folder of an adapter") as caught:
        adapter_folder(path)
    assert len(str(caught.value)) < 500


def test_digest_follows_the_content(llama: Path, tmp_path: Path) -> None:
    shapes = shapes_of(llama, *EVERYTHING)
    first, again, other, scaled = (
        read_adapter(save_adapter(tmp_path / name, shapes, seed=seed, lora_alpha=alpha)).digest
        for name, seed, alpha in (("a", 1, 8), ("b", 1, 8), ("c", 2, 8), ("d", 1, 9))
    )
    assert first == again and len({first, other, scaled}) == 3


FAMILIES: dict[str, tuple[str, ...]] = {
    "llama-biases-gelu": EVERYTHING,
    "qwen2-tied-upper-windows": ("q_proj", "v_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm": (*ATTENTION, "gate_up_proj", "down_proj"),
    "gpt-neox": ("query_key_value", "dense", "dense_h_to_4h"),
    "qwen3.5": EVERYTHING,
    "phi2": ("q_proj", "dense", "fc1", "fc2"),
}
"""Models, and the modules of their adapters: parts of stacked weights, stacked ones, reordered ones, gates."""


BF16_TOLERANCE = 6e-2  # of the largest logit: activations and adapters are rounded to bf16 (2**-9) dozens of times


def load(model: Path, backend: Backend, dtype: torch.dtype) -> Decoder:
    source = ModelFolder(model)
    return load_decoder(source.weights(), load_spec(source), dtype=dtype, device=CPU, backend=backend)


def packed(decoder: Decoder, adapter: Path, model: Path) -> Any:
    return decoder.backend.pack_adapter(read(adapter, model), decoder.weights, decoder.dtype)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(rng.randint(1, 24))] for _ in range(count)]


def run(decoder: Decoder, requests: list[Request], seed: int = 0) -> list[Tensor]:
    """The logits of each request, of random chunks in random company."""
    Runner(decoder, block_size=32, seed=seed).run_split(requests, random.Random(seed))
    return [torch.stack(request.logits) for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_the_merged_model(family: str, tmp_path: Path) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    shapes = shapes_of(tmp_path / "model", *FAMILIES[family])
    name = next(iter(shapes)).rpartition(".")[2]
    options: list[dict[str, Any]] = [
        {"r": 3, "lora_alpha": 5, "rank_pattern": {name: 7}, "alpha_pattern": {f"layers.1.self_attn.{name}": 2.5}},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
    ]
    folders = [save_adapter(tmp_path / str(n), shapes, seed=n, **each) for n, each in enumerate(options)]
    oracles = [model, *(merged(model, folder) for folder in folders)]
    decoder = load(tmp_path / "model", ReferenceBackend(), torch.float32)
    adapters = [None, *(packed(decoder, folder, tmp_path / "model") for folder in folders)]
    requests = [Request(ids, adapter=adapters[n % 3]) for n, ids in enumerate(prompts(6))]
    for n, (request, ours) in enumerate(zip(requests, run(decoder, requests), strict=True)):
        wanted = oracles[n % 3](input_ids=torch.tensor([request.token_ids])).logits[0]
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert n % 3 == 0 or not torch.allclose(wanted, model(input_ids=torch.tensor([request.token_ids])).logits[0])


@pytest.mark.parametrize(
    ("variant", "quantization", "family"),
    [
        *variants(None, "qwen3.5", id="bf16-qwen3.5"),
        *variants(None, "llama-biases-gelu", id="bf16-llama"),
        *variants("int8", "phi2", id="int8-phi2")[-1:],
    ],
)
@torch.no_grad()
def test_bits_of_adapters_alone_and_in_company(
    variant: str, quantization: str | None, family: str, tmp_path: Path
) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    shapes = shapes_of(tmp_path / "model", *FAMILIES[family])
    folders = [save_adapter(tmp_path / str(n), shapes, seed=n, r=(1, 4, 9, 16)[n % 4], size=0.2) for n in range(8)]
    backend = CpuBackend(variant=variant, num_threads=2, quantization=quantization)
    decoder = load(tmp_path / "model", backend, torch.bfloat16)
    assert decoder.is_fused
    adapters = [None, *(packed(decoder, folder, tmp_path / "model") for folder in folders)]
    ids = prompts(11)
    together = run(decoder, [Request(list(each), adapter=adapters[n % 9]) for n, each in enumerate(ids)])
    for n, each in enumerate(ids):
        (alone,) = run(decoder, [Request(list(each), adapter=adapters[n % 9])], seed=1)
        assert torch.equal(alone, together[n])
    batch = BatchBuilder(32, CPU).build([Chunk(0, [1, 2], (0,), 1, StateSlots(-1, 0))], adapters[1:2])
    assert batch.adapters is not None
    batch.adapters.of_row[1] = 1  # rule 9 of csrc/cpu.cpp
    with pytest.raises(IndexError, match="a row with an adapter that is not there"):
        decoder.forward(batch, Runner(decoder, block_size=32).cache)
    decoder._fused = None  # the operations one by one
    layers = run(decoder, [Request(list(each), adapter=adapters[n % 9]) for n, each in enumerate(ids)], seed=2)
    assert all(map(torch.equal, layers, together))
    check_last_rows(decoder, ids[:9], adapters)
    check_last_rows(load(tmp_path / "model", backend, torch.bfloat16), ids[:9], adapters)
    if family == "llama-biases-gelu":  # roundings do not grow in it as in the other, whose states carry them on
        for n, each in enumerate(ids[:3]):
            oracle = model if n == 0 else merged(model, folders[n - 1])
            wanted = oracle(input_ids=torch.tensor([each])).logits[0]
            assert (together[n] - wanted).abs().max() <= BF16_TOLERANCE * wanted.abs().max()


def check_last_rows(decoder: Decoder, ids: list[list[int]], adapters: list[Any]) -> None:
    """Assert that a step in which some rows need logits, in any order of adapters, gives what one of all rows does."""
    found = []
    for most in (100, 2):
        runner = Runner(decoder, block_size=32)
        some = [min(len(each), most) for each in ids]
        chunks = [Chunk(0, each, (n,), some[n], StateSlots(-1, n)) for n, each in enumerate(ids)]
        found.append(decoder.forward(runner.batches.build(chunks, adapters), runner.cache).split(some))
    assert all(torch.equal(whole[-len(last) :], last) for whole, last in zip(*found, strict=True))


@pytest.mark.extras
@torch.no_grad()
def test_logits_equal_those_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_models.save("llama-gqa", tmp_path / "model")
    options = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}, "use_rslora": True}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(EVERYTHING), init_lora_weights=False, **options)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    decoder = load(tmp_path / "model", ReferenceBackend(), torch.float32)
    adapter = packed(decoder, tmp_path / "adapter", tmp_path / "model")
    (ours,) = run(decoder, [Request(list(range(20)), adapter=adapter)])
    wanted = tuned.merge_and_unload()(input_ids=torch.tensor([list(range(20))])).logits[0]
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()
