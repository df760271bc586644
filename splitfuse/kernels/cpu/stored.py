"""Keeps weights in the forms in which checkpoints have quantized them. The layout of panels is in csrc/groups.h."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitfuse.kernels.cpu.structs import (
    BFLOAT16,
    E8M0,
    F16,
    F32,
    FP8,
    GROUPED,
    HIGH_BITS,
    I8,
    LOW_BITS,
    NONE,
    U8,
    Stored,
    Weight,
)
from splitfuse.kernels.quantized import FP8_GROUP, Fp8Quantized, GroupFormat, GroupQuantized

RUN = 256
"""Number of columns that a panel keeps together, and of which two-level scales share theirs."""
LEAST_GROUP, MOST_GROUP = 16, 128
BITS = (2, 3, 4, 5, 6, 8)
"""Bits that a level may be kept in: 7 are kept in 8."""
NUMBERS = {
    torch.float32: F32,
    torch.float16: F16,
    torch.bfloat16: BFLOAT16,
    torch.uint8: U8,
    torch.int8: I8,
    torch.float8_e8m0fnu: E8M0,
}
"""Dtypes of scales, mins and zeros, as csrc/interface.h numbers them."""


@dataclass(frozen=True)
class Kind:
    """Holds what C++ must know of a weight in groups but its shape. Weights of one kind can be stacked by rows."""

    bits: int
    group: int
    bias: int
    scale_type: int
    offset_type: int = NONE
    zeros: bool = False
    two_level: bool = False
    qvalues: tuple[int, ...] = tuple(range(16))

    def weight(self, rows: int, columns: int, *, gated: bool) -> Weight:
        """Return the struct of a weight of this kind, without memory."""
        weight = Weight(GROUPED, gated, rows, columns, self.group, None, (ctypes.c_uint8 * 16)(*self.qvalues))
        for name in ("bits", "bias", "scale_type", "offset_type", "zeros", "two_level"):
            setattr(weight, name, getattr(self, name))
        return weight


def kind_of(stored: GroupFormat) -> Kind | None:
    """Return the kind that a format is kept as with all its bits, or None if there is none.

    >>> kind_of(GroupFormat(name="Q4_K", bits=4, group_size=32, mins=True, super_groups=8)).two_level
    True
    """
    bits = next((bits for bits in BITS if bits >= stored.bits), None)
    group = math.gcd(stored.group_size, MOST_GROUP)
    scale_type = NUMBERS.get(stored.scale_dtype)
    if bits is None or group < LEAST_GROUP or scale_type not in (F32, F16, BFLOAT16, E8M0):
        return None
    kind = Kind(bits, group, 1 << (stored.bits - 1) if stored.signed else 0, scale_type)
    if stored.table is not None:
        if bits != 4 or stored.mins or stored.zeros or not all(-128 <= value <= 127 for value in stored.table):
            return None
        bias = max(-min(stored.table), 0)  # no larger: sums of small levels need fewer bits (sum_steps_of in C++)
        qvalues = [value + bias for value in stored.table] + [0] * (16 - len(stored.table))
        kind = replace(kind, bias=bias, qvalues=tuple(qvalues))
    if stored.zeros:
        kind = replace(kind, offset_type=U8, zeros=True)
    if stored.mins:
        kind = replace(kind, offset_type=scale_type)
    if stored.super_groups is None:
        return kind
    if stored.group_size * stored.super_groups != RUN or scale_type != F16 or stored.zeros:
        return None
    kind = replace(kind, two_level=True)
    if not stored.mins:
        return replace(kind, scale_type=I8)
    if bits == 2:  # Q2_K, whose scales and mins have four bits each
        return replace(kind, scale_type=LOW_BITS, offset_type=HIGH_BITS)
    return replace(kind, scale_type=U8, offset_type=U8)


def stored_groups(rows: GroupQuantized) -> Stored:
    """Return rows of a weight in groups as C++ packs them in the kind of their format."""
    kind = kind_of(rows.format)
    assert kind is not None
    columns, repeats = rows.levels.shape[1], rows.format.group_size // kind.group
    num_groups, num_runs = -(-columns // kind.group), -(-columns // RUN)

    def spread(numbers: Tensor | None, number: int) -> Tensor | None:
        if numbers is None:
            return None
        assert NUMBERS[numbers.dtype] == (U8 if number == LOW_BITS else number)
        numbers = numbers.view(torch.uint8) if number == E8M0 else numbers
        repeated = _repeated(numbers, repeats, num_groups).contiguous()
        assert repeated.shape[1] == num_groups
        return repeated

    levels = rows.levels
    if kind.bias and rows.format.signed:
        levels = (levels.view(torch.uint8) + kind.bias).contiguous()  # modulo 256
    assert levels.dtype == torch.uint8
    scales, offsets = rows.scales, rows.zeros if kind.zeros else rows.mins
    if kind.offset_type == HIGH_BITS:
        assert offsets is not None and int(scales.max()) < 16 and int(offsets.max()) < 16
        scales, offsets = scales | offsets << 4, None
    units = (rows.super_scales, rows.super_mins)
    for unit in units:
        assert unit is None or (unit.shape[1] == num_runs and unit.dtype == torch.float16)
    return Stored.of(levels, spread(scales, kind.scale_type), spread(offsets, kind.offset_type), *units)


def _repeated(numbers: Tensor, repeats: int, num_groups: int) -> Tensor:
    """Return the numbers of groups for the narrower groups that each is cut into."""
    return numbers.repeat_interleave(repeats, dim=1)[:, :num_groups]


def stored_fp8(rows: Fp8Quantized) -> Stored:
    """Return rows of a weight in FP8 as C++ packs them."""
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scales.dtype == torch.float32
    assert rows.scales.shape == (len(rows.values), -(-rows.values.shape[1] // FP8_GROUP))
    return Stored.of(rows.values.view(torch.uint8), rows.scales)


def fp8_weight(rows: int, columns: int, *, gated: bool) -> Weight:
    """Return the struct of a weight in FP8, without memory."""
    return Weight(FP8, gated, rows, columns)


def stacked(weights: Sequence[Weight]) -> Weight:
    """Return one weight of others that lie one after the other, and read the same of x."""
    if len(weights) == 1:
        return weights[0]
    whole = Weight.from_buffer_copy(weights[0])
    parts = (Weight * len(weights))(*weights)
    whole.rows, whole.data, whole.num_parts = sum(weight.rows for weight in weights), None, len(weights)
    whole.parts, whole.kept = ctypes.addressof(parts), (parts, *weights)
    return whole


def common_format(formats: Sequence[GroupFormat]) -> GroupFormat:
    """Return a format that holds weights of all these exactly, in levels of 8 bits with scales and mins in fp32."""
    group = math.gcd(*(each.group_size for each in formats), RUN)
    names = " and ".join(sorted({each.name for each in formats}))
    return GroupFormat(name=names, bits=8, group_size=group, mins=True, scale_dtype=torch.float32)


def converted(weight: GroupQuantized, stored: GroupFormat) -> GroupQuantized:
    """Return a weight in a common format of its own and others."""
    repeats = weight.format.group_size // stored.group_size
    num_groups = -(-weight.levels.shape[1] // stored.group_size)

    def spread(numbers: Tensor) -> Tensor:
        return _repeated(numbers, repeats, num_groups)

    levels, bias = weight.levels, 0
    if weight.format.table is not None:
        levels, bias = (torch.tensor(weight.format.table) + 128).to(torch.uint8)[levels.int()], 128
    elif weight.format.signed:
        levels, bias = levels.view(torch.uint8) + 128, 128
    scales = spread(weight.group_scales())
    mins = scales * bias
    if (own := weight.group_mins()) is not None:
        mins = spread(own)
    if weight.zeros is not None:
        mins = scales * spread(weight.zeros.float())
    return GroupQuantized(format=stored, levels=levels, scales=scales, mins=mins, order=weight.order)
