"""In which format each weight is kept: by its role in the network, and why. The arithmetic is csrc/weights.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu.bindings import BF16, INT4, INT8

QUANTIZATIONS = ("int8", "int4")  # what loses least first
GROUP_SIZES = {"int8": (128,), "int4": (64, 128)}
INT4_GROUP = 64
SIXTEEN = (-127, -98, -77, -60, -46, -33, -21, -10, 1, 12, 24, 36, 50, 65, 83, 107)
LEVELS = (ctypes.c_uint8 * 16)(*(level + 128 for level in SIXTEEN))
"""What the sixteen nibbles of int4 stand for, + 128: the least-squares fit to normal weights whose scale has the sign
that puts the largest of a group on the negative end (docs/decisions/0010-quantization.md).
"""


@dataclass(frozen=True)
class WeightFormat:
    """A number of library.py, and how many columns share a scale (None: a whole row)."""

    number: int
    group: int | None = None


def choose_format(role: str, quantization: str | None, group_size: int | None) -> WeightFormat:
    """The format of a weight of this role. Raises ConfigError for a combination that there is not."""
    if quantization is None or role == "router":
        return WeightFormat(BF16)
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    if group_size is not None and group_size not in GROUP_SIZES[quantization]:
        sizes = " or ".join(str(size) for size in GROUP_SIZES[quantization])
        raise ConfigError(f"quantization_group_size must be {sizes} for {quantization}, not {group_size}")
    if quantization == "int8":
        return WeightFormat(INT8, group_size)
    if role == "head":  # in int4 it alone would cost nearly as much as all layers; tied, it is the embedding too
        return WeightFormat(INT8)
    return WeightFormat(INT4, group_size or INT4_GROUP)
