"""Loading: what is wrong with a checkpoint is said before anything is loaded; what is right is loaded exactly."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from backends import variants
from ragged_requests import Request, Runner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitfuse.errors import UnsupportedModelError, WeightsError
from splitfuse.kernels.cpu import structs
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.quantized import Fp8Quantized, GroupFormat, GroupQuantized, QuantizedFormat, QuantizedWeight
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import Weight, WeightRole
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec, spec_from_config
from splitfuse.models.families.wrappers import kind_aside
from splitfuse.models.sources.dummy import DummyWeights
from splitfuse.models.sources.files import INDEX_FILE, SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.source import Piece, WeightSource
from splitfuse.models.weights import check_weights, left_aside, load_decoder, resolve_dtype, weight_bytes

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests change a copy."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_models.save("llama-gqa", tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Four layers, of which the last has experts."""
    tiny_models.save("qwen3-moe-some-dense", tmp_path / "experts")
    return tmp_path / "experts"


def load(folder: Path, weights: WeightSource | None = None, **options: Any) -> Decoder:
    source = ModelFolder(folder)
    weights = source.weights() if weights is None else weights
    options = {"dtype": torch.float32, "device": CPU, "backend": ReferenceBackend(), **options}
    return load_decoder(weights, check_weights(weights, load_spec(source)), **options)


class Packing(ReferenceBackend):
    """Keeps of a weight only what it was told: its role, and the shapes of its pieces."""

    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Weight:
        assert dtype == torch.float32
        if not role.linear:
            return super().pack(pieces, role=role, dtype=dtype)
        return role.value, [tuple(piece.shape) for piece in pieces]


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the single file."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / SINGLE_FILE), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE_FILE)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        load(folder)
    return str(error.value)


# --- what loads -------------------------------------------------------------------------------------------------------


