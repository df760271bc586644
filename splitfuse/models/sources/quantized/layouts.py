"""Unpacks linear weights [N, K] from the tensors in which quantized checkpoints store them, a pure function a layout.

In the shapes G is the number of groups of columns: K / group_size, rounded up. Words are little-endian, and numbers lie
in them from the lowest bit up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfuse.errors import WeightsError
from splitfuse.kernels.quantized import FP8_GROUP, Fp8Quantized, GroupFormat, GroupQuantized

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, that each four bits of a word of AWQ hold."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the numbers of 2, 4 or 8 bits in words or bytes: [R, C] -> uint8 [R, numbers].

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), 4)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    """
    in_bytes: Tensor = words.contiguous().view(torch.uint8)
    if bits == 8:
        return in_bytes
    # The numbers of a byte, in a word with a byte for each: vectorized, unlike shifts by several amounts.
    wide = in_bytes.to(torch.int16 if bits == 4 else torch.int32)
    spread = wide | wide << 4 if bits == 4 else wide | wide << 6 | wide << 12 | wide << 18
    return (spread & (0x0F0F if bits == 4 else 0x03030303)).view(torch.uint8)


def gptq(
    stored: GroupFormat,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    minus_one: bool,
    wraps: bool,
) -> GroupQuantized:
    """Return a weight of GPTQ.

    qweight int32 [K * bits / 32, N]: words go along K. qzeros int32 [G, N * bits / 32]: along N. scales [G, N]. g_idx
    int32 [K]: the group of each column; with act-order they are mixed. A weight is scale * (q - zero). With `minus_one`
    (version 1 of the format) qzeros hold zero - 1; a zero of 0 is only right there if one was subtracted from whole
    words, as `wraps` says. A `stored` format without zeros has those in the middle, and is checked to.

    Source: GPTQModel and AutoGPTQ, `qlinear/__init__.py`; the two versions, GPTQModel `utils/model.py`.
    """
    bits = stored.bits
    ones = sum(1 << shift for shift in range(0, 32, bits))
    if minus_one and not wraps and bool((unpack(qzeros, bits) == 2**bits - 1).any()):
        raise WeightsError(
            "zero points of 0 in version 1 of GPTQ, which old tools wrote wrongly: take a checkpoint of GPTQModel 0.9 "
            'or later, or one with checkpoint_format "gptq_v2"'
        )
    if minus_one:
        qzeros = qzeros + (ones if ones < 2**31 else ones - 2**32)  # modulo 2**32, as it was subtracted
    scales, zeros = scales.T.contiguous(), unpack(qzeros, bits).T.contiguous()
    levels = unpack(qweight.T, bits)
    order = None if g_idx is None else column_order(g_idx, stored.group_size)
    if order is not None:
        levels = levels[:, order]
    if stored.zeros:
        return GroupQuantized(format=stored, levels=levels, scales=scales, zeros=zeros, order=order)
    middle = 1 << (bits - 1)
    if not bool((zeros == middle).all()):
        raise WeightsError(f"zero points that are not {middle}, although quantization_config has sym = true")
    return GroupQuantized(format=stored, levels=centered(levels, bits), scales=scales, order=order)


def column_order(g_idx: Tensor, group_size: int) -> Tensor | None:
    """Return the columns in the order of their groups; None if they are in it.

    >>> column_order(torch.tensor([1, 0, 1, 0]), 2), column_order(torch.tensor([0, 0, 1, 1]), 2)
    (tensor([1, 3, 0, 2]), None)
    """
    in_order = torch.arange(len(g_idx)) // group_size
    if torch.equal(g_idx.long(), in_order):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], in_order):
        raise WeightsError(f"g_idx does not put {group_size} columns into each group")
    return order


