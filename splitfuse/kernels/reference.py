"""The kernel interface, and its meaning in plain PyTorch on any device and dtype.

A backend subclasses `Kernels` and overrides what it accelerates. Everything is flat: T tokens of one step, S requests,
H query heads, Hk key/value heads, D head size, C hidden size. What a weight or a KV store looks like inside is the
backend's own affair: weights come out of `pack`, stores out of `allocate_kv`, and only kernels look into them. Knows no
request, model or config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.errors import ConfigError

Weight: TypeAlias = Any
"""What `pack` returns."""
Store: TypeAlias = Any
"""The keys and values of one layer, as `allocate_kv` returns them."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

QUERY_TILE = 256  # rows of one request scored at a time, at most: skips keys of the future
MOST_SCORES = 2**24  # of one tile, over all heads: 64 MiB in fp32, however long the context


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One pre-norm decoder layer. Linear weights are packed; norms and biases are plain vectors, None where the network
    has none.
    """

    attn_norm: Tensor
    qkv: Weight  # [(H + 2 Hk) D, C]
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o: Weight  # [C, H D]
    o_bias: Tensor | None = None
    mlp_norm: Tensor
    gate_up: Weight = None  # [2I, C]
    gate_up_bias: Tensor | None = None
    down: Weight = None  # [C, I]
    down_bias: Tensor | None = None
    router: Weight = None  # [E, C]: these three instead of gate_up and down, where there are experts
    w13: Sequence[Weight] = ()  # of each expert [2I, C]
    w2: Sequence[Weight] = ()  # of each expert [C, I]


@dataclass(frozen=True, kw_only=True)
class NetworkWeights:
    """All of a network's weights."""

    embed: Weight  # [vocabulary, C]: a plain tensor, or the head itself where the two are tied
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Weight  # [vocabulary, C]


class Network(Protocol):
    """All of a network but its head in one call; see `Kernels.fuse`.

    `packed` is the step as one int32 tensor: ids [T], positions [T], slot_mapping [T], query_start [S + 1], seq_lens
    [S], block_tables [S, table_width], logit_rows [R], one behind the other.
    """

    def __call__(
        self,
        stores: Sequence[Store],
        packed: Tensor,
        *,
        num_tokens: int,
        num_requests: int,
        table_width: int,
        num_rows: int,
    ) -> Tensor: ...


