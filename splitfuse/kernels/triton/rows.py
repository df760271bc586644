"""Computes the small operations of every layer, a row or a few at a time: norms, gated activations, the best
token, and what `Backend.rope_store` does with queries, keys and values.

Each row's sums are taken over a tile of one shape, whatever else is in the step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitfuse.kernels.triton.attention import tanh

NO_NORM, NORM_FIRST, NORM_LAST = 0, 1, 2
"""Values of NORM of `place_kernel`: heads are not normed, or before or after they are rotated."""
SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, CLAMPED_SWIGLU = range(7)
ACTIVATIONS = {
    "silu": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu": RELU,
    "relu2": RELU2,
    "sigmoid": SIGMOID,
    "clamped_swiglu": CLAMPED_SWIGLU,
}
"""KIND of `gated` by the names of `reference.GATED_ACTIVATIONS`."""


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Return the logistic function of fp32."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return the activation of a gate times the up half, in fp32."""
    if KIND == 0:
        y = gate * sigmoid(gate) * up
    elif KIND == 1:
        y = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == 2:
        y = 0.5 * gate * (1 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    elif KIND == 3:
        y = tl.maximum(gate, 0.0) * up
    elif KIND == 4:
        y = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0) * up
    elif KIND == 5:
        y = sigmoid(gate) * up
    else:  # that of gpt-oss
        gate = tl.minimum(gate, 7.0)
        y = gate * sigmoid(1.702 * gate) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1)
    return y


@triton.jit
def gated_kernel(
    out: tl.pointer_type,  # [T, I]
    gate_up: tl.pointer_type,  # [T, 2 I]
    width: tl.tensor,  # I
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Compute the activation of the first half of a row times its second half: a grid of (T, I / COLUMNS) programs."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, gated(gate, up, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def normed(
    values: tl.tensor, inside: tl.tensor, width: tl.tensor, eps: tl.tensor, IS_CENTERED: tl.constexpr
) -> tl.tensor:
    """Return a row of `width` elements, which are those `inside`, normed in fp32."""
    if IS_CENTERED:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    return values / tl.sqrt(tl.sum(values * values, 0) / width + eps)


@triton.jit
def norm_kernel(
    out: tl.pointer_type,  # [T, C]
    summed: tl.pointer_type,  # [T, C]: x + branch * branch_scale, if HAS_BRANCH; may be x
    x: tl.pointer_type,  # [T, C]
    branch: tl.pointer_type,  # [T, C], if HAS_BRANCH
    weight: tl.pointer_type,  # fp32 [C]
    bias: tl.pointer_type,  # fp32 [C], if HAS_BIAS
    branch_scale: tl.tensor,
    width: tl.tensor,  # C
    eps: tl.tensor,
    HAS_BRANCH: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,  # C, as a power of two
) -> None:
    """Add a block's output to the residual stream, if there is one, and norm the sum: a program for each row."""
    row, columns = tl.program_id(0).to(tl.int64) * width, tl.arange(0, COLUMNS)
    inside = columns < width
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row + columns, mask=inside, other=0.0).to(tl.float32)
        total = (values + added * branch_scale).to(summed.dtype.element_ty)
        tl.store(summed + row + columns, total, mask=inside)
        values = total.to(tl.float32)
    y = normed(values, inside, width, eps, IS_CENTERED)
    y *= tl.load(weight + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def best_kernel(
    out: tl.pointer_type,  # int32 [R, 2]: a column, and the bits of its number in fp32
    scores: tl.pointer_type,  # fp32 [R, V]
    width: tl.tensor,  # V
    COLUMNS: tl.constexpr,
) -> None:
    """Find the first of the largest numbers of a row, which is NaN if the row has one: a program for each row."""
    row, columns = scores + tl.program_id(0).to(tl.int64) * width, tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    where = columns
    has_nan = tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, width, COLUMNS):
        here = begin + columns
        values = tl.load(row + here, mask=here < width, other=float("-inf"))
        has_nan = tl.where(values != values, 1, has_nan)
        is_better = values > best
        best = tl.where(is_better, values, best)
        where = tl.where(is_better, here, where)
    peak = tl.max(best, 0)
    first = tl.min(tl.where(best == peak, where, width - 1), 0)
    peak = tl.where(tl.max(has_nan, 0) > 0, float("nan"), peak)
    tl.store(out + tl.program_id(0) * 2, first)
    tl.store(out + tl.program_id(0) * 2 + 1, peak.to(tl.int32, bitcast=True))


