"""Weights in int8 and int4: the scales and quantized values that they must have, computed here with numpy, and products
that equal those of the quantized values up to fp32's rounding, not just roughly those of the weights.

A weight is scale * qvalue, the scale in bf16 and one for `group` columns. Activations become whole numbers from -127 to
127 with one scale for each row, its largest magnitude / 127. The whole numbers are multiplied and added exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import backends
import numpy as np
import numpy.typing as npt
import pytest
import torch
from backends import emulation_slow, pack_experts, variants
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.quantization import INT4_BIAS, INT4_QVALUES, QVALUES, choose_format
from splitfuse.kernels.cpu.structs import BF16, INT4, INT8
from splitfuse.kernels.weights import WeightRole

Floats = npt.NDArray[np.float32]
MOST_ERROR = 1.5
"""Squared error of an int4 group against that of the best of all scales. Only a few are tried while loading."""
FORMATS = [("int8", None), ("int8", 128), ("int4", 64), ("int4", 128)]
CASES = [case for f in FORMATS for case in variants(*f, id="-".join(str(x) for x in f))]


def kernels_of(variant: str, quantization: str, group: int | None, num_threads: int = 2) -> CpuBackend:
    return CpuBackend(variant=variant, num_threads=num_threads, quantization=quantization, group_size=group)


def bf16(values: Floats) -> Floats:
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().float().numpy()


@dataclass
class Quantized:
    """Quantized values [N, K] of a weight, and their scales [N, K], equal within a group."""

    qvalues: Floats
    scales: Floats
    group: int

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        return self.qvalues.astype(np.float64) * self.scales


def int8(weight: Floats, group: int | None) -> Quantized:
    group = group or weight.shape[1]
    quantized = Quantized(np.zeros_like(weight), np.zeros_like(weight), group)
    for begin in range(0, weight.shape[1], group):
        part = weight[:, begin : begin + group]
        exact = np.abs(part).max(axis=1) / np.float32(127)
        scale = bf16(exact)
        up = np.nextafter(exact, np.float32(np.inf)) * np.float32(1 + 2**-8)  # the next bf16, if rounding went down
        scale = np.where(scale < exact, bf16(up), scale)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        qvalues = np.clip(np.rint(part * inverse[:, None]), -127, 127)
        quantized.qvalues[:, begin : begin + group] = qvalues
        quantized.scales[:, begin : begin + group] = scale[:, None]
    return quantized


def nearest(values: Floats) -> Floats:
    sixteen = np.array(INT4_QVALUES, np.float32)
    return sixteen[np.searchsorted((sixteen[1:] + sixteen[:-1]) / 2, values, side="left")]


def int4_scales(values: Floats) -> Floats:
    """All bf16 numbers that the largest of a group may be scaled by, so that it comes to lie around the last qvalue."""
    largest = values[np.abs(values).argmax()]
    step = -INT4_QVALUES[0]
    least = torch.tensor([float(largest) / (2.4 * step)]).bfloat16().view(torch.int16)
    scales = (least + torch.arange(300, dtype=torch.int16)).view(torch.bfloat16).float().numpy()
    scales = scales[(np.abs(scales) <= abs(largest) / (0.47 * step)) & (np.sign(scales) == np.sign(largest))]
    return np.concatenate((-scales, scales))


def kept(backend: CpuBackend, weight: Tensor) -> npt.NDArray[np.float64]:
    """The weight as it is kept, read column by column with rows of a single 1: right to 2**-22."""
    packed = backend.pack([weight.bfloat16()], role=WeightRole.O)
    return backend.linear(torch.eye(weight.shape[1]).bfloat16(), packed).T.double().numpy()


def int4(weight: Floats, group: int, found: npt.NDArray[np.float64]) -> Quantized:
    """The quantized values and scales of a weight as it is `found`: each must be the nearest one under its scale,
    and no scale may have much less of a squared error.
    """
    quantized = Quantized(np.zeros_like(weight), np.zeros_like(weight), group)
    for row in range(len(weight)):
        for begin in range(0, weight.shape[1], group):
            span = slice(begin, begin + group)
            values = weight[row, span]
            if not values.any():
                assert not found[row, span].any()
                continue
            scales = int4_scales(values)[:, None]
            qvalues = nearest(values * (np.float32(1) / scales))
            weights = qvalues.astype(np.float64) * scales
            errors = np.square(values - weights).sum(axis=1)
            fitting = np.flatnonzero(np.isclose(weights, found[row, span], 2**-21, 0).all(axis=1))
            assert len(fitting), (
                f"row {row}, columns from {begin}: these are the nearest quantized values under no scale"
            )
            best = fitting[errors[fitting].argmin()]
            least = errors.min() + np.square(values).sum() * 1e-5  # what fits exactly allows no share of its error
            if len(values) >= 32:  # a few values can be fitted by chance
                assert errors[best] <= MOST_ERROR * least, f"row {row}, columns from {begin}: not the best scale"
            quantized.qvalues[row, span], quantized.scales[row, span] = qvalues[best], scales[best]
    return quantized


def quantize(backend: CpuBackend, weight: Tensor) -> Quantized:
    """The oracle's quantized values and scales; asserts that the kernels keep those."""
    values, found = weight.float().numpy(), kept(backend, weight)
    if backend.quantization == "int8":
        quantized = int8(values, backend.group_size)
        np.testing.assert_allclose(found, quantized.weights, rtol=2**-21, atol=0)
        return quantized
    assert backend.group_size is not None
    return int4(values, backend.group_size, found)


