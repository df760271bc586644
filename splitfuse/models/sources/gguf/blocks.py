"""Unpacks the blocks in which GGUF files store quantized tensors. A row is cut into blocks of 32 columns, or into
super-blocks of 256 whose groups of 16 or 32 columns share numbers in fp16.

Layouts: the structs of ggml (ggml-common.h), as its reference dequantization reads them; nibbles and bit pairs are
listed lowest first. Every function gets bytes [rows, blocks, bytes of a block], and returns arrays of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from splitfuse.kernels.quantized import FP4_TABLE, GroupFormat, GroupQuantized

BLOCKS_AT_ONCE = 2**15
"""Number of blocks, about, that are unpacked at a time: what lies between exists several times."""

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of the sixteen levels."""

FORMATS = {
    "Q4_0": GroupFormat(name="Q4_0", bits=4, group_size=32),
    "Q4_1": GroupFormat(name="Q4_1", bits=4, group_size=32, mins=True),
    "Q5_0": GroupFormat(name="Q5_0", bits=5, group_size=32),
    "Q5_1": GroupFormat(name="Q5_1", bits=5, group_size=32, mins=True),
    "Q8_0": GroupFormat(name="Q8_0", bits=8, group_size=32),
    "Q2_K": GroupFormat(name="Q2_K", bits=2, group_size=16, mins=True, super_groups=16),
    "Q3_K": GroupFormat(name="Q3_K", bits=3, group_size=16, super_groups=16),
    "Q4_K": GroupFormat(name="Q4_K", bits=4, group_size=32, mins=True, super_groups=8),
    "Q5_K": GroupFormat(name="Q5_K", bits=5, group_size=32, mins=True, super_groups=8),
    "Q6_K": GroupFormat(name="Q6_K", bits=6, group_size=16, super_groups=16),
    "IQ4_NL": GroupFormat(name="IQ4_NL", bits=4, group_size=32, table=IQ4_TABLE),
    "IQ4_XS": GroupFormat(name="IQ4_XS", bits=4, group_size=32, super_groups=8, table=IQ4_TABLE),
    "MXFP4": GroupFormat(name="MXFP4", bits=4, group_size=32, table=FP4_TABLE, scale_dtype=torch.bfloat16),
}
"""Name of a tensor type -> how it is quantized."""