def awq(stored: GroupFormat, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> GroupQuantized:
    """Return a weight of AWQ in the layout "gemm".

    qweight int32 [K, N / 8] and qzeros int32 [G, N / 8]: words go along N, their four bits hold the columns of
    AWQ_ORDER. scales [G, N]. A weight is scale * (q - zero).

    Source: AutoAWQ, `modules/linear/gemm.py` and `utils/packing_utils.py`.
    """

    def along_rows(words: Tensor) -> Tensor:
        words = words.T.contiguous()
        rows = torch.empty(len(words), 8, words.shape[1], dtype=torch.uint8)
        for place, row in enumerate(AWQ_ORDER):
            rows[:, row] = words >> 4 * place & 15
        return rows.view(-1, words.shape[1])

    scales = scales.T.contiguous()
    return GroupQuantized(format=stored, levels=along_rows(qweight), scales=scales, zeros=along_rows(qzeros))


def packed_integers(
    stored: GroupFormat,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    shape: tuple[int, int],
) -> GroupQuantized:
    """Return a weight of compressed-tensors in the format "pack-quantized".

    weight_packed int32 [N, K * bits / 32, rounded up]: words go along K, and hold q + 2^(bits - 1). weight_scale
    [N, G]. weight_zero_point int32 [N * bits / 32, rounded up, G]: words go along N, likewise. weight_g_idx [K]: the
    group of each column. A weight is scale * (q - zero).

    Source: compressed-tensors, `compressors/pack_quantized`.
    """
    rows, columns = shape
    levels = unpack(packed, stored.bits)[:, :columns]
    order = None if g_idx is None or bool((g_idx < 0).all()) else column_order(g_idx, stored.group_size)
    if order is not None:
        levels = levels[:, order]
    if zeros is None:
        return GroupQuantized(format=stored, levels=centered(levels, stored.bits), scales=scales, order=order)
    zeros = unpack(zeros.T, stored.bits)[:, :rows].T
    return GroupQuantized(format=stored, levels=levels, scales=scales, zeros=zeros, order=order)


def integers(stored: GroupFormat, values: Tensor, scales: Tensor, zeros: Tensor | None) -> GroupQuantized:
    """Return a weight of compressed-tensors in the format "int-quantized".

    weight int8 [N, K]. weight_scale [N, G], and weight_zero_point int8 of that shape. A weight is scale * (q - zero).

    Source: compressed-tensors, `compressors/naive_quantized`.
    """
    if zeros is None:
        return GroupQuantized(format=stored, levels=values, scales=scales)
    levels, zeros = ((each.view(torch.uint8) + 128) for each in (values.contiguous(), zeros.contiguous()))
    return GroupQuantized(format=stored, levels=levels, scales=scales, zeros=zeros)


def fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Fp8Quantized:
    """Return a weight in FP8.

    weight float8_e4m3fn [N, K]. Scales [N / block[0], K / block[1]], rounded up: a weight is value * scale. A block of
    a channel is (1, K), that of a whole tensor (N, K).

    Source: DeepSeek-V3, `inference/kernel.py` (weight_dequant); compressed-tensors, `compressors/naive_quantized`.
    """
    (num_rows, columns), (rows, width) = values.shape, block
    by_row = scales.float().repeat_interleave(min(rows, num_rows), dim=0)[:num_rows]
    num_groups = -(-columns // FP8_GROUP)
    if scales.shape[1] == 1:
        return Fp8Quantized(values=values, scales=by_row.expand(-1, num_groups))
    return Fp8Quantized(values=values, scales=by_row.repeat_interleave(width // FP8_GROUP, dim=1)[:, :num_groups])


def mxfp4(stored: GroupFormat, blocks: Tensor, exponents: Tensor) -> GroupQuantized:
    """Return a weight in MXFP4.

    blocks uint8 [N, K / 2]: two numbers of FP4 (e2m1) a byte, the lower bits first. exponents uint8 [N, K / 32]: the
    32 numbers of a group are multiplied by 2^(exponent - 127).

    Source: OCP Microscaling Formats (MX) 1.0; gpt-oss, `gpt_oss/torch/weights.py`.
    """
    halved = (exponents.int() - 1).clamp(min=0).to(torch.uint8)  # since FP4_TABLE is doubled; 2^-128 becomes 2^-127
    return GroupQuantized(format=stored, levels=unpack(blocks, 4), scales=halved.view(torch.float8_e8m0fnu))


def centered(levels: Tensor, bits: int) -> Tensor:
    """Return unsigned levels as int8 with 0 in the middle.

    >>> centered(torch.tensor([0, 8, 15], dtype=torch.uint8), 4)
    tensor([-8,  0,  7], dtype=torch.int8)
    """
    shifted: Tensor = levels + (256 - 2 ** (bits - 1))  # modulo 256
    return shifted.view(torch.int8)