def product(x: Tensor, quantized: Quantized) -> tuple[Tensor, Tensor]:
    """x [T, K] in bf16 by the quantized values, in fp64, and what its fp32 additions may be off by."""
    values = x.float().numpy()
    most = np.abs(values).max(axis=1)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    qvalues = np.rint(values * inverse[:, None]).astype(np.float64)
    scales = (most * (np.float32(1) / np.float32(127))).astype(np.float64)[:, None]
    exact = qvalues @ quantized.weights.T * scales
    magnitude = np.abs(qvalues) @ np.abs(quantized.weights).T * scales
    spans = -(-values.shape[1] // min(quantized.group, 1024))  # each is added in fp32, 1024 columns at most
    return torch.from_numpy(exact), torch.from_numpy(magnitude) * (spans + 3) * 2**-24


def weights_of_all_kinds(rows: int, columns: int) -> Tensor:
    """Normal rows, and some that are zero, tiny, huge, one-sided, or have a single outlier."""
    weight = torch.randn(rows, columns) * torch.rand(rows, 1)
    for row, change in enumerate(
        (
            lambda w: w * 0,
            lambda w: w * 1e-15,
            lambda w: w * 1e15,
            lambda w: w.abs(),
            lambda w: -w.abs(),
            lambda w: torch.where(torch.arange(columns) == columns // 2, 50.0, w * 0.01),
            lambda w: w.sign(),
        )[: max(0, rows - 1)]
    ):
        weight[row] = change(weight[row])
    return weight.bfloat16()


SHAPES = [(1, 1), (3, 7), (40, 63), (17, 64), (33, 65), (9, 129), (8, 256), (12, 1000), (31, 1029), (10, 2176)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("variant", "quantization", "group"), emulation_slow(CASES))
def test_scales_and_quantized_values(
    variant: str, quantization: str, group: int | None, rows: int, columns: int
) -> None:
    quantize(kernels_of(variant, quantization, group), weights_of_all_kinds(rows, columns))


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize(("variant", "quantization", "group"), emulation_slow(CASES, "int8-None"))
def test_linear(variant: str, quantization: str, group: int | None, outputs: int, inputs: int) -> None:
    backend = kernels_of(variant, quantization, group)
    weight = (torch.randn(outputs, inputs) * torch.rand(outputs, 1)).bfloat16()
    quantized, packed = quantize(backend, weight), backend.pack([weight], role=WeightRole.O)
    for rows in (1, 2, 14, 33):
        x = (torch.randn(rows, inputs) * 10 ** torch.randn(rows, 1)).bfloat16()
        x[-1] = 0
        bias = torch.randn(outputs).bfloat16()
        exact, bound = product(x, quantized)
        assert ((backend.linear(x, packed) - exact).abs() <= bound + 2**-23 * exact.abs()).all(), rows
        wanted = exact + bias.double()
        bound = bound + 2**-22 * (exact.abs() + bias.double().abs())
        assert ((backend.linear(x, packed, bias) - wanted).abs() <= bound).all(), rows


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_no_sum_overflows(variant: str, quantization: str, group: int | None) -> None:
    """Everything at its largest: also the 16 bits in which AVX2 adds two products."""
    backend = kernels_of(variant, quantization, group)
    weight = torch.ones(4, 4096) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    weight[2:, ::2] *= -1
    x = torch.ones(3, 4096)
    x[1] *= -1
    x[2, ::2] *= -1
    exact = (x @ weight.T).double()
    ours = backend.linear(x.bfloat16(), backend.pack([weight.bfloat16()], role=WeightRole.O))
    # int4 has its largest qvalue at one end only: a group of +1 and -1 is not exact.
    share = 2**-7 if quantization == "int8" else 0.2
    assert ((ours - exact).abs() <= share * 4096).all()
    whole, bound = product(x.bfloat16(), quantize(backend, weight.bfloat16()))
    assert ((ours - whole).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("inner", "inputs"), [(1, 5), (17, 130), (48, 256), (33, 1100)])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_gated(variant: str, quantization: str, group: int | None, inner: int, inputs: int, kind: str) -> None:
    """Equal, bit for bit, to its activation of the product, whose gate and up come as a weight of their own."""
    backend = kernels_of(variant, quantization, group)
    weight, bias = torch.randn(2 * inner, inputs).bfloat16() / 8, torch.randn(2 * inner).bfloat16()
    x = torch.randn(5, inputs).bfloat16()
    ours = backend.gated(x, backend.pack(list(weight.split(inner)), role=WeightRole.GATE_UP), bias, kind).double()
    gate, up = backend.linear(x, backend.pack([weight], role=WeightRole.O), bias).double().chunk(2, dim=-1)
    activation = {
        "silu": gate * torch.sigmoid(gate),
        "gelu": gate * 0.5 * torch.erfc(-gate * 0.5**0.5),
        "gelu_tanh": 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
    }[kind]
    assert ((ours - activation * up).abs() <= 2**-8 * (activation * up).abs() + 1e-6 * (gate * up).abs() + 1e-9).all()


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_experts(variant: str, quantization: str, group: int | None) -> None:
    """Each expert is quantized by itself: the mixture is the sum of dense networks that are quantized alike."""
    backend = kernels_of(variant, quantization, group)
    x, w13, w2 = torch.randn(11, 130).bfloat16(), torch.randn(5, 96, 130) / 8, torch.randn(5, 130, 48) / 8
    ids, weights = torch.stack([torch.randperm(5)[:3] for _ in range(11)]), torch.rand(11, 3)
    packed = pack_experts(backend, w13.bfloat16(), w2.bfloat16())
    ours = backends.experts(backend, x, ids, weights, packed)
    wanted = torch.zeros(11, 130, dtype=torch.float64)
    for expert in range(5):
        gate_up = backend.pack(w13[expert].bfloat16().chunk(2), role=WeightRole.GATE_UP)
        down = backend.pack([w2[expert].bfloat16()], role=WeightRole.DOWN)
        said = backend.linear(backend.gated(x, gate_up, None, "silu"), down)
        wanted += (ids == expert).double().mul(weights).sum(1, keepdim=True) * said
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("columns", [1, 33, 256, 1100])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_tied_embedding_reads_the_packed_head(variant: str, quantization: str, group: int | None, columns: int) -> None:
    backend = kernels_of(variant, quantization, group)
    weight = weights_of_all_kinds(40, columns)
    head = backend.pack([weight], role=WeightRole.HEAD)
    rows = backend.embed(torch.arange(40), head).double().numpy()
    # The head of an int4 model is int8, a scale a row.
    wanted = int8(weight.float().numpy(), backend.group_size if quantization == "int8" else None)
    assert (rows == wanted.weights).all()


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_nan_is_not_hidden_by_quantization(variant: str, quantization: str, group: int | None) -> None:
    backend = kernels_of(variant, quantization, group)
    weight, x = torch.randn(40, 300), torch.randn(6, 300)
    weight[3, 5] = torch.nan
    weight[35, 299] = torch.inf
    x[1, 7], x[2, 299] = torch.nan, -torch.inf
    ours = backend.linear(x.bfloat16(), backend.pack([weight.bfloat16()], role=WeightRole.O)).isfinite()
    assert not ours[1:3].any()
    assert not ours[:, [3, 35]].any()
    assert ours[[0, 3, 4, 5]][:, [c for c in range(40) if c not in (3, 35)]].all()


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-40])
def test_a_row_too_small_for_its_scale_is_nearly_zero(
    variant: str, quantization: str, group: int | None, magnitude: float
) -> None:
    backend = kernels_of(variant, quantization, group)
    packed = backend.pack([torch.randn(33, 70).bfloat16()], role=WeightRole.O)
    ours = backend.linear((torch.randn(3, 70) * magnitude).bfloat16(), packed)
    assert (ours.abs() <= 1e-25).all()


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_weights_whose_squares_fp32_cannot_hold(
    variant: str, quantization: str, group: int | None, magnitude: float
) -> None:
    weight = (torch.randn(40, 200) * magnitude).bfloat16()
    error = kept(kernels_of(variant, quantization, group), weight) - weight.double().numpy()
    assert np.sqrt(np.square(error).mean()) <= 0.15 * magnitude


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_error_of_normal_weights(variant: str, quantization: str, group: int | None) -> None:
    """int8: half a step of 127 for the largest of a few hundred, about 3.3 sigma. int4: 16 values fitted to what is
    normal leave about a tenth of it.
    """
    weight = torch.randn(64, 512).bfloat16()
    error = kept(kernels_of(variant, quantization, group), weight) - weight.double().numpy()
    assert np.sqrt(np.square(error).mean()) <= {"int8": 0.009, "int4": 0.1}[quantization]


