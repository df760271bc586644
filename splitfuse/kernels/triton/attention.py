"""Computes ragged attention over blocked KV: one launch for chunks and single rows of any mix, and one that merges
partial results where keys of a row were divided.

A program has the rows of one tile (work_list.py) and one key/value head. It walks the block table of its request, a
tile of keys after the other, with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv
2205.14135). A row's result depends on no other row of the tile: keys that it does not see have a weight of exactly
zero, and tiles of keys begin at multiples of KEYS wherever the rows are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh of fp32, exact where exp overflows."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _load_keys(
    base: tl.pointer_type,
    slots: tl.tensor,
    columns: tl.tensor,
    is_key: tl.tensor,
    width: tl.constexpr,
    stride: tl.constexpr,
) -> tl.tensor:
    """Return elements `columns` [D] of the keys in `slots` [K], zeros where `is_key` [K] is false or a column is not
    below `width`: what lies in such slots may be NaN.
    """
    inside = is_key[:, None] & (columns < width)[None, :]
    return tl.load(base + slots[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _normalized(
    acc: tl.tensor, peak: tl.tensor, total: tl.tensor, heads: tl.tensor, sinks: tl.pointer_type, HAS_SINKS: tl.constexpr
) -> tl.tensor:
    """Return the weighted mean [M, D] of values from their weighted sum and the sum of weights, `total` [M], both in
    units of exp(peak) [M]. The sink of a row's head is one more weight.
    """
    if HAS_SINKS:
        sink = tl.load(sinks + heads).to(tl.float32)
        highest = tl.maximum(peak, sink)
        shrink = tl.exp(peak - highest)
        acc *= shrink[:, None]
        total = total * shrink + tl.exp(sink - highest)
    return acc / total[:, None]


@triton.jit(do_not_specialize=["table_width"])
def attention_kernel(
    out: tl.pointer_type,  # [T, H, Dv]
    partial: tl.pointer_type,  # fp32 [partial results, Hk, ROWS, Dv]: sums of weighted values
    partial_softmax: tl.pointer_type,  # fp32 [partial results, Hk, ROWS, 2]: the largest score, and the sum of weights
    q: tl.pointer_type,  # [T, H, D]
    store: tl.pointer_type,  # [1 or 2, num_blocks, BLOCK, Hk, D]
    store_scales: tl.pointer_type,  # fp32 [2, num_blocks, BLOCK, Hk], if IS_SCALED
    sinks: tl.pointer_type,  # [H], if HAS_SINKS
    slopes: tl.pointer_type,  # fp32 [H], if HAS_SLOPES
    tiles: tl.pointer_type,  # int32 [programs, 8]: see work_list.TILE_FIELDS
    block_tables: tl.pointer_type,  # int32 [S, table_width]
    table_width: tl.tensor,
    num_slots: tl.tensor,  # num_blocks * BLOCK
    scale: tl.tensor,  # of scores
    softcap: tl.tensor,  # if HAS_CAP
    window: tl.tensor,  # positions that a query sees, if HAS_WINDOW
    chunk: tl.tensor,  # positions that see each other, if HAS_CHUNK
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_FROM: tl.constexpr,  # 0, or the element of a key that its value begins at
    DIM: tl.constexpr,  # of values, and of keys without what is before VALUE_FROM: a power of two
    FRONT_DIM: tl.constexpr,  # of what is before VALUE_FROM: a power of two
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_SCALED: tl.constexpr,
) -> None:
    """Compute the attention of one tile of rows to its keys, for one key/value head: a grid of (tiles, Hk) programs.
    Writes rows of `out`, or a partial result.
    """
    tile, kv_head = tiles + tl.program_id(0) * 8, tl.program_id(1)
    request, query_start, num_rows, first_row = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    first_position, begin, end, place = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    if num_rows == 0:
        return  # a tile that fills the list up

    rows = first_row + tl.arange(0, ROWS)
    is_row = rows < num_rows
    heads = kv_head * GROUP + rows % GROUP
    queries = first_position + rows // GROUP  # the position of each row
    first = tl.zeros([ROWS], tl.int32)  # that a row sees
    if HAS_WINDOW:
        first = tl.maximum(first, queries - window + 1)
    if HAS_CHUNK:
        first = tl.maximum(first, queries // chunk * chunk)
    q_rows = (query_start + rows // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + heads
    columns, width = tl.arange(0, DIM), HEAD_DIM - VALUE_FROM
    is_element = is_row[:, None] & (columns < width)[None, :]
    q_tile = tl.load(q + q_rows[:, None] * HEAD_DIM + VALUE_FROM + columns[None, :], mask=is_element, other=0.0)
    if VALUE_FROM > 0:
        front = tl.arange(0, FRONT_DIM)
        q_front = _load_keys(q, q_rows, front, is_row, VALUE_FROM, HEAD_DIM)
    slope = tl.zeros([ROWS], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + heads)

    stride = KV_HEADS * HEAD_DIM
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    table = block_tables + request.to(tl.int64) * table_width
    keys_base = store + kv_head * HEAD_DIM
    for tile_begin in range(begin, end, KEYS):
        keys = tile_begin + tl.arange(0, KEYS)
        is_key = keys < end
        block = tl.load(table + keys // BLOCK, mask=is_key, other=0).to(tl.int64)
        slots = block * BLOCK + keys % BLOCK
        k_tile = _load_keys(keys_base + VALUE_FROM, slots, columns, is_key, width, stride).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if VALUE_FROM > 0:
            k_front = _load_keys(keys_base, slots, front, is_key, VALUE_FROM, stride).to(q_tile.dtype)
            scores = tl.dot(q_front, tl.trans(k_front), scores, input_precision="ieee")
        scores *= scale
        if IS_SCALED:
            scale_at = slots * KV_HEADS + kv_head
            scores *= tl.load(store_scales + scale_at, mask=is_key, other=0.0)[None, :]
        if HAS_CAP:
            scores = softcap * tanh(scores / softcap)
        if HAS_SLOPES:
            scores += slope[:, None] * (keys[None, :] - queries[:, None]).to(tl.float32)
        seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= first[:, None]) & is_key[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)  # of rows that have seen no key yet
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(peak - finite)
        total = total * shrink + tl.sum(weights, 1)
        if VALUE_FROM > 0:
            v_tile = k_tile
        else:
            v_base = keys_base + tl.cast(num_slots, tl.int64) * stride
            v_tile = _load_keys(v_base, slots, columns, is_key, width, stride).to(q_tile.dtype)
        if IS_SCALED:
            v_scales = store_scales + tl.cast(num_slots, tl.int64) * KV_HEADS
            weights *= tl.load(v_scales + scale_at, mask=is_key, other=0.0)[None, :]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        peak = highest

    if place < 0:
        mean = _normalized(acc, peak, total, heads, sinks, HAS_SINKS)
        at = q_rows[:, None] * width + columns[None, :]
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=is_element)
    else:
        in_tile = (place.to(tl.int64) * KV_HEADS + kv_head) * ROWS + tl.arange(0, ROWS)
        tl.store(partial + in_tile[:, None] * width + columns[None, :], acc, mask=is_element)
        tl.store(partial_softmax + in_tile * 2, peak, mask=is_row)
        tl.store(partial_softmax + in_tile * 2 + 1, total, mask=is_row)


@triton.jit
def merge_kernel(
    out: tl.pointer_type,  # [T, H, Dv]
    partial: tl.pointer_type,  # as attention_kernel has written them
    partial_softmax: tl.pointer_type,
    sinks: tl.pointer_type,
    merges: tl.pointer_type,  # int32 [programs, 5]: see work_list.MERGE_FIELDS
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Merge the partial results of one tile, in the order of their keys: a grid of (merges, Hk) programs."""
    merge, kv_head = merges + tl.program_id(0) * 5, tl.program_id(1)
    query_start, num_rows, first_row = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    first_place, num_places = tl.load(merge + 3), tl.load(merge + 4)
    if num_rows == 0:
        return  # a merge that fills the list up

    rows = first_row + tl.arange(0, ROWS)
    is_row, columns = rows < num_rows, tl.arange(0, DIM)
    heads = kv_head * GROUP + rows % GROUP
    is_element = is_row[:, None] & (columns < VALUE_DIM)[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for place in range(first_place, first_place + num_places):
        in_tile = (tl.cast(place, tl.int64) * KV_HEADS + kv_head) * ROWS + tl.arange(0, ROWS)
        other = tl.load(partial + in_tile[:, None] * VALUE_DIM + columns[None, :], mask=is_element, other=0.0)
        other_peak = tl.load(partial_softmax + in_tile * 2, mask=is_row, other=float("-inf"))
        other_total = tl.load(partial_softmax + in_tile * 2 + 1, mask=is_row, other=0.0)
        highest = tl.maximum(peak, other_peak)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, other_shrink = tl.exp(peak - finite), tl.exp(other_peak - finite)
        acc = acc * shrink[:, None] + other * other_shrink[:, None]
        total = total * shrink + other_total * other_shrink
        peak = highest
    mean = _normalized(acc, peak, total, heads, sinks, HAS_SINKS)
    out_rows = (query_start + rows // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + heads
    tl.store(out + out_rows[:, None] * VALUE_DIM + columns[None, :], mean.to(out.dtype.element_ty), mask=is_element)
