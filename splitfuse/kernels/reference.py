"""Defines the operations of `interface.Backend` in plain PyTorch: right before fast, on any device and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.drawing import Filter, exact_draw
from splitfuse.kernels.interface import Backend, Capabilities, RopeTable, Store, exact_topk
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    HeadNormSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    QueryScaling,
    RecurrentSpec,
    RouterSpec,
)
from splitfuse.kernels.lora import Adapter, LoraRows, LoraUpdate, PackedAdapter
from splitfuse.kernels.weights import LayerWeights, NetworkWeights, Weight, WeightRole

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}

SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return the gate of gpt-oss: both halves clamped, the up half shifted by one."""
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


GATED_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: partial(_gated, function) for name, function in ACTIVATIONS.items()},
    "clamped_swiglu": _clamped_swiglu,
}
"""Functions of a gate and an up half: an activation of the gate times the up half, and others."""

QUERY_TILE = 256  # rows of one request scored at a time, at most: skips keys of the future
MAX_SCORES = 2**24  # of one tile, over all heads: 64 MiB in fp32, however long the context


class ReferenceBackend(Backend):
    """Computes with PyTorch operations. Here a weight is the tensor itself, a store [2, num_blocks, block_size, Hk, D],
    of latent attention [1, ...], or [num_slots, numbers of a state].

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
        return _num_kept(spec) * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize

    def allocate_kv(
        self, spec: AttentionSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        shape = (_num_kept(spec), num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return torch.empty(shape, dtype=dtype, device=device)

    def fill_kv(self, store: Store, byte: int) -> None:
        store.view(torch.uint8).fill_(byte)

    def read_block(self, store: Store, block: int, out: Tensor) -> None:
        out.copy_(store[:, block].flatten().view(torch.uint8))

    def write_block(self, store: Store, block: int, data: Tensor) -> None:
        part = store[:, block]
        part.copy_(data.view(store.dtype).view(part.shape))

    def state_bytes(self, spec: RecurrentSpec) -> int:
        return 4 * sum(_state_sizes(spec))

    def allocate_states(self, spec: RecurrentSpec, *, num_slots: int, device: torch.device) -> Store:
        return torch.empty(num_slots, sum(_state_sizes(spec)), device=device)

    def weight_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
        kept = _wide(dtype) if role is WeightRole.NORM else dtype
        return math.prod(shape) * kept.itemsize

    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Weight:
        weight = pieces[0].clone() if len(pieces) == 1 else torch.cat(tuple(pieces))
        dtype = dtype or weight.dtype
        return weight.to(_wide(dtype) if role is WeightRole.NORM else dtype).contiguous()

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        return F.embedding(ids, table)

    def topk(self, scores: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        return exact_topk(scores, k)

    def draw(
        self, scores: Tensor, rows: Sequence[int], filters: Sequence[Filter], numbers: Sequence[Sequence[float]]
    ) -> list[list[int]]:
        return exact_draw(scores, rows, filters, numbers)

    def norm(self, x: Tensor, spec: NormSpec, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _norm(x, spec, weight, bias)

    def pack_adapter(self, adapter: Adapter, weights: NetworkWeights, dtype: torch.dtype) -> PackedAdapter:
        def moved(update: LoraUpdate) -> LoraUpdate:
            a, b = (tensor.to(weights.norm.device, _wide(dtype)) for tensor in (update.a, update.b))
            return replace(update, a=a, b=b)

        return [{target: [moved(each) for each in updates] for target, updates in layer.items()} for layer in adapter]

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        return add_lora(F.linear(x, weight, bias), x, lora)

    def linear_heads(self, x: Tensor, weight: Weight) -> Tensor:
        y: Tensor = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2))
        return y.transpose(0, 1)

    def activated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        return ACTIVATIONS[activation](self.linear(x, weight, bias, lora))

    def gated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        gate, up = self.linear(x, weight, bias, lora).chunk(2, dim=-1)
        return GATED_ACTIVATIONS[activation](gate, up)

    def rope_store(
        self,
        qkv: Tensor,
        store: Store,
        spec: AttentionSpec,
        batch: RaggedBatch,
        rope: RopeTable | None,
        weights: LayerWeights,
    ) -> Tensor:
        q, k, v = place_heads(qkv, spec, batch, rope, weights)
        if spec.kv_layer is not None:
            return q
        written = batch.slot_mapping >= 0
        kept = torch.stack((k, v)[: _num_kept(spec)])
        slots: Tensor = store.view(len(kept), -1, spec.num_kv_heads, spec.head_dim)
        slots[:, batch.slot_mapping[written]] = kept[:, written]
        return q

    def attend(
        self, q: Tensor, store: Store, spec: AttentionSpec, batch: RaggedBatch, sinks: Tensor | None = None
    ) -> Tensor:
        out = q.new_zeros(*q.shape[:2], spec.value_dim)
        for request, (seq_len, (begin, end)) in enumerate(
            zip(batch.seq_lens.tolist(), pairwise(batch.query_start.tolist()), strict=True)
        ):
            tile = max(1, min(QUERY_TILE, MAX_SCORES // max(1, q.shape[1] * seq_len)))
            for first in range(begin, end, tile):
                last = min(first + tile, end)
                key_end = seq_len - (end - last)
                key_begin = _first_seen(spec, key_end - (last - first))
                keys, values = _read_kv(store, spec, batch.block_tables[request], key_begin, key_end)
                out[first:last] = _attend_last(q[first:last], keys, values, spec, sinks, key_begin)
        return out

    def delta(
        self, x: Tensor, gates: Tensor, states: Store, spec: DeltaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        assert weights.conv is not None and weights.decay is not None and weights.decay_bias is not None
        wide, group = _wide(x.dtype), spec.num_value_heads // spec.num_key_heads
        keys, values = spec.num_key_heads * spec.key_dim, spec.num_value_heads * spec.value_dim
        channels, z = x.split_with_sizes((spec.num_channels, values), dim=1)
        beta, rate = gates.to(wide).chunk(2, dim=1)
        kept = torch.exp(-weights.decay * F.softplus(rate + weights.decay_bias))  # [T, Hv]
        beta, out = beta.sigmoid(), x.new_empty(len(x), spec.num_value_heads, 1, spec.value_dim, dtype=wide)
        for request, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
            tail, state = _read_state(states, spec, batch, request)
            mixed, tail = _convolve(channels[begin:end].to(wide), tail, weights.conv)
            q, k, v = F.silu(mixed).split_with_sizes((keys, keys, values), dim=1)
            q, k = (_unit(each.view(-1, spec.num_key_heads, spec.key_dim)) for each in (q, k))
            q, k = (each.repeat_interleave(group, dim=1).unsqueeze(2) for each in (q * spec.key_dim**-0.5, k))
            v = v.view(-1, spec.num_value_heads, 1, spec.value_dim)
            state = state.view(spec.num_value_heads, spec.key_dim, spec.value_dim).to(wide, copy=True)
            for token in range(end - begin):
                state *= kept[begin + token].view(-1, 1, 1)
                error = torch.baddbmm(v[token], k[token], state, alpha=-1) * beta[begin + token].view(-1, 1, 1)
                state.baddbmm_(k[token].transpose(1, 2), error)
                torch.bmm(q[token], state, out=out[begin + token])
            states[batch.state_writes[request]] = torch.cat((tail.flatten(), state.flatten()))
        heads = _norm(out.view(len(x), spec.num_value_heads, spec.value_dim), spec.norm, weights.out_norm)
        return (heads.flatten(1) * F.silu(z.to(wide))).to(x.dtype)

    def mamba(
        self, x: Tensor, dt: Tensor, states: Store, spec: MambaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        assert weights.conv is not None and weights.out_norm is not None and weights.skip is not None
        assert weights.decay is not None and weights.decay_bias is not None
        wide, heads, group = _wide(x.dtype), spec.num_heads, spec.num_heads // spec.num_groups
        shared, values = spec.num_groups * spec.state_dim, heads * spec.head_dim
        channels, z = x.split_with_sizes((spec.num_channels, values), dim=1)
        dt = F.softplus(dt.to(wide) + weights.decay_bias).clamp(spec.dt_min, spec.dt_max)  # [T, H]
        kept, out = torch.exp(-weights.decay * dt), x.new_empty(len(x), heads, 1, spec.head_dim, dtype=wide)
        for request, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
            tail, state = _read_state(states, spec, batch, request)
            mixed, tail = _convolve(channels[begin:end].to(wide), tail, weights.conv, weights.conv_bias)
            c, b, v = F.silu(mixed).split_with_sizes((shared, shared, values), dim=1)
            c, b = (each.view(-1, spec.num_groups, spec.state_dim).repeat_interleave(group, dim=1) for each in (c, b))
            v = v.view(-1, heads, 1, spec.head_dim)
            added = v * dt[begin:end].view(-1, heads, 1, 1)
            state = state.view(heads, spec.state_dim, spec.head_dim).to(wide, copy=True)
            for token in range(end - begin):
                state *= kept[begin + token].view(-1, 1, 1)
                state.baddbmm_(b[token].unsqueeze(2), added[token])
                torch.bmm(c[token].unsqueeze(1), state, out=out[begin + token])
            out[begin:end] += v * weights.skip.view(-1, 1, 1)
            states[batch.state_writes[request]] = torch.cat((tail.flatten(), state.flatten()))
        gated = (out.flatten(1) * F.silu(z.to(wide))).view(len(x), spec.num_groups, values // spec.num_groups)
        return _norm(gated, spec.norm, weights.out_norm.view(spec.num_groups, -1)).flatten(1).to(x.dtype)

    def conv(self, x: Tensor, states: Store, spec: ConvSpec, batch: RaggedBatch, weights: LayerWeights) -> Tensor:
        assert weights.conv is not None
        b, c, u = x.to(_wide(x.dtype)).chunk(3, dim=1)
        inputs, out = b * u, torch.empty_like(b)
        for request, (begin, end) in enumerate(pairwise(batch.query_start.tolist())):
            tail, _ = _read_state(states, spec, batch, request)
            out[begin:end], tail = _convolve(inputs[begin:end], tail, weights.conv, weights.conv_bias)
            states[batch.state_writes[request]] = tail.flatten()
        return (c * out).to(x.dtype)

    def route(self, logits: Tensor, spec: RouterSpec, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = logits.to(_wide(logits.dtype))
        scores = wide.sigmoid() if spec.sigmoid else wide.softmax(dim=-1)
        choice = scores if choice_bias is None else scores + choice_bias.to(scores.dtype)
        if spec.num_groups > 1:
            size = spec.num_experts // spec.num_groups
            groups = choice.reshape(len(choice), spec.num_groups, size)
            sums = groups.topk(min(spec.group_best, size), dim=-1).values.sum(dim=-1)
            left_out = torch.ones_like(sums, dtype=torch.bool).scatter(1, _best(sums, spec.top_groups), False)
            choice = groups.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)
        expert_ids = _best(choice, spec.top_k)
        weights = scores.gather(1, expert_ids)
        if spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=spec.min_sum)
        return expert_ids, weights * spec.scale

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, spec: MlpSpec, layer: LayerWeights) -> Tensor:
        k = ids.shape[1]
        outputs = x.new_empty(ids.numel(), x.shape[1])  # [tokens x k, hidden]
        for expert in sorted(set(ids.flatten().tolist())):
            pairs = (ids.flatten() == expert).nonzero().squeeze(1)
            biases = (layer.w1_bias[expert], layer.w2_bias[expert]) if spec.bias else (None, None)
            if spec.gated:
                inner = self.gated(x[pairs // k], layer.w13[expert], biases[0], spec.activation)
            else:
                inner = self.activated(x[pairs // k], layer.w1[expert], biases[0], spec.activation)
            outputs[pairs] = self.linear(inner, layer.w2[expert], biases[1])
        weighted = outputs.view(-1, k, x.shape[1]) * weights.to(_wide(x.dtype)).unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)


def add_lora(y: Tensor, x: Tensor, lora: LoraRows | None) -> Tensor:
    """Return the product y [T, N] of x [T, K] with what adapters add to their rows."""
    if lora is None:
        return y
    for number, adapter in enumerate(lora.step.adapters):
        updates = adapter[lora.layer].get(lora.target, ())
        for update in updates:
            rows = lora.step.rows[number]
            shrunk = F.linear(x[rows].to(update.a.dtype), update.a) * update.scale
            columns = slice(update.first_row, update.first_row + len(update.b))
            y[rows, columns] = (y[rows, columns] + F.linear(shrunk, update.b)).to(y.dtype)
    return y


def place_heads(
    qkv: Tensor, spec: AttentionSpec, batch: RaggedBatch, rope: RopeTable | None, weights: LayerWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [T, H, D], keys and values [T, Hk, D] of qkv: normed, rotated and scaled as the spec says. If they
    are another layer's, there are no keys and values; values that are parts of keys are left out.
    """
    num_kv_heads = spec.num_kv_heads if spec.kv_layer is None else 0
    sizes = (spec.num_heads, num_kv_heads, 0 if spec.value_from else num_kv_heads)
    q, k, v = qkv.view(-1, sum(sizes), spec.head_dim).split_with_sizes(sizes, dim=1)
    norms = spec.qk_norm
    if norms is not None and not norms.after_rope:
        q = _norm_heads(q, norms, weights.q_norm, weights.q_norm_bias)
        k = _norm_heads(k, norms, weights.k_norm, weights.k_norm_bias)
    if rope is not None:
        cos, sin = (table[batch.positions].unsqueeze(1) for table in rope)  # [tokens, 1, rotary_dim / 2]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if norms is not None and norms.after_rope:
        q = _norm_heads(q, norms, weights.q_norm, weights.q_norm_bias)
        k = _norm_heads(k, norms, weights.k_norm, weights.k_norm_bias)
    if spec.query_scaling is not None:
        q = (q * query_scales(spec.query_scaling, batch.positions).view(-1, 1, 1)).to(q.dtype)
    if spec.v_norm is not None:
        v = _norm(v, spec.v_norm)
    return q, k, v


