"""Describes weights as quantized checkpoints store them. A backend that `accepts` a format keeps its bits; for others
the weights are dequantized while they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

ROWS_AT_ONCE = 2**22
"""Number of elements, about, that are dequantized at a time: they exist in fp32 too."""


@dataclass(frozen=True, kw_only=True)
class GroupFormat:
    """Describes weights that are quantized in groups of neighbouring columns: which numbers a group has.

    A weight is `scale * level`, or with `mins` `scale * level - min`, in fp32. With `super_groups` the scales and mins
    of so many neighbouring groups are whole numbers, multiples of one scale and of one min. With a `table` levels are
    indices into it.
    """

    name: str  # as its files and messages call it: "Q4_K"
    bits: int  # of a level
    group_size: int
    mins: bool = False
    super_groups: int | None = None
    table: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GroupQuantized:
    """Holds a weight [N, K] in a `GroupFormat`, unpacked: what is kept of it must be a copy.

    >>> format = GroupFormat(name="Q4_1", bits=4, group_size=32, mins=True)
    >>> ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    >>> weight = GroupQuantized(
    ...     format=format, levels=torch.arange(64, dtype=torch.uint8).view(1, 64) % 16, scales=ones, mins=zeros
    ... )
    >>> weight.dequantize(torch.float32)[0, :3]
    tensor([0., 1., 2.])
    """

    format: GroupFormat
    levels: Tensor  # [N, K], int8 or uint8
    scales: Tensor  # [N, K / group_size]: floats, or int8 or uint8 multiples of super_scales
    mins: Tensor | None = None  # likewise
    super_scales: Tensor | None = None  # [N, K / (group_size * super_groups)], floats
    super_mins: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight."""
        rows, columns = self.levels.shape
        return rows, columns

    def rows(self, index: Tensor | slice) -> GroupQuantized:
        """Return some of the rows, or all in another order."""

        def taken(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[index]

        return replace(
            self,
            levels=self.levels[index],
            scales=self.scales[index],
            mins=taken(self.mins),
            super_scales=taken(self.super_scales),
            super_mins=taken(self.super_mins),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight: what fp32 arithmetic makes of it, rounded to `dtype`."""
        (num_rows, columns), out = self.shape, torch.empty(self.shape, dtype=dtype)
        step = max(1, ROWS_AT_ONCE // columns)
        for begin in range(0, num_rows, step):
            out[begin : begin + step] = self.rows(slice(begin, begin + step))._in_fp32()
        return out

    def _in_fp32(self) -> Tensor:
        table, size = self.format.table, self.format.group_size
        levels = self.levels.float() if table is None else torch.tensor(table).float()[self.levels.int()]
        weights = levels.view(len(levels), -1, size) * self._spread(self.scales, self.super_scales).unsqueeze(-1)
        if self.mins is not None:
            weights -= self._spread(self.mins, self.super_mins).unsqueeze(-1)
        return weights.view(self.shape)

    def _spread(self, numbers: Tensor, factors: Tensor | None) -> Tensor:
        """Return the scale or min of each group, in fp32."""
        if factors is None:
            return numbers.float()
        groups = numbers.float().view(*factors.shape, -1)
        return (groups * factors.float().unsqueeze(-1)).view(numbers.shape)


QuantizedFormat: TypeAlias = GroupFormat
"""Description of how a tensor of a checkpoint is quantized: all that a backend must know to accept it."""
QuantizedWeight: TypeAlias = GroupQuantized
"""Weight as a checkpoint stores it, in one of these formats."""
