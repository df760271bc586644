"""Computes layers with recurrent states, for the chunks of any mix of requests at once: convolutions over tokens, and
the matrices of delta nets and Mamba-2.

Requests of a step that go on from each other's states are parts of one request. A program has all parts of one, and
takes its piece of the state through their tokens in order: a token's bits depend on its request's tokens alone.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfuse.kernels.batch import Numbers, RaggedBatch
from splitfuse.kernels.triton.rows import normed, sigmoid


def token_origins(batch: RaggedBatch) -> tuple[Tensor]:
    """Return for each token the first row in the step of its request, whose parts count as one, and the slot of the
    state that this row goes on from: int32 [T, 2] on the host. A token of no request is its own, without a state.
    """
    starts, reads, writes = batch.host_query_start, batch.host_state_reads, batch.host_state_writes
    owner = np.repeat(first_parts(reads, writes), np.diff(starts))
    origins = np.stack((np.arange(batch.num_tokens), np.full(batch.num_tokens, -1)), axis=1).astype(np.int32)
    origins[: len(owner), 0], origins[: len(owner), 1] = starts[owner], reads[owner]
    return (torch.from_numpy(origins),)


def first_parts(reads: Numbers, writes: Numbers) -> Numbers:
    """Return for each part of a step, which reads and writes these slots, the first part of its request: [S]."""
    goes_on = np.zeros(len(reads), bool)
    goes_on[1:] = (reads[1:] >= 0) & (reads[1:] == writes[:-1])
    first: Numbers = np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(reads))))
    return first


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """Return log(1 + exp(x)) of fp32, exact to its last bits where exp(x) is small too."""
    power = tl.exp(tl.minimum(x, 20.0))
    sum_ = 1 + power
    small = tl.where(sum_ == 1, power, tl.log(sum_) * (power / tl.where(sum_ == 1, 1.0, sum_ - 1)))
    return tl.where(x > 20, x, tl.where(x != x, x, small))


@triton.jit
def decay_steps(
    gates: tl.pointer_type,  # as in matrix_kernel
    rows: tl.tensor,
    is_row: tl.tensor,
    head: tl.tensor,
    bias: tl.tensor,
    dt_min: tl.tensor,
    dt_max: tl.tensor,
    IS_DELTA: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """Return how far a head's state decays at rows, in units of its rate of decay; 0 where there is no row."""
    if IS_DELTA:
        at = rows.to(tl.int64) * 2 * HEADS + HEADS + head
    else:
        at = rows.to(tl.int64) * HEADS + head
    step = softplus(tl.load(gates + at, mask=is_row, other=0.0).to(tl.float32) + bias)
    if not IS_DELTA:
        step = tl.maximum(step, dt_min, propagate_nan=tl.PropagateNan.ALL)
        step = tl.minimum(step, dt_max, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(is_row, step, 0.0)


@triton.jit
def _goes_on(request: tl.tensor, num_requests: tl.tensor, reads: tl.pointer_type, writes: tl.pointer_type) -> tl.tensor:
    """Return whether a request goes on from the state that the one before it writes; False behind the last one."""
    is_one = (request > 0) & (request < num_requests)
    read = tl.load(reads + request, mask=is_one, other=-1)
    return (read >= 0) & (read == tl.load(writes + request - 1, mask=is_one, other=-2))


@triton.jit
def _inputs(
    x: tl.pointer_type,
    rows: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    channels: tl.tensor,
    IS_GATED: tl.constexpr,
) -> tl.tensor:
    """Return what is convolved of rows [M] and columns [N] of x, in fp32."""
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        y *= tl.load(at + 2 * channels, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def convolve_kernel(
    out: tl.pointer_type,  # [T, C]
    x: tl.pointer_type,  # [T, stride], first the channels; with IS_GATED [T, b, c, u], of which b * u is convolved
    states: tl.pointer_type,  # fp32 [slots, state_stride], which begin with the last inputs [SIZE - 1, C]
    origins: tl.pointer_type,  # int32 [T, 2]: see token_origins
    weight: tl.pointer_type,  # fp32 [SIZE, C], the oldest token first
    bias: tl.pointer_type,  # fp32 [C], if HAS_BIAS
    num_tokens: tl.tensor,
    channels: tl.tensor,  # C
    stride: tl.tensor,
    state_stride: tl.tensor,
    IS_GATED: tl.constexpr,  # the convolution is multiplied by c; otherwise it goes through SiLU
    HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Convolve over tokens: a grid of (T / TOKENS, C / COLUMNS) programs."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = tokens < num_tokens, columns < channels
    first = tl.load(origins + tokens * 2, mask=is_token, other=0)
    slot = tl.load(origins + tokens * 2 + 1, mask=is_token, other=-1)
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for number in tl.static_range(SIZE):
        rows = tokens - (SIZE - 1 - number)
        is_new = is_token & (rows >= first)
        is_kept = is_token & (rows < first) & (slot >= 0)
        value = _inputs(x, rows, columns, is_new[:, None] & is_column[None, :], stride, channels, IS_GATED)
        at = slot.to(tl.int64) * state_stride + (SIZE - 1 + rows - first) * channels
        kept = is_kept[:, None] & is_column[None, :]
        value += tl.load(states + at[:, None] + columns[None, :], mask=kept, other=0.0)
        acc += value * tl.load(weight + number * channels + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0)[None, :]
    inside = is_token[:, None] & is_column[None, :]
    rows = tokens.to(tl.int64)[:, None]
    if IS_GATED:
        acc *= tl.load(x + rows * stride + channels + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        acc *= sigmoid(acc)
    tl.store(out + rows * channels + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_requests"], do_not_specialize_on_alignment=["query_start", "reads", "writes"])
def tail_kernel(
    x: tl.pointer_type,  # as in convolve_kernel, which has run
    states: tl.pointer_type,
    query_start: tl.pointer_type,  # int32 [S + 1]
    reads: tl.pointer_type,  # int32 [S]
    writes: tl.pointer_type,
    num_requests: tl.tensor,  # S
    channels: tl.tensor,
    stride: tl.tensor,
    state_stride: tl.tensor,
    IS_GATED: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # SIZE - 1, as a power of two
    COLUMNS: tl.constexpr,
) -> None:
    """Write the last inputs of each request to its state: a grid of (S, C / COLUMNS) programs, of which the first of a
    request's parts writes those of all.
    """
    request = tl.program_id(0)
    if _goes_on(request, num_requests, reads, writes):
        return
    columns, numbers = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    is_column, is_row = columns < channels, numbers < SIZE - 1
    goes_on = request >= 0
    while goes_on:
        read, target = tl.load(reads + request), tl.load(writes + request)
        begin, end = tl.load(query_start + request), tl.load(query_start + request + 1)
        old = end - begin + numbers  # of the inputs that were kept
        rows = old - (SIZE - 1) + begin
        is_new, is_kept = is_row & (old >= SIZE - 1), is_row & (old < SIZE - 1) & (read >= 0)
        value = _inputs(x, rows, columns, is_new[:, None] & is_column[None, :], stride, channels, IS_GATED)
        kept = states + read.to(tl.int64) * state_stride + old[:, None] * channels + columns[None, :]
        value += tl.load(kept, mask=is_kept[:, None] & is_column[None, :], other=0.0)
        tl.debug_barrier()  # a slot may be that which was read, and threads may have elements of each other
        at = states + target.to(tl.int64) * state_stride + numbers[:, None] * channels + columns[None, :]
        tl.store(at, value, mask=is_row[:, None] & is_column[None, :] & (target >= 0))
        tl.debug_barrier()
        request += 1
        goes_on = _goes_on(request, num_requests, reads, writes)


@triton.jit(
    do_not_specialize=["num_requests"],
    do_not_specialize_on_alignment=["query_start", "reads", "writes", "is_chunked"],
)
def matrix_kernel(
    out: tl.pointer_type,  # fp32 [T, H, V]
    mixed: tl.pointer_type,  # fp32 [T, 2 G K + H V]: vectors to read the state by, those to write it by, and values
    gates: tl.pointer_type,  # [T, betas and rates] of a delta net, or [T, time steps]
    states: tl.pointer_type,  # fp32 [slots, state_stride], of which the matrices [H, K, V] begin at an offset
    decay: tl.pointer_type,  # fp32 [H]
    decay_bias: tl.pointer_type,  # fp32 [H]
    skip: tl.pointer_type,  # fp32 [H] of Mamba
    query_start: tl.pointer_type,  # int32 [S + 1]
    reads: tl.pointer_type,  # int32 [S]
    writes: tl.pointer_type,
    is_chunked: tl.pointer_type,  # int32 [S], if HAS_CHUNKS: of which requests between_kernel computes the tokens
    num_requests: tl.tensor,  # S
    state_stride: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,  # of what a delta net reads by
    dt_min: tl.tensor,  # of Mamba's time steps
    dt_max: tl.tensor,
    IS_DELTA: tl.constexpr,
    HEADS: tl.constexpr,  # H
    GROUPS: tl.constexpr,  # G, of heads that read and write by the same vectors
    KEY_DIM: tl.constexpr,  # K
    VALUE_DIM: tl.constexpr,  # V
    KEYS: tl.constexpr,  # K, as a power of two
    HAS_CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Take each request's state through its tokens, one after the other: a grid of (S, H, V / COLUMNS) programs, of
    which the first of a request's parts has all.
    """
    request, head = tl.program_id(0), tl.program_id(1)
    if _goes_on(request, num_requests, reads, writes):
        return
    if HAS_CHUNKS:  # noqa: SIM102 (one is known when the kernel is compiled)
        if tl.load(is_chunked + request) > 0:
            return
    keys, columns = tl.arange(0, KEYS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = keys < KEY_DIM, columns < VALUE_DIM
    inside = is_key[:, None] & is_column[None, :]
    group = head // (HEADS // GROUPS)
    width = 2 * GROUPS * KEY_DIM + HEADS * VALUE_DIM
    fall, bias = tl.load(decay + head), tl.load(decay_bias + head)
    matrix = states + offset + head * KEY_DIM * VALUE_DIM + keys[:, None] * VALUE_DIM + columns[None, :]
    slot = tl.load(reads + request)
    state = tl.load(matrix + slot.to(tl.int64) * state_stride, mask=inside & (slot >= 0), other=0.0)
    goes_on = request >= 0
    while goes_on:
        for token in range(tl.load(query_start + request), tl.load(query_start + request + 1)):
            row = tl.cast(token, tl.int64)
            at = mixed + row * width + group * KEY_DIM + keys
            read_by = tl.load(at, mask=is_key, other=0.0)
            write_by = tl.load(at + GROUPS * KEY_DIM, mask=is_key, other=0.0)
            values_at = mixed + row * width + 2 * GROUPS * KEY_DIM + head * VALUE_DIM + columns
            value = tl.load(values_at, mask=is_column, other=0.0)
            step = decay_steps(gates, row, row >= 0, head, bias, dt_min, dt_max, IS_DELTA, HEADS)
            state *= tl.exp(-fall * step)
            if IS_DELTA:
                beta = sigmoid(tl.load(gates + row * 2 * HEADS + head).to(tl.float32))
                read_by *= scale / tl.sqrt(tl.sum(read_by * read_by, 0) + 1e-6)
                write_by *= 1 / tl.sqrt(tl.sum(write_by * write_by, 0) + 1e-6)
                added = (value - tl.sum(write_by[:, None] * state, 0)) * beta
            else:
                added = value * step
            state += write_by[:, None] * added[None, :]
            y = tl.sum(read_by[:, None] * state, 0)
            if not IS_DELTA:
                y += tl.load(skip + head) * value
            tl.store(out + (row * HEADS + head) * VALUE_DIM + columns, y, mask=is_column)
        target = tl.load(writes + request)
        tl.store(matrix + target.to(tl.int64) * state_stride, state, mask=inside & (target >= 0))
        request += 1
        goes_on = _goes_on(request, num_requests, reads, writes)


@triton.jit
def gated_norm_kernel(
    out: tl.pointer_type,  # [T, G W]
    y: tl.pointer_type,  # fp32 [T, G W]
    x: tl.pointer_type,  # [T, stride], of which gates [G W] begin at an offset
    weight: tl.pointer_type,  # fp32 [W], or [G, W] with OWN_WEIGHTS
    eps: tl.tensor,
    stride: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,  # W
    GATE_FIRST: tl.constexpr,  # what is normed is gated
    OWN_WEIGHTS: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,  # W, as a power of two
) -> None:
    """Norm a group of a token and multiply it by the SiLU of its gates: a grid of (T, G) programs."""
    row, group, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, COLUMNS)
    inside, at = columns < width, group * width + columns
    place = row * tl.num_programs(1) * width + at
    value = tl.load(y + place, mask=inside, other=0.0)
    gate = tl.load(x + row * stride + offset + at, mask=inside, other=0.0).to(tl.float32)
    gate *= sigmoid(gate)
    if GATE_FIRST:
        value *= gate
    value = normed(value, inside, width, eps, IS_CENTERED)
    value *= tl.load(weight + (at if OWN_WEIGHTS else columns), mask=inside, other=0.0)
    if not GATE_FIRST:
        value *= gate
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