def unpack(name: str, blocks: Tensor) -> GroupQuantized:
    """Return the rows of a tensor of that type, from its bytes [rows, blocks, bytes of a block]."""
    step = max(1, BLOCKS_AT_ONCE // blocks.shape[1])
    pieces = [_UNPACKERS[name](piece) for piece in torch.split(blocks, step)]
    fields = {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}
    return GroupQuantized(format=FORMATS[name], **fields)


def q4_0(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d fp16 and 16 bytes of nibbles of columns i and i + 16. A weight is d (q - 8)."""
    d, nibbles = _cut(blocks, 2, 16)
    return {"levels": _rows(_halves(nibbles).char() - 8), "scales": _fp16(d)}


def q4_1(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d and m fp16 and 16 bytes of nibbles of columns i and i + 16. A weight is d q + m."""
    d, m, nibbles = _cut(blocks, 2, 2, 16)
    return {"levels": _rows(_halves(nibbles)), "scales": _fp16(d), "mins": -_fp16(m)}


def q5_0(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d fp16, 32 fifth bits and 16 bytes of nibbles as in Q4_0. A weight is d (q - 16)."""
    d, fifth, nibbles = _cut(blocks, 2, 4, 16)
    return {"levels": _rows(_with_fifth(nibbles, fifth).char() - 16), "scales": _fp16(d)}


def q5_1(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d and m fp16, 32 fifth bits and 16 bytes of nibbles as in Q4_1. A weight is d q + m."""
    d, m, fifth, nibbles = _cut(blocks, 2, 2, 4, 16)
    return {"levels": _rows(_with_fifth(nibbles, fifth)), "scales": _fp16(d), "mins": -_fp16(m)}


def q8_0(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d fp16 and 32 int8. A weight is d q."""
    d, levels = _cut(blocks, 2, 32)
    return {"levels": _rows(levels.contiguous().view(torch.int8)), "scales": _fp16(d)}


def q2_k(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack 16 bytes of a scale (low nibble) and a min (high) of 16 columns, 64 bytes of bit pairs, d and dmin fp16. A
    weight is d scale q - dmin min. Each half of the columns has 32 bytes: byte i holds columns i, i + 32, i + 64 and
    i + 96.
    """
    scales, pairs, d, dmin = _cut(blocks, 16, 64, 2, 2)
    return {
        "levels": _rows(_fields(pairs, 32, 2)),
        "scales": _rows(scales & 15),
        "mins": _rows(scales >> 4),
        "super_scales": _fp16(d),
        "super_mins": _fp16(dmin),
    }


def q3_k(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack 32 bytes of third bits, 64 bytes of bit pairs as in Q2_K, 12 bytes of scales and d fp16. A weight is
    d (scale - 32) (q - 4).

    Bit j of byte i is the third of column i + 32 j. Scales have 6 bits: 16 nibbles of the first 8 bytes, 16 bit pairs
    of the last 4.
    """
    third, pairs, scales, d = _cut(blocks, 32, 64, 12, 2)
    levels = _fields(pairs, 32, 2) | _fields(third, 32, 1) << 2
    low, high = _cut(scales, 8, 4)
    return {
        "levels": _rows(levels.char() - 4),
        "scales": _rows((_fields(low, 8, 4) | _fields(high, 4, 2) << 4).char() - 32),
        "super_scales": _fp16(d),
    }


def q4_k(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d and dmin fp16, 12 bytes of scales and mins and 128 bytes of nibbles. A weight is d scale q - dmin min.

    Each quarter of the columns has 32 bytes: byte i holds columns i and i + 32.
    """
    d, dmin, packed, nibbles = _cut(blocks, 2, 2, 12, 128)
    scales, mins = _six_bits(packed)
    return {
        "levels": _rows(_fields(nibbles, 32, 4)),
        "scales": _rows(scales),
        "mins": _rows(mins),
        "super_scales": _fp16(d),
        "super_mins": _fp16(dmin),
    }


def q5_k(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d and dmin fp16, 12 bytes of scales and mins, 32 bytes of fifth bits (bit j of byte i is that of column
    i + 32 j) and 128 bytes of nibbles as in Q4_K.
    """
    d, dmin, packed, fifth, nibbles = _cut(blocks, 2, 2, 12, 32, 128)
    scales, mins = _six_bits(packed)
    return {
        "levels": _rows(_fields(nibbles, 32, 4) | _fields(fifth, 32, 1) << 4),
        "scales": _rows(scales),
        "mins": _rows(mins),
        "super_scales": _fp16(d),
        "super_mins": _fp16(dmin),
    }


def q6_k(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack 128 bytes of nibbles, 64 of bit pairs above them, 16 int8 scales and d fp16. A weight is d scale (q - 32).

    Each half of the columns has 64 bytes of nibbles, byte i of columns i and i + 64, and 32 of pairs as in Q2_K.
    """
    nibbles, pairs, scales, d = _cut(blocks, 128, 64, 16, 2)
    return {
        "levels": _rows((_fields(nibbles, 64, 4) | _fields(pairs, 32, 2) << 4).char() - 32),
        "scales": _rows(scales.contiguous().view(torch.int8)),
        "super_scales": _fp16(d),
    }


def iq4_nl(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d fp16 and 16 bytes of nibbles as in Q4_0, indices of IQ4_TABLE."""
    d, nibbles = _cut(blocks, 2, 16)
    return {"levels": _rows(_halves(nibbles)), "scales": _fp16(d)}


def iq4_xs(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack d fp16, 8 bit pairs above the 8 nibbles of scales, 128 bytes of nibbles, 16 for each group of 32 columns
    as in IQ4_NL. A weight is d (scale - 32) table[q].
    """
    d, high, low, nibbles = _cut(blocks, 2, 2, 4, 128)
    # Scales lie one behind the other, unlike the fields elsewhere: nibbles 2i and 2i + 1 in byte i.
    low, high = _in_order(low, 4), _in_order(high, 2)
    return {
        "levels": _rows(_halves(nibbles.reshape(*nibbles.shape[:2], 8, 16))),
        "scales": _rows((low | high << 4).char() - 32),
        "super_scales": _fp16(d),
    }


def mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    """Unpack an exponent e and 16 bytes of nibbles as in Q4_0, indices of FP4_TABLE. A weight is
    2^(e - 128) table[q].
    """
    e, nibbles = _cut(blocks, 1, 16)
    exponent = _rows(e).int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), exponent - 1 << 23)
    return {"levels": _rows(_halves(nibbles)), "scales": bits.view(torch.float32).bfloat16()}


_UNPACKERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
}


def _cut(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Return the fields of blocks, by their sizes in bytes."""
    return torch.split(blocks, list(sizes), dim=-1)


def _rows(values: Tensor) -> Tensor:
    """Return what blocks have, joined along each row."""
    return values.reshape(len(values), -1)


def _fp16(field: Tensor) -> Tensor:
    return _rows(field.contiguous().view(torch.float16))


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8)


def _fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """Return fields of so many bits: of each `width` bytes the lowest of all, then the next of all, and so on."""
    spread = packed.reshape(*packed.shape[:-1], -1, 1, width) >> _shifts(bits).unsqueeze(1)
    fields: Tensor = spread & (1 << bits) - 1
    return fields.flatten(-3)


def _in_order(packed: Tensor, bits: int) -> Tensor:
    """Return fields of so many bits: all of a byte, lowest first, then those of the next."""
    return (packed.unsqueeze(-1) >> _shifts(bits) & (1 << bits) - 1).flatten(-2)


def _halves(nibbles: Tensor) -> Tensor:
    """Return all low nibbles, then all high ones."""
    return torch.cat((nibbles & 15, nibbles >> 4), dim=-1)


def _with_fifth(nibbles: Tensor, fifth: Tensor) -> Tensor:
    """Return levels of five bits, of which the highest lie one behind the other."""
    return _halves(nibbles) | _in_order(fifth, 1) << 4


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8 scales and 8 mins of 6 bits. Bytes 0 to 3 hold the first four scales and 4 to 7 the first four mins; the
    others have their upper bits above these, and their nibbles in bytes 8 to 11.
    """
    scales, mins, low = _cut(packed, 4, 4, 4)
    return (
        torch.cat((scales & 63, low & 15 | scales >> 2 & 48), dim=-1),
        torch.cat((mins & 63, low >> 4 | mins >> 2 & 48), dim=-1),
    )
