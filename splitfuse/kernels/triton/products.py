"""Multiplies where cuBLAS does not do: by a weight of each row's own (experts), by weights in 8 or 4 bits, and by one
weight with the same bits whatever the number of rows. Dequantizes weights for cuBLAS.

A program computes ROWS x COLUMNS elements of a product, and goes over the inner dimension in one order, DEPTH elements
at a time: a row's result does not depend on the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitfuse.kernels.triton.rows import gated


@triton.jit
def _dot_rows(
    x: tl.pointer_type,  # [rows, K]
    weight: tl.pointer_type,  # [N, K]
    sources: tl.tensor,  # [M]: row of x
    is_row: tl.tensor,
    columns: tl.tensor,  # [N']: row of the weight
    is_column: tl.tensor,
    depth: tl.tensor,  # K
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
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


@triton.jit(do_not_specialize=["num_rows"])
def dense_kernel(
    out: tl.pointer_type,  # [T, N]
    x: tl.pointer_type,  # [T, K]
    weight: tl.pointer_type,  # [N, K]
    bias: tl.pointer_type,  # [N], if HAS_BIAS
    num_rows: tl.tensor,  # T
    width: tl.tensor,  # N
    depth: tl.tensor,  # K
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Multiply all rows by one weight: a grid of (T / ROWS, N / COLUMNS) programs."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < width
    y = _dot_rows(x, weight, rows, is_row, columns, is_column, depth, ROWS, COLUMNS, DEPTH)
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * width + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _first_of(owners: tl.pointer_type, wanted: tl.tensor, count: tl.tensor, searches: tl.tensor) -> tl.tensor:
    """Return for each owner that is `wanted` the first of `count` rising owners that is none before it."""
    low = wanted * 0
    high = low + count
    for _ in range(searches):
        middle, is_open = (low + high) // 2, low < high
        is_before = is_open & (tl.load(owners + middle, mask=is_open, other=0) < wanted)
        high = tl.where(is_open, tl.where(is_before, high, middle), high)
        low = tl.where(is_before, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["num_rows", "searches", "num_tiles"])
def tiles_kernel(
    tiles: tl.pointer_type,  # int32 [tiles, 3]: see grouped_kernel
    owners: tl.pointer_type,  # int [P], rising
    num_rows: tl.tensor,  # P
    searches: tl.tensor,  # halvings until one of P is left
    num_tiles: tl.tensor,
    ROWS: tl.constexpr,  # of a tile
    NUM_OWNERS: tl.constexpr,
    OWNERS: tl.constexpr,  # NUM_OWNERS, as a power of two
    TILES: tl.constexpr,
) -> None:
    """Cut the rows of each owner into tiles: a grid of tiles / TILES programs."""
    owner, number = tl.arange(0, OWNERS), tl.program_id(0) * TILES + tl.arange(0, TILES)
    begin, end = _first_of(owners, owner, num_rows, searches), _first_of(owners, owner + 1, num_rows, searches)
    count = (end - begin + ROWS - 1) // ROWS
    last = tl.cumsum(count, 0)  # the end of each owner's tiles
    owner_of = tl.sum((last[None, :] <= number[:, None]).to(tl.int32), 1)
    is_owner = owner[None, :] == owner_of[:, None]
    first_row = tl.sum(tl.where(is_owner, (begin - (last - count) * ROWS)[None, :], 0), 1) + number * ROWS
    end_row = tl.sum(tl.where(is_owner, end[None, :], 0), 1)
    is_tile = number < num_tiles
    tl.store(tiles + number * 3, tl.where(owner_of < NUM_OWNERS, owner_of, -1), mask=is_tile)
    tl.store(tiles + number * 3 + 1, first_row, mask=is_tile)
    tl.store(tiles + number * 3 + 2, end_row, mask=is_tile)


@triton.jit
def grouped_kernel(
    out: tl.pointer_type,  # [P, N]
    x: tl.pointer_type,  # [P / top_k, K]
    weights: tl.pointer_type,  # int64 [E]: addresses of weights [N, K], or [2 N, K] if IS_GATED
    biases: tl.pointer_type,  # int64 [E]: addresses of biases [N] or [2 N], if HAS_BIAS
    pairs: tl.pointer_type,  # int32 [P]: pairs of a token and an expert, `token * top_k + number`, by expert
    tiles: tl.pointer_type,  # int32 [tiles, 3]: expert, or -1 for none, and begin and end of its pairs in the tile
    top_k: tl.tensor,
    width: tl.tensor,  # N
    depth: tl.tensor,  # K
    KIND: tl.constexpr,  # activation of rows.py; -1: none
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # addresses of weights are multiples of 16
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
    if IS_ALIGNED:  # the compiler knows it of arguments alone
        weight = tl.multiple_of(weight, 16)
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
def _levels(
    packed: tl.tensor,
    half: tl.constexpr,
    table: tl.pointer_type,
    IS_4_BIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_TABLE: tl.constexpr,
) -> tl.tensor:
    """Return the numbers that bytes stand for, in 4 bits those of one half of each, in fp32."""
    if IS_FP8:
        bits = packed.to(tl.int32)
        # The bits of e4m3 are those of a number in fp16 that is 256 times as small, subnormal ones included.
        size = ((bits & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
        size = tl.where((bits & 127) == 127, float("nan"), size)
        level = tl.where(bits > 127, -size, size)
    elif IS_4_BIT:
        index = (packed.to(tl.int32) >> (4 * half)) & 15
        level = index.to(tl.float32)
        if HAS_TABLE:
            level = tl.load(table + index)
    else:
        level = packed.to(tl.float32)
    return level


@triton.jit
def _numbers(
    packed: tl.tensor,  # bytes [N', D]
    half: tl.constexpr,
    group_at: tl.tensor,  # int64 [N', D] or [N', 1]: places of their groups in what follows
    is_group: tl.tensor,
    scales: tl.pointer_type,
    zeros: tl.pointer_type,
    offsets: tl.pointer_type,
    table: tl.pointer_type,
    IS_4_BIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
) -> tl.tensor:
    """Return `scale * (level - bias - zero) + offset` of what bytes stand for, in fp32; see _dot_quantized."""
    y = _levels(packed, half, table, IS_4_BIT, IS_FP8, HAS_TABLE)
    if BIAS > 0:
        y -= BIAS
    if HAS_ZEROS:
        y -= tl.load(zeros + group_at, mask=is_group, other=0).to(tl.float32)
    y *= tl.load(scales + group_at, mask=is_group, other=0.0).to(tl.float32)
    if HAS_OFFSETS:
        y += tl.load(offsets + group_at, mask=is_group, other=0.0).to(tl.float32)
    return y


@triton.jit
def _dot_quantized(
    x: tl.pointer_type,  # [rows, K]
    sources: tl.tensor,  # int64 [M]: row of x
    is_row: tl.tensor,
    columns: tl.tensor,  # [N']: row of the weight
    is_column: tl.tensor,
    depth: tl.tensor,  # K
    stored: tl.tensor,  # bytes of a row: K', which is a multiple of the group, or in 4 bits K' / 2, which is one too
    levels: tl.pointer_type,  # 8 bits [N, K'], or uint8 [N, K' / 2], whose low halves have the first columns
    scales: tl.pointer_type,  # [N, K' / GROUP]
    zeros: tl.pointer_type,  # uint8, the same shape, if HAS_ZEROS
    offsets: tl.pointer_type,  # the same shape, if HAS_OFFSETS
    table: tl.pointer_type,  # fp32 [16]: what levels are indices into, if HAS_TABLE
    order: tl.pointer_type,  # int32 [K]: column of x that each column of the weight is multiplied by, if HAS_ORDER
    IS_4_BIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale, or 0: all do
    BIAS: tl.constexpr,  # of levels
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # divides GROUP
) -> tl.tensor:
    """Return the products [M, N'], in fp32, of rows of x with those of a weight, rounded to the dtype of x."""
    num_groups = (1 + IS_4_BIT) * stored // GROUP if GROUP > 0 else 1
    x_rows, level_rows = x + sources[:, None] * depth, levels + columns.to(tl.int64)[:, None] * stored
    groups = columns.to(tl.int64) * num_groups
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, stored, DEPTH):
        inner = begin + tl.arange(0, DEPTH)
        packed = tl.load(level_rows + inner[None, :], mask=is_column[:, None] & (inner < stored)[None, :], other=0)
        for half in tl.static_range(2 if IS_4_BIT else 1):
            group_at = groups + ((begin + half * stored) // GROUP if GROUP > 0 else 0)
            w_tile = _numbers(
                packed,
                half,
                group_at[:, None],
                is_column[:, None],
                scales,
                zeros,
                offsets,
                table,
                IS_4_BIT,
                IS_FP8,
                BIAS,
                HAS_ZEROS,
                HAS_OFFSETS,
                HAS_TABLE,
            )
            at = half * stored + inner
            is_inner = (inner < stored) & (at < depth)
            if HAS_ORDER:
                at = tl.load(order + at, mask=is_inner, other=0)
            x_tile = tl.load(x_rows + at[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
            acc = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def quantized_kernel(
    out: tl.pointer_type,  # [T, N]
    x: tl.pointer_type,  # [T, K]
    levels: tl.pointer_type,  # this and what follows to `order`: see _dot_quantized
    scales: tl.pointer_type,
    zeros: tl.pointer_type,
    offsets: tl.pointer_type,
    table: tl.pointer_type,
    order: tl.pointer_type,
    bias: tl.pointer_type,  # [N], if HAS_BIAS
    num_rows: tl.tensor,  # T
    width: tl.tensor,  # N
    depth: tl.tensor,  # K
    stored: tl.tensor,
    IS_4_BIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Multiply by a weight in 8 or 4 bits: a grid of (T / ROWS, N / COLUMNS) programs."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < width
    acc = _dot_quantized(
        x,
        rows,
        is_row,
        columns,
        is_column,
        depth,
        stored,
        levels,
        scales,
        zeros,
        offsets,
        table,
        order,
        IS_4_BIT,
        IS_FP8,
        GROUP,
        BIAS,
        HAS_ZEROS,
        HAS_OFFSETS,
        HAS_TABLE,
        HAS_ORDER,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * width + columns[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def dequantize_kernel(
    out: tl.pointer_type,  # [R, K]
    levels: tl.pointer_type,  # this and what follows to `order`: see _dot_quantized
    scales: tl.pointer_type,
    zeros: tl.pointer_type,
    offsets: tl.pointer_type,
    table: tl.pointer_type,
    order: tl.pointer_type,
    rows: tl.pointer_type,  # int [R]: rows of the weight, if HAS_ROWS; else its first ones
    num_rows: tl.tensor,  # R
    depth: tl.tensor,  # K
    stored: tl.tensor,
    IS_4_BIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write rows of a weight in 8 or 4 bits in the dtype of activations: a grid of (bytes of a row / COLUMNS, R / ROWS)
    programs.
    """
    places = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inner = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_stored = places < num_rows, inner < stored
    row = places
    if HAS_ROWS:
        row = tl.load(rows + places, mask=is_row, other=0).to(tl.int64)
    inside = is_row[:, None] & is_stored[None, :]
    packed = tl.load(levels + row[:, None] * stored + inner[None, :], mask=inside, other=0)
    num_groups = (1 + IS_4_BIT) * stored // GROUP if GROUP > 0 else 1
    for half in tl.static_range(2 if IS_4_BIT else 1):
        at = half * stored + inner
        group = at // GROUP if GROUP > 0 else at * 0
        y = _numbers(
            packed,
            half,
            row[:, None] * num_groups + group[None, :],
            inside,
            scales,
            zeros,
            offsets,
            table,
            IS_4_BIT,
            IS_FP8,
            BIAS,
            HAS_ZEROS,
            HAS_OFFSETS,
            HAS_TABLE,
        )
        is_column = is_stored & (at < depth)
        if HAS_ORDER:
            at = tl.load(order + at, mask=is_column, other=0)
        kept = is_row[:, None] & is_column[None, :]
        tl.store(out + places[:, None] * depth + at[None, :], y.to(out.dtype.element_ty), mask=kept)


@triton.jit
def grouped_quantized_kernel(
    out: tl.pointer_type,  # [P, N]
    x: tl.pointer_type,  # [P / top_k, K]
    addresses: tl.pointer_type,  # int64 [E, 5]: of each expert's levels, scales, zeros, offsets and order
    levels: tl.pointer_type,  # these of any expert, for their dtypes
    scales: tl.pointer_type,
    offsets: tl.pointer_type,
    table: tl.pointer_type,  # of all
    biases: tl.pointer_type,  # this and what follows: as in grouped_kernel
    pairs: tl.pointer_type,
    tiles: tl.pointer_type,
    top_k: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    stored: tl.tensor,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_4_BIT: tl.constexpr,  # this and what follows: see _dot_quantized
    IS_FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """Do what `grouped_kernel` does, by experts in 8 or 4 bits: a grid of (tiles, N / COLUMNS) programs."""
    tile = tiles + tl.program_id(0) * 3
    expert, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if expert < 0:
        return
    places = begin + tl.arange(0, ROWS)
    is_row = places < end
    pair = tl.load(pairs + places, mask=is_row, other=0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    own = addresses + expert * 5
    own_levels = tl.load(own).to(levels.dtype)
    if IS_ALIGNED:
        own_levels = tl.multiple_of(own_levels, 16)
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate = y
    for part in tl.static_range(2 if IS_GATED else 1):
        of_weight = columns + part * width
        y = _dot_quantized(
            x,
            pair // top_k,
            is_row,
            of_weight,
            is_column,
            depth,
            stored,
            own_levels,
            tl.load(own + 1).to(scales.dtype),
            tl.load(own + 2).to(tl.pointer_type(tl.uint8)),
            tl.load(own + 3).to(offsets.dtype),
            table,
            tl.load(own + 4).to(tl.pointer_type(tl.int32)),
            IS_4_BIT,
            IS_FP8,
            GROUP,
            BIAS,
            HAS_ZEROS,
            HAS_OFFSETS,
            HAS_TABLE,
            HAS_ORDER,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        if HAS_BIAS:
            bias = tl.load(biases + expert).to(x.dtype)
            y += tl.load(bias + of_weight, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if IS_GATED and part == 0:
            gate = y
    if IS_GATED:
        y = gated(gate, y, KIND)
    elif KIND >= 0:
        y = gated(y, tl.full([ROWS, COLUMNS], 1.0, tl.float32), KIND)
    at = pair[:, None] * width + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