def test_pieces_are_fused_in_order(folder: Path) -> None:
    tensors, layer = load_file(folder / SINGLE_FILE), load(folder).weights.layers[1]
    prefix = "model.layers.1."
    fused = [tensors[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(fused))
    assert torch.equal(
        layer.mlp.gate_up, torch.cat([tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    )
    assert torch.equal(layer.mlp.down, tensors[f"{prefix}mlp.down_proj.weight"])


def test_weights_are_packed_for_their_role(folder: Path) -> None:
    weights = load(folder, backend=Packing()).weights
    layer = weights.layers[0]
    assert (layer.qkv, layer.o) == (("qkv", [(48, 48), (16, 48), (16, 48)]), ("o", [(48, 48)]))
    assert (layer.mlp.gate_up, layer.mlp.down) == (("gate_up", [(72, 48), (72, 48)]), ("down", [(48, 72)]))
    assert weights.head == ("head", [(tiny_models.VOCAB_SIZE, 48)])
    assert all(isinstance(w, Tensor) for w in (weights.embed, weights.norm, layer.attn_norm, layer.mlp_norm))


def test_each_expert_is_packed_by_itself(experts: Path) -> None:
    """Nothing larger than one expert is ever gathered."""
    layers = load(experts, backend=Packing()).weights.layers
    for layer in (layers[0], layers[1], layers[2]):
        assert (layer.router, layer.w13, layer.w2) == (None, (), ())
        assert layer.mlp.down == ("down", [(48, 72)])
    assert layers[3].mlp is None
    assert layers[3].router == ("router", [(10, 48)])
    assert layers[3].w13 == [("w13", [(20, 48), (20, 48)])] * 10
    assert layers[3].w2 == [("w2", [(48, 20)])] * 10


def test_experts_are_those_of_the_checkpoint(experts: Path) -> None:
    tensors, layer = load_file(experts / SINGLE_FILE), load(experts).weights.layers[3]
    prefix = "model.layers.3.mlp"
    assert torch.equal(layer.router, tensors[f"{prefix}.gate.weight"])
    for expert, (w13, w2) in enumerate(zip(layer.w13, layer.w2, strict=True)):
        gate, up, down = (tensors[f"{prefix}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert torch.equal(w13, torch.cat((gate, up)))
        assert torch.equal(w2, down)


def test_missing_and_surplus_experts(experts: Path) -> None:
    last, beyond = (f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in (9, 10))
    rewrite(experts, {last: None})
    assert refused(experts) == f"weights missing from the checkpoint (1): {last}"
    rewrite(experts, {last: torch.zeros(20, 48), beyond: torch.zeros(20, 48)})
    assert refused(experts).endswith(f"does not use (1): {beyond}")


def test_a_tied_embedding_is_packed_as_the_head_and_kept_once(tmp_path: Path) -> None:
    tiny_models.save("llama-tied-wide-heads", tmp_path)
    weights = load(tmp_path, backend=Packing()).weights
    assert weights.embed is weights.head
    assert weights.head == ("head", [(tiny_models.VOCAB_SIZE, 48)])


def test_weights_do_not_alias_the_file(folder: Path) -> None:
    decoder = load(folder)
    before = decoder.weights.layers[0].mlp.down.clone()
    size = (folder / SINGLE_FILE).stat().st_size
    (folder / SINGLE_FILE).write_bytes(b"\0" * size)
    assert torch.equal(decoder.weights.layers[0].mlp.down, before)


def test_stored_precision_is_cast(folder: Path) -> None:
    exact = load(folder, dtype=torch.bfloat16).weights.embed
    rewrite(folder, {name: tensor.double() for name, tensor in load_file(folder / SINGLE_FILE).items()})
    assert torch.equal(load(folder, dtype=torch.bfloat16).weights.embed, exact)


def test_harmless_extras_are_skipped(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load(folder)


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, computed anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        request = Request(tokens)
        Runner(decoder, block_size=4).step([(request, len(tokens))])
        tokens.append(int(request.logits[-1].argmax()))
    return tokens[len(prompt) :]


def as_transformers(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("stored", ["both, equal", "both, different", "head only", "both, misshapen"])
def test_tied_pair_is_loaded_as_by_transformers(tmp_path: Path, stored: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.save("llama-tied-wide-heads", tmp_path)
    embed = load_file(tmp_path / SINGLE_FILE)["model.embed_tokens.weight"]
    changes: dict[str, dict[str, Tensor | None]] = {
        "both, equal": {"lm_head.weight": embed.clone()},
        "both, different": {"lm_head.weight": embed.flip(0).contiguous()},
        "head only": {"lm_head.weight": embed, "model.embed_tokens.weight": None},
        "both, misshapen": {"lm_head.weight": embed[1:].clone()},
    }
    rewrite(tmp_path, changes[stored])
    if stored == "both, misshapen":
        assert "weight lm_head.weight has shape [96, 48]" in refused(tmp_path)
        return
    decoder = load(tmp_path)
    assert greedy(decoder, [1, 2, 3], 6) == as_transformers(tmp_path, [1, 2, 3], 6)
    assert (decoder.weights.head is decoder.weights.embed) is (stored != "both, different")
    assert ("a different lm_head.weight, which is used" in caplog.text) is (stored == "both, different")


def test_progress_goes_to_stderr_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capsys.readouterr() == ("", "")
    load(folder, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Loading weights: 100%" in shown.err


IN_FP32 = re.compile(
    r"norm|\.ln_|conv\.conv|conv1d|A_log|dt_bias|\.D$|correction_bias|layer_scalar|router\.scale|expert_scale"
)
BUFFERS = re.compile(r"correction_bias|layer_scalar")


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_weight_bytes_counts_every_weight_once(variant: str, tmp_path: Path) -> None:
    model = tiny_models.save(variant, tmp_path)
    stored = [*model.named_parameters(), *(each for each in model.named_buffers() if BUFFERS.search(each[0]))]
    text = {name: weight.numel() for name, weight in stored if kind_aside(name, wrapper=True) is None}
    for name in text:  # Gemma 4's layers without values: the keys' rows are packed twice
        if "self_attn.k_proj" in name and name.replace("k_proj", "v_proj") not in text:
            text[name] *= 2
    count = sum(text.values())
    norms = sum(size for name, size in text.items() if IN_FP32.search(name))
    spec = load_spec(ModelFolder(tmp_path))
    assert weight_bytes(spec, torch.float32, ReferenceBackend()) == 4 * count
    assert weight_bytes(spec, torch.bfloat16, ReferenceBackend()) == 2 * (count + norms)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize(
    "family", ["llama-biases-gelu", "llama-tied-wide-heads", "qwen3-biases-layer-types", "qwen3-moe-some-dense"]
)
@pytest.mark.parametrize("variant", variants())
def test_weight_bytes_is_what_the_cpp_kernels_keep(
    variant: str, family: str, quantization: str | None, tmp_path: Path
) -> None:
    tiny_models.save(family, tmp_path)
    backend = CpuBackend(variant=variant, num_threads=1, quantization=quantization)
    weights = load(tmp_path, dtype=torch.bfloat16, backend=backend).weights
    each = [vars(layer).values() for layer in weights.layers] + [vars(weights).values()]
    each += [[*layer.w13, *layer.w2] for layer in weights.layers]
    each += [vars(layer.mlp).values() for layer in weights.layers if layer.mlp is not None]
    kept = {id(weight): weight for weight in chain(*each) if isinstance(weight, Tensor | structs.Weight)}
    total = sum((weight if isinstance(weight, Tensor) else weight.memory).nbytes for weight in kept.values())
    assert weight_bytes(load_spec(ModelFolder(tmp_path)), torch.bfloat16, backend) == total


@pytest.mark.parametrize(
    "variant", ["llama-biases-gelu", "qwen3-biases-layer-types", "qwen2-tied-upper-windows", "mixtral-window"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dummy_weights_need_only_a_config(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.save(variant, tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    logits = []
    for _ in range(2):
        request = Request([1, 2, 3, 4, 5])
        Runner(load(tmp_path, DummyWeights(dtype, CPU), dtype=dtype), block_size=4).step([(request, 5)])
        logits.append(torch.stack(request.logits))
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()
    assert logits[0].std() > 0


def test_resolve_dtype(saved: Path) -> None:
    spec = load_spec(ModelFolder(saved))
    assert resolve_dtype("auto", spec) == torch.float32
    assert resolve_dtype("bfloat16", spec) == torch.bfloat16
    edited = {**json.loads((saved / "config.json").read_text()), "dtype": "float8_e4m3fn"}
    with pytest.raises(UnsupportedModelError, match="float8_e4m3fn: set dtype to one of bfloat16, float16, float32"):
        resolve_dtype("auto", spec_from_config(edited))
    assert resolve_dtype("float16", spec_from_config(edited)) == torch.float16


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["deepseek-v3", "glm4-moe-lite", "glm-moe-norms", "minimax-m2"])
def test_layers_for_further_tokens_are_as_many_as_said(variant: str, tmp_path: Path) -> None:
    """A config that says fewer layers than there are is not answered with a part of the network."""
    tiny_models.save(variant, tmp_path)
    path, weights = tmp_path / "config.json", ModelFolder(tmp_path).weights()
    count = json.loads(path.read_text())["num_hidden_layers"]
    kinds = json.loads(path.read_text()).get("mlp_layer_types") or []
    field = "num_mtp_modules" if variant == "minimax-m2" else "num_nextn_predict_layers"
    last = {name for name in weights.names() if f"layers.{count - 1}." in name}
    edit_json(path, num_hidden_layers=count - 1, **{field: 1}, **({"mlp_layer_types": kinds[:-1]} if kinds else {}))
    spec = load_spec(ModelFolder(tmp_path))
    check_weights(weights, spec)
    assert set(left_aside(weights, spec)["multi-token prediction"]) == last != set()
    edit_json(path, **{field: 0})
    with pytest.raises(WeightsError, match=rf"does not use \({len(last)}\)"):
        check_weights(weights, load_spec(ModelFolder(tmp_path)))


def test_missing_weight(folder: Path) -> None:
    rewrite(folder, {Q_PROJ: None})
    assert refused(folder) == f"weights missing from the checkpoint (1): {Q_PROJ}"


def test_many_missing_weights_are_not_all_listed(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=9)
    count = 6 * 9  # six layers too many, nine tensors each
    message = refused(folder)
    assert f"missing from the checkpoint ({count}): " in message
    assert f"and {count - 5} more" in message


def test_surplus_weight(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    assert refused(folder) == (
        "weights that LlamaForCausalLM with this config.json does not use (1): model.layers.0.self_attn.q_proj.bias"
    )


@pytest.mark.parametrize("shape", [(48, 47), (47, 48), (48,), (1, 48, 48), (0, 48)])
def test_wrong_shape(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, {Q_PROJ: torch.zeros(shape)})
    assert refused(folder) == f"weight {Q_PROJ} has shape {list(shape)}, but config.json implies [48, 48]"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_not_floating_point(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, {Q_PROJ: torch.zeros(48, 48).to(dtype)})
    assert f"weight {Q_PROJ} is stored as" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -1000])
def test_truncated_file(folder: Path, kept: int) -> None:
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[:kept])
    assert "is not a whole safetensors file" in refused(folder)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"\0" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 2) + b"[]",
        {"a": entry(0, 4), "b": entry(0, 4)},  # overlapping
        {"a": entry(0, 4), "b": entry(8, 12)},  # a hole
        {"a": entry(4, 0)},
        {"a": entry(-4, 0)},
        {"a": entry(0, 2**62)},
        {"a": entry(0, 8, shape=[2**61, 2**61])},
        {"a": entry(0, 4, shape=[2])},
        {"a": entry(0, 4, dtype="PICKLE")},
        {"a": 7},
    ],
    ids=str,
)
def test_hostile_file(folder: Path, content: bytes | dict[str, Any]) -> None:
    if isinstance(content, dict):
        header = json.dumps(content).encode()
        content = struct.pack("<Q", len(header)) + header + b"\0" * 8
    (folder / SINGLE_FILE).write_bytes(content)
    assert "is not a whole safetensors file" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(folder: Path, name: str) -> None:
    (folder / SINGLE_FILE).rename(folder / name)
    message = refused(folder)
    assert name in message
    assert "save_pretrained, writes safetensors" in message


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in refused(folder)


def test_absent_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert refused(sharded) == f"{sharded} lacks shards that its index names: {gone.name}"


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", 7, "..\\a.safetensors", "a.bin"]
)
def test_index_that_points_elsewhere(sharded: Path, file: Any) -> None:
    save_file({"a": torch.zeros(1)}, sharded.parent / "other.safetensors")
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    edit_json(sharded / INDEX_FILE, weight_map={**weight_map, Q_PROJ: file})
    assert "which is not a safetensors file of its own folder" in refused(sharded)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}', "[" * 9999]
)
def test_index_that_is_not_an_index(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    assert "is not a weight index" in refused(sharded)


def test_weight_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    assert "which another file of the checkpoint holds too" in refused(sharded)


# --- quantized checkpoints --------------------------------------------------------------------------------------------

IN_GROUPS = GroupFormat(name="groups of 4", bits=4, group_size=4, mins=True, scale_dtype=torch.float32)


class QuantizedWeights(WeightSource):
    """Gives the matrices of a folder quantized."""

    def __init__(self, folder: Path) -> None:
        self._dense = ModelFolder(folder).weights()

    def __contains__(self, name: str) -> bool:
        return name in self._dense

    def names(self) -> Collection[str]:
        return self._dense.names()

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        self._dense.check(wanted, architecture=architecture, aside=aside)

    def quantization(self, name: str) -> GroupFormat | None:
        return IN_GROUPS if name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")) else None

    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        assert self.quantization(piece.name) is None
        return self._dense.read(piece)

    @contextmanager
    def read_quantized(self, piece: Piece) -> Iterator[GroupQuantized]:
        with self._dense.read(piece) as tensor:
            groups = tensor.view(len(tensor), -1, 4)
            low, high = groups.amin(-1), groups.amax(-1)
            scales = (high - low) / 15
            levels = ((groups - low.unsqueeze(-1)) / scales.unsqueeze(-1)).round().byte()
        yield GroupQuantized(format=IN_GROUPS, levels=levels.view(tensor.shape), scales=scales, mins=-low)


class KeepingQuantized(ReferenceBackend):
    """Keeps quantized matrices of layers as they are stored."""

    def accepts(self, stored: QuantizedFormat, role: WeightRole) -> bool:
        return stored == IN_GROUPS and role is not WeightRole.HEAD and role.linear

    def pack_quantized(
        self, pieces: Sequence[Tensor | QuantizedWeight], *, role: WeightRole, dtype: torch.dtype
    ) -> Weight:
        assert all(isinstance(piece, GroupQuantized) for piece in pieces)
        return self.pack([piece.dequantize(dtype) for piece in pieces if not isinstance(piece, Tensor)], role=role)


def test_quantized_tensors_are_dequantized_or_kept(folder: Path) -> None:
    """The same network, whether a backend keeps the levels and scales or not; near the one that was quantized."""
    weights = QuantizedWeights(folder)
    plain = load(folder).weights
    dequantized, kept = (
        load(folder, weights, backend=each).weights for each in (ReferenceBackend(), KeepingQuantized())
    )
    for layer, ours, other in zip(plain.layers, dequantized.layers, kept.layers, strict=True):
        for name in ("qkv", "o", "attn_norm"):
            assert torch.equal(getattr(ours, name), getattr(other, name))
        assert torch.equal(layer.attn_norm, ours.attn_norm) and not torch.equal(layer.qkv, ours.qkv)
        assert (layer.qkv - ours.qkv).abs().max() < 0.06 * layer.qkv.abs().max()
    assert torch.equal(dequantized.head, kept.head)


def test_rows_in_another_order_are_kept_quantized(tmp_path: Path) -> None:
    """Interleaved rows of heads, and halves of one tensor."""
    for variant in ("cohere2", "phi3", "glm4"):
        tiny_models.save(variant, tmp_path / variant)
        weights = QuantizedWeights(tmp_path / variant)
        loaded = [load(tmp_path / variant, weights, backend=each) for each in (ReferenceBackend(), KeepingQuantized())]
        for one, other in zip(*(decoder.weights.layers for decoder in loaded), strict=True):
            assert torch.equal(one.qkv, other.qkv) and torch.equal(one.mlp.gate_up, other.mlp.gate_up)


def test_super_groups_and_tables_are_dequantized_in_fp32() -> None:
    stored = GroupFormat(name="two levels", bits=2, group_size=2, mins=True, super_groups=2, table=(-3, 0, 5, 7))
    weight = GroupQuantized(
        format=stored,
        levels=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8),
        scales=torch.tensor([[1, 2], [3, -4]], dtype=torch.int8),
        mins=torch.tensor([[1, 0], [2, 5]], dtype=torch.uint8),
        super_scales=torch.tensor([[0.5], [0.25]], dtype=torch.float16),
        super_mins=torch.tensor([[2.0], [1.0]], dtype=torch.float16),
    )
    expected = torch.tensor([[-3.5, -2.0, 5.0, 7.0], [3.25, 1.75, -5.0, -2.0]])
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.rows(torch.tensor([1])).dequantize(torch.bfloat16), expected[1:].bfloat16())


def test_zeros_order_and_a_short_last_group_are_dequantized() -> None:
    stored = GroupFormat(name="zeros", bits=4, group_size=2, zeros=True)
    weight = GroupQuantized(
        format=stored,
        levels=torch.tensor([[0, 5, 15], [1, 2, 3]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0], [0.25, 1.0]], dtype=torch.float16),
        zeros=torch.tensor([[8, 14], [0, 16]], dtype=torch.uint8),
        order=torch.tensor([2, 0, 1]),
    )
    expected = torch.tensor([[-1.5, 2.0, -4.0], [0.5, -13.0, 0.25]])
    assert torch.equal(weight.dequantize(torch.float32), expected) and not stored.signed
    assert torch.equal(weight.rows(slice(1, 2)).dequantize(torch.bfloat16), expected[1:].bfloat16())


def test_fp8_is_dequantized_by_scales_of_128_columns() -> None:
    values = torch.tensor([[1.0, -448.0] + [2.0] * 127, [0.5] * 129]).to(torch.float8_e4m3fn)
    weight = Fp8Quantized(values=values, scales=torch.tensor([[0.5, 4.0], [1.0, 3.0]]))
    expected = torch.tensor([[0.5, -224.0] + [1.0] * 126 + [8.0], [0.5] * 128 + [1.5]])
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.rows(torch.tensor([1, 0])).dequantize(torch.float32), expected.flip(0))