NEVER_QUANTIZED = (WeightRole.ROUTER, WeightRole.SHARED_GATE, WeightRole.GATES)


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_bytes_of_a_weight(variant: str, quantization: str, group: int | None) -> None:
    backend = kernels_of(variant, quantization, group)
    bits = {"int8": 8, "int4": 4}[quantization]
    scales = 1024 // group if group else 1

    def size(role: WeightRole) -> int:
        return backend.weight_bytes((512, 1024), role=role, dtype=torch.bfloat16)

    for role in set(WeightRole) - {
        WeightRole.PLAIN,
        WeightRole.EMBED,
        WeightRole.NORM,
        WeightRole.HEAD,
        *NEVER_QUANTIZED,
    }:
        assert size(role) == 512 * 1024 * bits // 8 + 512 * scales * 2
    assert size(WeightRole.HEAD) == (size(WeightRole.O) if quantization == "int8" else 512 * 1024 + 512 * 2)
    assert size(WeightRole.ROUTER) == size(WeightRole.PLAIN) == 2 * 512 * 1024
    assert size(WeightRole.NORM) == 4 * 512 * 1024


def test_int4_values_rise_and_fit_a_byte() -> None:
    assert len(INT4_QVALUES) == 16
    assert list(INT4_QVALUES) == sorted(set(INT4_QVALUES))
    assert list(QVALUES) == [qvalue + INT4_BIAS for qvalue in INT4_QVALUES]
    assert 12 * max(QVALUES) * 128 < 2**15  # AVX2 sums in 16 bits what six words of x give, two products each
    assert min(QVALUES) >= 0


