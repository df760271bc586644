"""Defines the operations of `interface.Backend` in plain PyTorch: right before fast, on any device and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import (
    AttentionSpec,
    Backend,
    Capabilities,
    Role,
    RopeTable,
    Store,
    Weight,
    exact_argmax,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

QUERY_TILE = 256  # rows of one request scored at a time, at most: skips keys of the future
MAX_SCORES = 2**24  # of one tile, over all heads: 64 MiB in fp32, however long the context


class ReferenceBackend(Backend):
    """Computes with PyTorch operations. Here a weight is the tensor itself, a store [2, num_blocks, block_size, Hk, D].

    `why` says why no faster backend was chosen.

        >>> ReferenceBackend().describe()
        'reference kernels in PyTorch'
    """

    capabilities = Capabilities(name="the reference kernels")

    def __init__(self, why: str = "") -> None:
        self.why = why

    def describe(self) -> str:
        return "reference kernels in PyTorch" + (f": {self.why}" if self.why else "")

    def kv_bytes(self, spec: AttentionSpec, *, block_size: int, dtype: torch.dtype) -> int:
        return 2 * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize

    def allocate_kv(
        self, spec: AttentionSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        shape = (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return torch.empty(shape, dtype=dtype, device=device)

    def fill_kv(self, store: Store, byte: int) -> None:
        store.view(torch.uint8).fill_(byte)

    def weight_bytes(self, shape: Sequence[int], *, role: Role, dtype: torch.dtype) -> int:
        del role
        return math.prod(shape) * dtype.itemsize

    def pack(self, pieces: Sequence[Tensor], *, role: Role, dtype: torch.dtype | None = None) -> Weight:
        del role
        weight = pieces[0].clone() if len(pieces) == 1 else torch.cat(tuple(pieces))
        return weight.to(dtype or weight.dtype)

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        return F.embedding(ids, table)

    def argmax(self, scores: Tensor) -> tuple[list[int], list[float]]:
        return exact_argmax(scores)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x.dtype))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (scaled * weight).to(x.dtype)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str) -> Tensor:
        gate, up = self.linear(x, weight, bias).chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def rope_store(
        self,
        qkv: Tensor,
        store: Store,
        spec: AttentionSpec,
        batch: RaggedBatch,
        rope: RopeTable,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        sizes = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = qkv.view(-1, sum(sizes), spec.head_dim).split_with_sizes(sizes, dim=1)
        if q_norm is not None:
            q = self.norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.norm(k, k_norm, eps)
        cos, sin = (table[batch.positions].unsqueeze(1) for table in rope)  # [tokens, 1, rotary_dim / 2]
        written = batch.slot_mapping >= 0
        slots: Tensor = store.view(2, -1, spec.num_kv_heads, spec.head_dim)
        slots[:, batch.slot_mapping[written]] = torch.stack((_rotate(k, cos, sin), v))[:, written]
        return _rotate(q, cos, sin)

    def attend(
        self, q: Tensor, store: Store, spec: AttentionSpec, batch: RaggedBatch, sinks: Tensor | None = None
    ) -> Tensor:
        out = torch.zeros_like(q)
        for request, (seq_len, (begin, end)) in enumerate(
            zip(batch.seq_lens.tolist(), pairwise(batch.query_start.tolist()), strict=True)
        ):
            tile = max(1, min(QUERY_TILE, MAX_SCORES // max(1, q.shape[1] * seq_len)))
            for first in range(begin, end, tile):
                last = min(first + tile, end)
                key_end = seq_len - (end - last)
                key_begin = 0 if spec.window is None else max(0, key_end - (last - first) - spec.window + 1)
                keys, values = _read_kv(store, batch.block_tables[request], key_begin, key_end)
                out[first:last] = _attend_last(q[first:last], keys, values, spec, sinks)
        return out

    def route(self, scores: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        probabilities = scores.to(_wide(scores.dtype)).softmax(dim=-1)
        weights, expert_ids = probabilities.topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights

    def experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, *, w13: Sequence[Weight], w2: Sequence[Weight], activation: str
    ) -> Tensor:
        k = ids.shape[1]
        outputs = x.new_empty(ids.numel(), x.shape[1])  # [tokens x k, hidden]
        for expert in sorted(set(ids.flatten().tolist())):
            pairs = (ids.flatten() == expert).nonzero().squeeze(1)
            outputs[pairs] = self.linear(self.gated(x[pairs // k], w13[expert], None, activation), w2[expert])
        weighted = outputs.view(-1, k, x.shape[1]) * weights.to(_wide(x.dtype)).unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(_wide(x.dtype))
    a, b, rest = wide.split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def _read_kv(store: Tensor, block_table: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [end - begin, Hk, D] of a request's positions begin to end - 1."""
    block_size = store.shape[2]
    first_block = begin // block_size
    blocks = store[:, block_table[first_block : -(-end // block_size)]]  # [2, blocks, block_size, Hk, D]
    offset = first_block * block_size
    keys, values = blocks.flatten(1, 2)[:, begin - offset : end - offset]
    return keys, values


def _attend_last(q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """Return attention of queries [n, H, D] at the last n of L positions to keys and values [L, Hk, D]: [n, H, D]."""
    rows, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    wide = _wide(q.dtype)
    grouped = q.view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    scores = grouped.to(wide) @ keys.to(wide).permute(1, 2, 0) * spec.score_scale  # [Hk, group x n, L]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.view(num_kv_heads, group, rows, length)
    if rows > 1:  # a single row sees every key that was read
        visible = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        if spec.window is not None:
            visible = visible.triu(length - rows - spec.window + 1)
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(num_kv_heads, group, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :length].reshape(num_kv_heads, -1, length)
    y = (weights @ values.to(wide).transpose(0, 1)).view(num_kv_heads, group, rows, head_dim)
    return y.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim).to(q.dtype)
