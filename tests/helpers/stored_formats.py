"""Lists formats of quantized checkpoints, and makes random weights in them."""

from __future__ import annotations

import torch

from splitfuse.kernels.quantized import FP4_TABLE, Fp8Quantized, GroupFormat, GroupQuantized
from splitfuse.models.sources.gguf import blocks

FORMATS = blocks.FORMATS | {
    each.name: each
    for each in (
        GroupFormat(name="MX", bits=4, group_size=32, table=FP4_TABLE, scale_dtype=torch.float8_e8m0fnu),
        GroupFormat(name="GPTQ", bits=4, group_size=128, zeros=True),
        GroupFormat(name="GPTQ of 8 bits", bits=8, group_size=64, zeros=True, scale_dtype=torch.bfloat16),
        GroupFormat(name="int4 in groups of 96", bits=4, group_size=96, scale_dtype=torch.bfloat16),
        GroupFormat(name="int8 by row", bits=8, group_size=2304, scale_dtype=torch.float32),
    )
}


def weight_in(stored: GroupFormat, rows: int, columns: int) -> GroupQuantized:
    """A random weight, whose levels, scales, mins and zeros are all those there are."""
    groups, runs = -(-columns // stored.group_size), -(-columns // 256)
    least = -(2 ** (stored.bits - 1)) if stored.signed else 0
    levels = torch.randint(least, least + 2**stored.bits, (rows, columns))
    scales, more = torch.randn(rows, groups).to(stored.scale_dtype), {}
    if stored.scale_dtype == torch.float8_e8m0fnu:
        scales = torch.randint(0, 130, (rows, groups)).to(torch.uint8).view(torch.float8_e8m0fnu)
    if stored.super_groups:
        most = 16 if stored.bits == 2 else 64
        scales = torch.randint(*((0, most) if stored.mins else (-128, 128)), (rows, groups))
        scales = scales.to(torch.uint8 if stored.mins else torch.int8)
        more["super_scales"] = torch.randn(rows, runs).half()
    if stored.mins:
        more["mins"] = torch.randn(rows, groups).to(stored.scale_dtype)
    if stored.mins and stored.super_groups:
        more["mins"] = torch.randint(0, 16 if stored.bits == 2 else 64, (rows, groups)).to(torch.uint8)
        more["super_mins"] = torch.randn(rows, runs).half()
    if stored.zeros:
        more["zeros"] = torch.randint(0, 2**stored.bits, (rows, groups)).to(torch.uint8)
    levels = levels.to(torch.int8 if stored.signed else torch.uint8)
    return GroupQuantized(format=stored, levels=levels, scales=scales, **more)


def fp8(rows: int, columns: int) -> Fp8Quantized:
    codes = torch.randint(0, 127, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    return Fp8Quantized(values=values, scales=torch.randn(rows, -(-columns // 128)))