def query_scales(scaling: QueryScaling, positions: Tensor) -> Tensor:
    """Return the factors of queries at these positions, in fp32: each depends on its position alone."""
    turns = torch.floor((positions + scaling.offset) / scaling.length)
    return (1 + scaling.beta * torch.log1p(turns)).float()


def _norm(x: Tensor, spec: NormSpec, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the norm of the last dimension; `weight` and `bias` are shaped like its last dimensions."""
    wide = x.to(_wide(x.dtype))
    if spec.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.eps)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(x.dtype)


def _norm_heads(heads: Tensor, spec: HeadNormSpec, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return normed heads [T, H, D]."""
    if spec.whole_row:
        return _norm(heads.flatten(1), spec.norm, weight, bias).view_as(heads)
    return _norm(heads, spec.norm, weight, bias)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of each row's largest, best first and of equal ones the lower first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _first_seen(spec: AttentionSpec, position: int) -> int:
    """Return the first position that the query at `position` sees."""
    first = 0 if spec.window is None else max(0, position - spec.window + 1)
    return first if spec.chunk is None else max(first, position // spec.chunk * spec.chunk)


def _state_sizes(spec: RecurrentSpec) -> tuple[int, int]:
    """Return how many numbers of a state are inputs of the convolution, and how many the matrices of heads."""
    matrices = 0
    if isinstance(spec, DeltaSpec):
        matrices = spec.num_value_heads * spec.key_dim * spec.value_dim
    elif isinstance(spec, MambaSpec):
        matrices = spec.num_heads * spec.state_dim * spec.head_dim
    return (spec.conv_size - 1) * spec.num_channels, matrices


def _read_state(states: Tensor, spec: RecurrentSpec, batch: RaggedBatch, request: int) -> tuple[Tensor, Tensor]:
    """Return the last inputs [conv_size - 1, channels] of a request before its chunk, and its matrices, flat."""
    slot, sizes = int(batch.state_reads[request]), _state_sizes(spec)
    state = states.new_zeros(sum(sizes)) if slot < 0 else states[slot]
    tail, matrices = state.split_with_sizes(sizes)
    return tail.view(spec.conv_size - 1, spec.num_channels), matrices


def _convolve(inputs: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the convolution [n, channels] of inputs that follow those of the tail, and the new tail."""
    whole = torch.cat((tail.to(inputs.dtype), inputs))
    size = len(weight)
    out = (whole.unfold(0, size, 1) * weight.T).sum(-1)
    return out if bias is None else out + bias, whole[len(whole) - size + 1 :]


def _unit(x: Tensor) -> Tensor:
    """Return vectors of length 1, or less where they are nearly zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(_wide(x.dtype))
    a, b, rest = wide.split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def _num_kept(spec: AttentionSpec) -> int:
    """Return how many vectors a token keeps of each head: its key, and its value unless that is part of the key."""
    return 1 if spec.value_from else 2


def _read_kv(store: Tensor, spec: AttentionSpec, block_table: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [end - begin, Hk, D] of a request's positions begin to end - 1."""
    block_size = store.shape[2]
    first_block = begin // block_size
    blocks = store[:, block_table[first_block : -(-end // block_size)]]  # [1 or 2, blocks, block_size, Hk, D]
    offset = first_block * block_size
    kept = blocks.flatten(1, 2)[:, begin - offset : end - offset]
    return kept[0], kept[-1][..., spec.value_from :]


def alibi_slopes(spec: AttentionSpec) -> Tensor:
    """Return how much the score of each head falls with a position of distance, in fp32 (Press et al., arXiv
    2108.12409): a geometric series for a power of two of heads; heads beyond it take every other number of the next.
    """
    assert spec.alibi is not None
    num_heads, whole = spec.num_heads, 2 ** math.floor(math.log2(spec.num_heads))

    def series(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    return torch.tensor(series(whole) + series(2 * whole)[0::2][: num_heads - whole]) * spec.alibi


def _attend_last(
    q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, sinks: Tensor | None, begin: int
) -> Tensor:
    """Return attention of queries [n, H, D] at the last n of L positions to keys and values [L, Hk, D], of which values
    may be shorter: [n, H, Dv]. The first position is `begin`.
    """
    rows, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    wide = _wide(q.dtype)
    grouped = q.view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    scores = grouped.to(wide) @ keys.to(wide).permute(1, 2, 0) * spec.score_scale  # [Hk, group x n, L]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.view(num_kv_heads, group, rows, length)
    positions = torch.arange(begin, begin + length, device=q.device)
    queries = positions[length - rows :].unsqueeze(1)
    if spec.alibi is not None:
        slopes = alibi_slopes(spec).to(scores).view(num_kv_heads, group, 1, 1)
        scores = scores + slopes * (positions - queries).to(scores.dtype)
    if rows > 1:  # a single row sees every key that was read
        first = torch.tensor([_first_seen(spec, begin + length - rows + row) for row in range(rows)], device=q.device)
        scores = scores.masked_fill((positions > queries) | (positions < first.unsqueeze(1)), -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(num_kv_heads, group, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :length].reshape(num_kv_heads, -1, length)
    y = (weights @ values.to(wide).transpose(0, 1)).view(num_kv_heads, group, rows, -1)
    return y.permute(2, 0, 1, 3).reshape(rows, num_heads, -1).to(q.dtype)
