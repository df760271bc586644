"""Weights that are kept as a checkpoint has quantized them: products equal those of the dequantized weights with our
quantized activations up to fp32's rounding, with the same bits whatever else is in a step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import backends
import gguf_files
import pytest
import torch
import torch.nn.functional as F
from backends import make_case, variants
from stored_formats import FORMATS, fp8, weight_in
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.stored import kind_of
from splitfuse.kernels.quantized import (
    Fp8Format,
    Fp8Quantized,
    GroupFormat,
    GroupQuantized,
    QuantizedWeight,
    are_whole_groups,
)
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import LayerWeights, WeightRole
from splitfuse.models.sources.gguf import blocks

BF16, F32 = torch.bfloat16, torch.float32
FILE_BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
FILE_BITS |= {
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "MX": 4.25,
    "GPTQ": 4.15625,
    "GPTQ of 8 bits": 8.375,
}
FILE_BITS |= {"int8 by row": 8}
CASES = [case for name in FORMATS for case in variants(name, id=name)]


def kernels(variant: str) -> CpuBackend:
    backend = make_case(variant).backend
    assert isinstance(backend, CpuBackend)
    return backend


def quantized(x: Tensor, group: int) -> Tensor:
    """Activations as the kernels quantize them for weights in groups: whole numbers up to 127, times a scale for each
    32 to 128 columns of a row.
    """
    block = min(max(math.gcd(group, 128), 32), 128)
    padded = F.pad(x.float(), (0, -x.shape[1] % block)).view(len(x), -1, block)
    most = padded.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0.0)
    rounded = (padded * inverse).round().double() * (most * torch.tensor(1 / 127)).double()
    return rounded.flatten(1)[:, : x.shape[1]]


def assert_product(ours: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    """Assert that it is right up to what fp32 additions may be off by."""
    wanted = weight.dequantize(F32).double()
    bound = x.double().abs() @ wanted.abs().T * 3e-6
    if isinstance(weight, GroupQuantized) and weight.mins is not None:  # which may cancel what levels give
        bound = bound * 10
    assert ((ours.double() - x.double() @ wanted.T).abs() <= bound + 1e-30).all()


SHAPES = [(1, 32), (40, 96), (33, 256), (70, 2272)]


@pytest.mark.parametrize("name", [*FORMATS, "FP8"])
def test_whole_groups_of_columns_are_those_of_the_weight(name: str) -> None:
    weight: QuantizedWeight = fp8(3, 1152) if name == "FP8" else weight_in(FORMATS[name], 3, 1152)
    whole = weight.dequantize(F32)
    for columns in (range(768), range(768, 1152), range(384, 768)):
        if not are_whole_groups(weight.format, columns, 1152):
            assert columns.start == 384  # half a block of 256
            continue
        some = weight.only_columns(columns)
        assert some.shape == (3, len(columns))
        assert torch.equal(some.dequantize(F32), whole[:, columns.start : columns.stop])
    by_row = name == "int8 by row"
    assert are_whole_groups(weight.format, range(100, 768), 1152) == by_row


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_products_and_their_bits(variant: str, name: str) -> None:
    backend = kernels(variant)
    for outputs, inputs in SHAPES:
        weight = weight_in(FORMATS[name], outputs, inputs)
        packed = backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)
        x = (torch.randn(31, inputs) * 10 ** torch.randn(31, 1) * 10 ** torch.randn(inputs)).bfloat16()
        x[3] = 0
        x[4, 32:] = 0
        ours = backend.linear(x, packed)
        assert_product(ours, quantized(x, FORMATS[name].group_size), weight)
        for begin, end in ((0, 1), (1, 6), (6, 20), (20, 31)):
            assert torch.equal(backend.linear(x[begin:end], packed), ours[begin:end])


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_sums_of_the_largest_products(variant: str, name: str) -> None:
    backend, stored = kernels(variant), FORMATS[name]
    made = weight_in(stored, 40, 768)
    table = None if stored.table is None else torch.tensor(stored.table)
    largest = int(made.levels.max()) if table is None else int(table.argmax())
    weight = replace(made, levels=torch.full_like(made.levels, largest))
    packed = backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    for sign in (1, -1):  # all of which are 127 and -127 once they are quantized
        x = torch.full((7, 768), 0.5 * sign, dtype=BF16)
        assert_product(backend.linear(x, packed), quantized(x, stored.group_size), weight)


@pytest.mark.parametrize(("variant", "name"), [case for name in blocks.FORMATS for case in variants(name, id=name)])
def test_products_with_blocks_of_gguf_files(variant: str, name: str) -> None:
    stored = gguf_files.random_blocks(name, 40, 2)
    if name == "MXFP4":  # products of all exponents are no finite numbers
        stored[..., 0] = stored[..., 0] % 32 + 112
    weight = blocks.unpack(name, torch.from_numpy(stored))
    x = torch.randn(7, weight.shape[1]).bfloat16()
    packed = kernels(variant).pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    assert_product(kernels(variant).linear(x, packed), quantized(x, weight.format.group_size), weight)


@pytest.mark.parametrize("variant", variants())
def test_products_in_fp8_and_their_bits(variant: str) -> None:
    backend = kernels(variant)
    for outputs, inputs in ((1, 1), (3, 7), (40, 127), (33, 130), (70, 1029)):
        weight = fp8(outputs, inputs)
        packed = backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)
        x = torch.randn(31, inputs).bfloat16()
        ours = backend.linear(x, packed)
        assert_product(ours, x, weight)
        for begin, end in ((0, 1), (1, 6), (6, 20), (20, 31)):
            assert torch.equal(backend.linear(x[begin:end], packed), ours[begin:end])


@pytest.mark.parametrize("variant", variants())
def test_every_number_of_fp8_is_exact(variant: str) -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127]).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).unsqueeze(0).expand(3, -1)
    weight = Fp8Quantized(values=values.contiguous(), scales=torch.ones(3, 2))
    packed = kernels(variant).pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    found = kernels(variant).linear(torch.eye(len(codes)).bfloat16(), packed)
    assert torch.equal(found, weight.dequantize(F32).T)


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_embedding_reads_the_packed_weight(variant: str, name: str) -> None:
    weight = weight_in(FORMATS[name], 40, 544)
    packed = kernels(variant).pack_quantized([weight], role=WeightRole.HEAD, dtype=BF16)
    rows = kernels(variant).embed(torch.arange(40), packed)
    assert torch.equal(rows, weight.dequantize(F32))


@pytest.mark.parametrize("name", FILE_BITS)
def test_bytes_are_those_of_the_file(name: str) -> None:
    backend = CpuBackend(num_threads=1)
    weight = weight_in(FORMATS[name], 64, 2304)
    packed = backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    assert FILE_BITS[name] * 0.999 <= packed.memory.nbytes * 8 / weight.levels.numel() <= FILE_BITS[name] * 1.05


@pytest.mark.parametrize("variant", variants())
def test_pieces_of_two_formats_are_stacked(variant: str) -> None:
    backend = kernels(variant)
    pieces = [weight_in(FORMATS[name], rows, 512) for name, rows in (("Q4_K", 70), ("Q4_K", 33), ("Q6_K", 40))]
    x, bias = torch.randn(17, 512).bfloat16(), torch.randn(143).bfloat16()
    whole = backend.linear(x, backend.pack_quantized(pieces, role=WeightRole.QKV, dtype=BF16), bias)
    apart = [
        backend.linear(x, backend.pack_quantized([piece], role=WeightRole.QKV, dtype=BF16), own.contiguous())
        for piece, own in zip(pieces, bias.split([70, 33, 40]), strict=True)
    ]
    assert torch.equal(whole, torch.cat(apart, dim=1))


@pytest.mark.parametrize("names", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("GPTQ", "IQ4_NL"), ("FP8", "FP8")], ids=str)
@pytest.mark.parametrize("variant", variants())
def test_gate_and_up_of_one_format_or_two(variant: str, names: tuple[str, str]) -> None:
    backend, x = kernels(variant), torch.randn(5, 512).bfloat16()
    pieces = [fp8(48, 512) if name == "FP8" else weight_in(FORMATS[name], 48, 512) for name in names]
    groups = [piece.format.group_size for piece in pieces if isinstance(piece, GroupQuantized)]
    read = quantized(x, min(groups)) if groups else x.double()
    gate, up = (read @ piece.dequantize(F32).double().T / 1000 for piece in pieces)
    for piece in pieces:  # products of about 1
        if isinstance(piece, Fp8Quantized):
            piece.scales.mul_(1 / 1000)
    ours = backend.gated(x, backend.pack_quantized(pieces, role=WeightRole.GATE_UP, dtype=BF16), None, "relu").double()
    wanted = gate.relu() * up * (1 if names[0] == "FP8" else 1e6)
    assert ((ours - wanted).abs() <= 2**-7 * wanted.abs() + 1e-4 * wanted.abs().mean()).all()


@pytest.mark.parametrize("variant", variants())
def test_pieces_of_two_widths_share_blocks_of_the_wider(variant: str) -> None:
    pieces, x = [weight_in(FORMATS[name], 40, 1120) for name in ("Q4_1", "GPTQ", "Q6_K")], torch.randn(17, 1120)
    x = (x * 10 ** torch.randn(1120)).bfloat16()
    ours = kernels(variant).linear(x, kernels(variant).pack_quantized(pieces, role=WeightRole.QKV, dtype=BF16))
    for piece, part in zip(pieces, ours.split(40, dim=1), strict=True):
        assert_product(part, quantized(x, 128), piece)


@pytest.mark.parametrize("variant", variants())
def test_a_large_element_leaves_other_blocks_alone(variant: str) -> None:
    """With one scale for a row all others would be rounded to zero."""
    weight, x = weight_in(FORMATS["Q4_1"], 40, 256), torch.randn(5, 256)
    x[:, 40] = 1e3
    packed = kernels(variant).pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    spared = x.clone()
    spared[:, 32:64] = 0
    given, alone = (kernels(variant).linear(each.bfloat16(), packed) for each in (x, spared))
    x[:, :32], x[:, 64:] = 0, 0
    assert torch.allclose(given, alone + kernels(variant).linear(x.bfloat16(), packed), rtol=1e-5, atol=1e-2)
    assert float(alone.abs().amax()) > 1


@pytest.mark.parametrize("variant", variants())
def test_a_dense_piece_makes_all_dense(variant: str) -> None:
    backend, x = kernels(variant), torch.randn(3, 512).bfloat16()
    weight, dense = weight_in(FORMATS["Q8_0"], 40, 512), torch.randn(33, 512).bfloat16()
    packed = backend.pack_quantized([weight, dense], role=WeightRole.QKV, dtype=BF16)
    wanted = backend.pack([weight.dequantize(BF16), dense], role=WeightRole.QKV)
    assert torch.equal(backend.linear(x, packed), backend.linear(x, wanted))


@pytest.mark.parametrize("name", ["Q6_K", "GPTQ", "GPTQ in orders", "FP8"])
@pytest.mark.parametrize("variant", variants())
def test_experts(variant: str, name: str) -> None:
    """The mixture is the sum of dense networks that are packed alike, but each in an order of columns of its own."""
    backend, x = kernels(variant), torch.randn(11, 256).bfloat16()
    ids, weights = torch.stack([torch.randperm(5)[:3] for _ in range(11)]), torch.rand(11, 3)

    def packed(rows: int, columns: int, role: WeightRole) -> list[backends.Any]:
        def half() -> QuantizedWeight:
            return fp8(rows, columns) if name == "FP8" else weight_in(FORMATS[name.split()[0]], rows, columns)

        experts = [[half() for _ in range(2 if role.gated else 1)] for _ in range(5)]
        for pieces in experts[1:] if name == "GPTQ in orders" else ():
            order = torch.randperm(columns)
            pieces[:] = [replace(piece, order=order) for piece in pieces if isinstance(piece, GroupQuantized)]
        return [backend.pack_quantized(pieces, role=role, dtype=BF16) for pieces in experts]

    layer = LayerWeights(
        w13=packed(128, 256, WeightRole.W13), w2=packed(256, 128, WeightRole.W2), w1_bias=(), w2_bias=()
    )
    ours = backends.experts(backend, x, ids, weights, layer)
    wanted = torch.zeros(11, 256, dtype=torch.float64)
    for expert in range(5):
        given = backend.linear(backend.gated(x, layer.w13[expert], None, "silu"), layer.w2[expert])
        wanted += (ids == expert).double().mul(weights).sum(1, keepdim=True) * given
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    for token in range(11):
        one = backends.experts(backend, *(each[token : token + 1] for each in (x, ids, weights)), layer)
        assert torch.equal(one, ours[token : token + 1])


@pytest.mark.parametrize("variant", variants())
def test_columns_in_another_order(variant: str) -> None:
    backend, x = kernels(variant), torch.randn(17, 2048).bfloat16()
    weight, order = weight_in(FORMATS["GPTQ"], 40, 2048), torch.randperm(2048)
    ordered = GroupQuantized(**{**vars(weight), "order": order})
    assert torch.equal(ordered.dequantize(F32)[:, order], weight.dequantize(F32))
    ours = backend.linear(x, backend.pack_quantized([ordered], role=WeightRole.O, dtype=BF16))
    plain = backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)
    assert torch.equal(ours, backend.linear(x[:, order].contiguous(), plain))
    # Pieces in different orders cannot be read at once.
    dense = backend.pack([each.dequantize(BF16) for each in (weight, ordered)], role=WeightRole.QKV)
    both = backend.pack_quantized([weight, ordered], role=WeightRole.QKV, dtype=BF16)
    assert torch.equal(backend.linear(x, both), backend.linear(x, dense))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "FP8"])
@pytest.mark.parametrize("variant", variants())
def test_nan_is_not_hidden(variant: str, name: str) -> None:
    backend = kernels(variant)
    if name == "FP8":
        weight: QuantizedWeight = fp8(40, 512)
        weight.values.view(torch.uint8)[3, 300] = 0x7F
    else:
        weight = weight_in(FORMATS[name], 40, 512)
        (weight.scales if weight.super_scales is None else weight.super_scales)[3, 1] = torch.nan
    x = torch.randn(6, 512).bfloat16()
    x[1, 7] = torch.nan
    ours = backend.linear(x, backend.pack_quantized([weight], role=WeightRole.O, dtype=BF16)).isfinite()
    assert not ours[1].any() and not ours[:, 3].any()
    assert ours[[0, 2, 3, 4, 5]][:, [c for c in range(40) if c != 3]].all()


def test_formats_that_are_kept_and_others() -> None:
    backend = CpuBackend(num_threads=1)
    assert all(
        backend.accepts(each, WeightRole.O) and backend.accepts(each, WeightRole.EMBED) for each in FORMATS.values()
    )
    assert not backend.accepts(FORMATS["Q8_0"], WeightRole.PLAIN)
    assert backend.accepts(Fp8Format(), WeightRole.O) and not backend.accepts(Fp8Format(), WeightRole.HEAD)
    assert not CpuBackend(num_threads=1, quantization="int8").accepts(Fp8Format(), WeightRole.O)
    assert not ReferenceBackend().accepts(FORMATS["Q8_0"], WeightRole.O)
    for odd in (
        GroupFormat(name="groups of 8", bits=4, group_size=8),
        GroupFormat(name="more than a byte", bits=9, group_size=32),
        GroupFormat(name="levels that are no bytes", bits=4, group_size=32, table=(0, 200)),
        GroupFormat(name="scales in fp64", bits=4, group_size=32, scale_dtype=torch.float64),
        GroupFormat(name="short super groups", bits=4, group_size=32, super_groups=4),
    ):
        assert kind_of(odd) is None