class Kernels:
    """The reference backend. Here a weight is the tensor itself, a store [2, num_blocks, block_size, Hk, D].

    `why` says what stood in the way of faster kernels, if something did.
    """

    def __init__(self, why: str = "") -> None:
        self.why = why

    def check_block_size(self, block_size: int) -> None:
        """Raise ConfigError for a block size this backend does not take; the reference takes every positive one."""
        if block_size < 1:
            raise ConfigError(f"block_size must be at least 1, not {block_size}")

    def kv_bytes(self, *, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer."""
        return 2 * block_size * num_kv_heads * head_dim * dtype.itemsize

    def allocate_kv(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Store:
        """The store of one layer. What it holds before it is written is never read."""
        return torch.empty(2, num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)

    def describe(self) -> str:
        """One line for the start: which kernels, and on what."""
        return "reference kernels in PyTorch" + (f": {self.why}" if self.why else "")

    def weight_bytes(self, shape: Sequence[int], *, role: str, dtype: torch.dtype) -> int:
        """Bytes of a weight as it is kept: packed for its role, or "plain" for what is not."""
        del role
        return math.prod(shape) * dtype.itemsize

    def pack(self, pieces: Sequence[Tensor], *, role: str, dtype: torch.dtype | None = None) -> Weight:
        """A linear weight [N, K] in the form that `linear`, `gated` or `experts` wants, from the pieces of its rows in
        their order. They may be maps of files, which are given back afterwards: what is kept must be a copy. `dtype` is
        what to compute in, if that is not the pieces' own.

        `role` is its field of LayerWeights, or "head": what a backend may choose the form by. A packed head is read by
        `embed` too, where the two are one. "plain" stays a tensor of the pieces' shape: vectors, and tables to look up.
        """
        del role
        weight = pieces[0].clone() if len(pieces) == 1 else torch.cat(tuple(pieces))
        return weight.to(dtype or weight.dtype)

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        """Rows of `table` [vocabulary, C], a tensor or a packed head, for `ids` [T]: [T, C]."""
        return F.embedding(ids, table)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias + residual`: [T, K] -> [T, N]."""
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467), in fp32 or wider."""
        wide = x.to(_wide(x.dtype))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (scaled * weight).to(x.dtype)

    def activate(self, gate_up: Tensor, kind: str) -> Tensor:
        """`activation(gate) * up`, both halves of `gate_up` [T, 2I]: [T, I]. `kind` is a key of ACTIVATIONS."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[kind](gate) * up

    def gated(self, x: Tensor, weight: Weight, bias: Tensor | None, kind: str) -> Tensor:
        """`activate` of the product with a "gate_up": x [T, K], weight [2I, K] -> [T, I]."""
        return self.activate(self.linear(x, weight, bias), kind)

    def rope_store(
        self,
        qkv: Tensor,
        *,
        positions: Tensor,
        slot_mapping: Tensor,
        cos: Tensor,
        sin: Tensor,
        store: Store,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Norm the heads if there are weights [D] for it, rotate queries and keys, write keys and values to the store.

        qkv [T, (H + 2 Hk) D], positions [T], slot_mapping [T] -> queries [T, H, D]. Rows of `cos` and `sin`
        [max_position, rotary_dim / 2] turn the first rotary_dim elements of a head, element i with element i +
        rotary_dim / 2 (Su et al., arXiv 2104.09864); the others pass. A token of slot -1 is written nowhere.
        """
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if q_norm is not None:
            q = self.norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.norm(k, k_norm, eps)
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [tokens, 1, rotary_dim / 2]
        written = slot_mapping >= 0
        slots: Tensor = store.view(2, -1, num_kv_heads, head_dim)
        slots[:, slot_mapping[written]] = torch.stack((_rotate(k, cos, sin), v))[:, written]
        return _rotate(q, cos, sin)

    def attend(
        self,
        q: Tensor,
        store: Store,
        *,
        query_start: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each request's newest tokens to all its tokens, over blocked KV: [T, H, D] -> [T, H, D].

        Request s owns the rows `query_start[s]` to `query_start[s + 1]` of `q`; they are the last of its `seq_lens[s]`
        positions, whose keys lie in the blocks `block_tables[s]`. The query at position p sees p and what is before
        it; with a `window`, only p - window + 1 to p. Scores are scaled, then capped: softcap * tanh(score / softcap).
        `sinks` [H] are scores of a key without a value. What lies beyond the request's positions is never read.
        """
        out = torch.zeros_like(q)
        for request, (seq_len, (begin, end)) in enumerate(
            zip(seq_lens.tolist(), pairwise(query_start.tolist()), strict=True)
        ):
            tile = max(1, min(QUERY_TILE, MOST_SCORES // max(1, q.shape[1] * seq_len)))
            for first in range(begin, end, tile):
                last = min(first + tile, end)
                key_end = seq_len - (end - last)
                key_begin = 0 if window is None else max(0, key_end - (last - first) - window + 1)
                keys, values = _read_kv(store, block_tables[request], key_begin, key_end)
                out[first:last] = _attend_last(q[first:last], keys, values, scale, window, softcap, sinks)
        return out

    def route(self, scores: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """A router's scores [T, E] -> for every token its `top_k` best experts and their weights, both [T, top_k], best
        first: the softmax over all experts, in fp32 or wider; with `renormalize` scaled to add up to 1.

        Source: Shazeer et al., arXiv 1701.06538; `renormalize` is Mixtral's rule (arXiv 2401.04088).
        """
        probabilities = scores.to(_wide(scores.dtype)).softmax(dim=-1)
        weights, expert_ids = probabilities.topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights

    def experts(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        *,
        w13: Sequence[Weight],
        w2: Sequence[Weight],
        kind: str,
    ) -> Tensor:
        """For every token the weighted sum over its k different experts: x [T, C], ids and weights [T, k] -> [T, C].

        Expert e computes `gated(x, w13[e]) @ w2[e].T` with w13[e] [2I, C] and w2[e] [C, I]. The sum over a token's
        experts runs in the order of its ids, whichever tokens are beside it.
        """
        k = expert_ids.shape[1]
        outputs = x.new_empty(expert_ids.numel(), x.shape[1])  # [tokens x k, hidden]
        for expert in sorted(set(expert_ids.flatten().tolist())):
            pairs = (expert_ids.flatten() == expert).nonzero().squeeze(1)
            outputs[pairs] = self.linear(self.gated(x[pairs // k], w13[expert], None, kind), w2[expert])
        weighted = outputs.view(-1, k, x.shape[1]) * expert_weights.to(_wide(x.dtype)).unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        """The named rows of `x`."""
        return x.index_select(0, rows)

    def argmax(self, scores: Tensor) -> tuple[list[int], list[float]]:
        """For each row of `scores` [R, V] the lowest index of its largest element, and that element; NaN if the row
        has one, whatever the index.
        """
        peaks = scores.amax(-1)
        ids = torch.arange(scores.shape[1], device=scores.device)
        best = torch.where(scores == peaks.unsqueeze(1), ids, scores.shape[1] - 1).amin(-1)
        return best.tolist(), peaks.tolist()

    def fuse(
        self,
        weights: NetworkWeights,
        *,
        windows: Sequence[int | None],
        activation: str,
        norm_eps: float,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        scale: float,
        softcap: float | None,
        top_k: int,
        renormalize: bool,
    ) -> Network | None:
        """A network as one call, from token ids to the normed rows [R, C] that the head is applied to, which gives what
        the operations above give one by one: where a backend has that. `top_k` and `renormalize` are those of `route`,
        for layers that have a router.
        """
        del weights, windows, activation, norm_eps, cos, sin, num_heads, scale, softcap, top_k, renormalize
        return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(_wide(x.dtype))
    a, b, rest = wide.split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def _read_kv(store: Tensor, block_table: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values [end - begin, Hk, D] of a request's positions begin to end - 1."""
    block_size = store.shape[2]
    first_block = begin // block_size
    blocks = store[:, block_table[first_block : -(-end // block_size)]]  # [2, blocks, block_size, Hk, D]
    offset = first_block * block_size
    keys, values = blocks.flatten(1, 2)[:, begin - offset : end - offset]
    return keys, values


def _attend_last(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of queries [n, H, D] at the last n of the L positions of keys and values [L, Hk, D]: [n, H, D]."""
    rows, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    wide = _wide(q.dtype)
    grouped = q.view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    scores = grouped.to(wide) @ keys.to(wide).permute(1, 2, 0) * scale  # [Hk, group x n, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(num_kv_heads, group, rows, length)
    if rows > 1:  # a single row sees every key that was read
        visible = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        if window is not None:
            visible = visible.triu(length - rows - window + 1)
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(num_kv_heads, group, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :length].reshape(num_kv_heads, -1, length)
    y = (weights @ values.to(wide).transpose(0, 1)).view(num_kv_heads, group, rows, head_dim)
    return y.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim).to(q.dtype)
