"""Takes recurrent states through the tokens of prompts, a chunk of tokens at a time by products of matrices.

This is the gated delta rule by chunks of Yang, Kautz and Hatamizadeh (arXiv 2412.06464). With the state S [K, V] before
a chunk, rows k of K to write by, q of Q to read by and v of V, and c_tj the decay from token j to token t, the tokens
of a chunk add rows of U:

    (I + A) U = diag(beta) (V - diag(c_t) K S)        A_tj = beta_t c_tj (k_t . k_j) for j < t, else 0
    Y = diag(c_t) Q S + P U                           P_tj = c_tj (q_t . k_j) for j <= t, else 0
    S' = c S + (diag(c_end,t) K)' U                   c_t, c: from the chunk's beginning to t, and to its end

Mamba-2 takes nothing back: there U is what is written. P and the inverse of I + A depend on no state, and are computed
for all chunks at once; what depends on it is left to one program for a head and some columns of the state, chunk after
chunk.

Chunks end at positions of a request that are multiples of CHUNK, wherever a step ends. A step that ends elsewhere makes
two chunks of one, whose sums are other ones: bits depend on where steps end between multiples of CHUNK.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.triton.recurrent import decay_steps, first_parts
from splitfuse.kernels.triton.rows import sigmoid
from splitfuse.kernels.triton.work_list import expand, filled_up

CHUNK = 32
"""Most tokens of a chunk."""
FEWEST_TOKENS = 16
"""Least number of tokens that a request has in a step for them to be taken in chunks, and not one after the other."""


def state_chunks(batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is taken in chunks, int32 on the host: for each part of a request whether it is [S]; for each request
    its first part, the first of its chunks and their number [requests, 3]; and for each chunk its first row, the end of
    its rows, and the part that ends with it, or -1 [chunks, 3].
    """
    starts, ends = batch.host_query_start, batch.host_seq_lens
    counts, first = np.diff(starts), first_parts(batch.host_state_reads, batch.host_state_writes)
    is_chunked = np.bincount(first, counts, len(counts))[first] >= FEWEST_TOKENS
    in_chunk = (ends - counts) % CHUNK  # place of a part's first token in its chunk
    num_chunks = np.where(is_chunked, -(-(in_chunk + counts) // CHUNK), 0)
    part, index = expand(num_chunks)
    bounds = starts[part] - in_chunk[part] + index * CHUNK
    ending = np.where(index == num_chunks[part] - 1, part, -1)
    chunks = np.stack((np.maximum(bounds, starts[part]), np.minimum(bounds + CHUNK, starts[part + 1]), ending), axis=1)
    leads = np.flatnonzero(is_chunked & (first == np.arange(len(first))))
    of_request = np.bincount(first, num_chunks, len(counts))[leads].astype(np.int64)
    runs = np.stack((leads, np.cumsum(of_request) - of_request, of_request), axis=1)
    if batch.is_padded:
        chunks = filled_up(chunks, batch.num_tokens // CHUNK + 2 * len(counts))
        runs = filled_up(runs, min(len(counts), batch.num_tokens // FEWEST_TOKENS))
    flags, *lists = (torch.from_numpy(each.astype(np.int32)) for each in (is_chunked, runs, chunks))
    return flags, lists[0], lists[1]


@triton.jit
def _vectors(
    first: tl.pointer_type,  # fp32: the vector of row 0
    rows: tl.tensor,
    is_row: tl.tensor,
    keys: tl.tensor,
    width: tl.constexpr,  # from row to row
    KEY_DIM: tl.constexpr,
) -> tl.tensor:
    """Return elements `keys` of the vectors that states are read or written by at rows, [M, keys]."""
    inside = is_row[:, None] & (keys < KEY_DIM)[None, :]
    return tl.load(first + rows.to(tl.int64)[:, None] * width + keys[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize_on_alignment=["chunks"])
def within_kernel(
    factors: tl.pointer_type,  # fp32 [T, H, 4] of each row: of what it reads of the state before its chunk, of what it
    # takes back, of what it adds to the state behind, and the decay from the chunk's beginning to it
    seen: tl.pointer_type,  # fp32 [T, H, CHUNK]: P of the module's docstring
    solved: tl.pointer_type,  # fp32 [T, H, CHUNK]: inverse of I + A, times beta, of a delta net
    mixed: tl.pointer_type,  # this and what follows to `decay_bias`: as in matrix_kernel
    gates: tl.pointer_type,
    decay: tl.pointer_type,
    decay_bias: tl.pointer_type,
    chunks: tl.pointer_type,  # int32 [chunks, 3]: see state_chunks
    scale: tl.tensor,
    dt_min: tl.tensor,
    dt_max: tl.tensor,
    IS_DELTA: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,  # of products
) -> None:
    """Compute what the tokens of a chunk are to each other, without its state: a grid of (chunks, H) programs."""
    chunk, head = chunks + tl.program_id(0) * 3, tl.program_id(1)
    begin, end = tl.load(chunk), tl.load(chunk + 1)
    if begin == end:
        return  # a chunk that fills the list up
    places = tl.arange(0, CHUNK)
    rows, is_row = begin + places, begin + places < end
    long_rows = rows.to(tl.int64)
    width, group = 2 * GROUPS * KEY_DIM + HEADS * VALUE_DIM, head // (HEADS // GROUPS)
    vectors = mixed + group * KEY_DIM
    fall, bias = tl.load(decay + head), tl.load(decay_bias + head)
    steps = decay_steps(gates, rows, is_row, head, bias, dt_min, dt_max, IS_DELTA, HEADS)
    next_steps = decay_steps(gates, rows + 1, rows + 1 < end, head, bias, dt_min, dt_max, IS_DELTA, HEADS)
    reads, alike = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    of_read, of_write = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for first_key in tl.static_range(0, KEYS, KEYS_AT_ONCE):
        keys = first_key + tl.arange(0, KEYS_AT_ONCE)
        read_by = _vectors(vectors, rows, is_row, keys, width, KEY_DIM)
        write_by = _vectors(vectors + GROUPS * KEY_DIM, rows, is_row, keys, width, KEY_DIM)
        reads = tl.dot(read_by, tl.trans(write_by), reads, input_precision=PRECISION)
        if IS_DELTA:
            alike = tl.dot(write_by, tl.trans(write_by), alike, input_precision=PRECISION)
            of_read += tl.sum(read_by * read_by, 1)
            of_write += tl.sum(write_by * write_by, 1)
    if IS_DELTA:
        of_read, of_write = scale / tl.sqrt(of_read + 1e-6), 1 / tl.sqrt(of_write + 1e-6)
        written = of_write
    else:
        of_read, of_write, written = of_read + 1, of_write + 1, steps
    is_later = places[:, None] > places[None, :]
    # From each token to each later one, added up from there: a difference of sums would lose small decays behind large.
    kept = tl.exp(tl.cumsum(tl.where(is_later, -fall * steps[:, None], 0.0), 0))
    at = (long_rows[:, None] * HEADS + head) * CHUNK + places[None, :]
    if IS_DELTA:
        reads *= of_read[:, None] * of_write[None, :] * kept
    else:
        reads *= steps[None, :] * kept
    tl.store(seen + at, tl.where(places[:, None] >= places[None, :], reads, 0.0), mask=is_row[:, None])
    if IS_DELTA:
        beta = sigmoid(tl.load(gates + long_rows * 2 * HEADS + head, mask=is_row, other=0.0).to(tl.float32))
        taken = alike * of_write[:, None] * of_write[None, :] * kept * beta[:, None]
        taken = tl.trans(tl.where(is_later, taken, 0.0))  # a row of A is a column
        inverse = tl.where(places[:, None] == places[None, :], 1.0, 0.0)
        for number in range(1, CHUNK):
            of_row = tl.sum(tl.where(places[None, :] == number, taken, 0.0), 1)
            others = tl.sum(of_row[:, None] * inverse, 0)
            inverse -= tl.where(places[:, None] == number, others[None, :], 0.0)
        tl.store(solved + at, inverse * beta[None, :], mask=is_row[:, None])
    until = tl.exp(tl.cumsum(-fall * steps, 0))
    left = tl.exp(tl.cumsum(-fall * next_steps, 0, reverse=True))  # of what a row adds, until the end
    place = factors + (long_rows * HEADS + head) * 4
    tl.store(place, until * of_read, mask=is_row)
    tl.store(place + 1, until * of_write, mask=is_row)
    tl.store(place + 2, left * written, mask=is_row)
    tl.store(place + 3, until, mask=is_row)


@triton.jit(do_not_specialize_on_alignment=["reads", "writes", "runs", "chunks"])
def between_kernel(
    out: tl.pointer_type,  # fp32 [T, H, V]
    factors: tl.pointer_type,  # as within_kernel has written them
    seen: tl.pointer_type,
    solved: tl.pointer_type,
    mixed: tl.pointer_type,  # this and what follows to `skip`: as in matrix_kernel
    states: tl.pointer_type,
    skip: tl.pointer_type,
    reads: tl.pointer_type,  # int32 [S]
    writes: tl.pointer_type,
    runs: tl.pointer_type,  # int32 [requests, 3]: see state_chunks
    chunks: tl.pointer_type,  # int32 [chunks, 3]
    state_stride: tl.tensor,
    offset: tl.tensor,
    IS_DELTA: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Take each request's state through its chunks: a grid of (requests, H, V / COLUMNS) programs."""
    run, head = runs + tl.program_id(0) * 3, tl.program_id(1)
    part, first, count = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    if count == 0:
        return  # a request that fills the list up
    slot = tl.load(reads + part)
    keys, columns = tl.arange(0, KEYS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    places, is_column = tl.arange(0, CHUNK), columns < VALUE_DIM
    inside = (keys < KEY_DIM)[:, None] & is_column[None, :]
    width, group = 2 * GROUPS * KEY_DIM + HEADS * VALUE_DIM, head // (HEADS // GROUPS)
    vectors, values = mixed + group * KEY_DIM, mixed + 2 * GROUPS * KEY_DIM + head * VALUE_DIM
    matrix = states + offset + head * KEY_DIM * VALUE_DIM + keys[:, None] * VALUE_DIM + columns[None, :]
    state = tl.load(matrix + slot.to(tl.int64) * state_stride, mask=inside & (slot >= 0), other=0.0)
    for number in range(first, first + count):
        begin, end = tl.load(chunks + number * 3), tl.load(chunks + number * 3 + 1)
        rows, is_row = begin + places, begin + places < end
        long_rows = rows.to(tl.int64)
        of_row = factors + (long_rows * HEADS + head) * 4
        at = (long_rows[:, None] * HEADS + head) * CHUNK + places[None, :]
        is_value = is_row[:, None] & is_column[None, :]
        value = tl.load(values + long_rows[:, None] * width + columns[None, :], mask=is_value, other=0.0)
        write_by = _vectors(vectors + GROUPS * KEY_DIM, rows, is_row, keys, width, KEY_DIM)
        added = value
        if IS_DELTA:
            taken = tl.dot(write_by, state, input_precision=PRECISION)
            taken *= tl.load(of_row + 1, mask=is_row, other=0.0)[:, None]
            inverse = tl.load(solved + at, mask=is_row[:, None], other=0.0)
            added = tl.dot(inverse, value - taken, input_precision=PRECISION)
        read_by = _vectors(vectors, rows, is_row, keys, width, KEY_DIM)
        y = tl.dot(read_by, state, input_precision=PRECISION) * tl.load(of_row, mask=is_row, other=0.0)[:, None]
        y = tl.dot(tl.load(seen + at, mask=is_row[:, None], other=0.0), added, y, input_precision=PRECISION)
        if not IS_DELTA:
            y += tl.load(skip + head) * value
        tl.store(out + (long_rows[:, None] * HEADS + head) * VALUE_DIM + columns[None, :], y, mask=is_value)
        state *= tl.load(factors + (tl.cast(end - 1, tl.int64) * HEADS + head) * 4 + 3)
        added *= tl.load(of_row + 2, mask=is_row, other=0.0)[:, None]
        state = tl.dot(tl.trans(write_by), added, state, input_precision=PRECISION)
        part = tl.load(chunks + number * 3 + 2)
        target = tl.load(writes + part, mask=part >= 0, other=-1)
        tl.store(matrix + target.to(tl.int64) * state_stride, state, mask=inside & (target >= 0))
