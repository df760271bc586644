"""Keeps weights in 8 or 4 bits, with a scale for each group of columns of a row: those that we round, and those that a
checkpoint has in such a form already, whose bits are kept.

Products are in the dtype of activations: what is saved is the reading of weights, which bounds small steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.quantized import (
    FP8_GROUP,
    Fp8Format,
    GroupQuantized,
    QuantizedFormat,
    QuantizedWeight,
    read_alike,
)
from splitfuse.kernels.weights import WeightRole

GROUP_SIZES = {"int8": (128,), "int4": (64, 128)}
"""Quantizations, the one that loses least first, and the group sizes of each."""
INT4_GROUP = 64
LEAST_GROUP, MOST_GROUP = 16, 128
"""Least number of columns that share a scale, which a tile of a product must have, and the number that wider groups are
cut into.
"""
AT_ONCE = 2**24
"""Number of elements, about, that are rounded at a time: they exist in fp32 several times meanwhile."""
TABLE_SIZE = 16
"""Number of entries of a table: levels of 4 bits are indices into it."""


@dataclass(frozen=True)
class Format:
    """Describes how levels are kept: a weight is `scale * (level - bias - zero) + offset`, in fp32.

    A level is a number in FP8 (e4m3), an index into a `table`, or whole: of 8 bits with a sign if `is_signed`. Scales
    and offsets are of these dtypes; `offset_dtype` None: there are none.
    """

    bits: int  # 8 or 4
    group: int  # columns that share a scale; 0: a whole row
    is_signed: bool = True
    is_float: bool = False
    bias: int = 0
    has_zeros: bool = False
    table: tuple[int, ...] | None = None
    scale_dtype: torch.dtype = torch.float32
    offset_dtype: torch.dtype | None = None

    def padded(self, columns: int) -> int:
        """Return the number of columns that are kept of so many: whole groups, in 4 bits an even number of them."""
        step = max(self.group, 1) * (2 if self.bits == 4 else 1)
        return -(-columns // step) * step

    def num_groups(self, columns: int) -> int:
        """Return the number of groups that are kept of a row of so many columns."""
        return self.padded(columns) // self.group if self.group else 1

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight [N, K], without the order of its columns where that is another."""
        rows, columns = shape
        of_group = self.scale_dtype.itemsize + self.has_zeros
        of_group += 0 if self.offset_dtype is None else self.offset_dtype.itemsize
        whole = rows * (self.padded(columns) * self.bits // 8 + self.num_groups(columns) * of_group)
        return whole + (0 if self.table is None else 4 * TABLE_SIZE)


def choose_format(role: WeightRole, quantization: str | None, group_size: int | None) -> Format | None:
    """Return the format of a weight of this role; None: it stays as it is. Raises ConfigError for a group size that the
    quantization does not have.

    >>> choose_format(WeightRole.HEAD, "int4", None).bits
    8
    """
    if quantization is None:
        return None
    if group_size is not None and group_size not in GROUP_SIZES[quantization]:
        valid = " or ".join(map(str, GROUP_SIZES[quantization]))
        raise ConfigError(f"quantization_group_size={group_size} cannot be used with {quantization}: use {valid}")
    if not role.linear or role.by_head or role in (WeightRole.ROUTER, WeightRole.SHARED_GATE, WeightRole.GATES):
        return None
    if quantization == "int8" or role is WeightRole.HEAD:
        return Format(8, (group_size or 0) if quantization == "int8" else 0)
    return Format(4, group_size or INT4_GROUP, is_signed=False, offset_dtype=torch.float32)


def stored_format(stored: QuantizedFormat, columns: int) -> Format | None:
    """Return the format that keeps the bits of a weight of so many columns which a checkpoint has in `stored`; None if
    there is none.

    >>> from splitfuse.kernels.quantized import GroupFormat
    >>> stored_format(GroupFormat(name="AWQ", bits=4, group_size=128, zeros=True), 4096).group
    128
    """
    if isinstance(stored, Fp8Format):
        return Format(8, FP8_GROUP, is_float=True)
    group = 0 if stored.group_size >= columns else math.gcd(stored.group_size, MOST_GROUP)
    if stored.bits > 8 or 0 < group < LEAST_GROUP or (stored.table is not None and stored.bits != 4):
        return None
    bits = 4 if stored.bits <= 4 else 8
    scale_dtype = torch.float32 if stored.super_groups else stored.scale_dtype
    if scale_dtype == torch.float8_e8m0fnu:  # which has no arithmetic
        scale_dtype = torch.bfloat16
    return Format(
        bits,
        group,
        is_signed=stored.signed and bits == 8,
        bias=1 << (stored.bits - 1) if stored.signed and bits == 4 else 0,
        has_zeros=stored.zeros,
        table=stored.table,
        scale_dtype=scale_dtype,
        offset_dtype=scale_dtype if stored.mins else None,
    )


@dataclass(frozen=True)
class Quantized:
    """Holds a weight [N, K]: `levels` [N, K'] in 8 bits, or uint8 [N, K' / 2], whose low halves have the first K' / 2
    columns, and `scales`, `zeros` and `offsets` [N, groups]. Column i is column `order[i]` of the weight; None: i.
    """

    format: Format
    columns: int  # K
    dtype: torch.dtype  # of activations
    levels: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, kept: Format) -> Quantized:
        """Return a weight rounded to the nearest levels: of 8 bits from -127 to 127, of 4 bits 16 from the least to the
        largest of a group.
        """
        rows, columns = weight.shape
        step = max(1, AT_ONCE // columns)
        parts = [_quantized(weight[first : first + step], kept) for first in range(0, max(rows, 1), step)]
        levels, scales, *offsets = (torch.cat(each) for each in zip(*parts, strict=True))
        return cls(kept, columns, weight.dtype, levels, scales, offsets=offsets[0] if offsets else None)

    @classmethod
    def stored(cls, pieces: Sequence[QuantizedWeight], dtype: torch.dtype, device: torch.device) -> Quantized | None:
        """Return a weight of these pieces, on a device, as a checkpoint stores them; None if they are not stored alike.
        `dtype` is that of activations.
        """
        columns = pieces[0].shape[1]
        kept = stored_format(pieces[0].format, columns)
        others = [stored_format(piece.format, columns) for piece in pieces[1:]]
        if kept is None or any(each != kept for each in others) or not read_alike(pieces):
            return None
        parts = [_part(piece, kept, device) for piece in pieces]
        names = ("levels", "scales", "zeros", "offsets")
        joined = {name: torch.cat([part[name] for part in parts]) for name in names if name in parts[0]}
        table = None
        if kept.table is not None:
            table = torch.tensor([*kept.table, *[0] * (TABLE_SIZE - len(kept.table))], dtype=torch.float32)
        order = getattr(pieces[0], "order", None)
        return cls(
            kept,
            columns,
            dtype,
            **joined,
            table=None if table is None else table.to(device),
            order=None if order is None else order.to(device, torch.int32),
        )

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all that is kept."""
        parts = (self.levels, self.scales, self.zeros, self.offsets, self.table, self.order)
        return sum(each.nbytes for each in parts if each is not None)


def _quantized(weight: Tensor, kept: Format) -> tuple[Tensor, ...]:
    """Return the levels and scales of rows, of 4 bits with offsets."""
    rows, columns = weight.shape
    padded = kept.padded(columns)
    grouped = F.pad(weight.float(), (0, padded - columns)).view(rows, -1, kept.group or padded)
    if kept.bits == 8:
        scales = grouped.abs().amax(-1) / 127
        return _rounded(grouped, scales).to(torch.int8).view(rows, padded), scales
    offsets = grouped.amin(-1)
    scales = (grouped.amax(-1) - offsets) / 15
    levels = _rounded(grouped - offsets.unsqueeze(-1), scales).to(torch.uint8).view(rows, padded)
    return _halved(levels), scales, offsets


def _rounded(grouped: Tensor, scales: Tensor) -> Tensor:
    """Return groups divided by their scales and rounded; zeros where a scale is zero."""
    return (grouped / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()


def _halved(levels: Tensor) -> Tensor:
    """Return levels [N, K'] of 4 bits, two in a byte: [N, K' / 2]."""
    low, high = levels.chunk(2, dim=1)
    return low | (high << 4)


def _part(piece: QuantizedWeight, kept: Format, device: torch.device) -> dict[str, Tensor]:
    """Return what `Quantized` holds of the rows of a piece, by its name there."""
    columns, padded = piece.shape[1], kept.padded(piece.shape[1])

    def grouped(numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers of groups, as wide as they are kept."""
        repeats = 1 if not kept.group else stored_group // kept.group
        spread = numbers.to(device).repeat_interleave(repeats, dim=1)[
            :, : -(-columns // kept.group) if kept.group else 1
        ]
        return F.pad(spread.to(dtype), (0, kept.num_groups(columns) - spread.shape[1]))

    if not isinstance(piece, GroupQuantized):
        stored_group = FP8_GROUP
        levels = F.pad(piece.values.view(torch.uint8).to(device), (0, padded - columns))
        return {"levels": levels, "scales": grouped(piece.scales, torch.float32)}
    stored_group = piece.format.group_size
    levels = piece.levels.to(device)
    if kept.bias:
        levels = (levels + kept.bias).to(torch.uint8)
    levels = F.pad(levels, (0, padded - columns))
    part = {"levels": _halved(levels) if kept.bits == 4 else levels}
    part["scales"] = grouped(piece.group_scales(), kept.scale_dtype)
    if piece.zeros is not None:
        part["zeros"] = grouped(piece.zeros, torch.uint8)
    if (mins := piece.group_mins()) is not None:
        assert kept.offset_dtype is not None
        part["offsets"] = grouped(-mins, kept.offset_dtype)
    return part
