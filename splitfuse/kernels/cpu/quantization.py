"""Chooses the format of each weight, by its role in the network, and says why. The arithmetic is in csrc/weights.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu.structs import BF16, INT4, INT8
from splitfuse.kernels.weights import WeightRole

GROUP_SIZES = {"int8": (128,), "int4": (64, 128)}
"""Quantizations, the one that loses least first, and the group sizes of each."""
INT4_GROUP = 64
INT4_QVALUES = (-12, -9, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9)
"""Values of the sixteen nibbles of int4: the least-squares fit to weights whose scale has the sign that puts the
largest of a group on the negative end, of those that span no more than 21: so few that AVX2 sums products in 16 bits
(docs/decisions/0082-small-int4.md).
"""
INT4_BIAS = -INT4_QVALUES[0]
"""Number that is added to the values as C++ reads them: none is negative then."""
QVALUES = (ctypes.c_uint8 * 16)(*(value + INT4_BIAS for value in INT4_QVALUES))
"""Values of the nibbles as C++ reads them."""


@dataclass(frozen=True)
class WeightFormat:
    """Holds a format's number in structs.py, and how many columns share a scale (None: a whole row)."""

    number: int
    group: int | None = None


def choose_format(role: WeightRole, quantization: str | None, group_size: int | None) -> WeightFormat:
    """Return the format of a weight of this role. Raises ConfigError for an unknown quantization or group size.

    >>> choose_format(WeightRole.HEAD, "int4", None) == WeightFormat(INT8)
    True
    """
    if quantization is None or role in (WeightRole.ROUTER, WeightRole.SHARED_GATE, WeightRole.GATES):
        return WeightFormat(BF16)
    if quantization not in GROUP_SIZES:
        raise ConfigError(f"quantization={quantization!r} is unknown: use {' or '.join(GROUP_SIZES)}")
    if group_size is not None and group_size not in GROUP_SIZES[quantization]:
        sizes = " or ".join(str(size) for size in GROUP_SIZES[quantization])
        raise ConfigError(f"quantization_group_size={group_size} is not supported for {quantization}: use {sizes}")
    if quantization == "int8":
        return WeightFormat(INT8, group_size)
    if (
        role is WeightRole.HEAD
    ):  # in int4 it alone would cost nearly as much as all layers; tied, it is the embedding too
        return WeightFormat(INT8)
    return WeightFormat(INT4, group_size or INT4_GROUP)
