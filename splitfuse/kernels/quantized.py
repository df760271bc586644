"""Describes weights as quantized checkpoints store them. A backend that `accepts` a format keeps its bits; for others
the weights are dequantized while they are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

ROWS_AT_ONCE = 2**22
"""Number of elements, about, that are dequantized at a time: they exist in fp32 too."""
FP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of FP4 (e2m1), by their bits."""
FP8_GROUP = 128
"""Number of columns of a row in FP8 that share a scale."""


@dataclass(frozen=True, kw_only=True)
class GroupFormat:
    """Describes weights that are quantized in groups of neighbouring columns: which numbers a group has.

    A weight is `scale * level`, with `mins` `scale * level - min`, with `zeros` `scale * (level - zero)`, in fp32. With
    `super_groups` the scales and mins of so many neighbouring groups are whole numbers, multiples of one scale and of
    one min. With a `table` levels are indices into it; without table, mins and zeros they have signs.
    """

    name: str  # as its files and messages call it: "Q4_K"
    bits: int  # of a level
    group_size: int
    mins: bool = False
    zeros: bool = False
    super_groups: int | None = None
    table: tuple[int, ...] | None = None
    scale_dtype: torch.dtype = torch.float16  # of scales and mins, or of what they are multiples of

    @property
    def signed(self) -> bool:
        """Return whether levels are int8, else uint8."""
        return self.table is None and not self.mins and not self.zeros


