"""Multiplies where cuBLAS does not do: by a weight of each row's own (experts), by weights in 8 or 4 bits, and by one
weight with the same bits whatever the number of rows.

A program computes ROWS x COLUMNS elements of a product, and goes over the inner dimension in one order, DEPTH elements
at a time: a row's result does not depend on the others.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from splitfuse.kernels.triton.attention import Number, Pointer
from splitfuse.kernels.triton.rows import gated


@triton.jit
def _dot_rows(
    x: Pointer,  # [rows, K]
    weight: Pointer,  # [N, K]
    sources: Any,  # [M]: row of x
    is_row: Any,
    columns: Any,  # [N']: row of the weight
    is_column: Any,
    depth: Number,  # K
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> Any:
    """Return the products [M, N'] of rows of x with rows of a weight, in fp32."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, depth, DEPTH):
        inner = begin + tl.arange(0, DEPTH)
        is_inner = inner < depth
        x_mask, w_mask = is_row[:, None] & is_inner[None, :], is_column[:, None] & is_inner[None, :]
        x_tile = tl.load(x + sources[:, None] * depth + inner[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(weight + columns.to(tl.int64)[:, None] * depth + inner[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_kernel(
    out: Pointer,  # [P, N]
    x: Pointer,  # [P / top_k, K]
    weights: Pointer,  # int64 [E]: addresses of weights [N, K], or [2 N, K] if IS_GATED, of the dtype of x
    biases: Pointer,  # int64 [E]: addresses of biases [N] or [2 N], if HAS_BIAS
    pairs: Pointer,  # int32 [P]: pairs of a token and an expert, `token * top_k + number`, by expert
    tiles: Pointer,  # int32 [tiles, 3]: expert, or -1 for none, and begin and end of its pairs that are in the tile
    top_k: Number,
    width: Number,  # N
    depth: Number,  # K
    KIND: tl.constexpr,  # activation of rows.py; -1: none
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Multiply each pair's token by the weight of its expert, and activate: a grid of (tiles, N / COLUMNS) programs."""
    tile = tiles + tl.program_id(0) * 3
    expert, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if expert < 0:
        return
    places = begin + tl.arange(0, ROWS)
    is_row = places < end
    pair = tl.load(pairs + places, mask=is_row, other=0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    weight = tl.load(weights + expert).to(x.dtype)
    y = _dot_rows(x, weight, pair // top_k, is_row, columns, is_column, depth, ROWS, COLUMNS, DEPTH)
    if HAS_BIAS:
        bias = tl.load(biases + expert).to(x.dtype)
        y += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        up = _dot_rows(x, weight, pair // top_k, is_row, columns + width, is_column, depth, ROWS, COLUMNS, DEPTH)
        if HAS_BIAS:
            up += tl.load(bias + width + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        y = gated(y, up, KIND)
    elif KIND >= 0:
        y = gated(y, tl.full([ROWS, COLUMNS], 1.0, tl.float32), KIND)
    at = pair[:, None] * width + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def quantized_kernel(
    out: Pointer,  # [T, N]
    x: Pointer,  # [T, K]
    levels: Pointer,  # int8 [N, K'], or uint8 [N, K' / 2]: the low half of a byte has column i, the high one i + K' / 2
    scales: Pointer,  # fp32 [N, K' / GROUP]
    offsets: Pointer,  # fp32 [N, K' / GROUP], if HAS_OFFSETS
    bias: Pointer,  # [N], if HAS_BIAS
    num_rows: Number,  # T
    width: Number,  # N
    depth: Number,  # K
    padded: Number,  # K': a multiple of the group and, in 4 bits, of two of them
    IS_4_BIT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale, or 0: all do
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # divides GROUP
) -> None:
    """Multiply by a weight of `scale * level + offset`, which is rounded to the dtype of x: a grid of
    (T / ROWS, N / COLUMNS) programs.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < width
    x_rows = x + rows.to(tl.int64)[:, None] * depth
    stored = padded // 2 if IS_4_BIT else padded
    num_groups = padded // GROUP if GROUP > 0 else 1
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, stored, DEPTH):
        inner = begin + tl.arange(0, DEPTH)
        bytes_at = columns.to(tl.int64)[:, None] * stored + inner[None, :]
        packed = tl.load(levels + bytes_at, mask=is_column[:, None] & (inner < stored)[None, :], other=0)
        for half in tl.static_range(2 if IS_4_BIT else 1):
            if IS_4_BIT:
                level = ((packed.to(tl.int32) >> (4 * half)) & 15).to(tl.float32)
            else:
                level = packed.to(tl.float32)
            first = begin + half * stored
            group_at = columns * num_groups + (first // GROUP if GROUP > 0 else 0)
            w_tile = level * tl.load(scales + group_at, mask=is_column, other=0.0)[:, None]
            if HAS_OFFSETS:
                w_tile += tl.load(offsets + group_at, mask=is_column, other=0.0)[:, None]
            at = half * stored + inner
            x_tile = tl.load(x_rows + at[None, :], mask=is_row[:, None] & (at < depth)[None, :], other=0.0)
            acc = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
