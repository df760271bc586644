"""Makes random weights as quantized checkpoints store them, for the stages that check and compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from splitfuse.kernels.quantized import FP4_TABLE, Fp8Quantized, GroupFormat, GroupQuantized, QuantizedWeight

E8M0 = torch.float8_e8m0fnu
FORMATS = (
    GroupFormat(name="AWQ", bits=4, group_size=128, zeros=True),
    GroupFormat(name="GPTQ", bits=4, group_size=32),
    GroupFormat(name="int8 by row", bits=8, group_size=2**20, scale_dtype=torch.bfloat16),
    GroupFormat(name="MXFP4", bits=4, group_size=32, table=FP4_TABLE, scale_dtype=E8M0),
)
"""Formats in groups: with zeros, with columns in another order, of whole rows, and with a table."""


def stored_weights() -> dict[str, Callable[[int, int], QuantizedWeight]]:
    """Return makers of weights [N, K] by the names of their formats."""
    return {"FP8": in_fp8} | {each.name: partial(in_groups, each) for each in FORMATS}


def in_groups(stored: GroupFormat, rows: int, columns: int) -> GroupQuantized:
    """Return a weight whose numbers are near 1, its columns in another order if it is of GPTQ."""
    least = -(2 ** (stored.bits - 1)) if stored.signed else 0
    levels = torch.randint(least, least + 2**stored.bits, (rows, columns))
    shape = rows, -(-columns // stored.group_size)
    scales = (torch.rand(shape) + 0.5).to(torch.float32 if stored.scale_dtype == E8M0 else stored.scale_dtype)
    if stored.scale_dtype == E8M0:
        scales = torch.randint(122, 126, shape, dtype=torch.uint8).view(E8M0)
    return GroupQuantized(
        format=stored,
        levels=levels.to(torch.int8 if stored.signed else torch.uint8),
        scales=scales if stored.scale_dtype == E8M0 else scales / 2 ** (stored.bits - 1),
        zeros=torch.randint(0, 2**stored.bits, shape).to(torch.uint8) if stored.zeros else None,
        order=torch.randperm(columns) if stored.name == "GPTQ" else None,
    )


def in_fp8(rows: int, columns: int) -> Fp8Quantized:
    """Return a weight in FP8 with scales of rows and 128 columns."""
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    return Fp8Quantized(values=values, scales=torch.rand(rows, -(-columns // 128)) + 0.5)
