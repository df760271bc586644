"""Products of the Triton kernels in the interpreter: by experts, by weights in 8 and 4 bits, and with equal bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import backends
import pytest
import torch
from backends import Requests, pack_experts, runnable
from specs import make_spec
from stored_formats import FORMATS, fp8, weight_in
from torch import Tensor
from triton_faults import changed_copy, sum_in_one_order

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ConfigError
from splitfuse.kernels.interface import StepSizes
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.quantized import Fp8Format, Fp8Quantized, GroupFormat, QuantizedWeight
from splitfuse.kernels.reference import GATED_ACTIVATIONS, ReferenceBackend
from splitfuse.kernels.triton import quantized
from splitfuse.kernels.triton.quantized import Format, Quantized, choose_format
from splitfuse.kernels.weights import LayerWeights, WeightRole
from splitfuse.runtime.memory_planner import plan_memory

pytestmark = [*runnable("triton-float32"), pytest.mark.usefixtures("seeded")]

TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3}


def make_backend(**options: object) -> Any:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu", **options)


def assert_near(ours: Tensor, wanted: Tensor) -> None:
    tolerance, largest = TOLERANCE[ours.dtype], float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(each, marks=pytest.mark.slow) for each in range(2, 6))])
def test_experts(seed: int, dtype: torch.dtype) -> None:
    rng = Random(f"{seed} {dtype}")
    tokens, experts, hidden, inner = rng.choice((1, 5, 40)), rng.choice((1, 3, 8)), rng.choice((5, 64, 70)), 33
    top_k, kind = rng.randint(1, experts), rng.choice(list(GATED_ACTIVATIONS))
    x = torch.randn(tokens, hidden, dtype=dtype)
    w13 = torch.randn(experts, 2 * inner, hidden, dtype=dtype) / hidden**0.5
    w2 = torch.randn(experts, hidden, inner, dtype=dtype) / inner**0.5
    biases = [torch.randn(experts, 2 * inner, dtype=dtype), torch.randn(experts, hidden, dtype=dtype)]
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k)
    found = []
    for each in (make_backend(), ReferenceBackend()):
        layer = pack_experts(each, w13, w2, *(biases if rng.random() < 2 and seed % 2 else ()))
        found.append(backends.experts(each, x, ids, weights, layer, kind))
    assert_near(*found)


def test_experts_of_no_tokens() -> None:
    layer = pack_experts(make_backend(), torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    empty = torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    assert backends.experts(make_backend(), *empty, layer).shape == (0, 4)


OWN_FORMATS = [
    choose_format(WeightRole.O, *each) for each in (("int8", None), ("int8", 128), ("int4", 64), ("int4", 128))
]


@pytest.mark.parametrize("kept", OWN_FORMATS, ids=["int8", "int8 in 128", "int4 in 64", "int4 in 128"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 64, 3), (1, 1, 1), (5, 257, 40), (20, 512, 33)])
def test_weights_of_few_bits(kept: Format, rows: int, inputs: int, outputs: int) -> None:
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    packed, x, backend = Quantized.of(weight, kept), torch.randn(rows, inputs), make_backend()
    nearest = backend.dequantize(packed, torch.float32)
    if kept.bits == 8:
        half_steps = weight.abs().amax(1, keepdim=True) / 253
    else:
        half_steps = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)).clamp_min(4) / 29
    assert ((nearest - weight).abs() <= half_steps).all()
    assert_near(backend.linear(x, packed, bias), torch.nn.functional.linear(x, nearest, bias))
    many = torch.randn(70, inputs)  # multiplied by cuBLAS
    assert_near(backend.linear(many, packed), many @ nearest.T)
    assert kept.num_bytes(weight.shape) == sum(
        each.nbytes for each in (packed.levels, packed.scales, packed.offsets) if each is not None
    )


@pytest.mark.parametrize("kept", OWN_FORMATS, ids=["int8", "int8 in 128", "int4 in 64", "int4 in 128"])
def test_weights_are_rounded_some_rows_at_a_time(kept: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 200)
    whole = Quantized.of(weight, kept)
    monkeypatch.setattr(quantized, "AT_ONCE", 3 * 200)
    parts = Quantized.of(weight, kept)
    names = ("levels", "scales", *["offsets"] * (kept.bits == 4))
    assert all(torch.equal(getattr(parts, name), getattr(whole, name)) for name in names)


QUICK_FORMATS = {"GPTQ", "GPTQ of 8 bits", "int8 by row", "MX", "Q4_1", "Q6_K", "FP8"}
"""Formats that `make test` multiplies by: with zeros, mins, tables, signs, two levels of scales, and floats."""
STORED = [
    pytest.param(name, marks=() if name in QUICK_FORMATS else pytest.mark.slow, id=name) for name in (*FORMATS, "FP8")
]


def stored_weight(name: str, rows: int, columns: int) -> QuantizedWeight:
    """Return a random weight as a checkpoint stores it, of numbers that fp16 holds."""
    if name == "FP8":
        weight = fp8(rows, columns)
        return replace(weight, scales=weight.scales / 2**10)
    found = weight_in(FORMATS[name], rows, columns)
    if found.format.scale_dtype == torch.float8_e8m0fnu:
        scales = torch.randint(120, 130, found.scales.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        return replace(found, scales=scales)
    return found if found.super_scales is None else replace(found, super_scales=found.super_scales / 64)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", STORED)
def test_weights_of_checkpoints(name: str, dtype: torch.dtype) -> None:
    """What is kept means what is stored, takes the bytes that are planned, and is multiplied as it is in few rows."""
    backend = make_backend()
    for rows, columns in ((40, 96), (3, 544)):
        pieces = [stored_weight(name, rows, columns), stored_weight(name, 5, columns)]
        packed = backend.pack_quantized(pieces, role=WeightRole.QKV, dtype=dtype)
        exact = torch.cat([piece.dequantize(torch.float32) for piece in pieces])
        assert torch.equal(backend.dequantize(packed, torch.float32), exact)
        kept = [(piece.format, len(exact) - 5 if number == 0 else 5) for number, piece in enumerate(pieces)]
        assert packed.nbytes == backend.quantized_weight_bytes(kept, columns=columns, role=WeightRole.QKV, dtype=dtype)
        x, bias = torch.randn(7, columns).to(dtype), torch.randn(len(exact)).to(dtype)
        wanted = (x.double() @ exact.to(dtype).double().T + bias.double()).to(dtype)
        assert_near(backend.linear(x, packed, bias), wanted)
        assert_near(backend.linear(x.repeat(10, 1), packed, bias), wanted.repeat(10, 1))  # by cuBLAS
        some = torch.tensor([len(exact) - 1, 0])
        assert torch.equal(backend.embed(some, packed), exact[some].to(dtype))


def test_columns_in_another_order() -> None:
    backend, weight = make_backend(), stored_weight("GPTQ", 20, 256)
    ordered = replace(weight, order=torch.randperm(256))
    packed, x = backend.pack_quantized([ordered], role=WeightRole.O, dtype=torch.float32), torch.randn(5, 256)
    assert torch.equal(backend.dequantize(packed, torch.float32), ordered.dequantize(torch.float32))
    assert_near(backend.linear(x, packed), x @ ordered.dequantize(torch.float32).T)
    both = backend.pack_quantized(
        [weight, ordered], role=WeightRole.QKV, dtype=torch.float32
    )  # which cannot be read at once
    assert torch.equal(both, torch.cat([each.dequantize(torch.float32) for each in (weight, ordered)]))


def test_pieces_in_several_formats_are_dense() -> None:
    backend, pieces = make_backend(), [stored_weight("GPTQ", 4, 128), stored_weight("Q4_1", 3, 128)]
    dense = backend.pack_quantized([*pieces, torch.ones(2, 128)], role=WeightRole.QKV, dtype=torch.float16)
    assert torch.equal(dense[:4], pieces[0].dequantize(torch.float16)) and (dense[7:] == 1).all()
    kept = [(pieces[0].format, 4), (pieces[1].format, 3), (None, 2)]
    assert backend.quantized_weight_bytes(kept, columns=128, role=WeightRole.QKV, dtype=torch.float16) == dense.nbytes


@pytest.mark.parametrize("name", ["Q8_0", "FP8"])
def test_nan_is_not_hidden(name: str) -> None:
    backend, weight = make_backend(), stored_weight(name, 40, 256)
    if isinstance(weight, Fp8Quantized):
        weight.values.view(torch.uint8)[3, 200] = 0x7F
    else:
        weight.scales[3, 1] = torch.nan
    ours = backend.linear(torch.randn(2, 256), backend.pack_quantized([weight], role=WeightRole.O, dtype=torch.float32))
    assert ours[:, 3].isnan().all() and ours.isnan().sum() == 2


def test_formats_of_checkpoints_that_are_kept() -> None:
    backend = make_backend()
    for stored in (*FORMATS.values(), Fp8Format()):
        assert backend.accepts(stored, WeightRole.O) and backend.accepts(stored, WeightRole.W2)
        assert not any(
            backend.accepts(stored, role)
            for role in (WeightRole.GATES, WeightRole.K_B, WeightRole.NORM, WeightRole.PLAIN)
        )
        assert not make_backend(quantization="int8").accepts(stored, WeightRole.O)
    for odd in (
        {"bits": 9, "group_size": 32},
        {"bits": 4, "group_size": 8},
        {"bits": 5, "group_size": 32, "table": (1,)},
    ):
        assert not backend.accepts(GroupFormat(name="odd", **odd), WeightRole.O)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tokens", [pytest.param(1, marks=pytest.mark.slow), 9, pytest.param(70, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("MX", "FP8", "Q4_K")), "GPTQ"]
)
def test_experts_of_few_bits(name: str, tokens: int) -> None:
    """All experts in one launch are each of them alone; some have their columns in orders of their own."""
    backend, count = make_backend(), 3

    def make(rows: int, columns: int, role: WeightRole) -> list[Any]:
        packed = []
        for expert in range(count):
            order = {"order": torch.randperm(columns)} if name == "GPTQ" and expert == 1 else {}
            pieces = [replace(stored_weight(name, rows, columns), **order) for _ in range(2 if role.gated else 1)]
            packed.append(backend.pack_quantized(pieces, role=role, dtype=torch.float32))
        return packed

    layer = LayerWeights(w13=make(40, 64, WeightRole.W13), w2=make(64, 40, WeightRole.W2))
    x, weights = torch.randn(tokens, 64), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)])
    dense = {
        field: [backend.dequantize(each, torch.float64) for each in getattr(layer, field)] for field in ("w13", "w2")
    }
    wanted = backends.experts(ReferenceBackend(), x.double(), ids, weights, LayerWeights(**dense))
    assert_near(backends.experts(backend, x, ids, weights, layer), wanted.float())


DEQUANTIZE_FAULTS = {
    "group": ("group = at // GROUP", "group = (at + 1) // GROUP"),
    "half": ("at = half * stored + inner\n        group", "at = half * (stored - 1) + inner\n        group"),
    "zero": ("y -= tl.load(zeros", "y += tl.load(zeros"),
    "byte": ("stored + inner[None, :], mask=inside", "stored + inner[None, :] - 1, mask=inside"),
    "row of a group": ("row[:, None] * num_groups", "places[:, None] * num_groups"),
    "looked up row": ("row = tl.load(rows + places", "row = tl.load(rows + places - 1"),
    "order": ("at = tl.load(order + at, mask=is_column", "at = tl.load(order + at - 1, mask=is_column"),
}


def check_dequantized() -> None:
    """Compare weights in 4 bits with zeros, one with its columns in another order, and rows of them with exact ones."""
    backend, some = make_backend(), torch.tensor([9, 69, 0, 40, 40], dtype=torch.int32)[1:]
    for weight in (stored_weight("GPTQ", 70, 544), replace(stored_weight("GPTQ", 70, 256), order=torch.randperm(256))):
        packed = backend.pack_quantized([weight], role=WeightRole.O, dtype=torch.float16)
        exact = weight.dequantize(torch.float32)
        assert torch.equal(backend.dequantize(packed, torch.float32), exact)
        assert torch.equal(backend.dequantize(packed, torch.float16, some), exact[some].half())


def test_weights_are_dequantized() -> None:
    check_dequantized()


@pytest.mark.parametrize("name", DEQUANTIZE_FAULTS)
def test_a_fault_in_dequantizing_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from splitfuse.kernels.triton import backend, products

    copy = changed_copy(products, *DEQUANTIZE_FAULTS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(backend, "dequantize_kernel", copy.dequantize_kernel)
    with pytest.raises((AssertionError, IndexError)):
        check_dequantized()


@pytest.mark.parametrize("invariant", [False, True])
def test_the_largest_copy_is_in_the_memory_plan(invariant: bool) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": 5000, "hidden_size": 128, "intermediate_size": 300, "max_position": 1000}
    spec = make_spec(dtype="bfloat16", num_layers=1, **sizes, **heads)
    config = EngineConfig.from_settings({"max_num_batched_tokens": 64, "num_blocks": 1, "device": "cpu"})
    without, found = (
        plan_memory(spec, config, backend=make_backend(quantization=each, invariant=invariant), available=2**30)
        for each in (None, "int8")
    )
    copied = 0 if invariant else 600 * 128 * 2
    assert found.activations - without.activations == copied


def test_partial_results_of_attention_are_in_the_memory_plan() -> None:
    """As many as there are in the worst step of these sizes: one long request has the tokens, others the rest."""
    spec, dtype = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128), torch.float16
    step = StepSizes(num_tokens=2048, num_requests=3, num_positions=40000, longest=32768, is_padded=False)
    tile = 8 * 32 * 130 * 4  # of INTERPRETED, for all heads
    backend, other = make_backend(invariant=True), make_backend()
    assert backend.attention_bytes(spec, step, dtype) == (256 * 4 + 3 + 4) * tile
    assert backend.attention_bytes(spec, replace(step, longest=8192), dtype) == 0
    assert other.attention_bytes(spec, step, dtype) == tile  # one program of a GPU of one multiprocessor
    assert other.attention_bytes(spec, replace(step, is_padded=True), dtype) == (2 * 259 + 1) * tile


def test_formats_by_role() -> None:
    assert choose_format(WeightRole.QKV, None, None) is choose_format(WeightRole.ROUTER, "int8", None) is None
    assert choose_format(WeightRole.V_B, "int4", None) is choose_format(WeightRole.NORM, "int4", None) is None
    assert choose_format(WeightRole.DOWN, "int4", None) == Format(4, 64, is_signed=False, offset_dtype=torch.float32)
    assert choose_format(WeightRole.HEAD, "int8", 128) == Format(8, 128)
    with pytest.raises(ConfigError, match="quantization_group_size=64 cannot be used with int8: use 128"):
        make_backend(quantization="int8", group_size=64)


def test_a_quantized_head_is_looked_up() -> None:
    backend = make_backend(quantization="int8")
    table = torch.randn(7, 30, dtype=torch.float16)
    rows = backend.embed(torch.tensor([6, 0], dtype=torch.int32), backend.pack([table], role=WeightRole.HEAD))
    assert rows.dtype == torch.float16 and (rows - table[[6, 0]]).abs().max() < 0.02


# --- equal bits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_in_one_order(monkeypatch)


@pytest.mark.usefixtures("ordered_sums")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_row_alone_has_the_bits_that_it_has_in_company(dtype: torch.dtype, quantization: str | None) -> None:
    backend = make_backend(invariant=True, quantization=quantization)
    x = torch.randn(70, 100, dtype=dtype)
    weight = backend.pack([torch.randn(33, 100, dtype=dtype)], role=WeightRole.O)
    heads = backend.pack([torch.randn(5, 7, 20, dtype=dtype)], role=WeightRole.K_B)
    together, by_head = backend.linear(x, weight), backend.linear_heads(x.view(70, 5, 20), heads)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 40)):
        assert torch.equal(backend.linear(x[rows], weight), together[rows])
        assert torch.equal(backend.linear_heads(x[rows].view(-1, 5, 20), heads), by_head[rows])
    if quantization is None:
        assert_near(together, torch.nn.functional.linear(x, weight))
        assert_near(by_head, ReferenceBackend().linear_heads(x.view(70, 5, 20), heads))


@pytest.mark.usefixtures("ordered_sums")
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 50])
def test_attention_to_a_prompt_has_the_same_bits_however_it_is_cut(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitfuse.kernels.triton import backend as module

    monkeypatch.setattr(module, "FIXED_SPLIT", 64)
    backend = make_backend(invariant=True)
    backend.processors = 1000  # type: ignore[attr-defined] # it must not matter
    case = backends.BackendCase(backend, torch.float32, torch.float32, 1e-5, 1e-5)
    requests = Requests.random([150, 20], block_size=16, num_kv_heads=2, head_dim=32)
    store, q = requests.store(case, pieces=64), torch.randn(150, 4, 32)

    def attend(*parts: tuple[int, int, int]) -> Tensor:
        """Attention of the queries from `begin` to `end` of each request: (request, begin, end)."""
        counts = [end - begin for _, begin, end in parts]
        return backends.attend(
            backend,
            torch.cat([q[begin:end] for _, begin, end in parts]),
            store,
            query_start=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([end for *_, end in parts], dtype=torch.int32),
            block_tables=requests.block_tables[[request for request, *_ in parts]],
            scale=0.3,
            window=window,
        )

    whole = attend((0, 0, 150))
    assert torch.equal(attend((0, 149, 150)), whole[149:])
    assert torch.equal(attend((1, 3, 20), (0, 40, 113))[17:], whole[40:113])
    exact, magnitude = backends.attention(q.double(), requests.keys[0], requests.values[0], scale=0.3, window=window)
    case.near(whole, exact, magnitude, share=case.attention)