# --- queries, keys and values -----------------------------------------------------------------------------------------


@triton.jit
def _moments(
    x: tl.tensor, inside: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, IS_CENTERED: tl.constexpr
) -> tl.tensor:
    """Return what is subtracted from each row of x [M, D], and what it is multiplied by then, to norm it."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    if IS_CENTERED:
        mean = tl.sum(x, 1) / WIDTH
    centered = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centered * centered, 1) / WIDTH + eps)


@triton.jit
def _scaled(
    x: tl.tensor,
    mean: tl.tensor,
    factor: tl.tensor,
    at: tl.tensor,
    is_column: tl.tensor,
    weight: tl.pointer_type,
    bias: tl.pointer_type,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """Return rows of x [M, D] normed by these moments, with elements `at` [D] of a norm's weight and bias."""
    y = (x - mean[:, None]) * factor[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight + at, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + at, mask=is_column, other=0.0)[None, :]
    return y


@triton.jit
def _turned(
    base: tl.pointer_type,  # of the elements of this head of token 0
    stride: tl.tensor,  # from token to token
    tokens: tl.tensor,  # [M]
    is_token: tl.tensor,
    norm_head: tl.tensor,  # this head's place in the norm's weight
    positions: tl.pointer_type,
    cos: tl.pointer_type,
    sin: tl.pointer_type,
    weight: tl.pointer_type,
    bias: tl.pointer_type,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """Return a head [M, D] of some tokens, normed and rotated, in fp32. Each element is rotated with its partner, which
    is HALF columns from it.
    """
    columns = tl.arange(0, DIM)
    is_column = columns < HEAD_DIM
    inside = is_token[:, None] & is_column[None, :]
    rows = base + tokens.to(tl.int64)[:, None] * stride
    y = tl.load(rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    at = norm_head * HEAD_DIM
    if NORM == 1:
        mean, factor = _moments(y, inside, eps, HEAD_DIM, IS_CENTERED)
        y = _scaled(y, mean, factor, at + columns, is_column, weight, bias, HAS_WEIGHT, HAS_BIAS)
    if HALF > 0:
        is_turned, is_second = columns < 2 * HALF, columns >= HALF
        partners = tl.where(is_turned, tl.where(is_second, columns - HALF, columns + HALF), columns)
        other = tl.load(rows + partners[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM == 1:
            other = _scaled(other, mean, factor, at + partners, is_column, weight, bias, HAS_WEIGHT, HAS_BIAS)
        angle = tl.where(is_second, columns - HALF, columns)
        position = tl.load(positions + tokens, mask=is_token, other=0).to(tl.int64)
        in_table = position[:, None] * HALF + angle[None, :]
        is_angle = is_token[:, None] & is_turned[None, :]
        c = tl.load(cos + in_table, mask=is_angle, other=1.0)
        s = tl.load(sin + in_table, mask=is_angle, other=0.0)
        y = y * c + other * tl.where(is_second[None, :], s, -s)
    if NORM == 2:
        mean, factor = _moments(y, inside, eps, HEAD_DIM, IS_CENTERED)
        y = _scaled(y, mean, factor, at + columns, is_column, weight, bias, HAS_WEIGHT, HAS_BIAS)
    return y


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def place_kernel(
    q_out: tl.pointer_type,  # [T, H, D]
    store: tl.pointer_type,  # [1 or 2, num_blocks, BLOCK, Hk, D]
    store_scales: tl.pointer_type,  # fp32 [2, num_blocks, BLOCK, Hk], if LEVELS
    qkv: tl.pointer_type,  # [T, (H + 2 Hk) D], or without values
    positions: tl.pointer_type,  # int32 [T]
    slots: tl.pointer_type,  # int32 [T], -1: keys and values are not written
    cos: tl.pointer_type,  # fp32 [positions, HALF]
    sin: tl.pointer_type,
    q_norm: tl.pointer_type,  # fp32 [D], or [H, D] with OWN_WEIGHTS
    q_bias: tl.pointer_type,
    k_norm: tl.pointer_type,  # fp32 [D], or [Hk, D] with OWN_WEIGHTS, of the type of q_norm in any case
    k_bias: tl.pointer_type,
    query_scales: tl.pointer_type,  # fp32 [T], if HAS_SCALES
    num_tokens: tl.tensor,
    num_slots: tl.tensor,  # num_blocks * BLOCK
    stride: tl.tensor,  # from row to row of qkv
    eps: tl.tensor,
    v_eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM, as a power of two
    HALF: tl.constexpr,  # elements of a head that are rotated / 2
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    OWN_WEIGHTS: tl.constexpr,  # 0 or 1
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    V_NORM: tl.constexpr,  # 0: none, 1: RMS, 2: centered
    HAS_SCALES: tl.constexpr,
    LEVELS: tl.constexpr,  # largest number that the store holds of a head that is divided by its scale; 0: no scales
    IS_INTEGER: tl.constexpr,
) -> None:
    """Norm and rotate one head of some tokens; a query goes to `q_out`, a key or value to its slot. A grid of
    (T / TOKENS, heads of qkv) programs.
    """
    head = tl.program_id(1)
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token, columns = tokens < num_tokens, tl.arange(0, DIM)
    inside = is_token[:, None] & (columns < HEAD_DIM)[None, :]
    base = qkv + head * HEAD_DIM
    if is_value:
        kv_head = head - HEADS - KV_HEADS
        y = tl.load(base + tokens.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        y = y.to(tl.float32)
        if V_NORM > 0:
            mean, factor = _moments(y, inside, v_eps, HEAD_DIM, V_NORM == 2)
            y = (y - mean[:, None]) * factor[:, None]
    else:
        kv_head = head - HEADS  # of a key
        y = _turned(
            base,
            stride,
            tokens,
            is_token,
            tl.where(is_query, head, kv_head) * OWN_WEIGHTS,
            positions,
            cos,
            sin,
            tl.where(is_query, q_norm, k_norm),
            tl.where(is_query, q_bias, k_bias),
            eps,
            HEAD_DIM,
            DIM,
            HALF,
            NORM,
            IS_CENTERED,
            HAS_WEIGHT,
            HAS_BIAS,
        )
    if is_query:
        if HAS_SCALES:
            y *= tl.load(query_scales + tokens, mask=is_token, other=0.0)[:, None]
        rows = tokens.to(tl.int64) * HEADS + head
        tl.store(q_out + rows[:, None] * HEAD_DIM + columns[None, :], y.to(q_out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + tokens, mask=is_token, other=-1)
        is_written = slot >= 0
        places = (slot.to(tl.int64) + tl.where(is_value, tl.cast(num_slots, tl.int64), 0)) * KV_HEADS + kv_head
        if LEVELS > 0:
            largest = tl.max(tl.where(inside, tl.abs(y), 0.0), 1)
            tl.store(store_scales + places, largest / LEVELS, mask=is_written)
            y *= tl.where(largest > 0, LEVELS / largest, 0.0)[:, None]
            if IS_INTEGER:
                y = tl.floor(y + 0.5)
        kept = is_written[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(store + places[:, None] * HEAD_DIM + columns[None, :], y.to(store.dtype.element_ty), mask=kept)