@dataclass(frozen=True, kw_only=True)
class GroupQuantized:
    """Holds a weight [N, K] in a `GroupFormat`, unpacked: what is kept of it must be a copy.

    >>> format = GroupFormat(name="Q4_1", bits=4, group_size=32, mins=True, scale_dtype=torch.float32)
    >>> ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    >>> weight = GroupQuantized(
    ...     format=format, levels=torch.arange(64, dtype=torch.uint8).view(1, 64) % 16, scales=ones, mins=zeros
    ... )
    >>> weight.dequantize(torch.float32)[0, :3]
    tensor([0., 1., 2.])
    """

    format: GroupFormat
    levels: Tensor  # [N, K], int8 or uint8
    scales: Tensor  # [N, K / group_size], rounded up: floats, or int8 or uint8 multiples of super_scales
    mins: Tensor | None = None  # likewise
    zeros: Tensor | None = None  # the same shape, uint8
    super_scales: Tensor | None = None  # [N, K / (group_size * super_groups)], floats
    super_mins: Tensor | None = None
    order: Tensor | None = None  # [K]: column i is column order[i] of the weight; None: i

    def __post_init__(self) -> None:
        floats = (self.super_scales, self.super_mins) if self.format.super_groups else (self.scales, self.mins)
        assert all(each is None or each.dtype == self.format.scale_dtype for each in floats), self.format.name

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight."""
        rows, columns = self.levels.shape
        return rows, columns

    def rows(self, index: Tensor | slice) -> GroupQuantized:
        """Return some of the rows, or all in another order."""
        names = ("levels", "scales", "mins", "zeros", "super_scales", "super_mins")
        parts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part[index] for name, part in parts.items() if part is not None})

    def only_columns(self, columns: range) -> GroupQuantized:
        """Return some of the columns, which `are_whole_groups`. Theirs must be the order of the weight."""
        assert self.order is None
        size = self.format.group_size
        sizes = {"levels": 1, "scales": size, "mins": size, "zeros": size}
        sizes |= dict.fromkeys(("super_scales", "super_mins"), size * (self.format.super_groups or 1))
        parts: dict[str, Any] = {name: getattr(self, name) for name in sizes}
        parts = {name: _of_columns(part, columns, sizes[name]) for name, part in parts.items() if part is not None}
        return replace(self, **parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight: what fp32 arithmetic makes of it, rounded to `dtype`."""
        (num_rows, columns), out = self.shape, torch.empty(self.shape, dtype=dtype)
        step = max(1, ROWS_AT_ONCE // columns)
        for begin in range(0, num_rows, step):
            weights = self.rows(slice(begin, begin + step))._in_fp32()
            if self.order is None:
                out[begin : begin + step] = weights
            else:
                out[begin : begin + step, self.order.long()] = weights.to(dtype)
        return out

    def _in_fp32(self) -> Tensor:
        if self.format.table is None:
            weights = self.levels.float()
        else:
            weights = torch.tensor(self.format.table, dtype=torch.float32)[self.levels.int()]
        if self.zeros is not None:
            weights -= self._spread(self.zeros.float())
        weights *= self._spread(self.group_scales())
        if (mins := self.group_mins()) is not None:
            weights -= self._spread(mins)
        return weights

    def group_scales(self) -> Tensor:
        """Return the scale of each group, in fp32."""
        return self._times(self.scales, self.super_scales)

    def group_mins(self) -> Tensor | None:
        """Return the min of each group, in fp32, if there are mins."""
        return None if self.mins is None else self._times(self.mins, self.super_mins)

    def _times(self, numbers: Tensor, factors: Tensor | None) -> Tensor:
        if factors is None:
            return numbers.float()
        spread = factors.float().repeat_interleave(self.format.super_groups or 1, dim=1)
        return numbers.float() * spread[:, : numbers.shape[1]]

    def _spread(self, numbers: Tensor) -> Tensor:
        """Return the numbers of groups for each of their columns."""
        return numbers.repeat_interleave(self.format.group_size, dim=1)[:, : self.levels.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Fp8Format:
    """Describes weights in FP8 (e4m3), each `FP8_GROUP` columns of a row times a scale in fp32."""

    name: str = "FP8"


@dataclass(frozen=True, kw_only=True)
class Fp8Quantized:
    """Holds a weight [N, K] in FP8.

    >>> values = torch.ones(1, 2).to(torch.float8_e4m3fn)
    >>> Fp8Quantized(values=values, scales=torch.tensor([[0.5]])).dequantize(torch.float32)
    tensor([[0.5000, 0.5000]])
    """

    values: Tensor  # [N, K], float8_e4m3fn
    scales: Tensor  # [N, K / FP8_GROUP], rounded up, fp32
    format: Fp8Format = Fp8Format()

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight."""
        rows, columns = self.values.shape
        return rows, columns

    def rows(self, index: Tensor | slice) -> Fp8Quantized:
        """Return some of the rows, or all in another order."""
        values = self.values.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return replace(self, values=values, scales=self.scales[index])

    def only_columns(self, columns: range) -> Fp8Quantized:
        """Return some of the columns, which `are_whole_groups`."""
        scales = _of_columns(self.scales, columns, FP8_GROUP)
        return replace(self, values=self.values[:, columns.start : columns.stop], scales=scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight: what fp32 arithmetic makes of it, rounded to `dtype`."""
        scales = self.scales.repeat_interleave(FP8_GROUP, dim=1)[:, : self.shape[1]]
        return (self.values.float() * scales).to(dtype)


QuantizedFormat: TypeAlias = GroupFormat | Fp8Format
"""Description of how a tensor of a checkpoint is quantized: all that a backend must know to accept it."""
QuantizedWeight: TypeAlias = GroupQuantized | Fp8Quantized
"""Weight as a checkpoint stores it, in one of these formats."""


def read_alike(pieces: Sequence[QuantizedWeight]) -> bool:
    """Return whether the columns of pieces are in one order."""
    first, *others = (piece.order if isinstance(piece, GroupQuantized) else None for piece in pieces)
    return all(
        each is first or (each is not None and first is not None and torch.equal(each, first)) for each in others
    )


def are_whole_groups(stored: QuantizedFormat, columns: range, width: int) -> bool:
    """Return whether some of the columns of a weight, which has `width`, are whole groups of it, or of a group that all
    are in.

    >>> are_whole_groups(Fp8Format(), range(128, 200), 200), are_whole_groups(Fp8Format(), range(100, 200), 200)
    (True, False)
    """
    size = FP8_GROUP if isinstance(stored, Fp8Format) else stored.group_size
    if size >= width:
        return True
    if isinstance(stored, GroupFormat):
        size *= stored.super_groups or 1
    return columns.start % size == 0 and (columns.stop % size == 0 or columns.stop == width)


def _of_columns(numbers: Tensor, columns: range, size: int) -> Tensor:
    """Return the numbers of groups of so many columns that some columns are in."""
    return numbers[:, columns.start // size : -(-columns.stop // size)]
