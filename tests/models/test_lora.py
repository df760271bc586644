"""LoRA adapters: what is read and what is refused, and logits against the adapter merged into transformers' weights."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import ATTENTION, EVERYTHING, module_shapes, save_adapter

from splitfuse.errors import AdapterError
from splitfuse.kernels.lora import Adapter
from splitfuse.models.families.registry import load_spec
from splitfuse.models.lora import read_adapter, resolve_adapter
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import stored_parameters


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
    "alpha-text": (edit_config(lora_alpha="8"), "lora_alpha must be a number, not '8'"),
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
    "one-side": (edit_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), f"lacks the tensor {Q}.lora_B.weight"),
    "no-tensors": (edit_tensors(lambda t: t.clear()), "has no tensors"),
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


def test_digest_follows_the_content(llama: Path, tmp_path: Path) -> None:
    shapes = shapes_of(llama, *EVERYTHING)
    first, again, other, scaled = (
        read_adapter(save_adapter(tmp_path / name, shapes, seed=seed, lora_alpha=alpha)).digest
        for name, seed, alpha in (("a", 1, 8), ("b", 1, 8), ("c", 2, 8), ("d", 1, 9))
    )
    assert first == again and len({first, other, scaled}) == 3