@pytest.mark.parametrize("role", [role for role in WeightRole if role.linear], ids=str)
def test_formats_by_role(role: WeightRole) -> None:
    def found(quantization: str | None, group: int | None) -> tuple[int, int | None]:
        chosen = choose_format(role, quantization, group)
        return chosen.number, chosen.group

    assert found(None, None) == (BF16, None)
    layers = role not in (WeightRole.HEAD, *NEVER_QUANTIZED)
    for group in (None, 128):
        assert found("int8", group) == ((BF16, None) if role in NEVER_QUANTIZED else (INT8, group))
    for group, resolved in ((None, 64), (64, 64), (128, 128)):
        wanted = (INT4, resolved) if layers else (INT8, None) if role is WeightRole.HEAD else (BF16, None)
        assert found("int4", group) == wanted


@pytest.mark.parametrize(
    ("quantization", "group", "message"),
    [
        ("int8", 64, "quantization_group_size=64 is not supported for int8: use 128"),
        ("int4", 32, "quantization_group_size=32 is not supported for int4: use 64 or 128"),
        ("int2", None, "quantization='int2' is unknown: use int8 or int4"),
    ],
)
def test_unknown_formats_are_refused(quantization: str, group: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose_format(WeightRole.O, quantization, group)
    assert str(refusal.value) == message
