"""Keeps weights in 8 or 4 bits, with a scale for each group of columns of a row, and in 4 bits an offset.

Products are in the dtype of activations: what is saved is the reading of weights, which bounds small steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.interface import Role

GROUP_SIZES = {"int8": (128,), "int4": (64, 128)}
"""Quantizations, the one that loses least first, and the group sizes of each."""
INT4_GROUP = 64
AT_ONCE = 2**23
"""Number of elements, about, that are dequantized at a time: they exist in fp32 too."""
AT_ONCE_BYTES = 5
"""Bytes of each of them besides the result: a number in fp32, and its level in a byte."""


@dataclass(frozen=True)
class Format:
    """Holds the bits of a weight's levels, and how many columns share a scale (0: a whole row)."""

    bits: int
    group: int

    def padded(self, columns: int) -> int:
        """Return the number of columns that are kept of so many: whole groups, in 4 bits an even number of them."""
        step = max(self.group, 1) * (2 if self.bits == 4 else 1)
        return -(-columns // step) * step

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight [N, K]."""
        rows, padded = shape[0], self.padded(shape[1])
        groups = padded // self.group if self.group else 1
        return rows * (padded * self.bits // 8 + groups * (8 if self.bits == 4 else 4))

    def copy_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes that `Quantized.dequantize` takes for a weight [N, K]: its result, and what it computes."""
        rows, padded = shape[0], self.padded(shape[1])
        return rows * shape[1] * dtype.itemsize + min(rows, rows_at_once(padded)) * padded * AT_ONCE_BYTES


def choose_format(role: Role, quantization: str | None, group_size: int | None) -> Format | None:
    """Return the format of a weight of this role; None: it stays as it is. Raises ConfigError for a group size that the
    quantization does not have.

    >>> choose_format(Role.HEAD, "int4", None)
    Format(bits=8, group=0)
    """
    if quantization is None:
        return None
    if group_size is not None and group_size not in GROUP_SIZES[quantization]:
        valid = " or ".join(map(str, GROUP_SIZES[quantization]))
        raise ConfigError(f"quantization_group_size={group_size} cannot be used with {quantization}: use {valid}")
    if not role.linear or role.by_head or role in (Role.ROUTER, Role.SHARED_GATE, Role.GATES):
        return None
    if quantization == "int8" or role is Role.HEAD:
        return Format(8, (group_size or 0) if quantization == "int8" else 0)
    return Format(4, group_size or INT4_GROUP)


@dataclass(frozen=True)
class Quantized:
    """Holds a weight [N, K]: `levels` int8 [N, K'], or uint8 [N, K' / 2], whose low halves have the first K' / 2
    columns, `scales` and `offsets` fp32 [N, groups].
    """

    format: Format
    columns: int  # K
    levels: Tensor
    scales: Tensor
    offsets: Tensor | None
    dtype: torch.dtype  # of activations

    @classmethod
    def of(cls, weight: Tensor, kept: Format) -> Quantized:
        """Return a weight rounded to the nearest levels: of 8 bits from -127 to 127, of 4 bits 16 from the least to the
        largest of a group.
        """
        rows, columns = weight.shape
        padded = kept.padded(columns)
        wide = torch.nn.functional.pad(weight.float(), (0, padded - columns))
        grouped = wide.view(rows, -1, kept.group or padded)
        if kept.bits == 8:
            scales, offsets = grouped.abs().amax(-1) / 127, None
            levels = _rounded(grouped, scales).to(torch.int8).view(rows, padded)
            return cls(kept, columns, levels, scales, offsets, weight.dtype)
        offsets = grouped.amin(-1)
        scales = (grouped.amax(-1) - offsets) / 15
        whole = _rounded(grouped - offsets.unsqueeze(-1), scales).to(torch.uint8).view(rows, padded)
        low, high = whole.chunk(2, dim=1)
        return cls(kept, columns, low | (high << 4), scales, offsets, weight.dtype)

    @property
    def padded(self) -> int:
        """Return the number of columns that are kept."""
        return self.levels.shape[1] * (2 if self.format.bits == 4 else 1)

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return the weight, or some of its rows: what fp32 arithmetic makes of it, rounded to `dtype`."""
        num_rows, step = len(self.levels if rows is None else rows), rows_at_once(self.padded)
        out = torch.empty(num_rows, self.columns, dtype=dtype, device=self.levels.device)
        for begin in range(0, num_rows, step):
            part = slice(begin, begin + step)
            out[part] = self._in_fp32(part if rows is None else rows[part])[:, : self.columns]
        return out

    def _in_fp32(self, rows: slice | Tensor) -> Tensor:
        """Return some rows with all columns that are kept."""
        levels, scales = self.levels[rows], self.scales[rows]
        if self.format.bits == 4:
            levels = torch.cat((levels & 15, levels >> 4), dim=1)
        grouped = levels.float().view(len(levels), scales.shape[1], -1)
        grouped *= scales.unsqueeze(-1)
        if self.offsets is not None:
            grouped += self.offsets[rows].unsqueeze(-1)
        return grouped.flatten(1)


def rows_at_once(padded: int) -> int:
    """Return the number of rows of so many columns that are dequantized at a time."""
    return max(1, AT_ONCE // max(padded, 1))


def _rounded(grouped: Tensor, scales: Tensor) -> Tensor:
    """Return groups divided by their scales and rounded; zeros where a scale is zero."""
    return (grouped / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
