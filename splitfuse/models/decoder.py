"""Computes the only network: a decoder over blocked KV, layer by layer as its ModelSpec says.

Knows neither where weights come from (weights.py) nor which requests a batch serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group
from splitfuse.kernels.interface import Backend, NetworkPlan, Store, add_branch
from splitfuse.kernels.layers import (
    AttentionSpec,
    DeltaSpec,
    ExpertsSpec,
    MambaSpec,
    Mixer,
    MlpSpec,
    NormPlace,
    NormSpec,
    TokenInputSpec,
)
from splitfuse.kernels.loans import Channel
from splitfuse.kernels.lora import LoraRows
from splitfuse.kernels.weights import LayerWeights, MlpWeights, NetworkWeights
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.latent import compressed
from splitfuse.models.rope import rope_table
from splitfuse.models.spec import ModelSpec

LoraOf: TypeAlias = Callable[[str], LoraRows | None]
"""Function that returns what the adapters of a step add to a target of a layer."""


class ResidualStream:
    """Holds the residual stream [T, C]. What a block gives is added by the operation that reads the stream next."""

    def __init__(self, x: Tensor, backend: Backend, norm: NormSpec) -> None:
        self._x, self._backend, self._norm = x, backend, norm
        self._branch: Tensor | None = None  # what the last block gave, if it is not added yet
        self._scale = 1.0

    def add(self, branch: Tensor, scale: float) -> None:
        """Add `scale` times what a block gave."""
        self.sum()
        self._branch, self._scale = branch, scale

    def replace(self, x: Tensor) -> None:
        """Let the stream be another."""
        self._x, self._branch = x, None

    def keep(self, rows: Tensor) -> None:
        """Leave some rows [R] of the stream, which is [R, C] then."""
        self.replace(self.sum().index_select(0, rows))

    def sum(self) -> Tensor:
        """Return the stream with all that was added."""
        if self._branch is not None:
            self.replace(add_branch(self._x, self._branch, self._scale))
        return self._x

    def normed(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the norm of the stream with all that was added."""
        if self._branch is None:
            return self._backend.norm(self._x, self._norm, weight, bias)
        x, normed = self._backend.add_norm(self._x, self._branch, self._scale, self._norm, weight, bias)
        self.replace(x)
        return normed


class Decoder:
    """Computes hidden states and logits of ragged batches. `dtype` is that of weights, activations and the KV cache.

    >>> decoder = Decoder(spec, weights, ReferenceBackend(), dtype=torch.float32)     # doctest: +SKIP
    >>> hidden = decoder.forward(batch, kv_cache)     # [rows that need logits, hidden]  # doctest: +SKIP
    >>> decoder.logits(hidden)                        # [rows, vocabulary], fp32         # doctest: +SKIP
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: NetworkWeights,
        backend: Backend,
        *,
        dtype: torch.dtype,
        group: Group | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.backend = backend
        self.dtype = dtype
        self.ropes = tuple(rope_table(rope, spec.max_position, self.device) for rope in spec.ropes)
        self._fused = backend.compile_network(
            NetworkPlan(
                layers=spec.layers,
                weights=weights,
                ropes=self.ropes,
                norm=spec.norm,
                embed_scale=spec.embed_scale,
                position_offset=spec.position_offset,
                vocabulary=spec.vocab_size,
                group=group,
            )
        )
        is_plain = spec.logit_scale == 1.0 and spec.logit_softcap is None
        adds_up = group is not None and group.shard.sums
        self.chooses_at_once = self._fused is not None and is_plain and not adds_up
        """Whether `forward_and_choose` can be called."""

    @property
    def device(self) -> torch.device:
        """Return the device of the weights, where batches and caches must be too."""
        return self.weights.norm.device

    def on_device(self) -> AbstractContextManager[object]:
        """Return a context in which kernels are launched on the device of the weights: to compute in, and to choose."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def check_complete(self) -> None:
        """Check that numbers which were read from the device are those of all ranks; here there is one."""

    @property
    def is_fused(self) -> bool:
        """Return whether the backend computes the network in one call."""
        return self._fused is not None

    def forward(self, batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        """Compute the batch and write its keys and values; return the normed hidden states [R, C] of its
        `logit_rows`. Of other rows nothing is computed that is not stored: behind the last layer that stores anything
        there are none.
        """
        if self._fused is not None:
            return self._fused(kv_cache.layers, batch)
        x = self.embed(batch.ids)  # [T, C], the residual stream
        if self.spec.embed_scale != 1.0:
            x = x * self.spec.embed_scale
        if self.weights.positions is not None:
            x = x + self.weights.positions[batch.positions + self.spec.position_offset]
        token_inputs, stream = self._token_inputs(batch.ids, x), ResidualStream(x, self.backend, self.spec.norm)
        rest, last_storing = batch, self.spec.last_storing  # rows that the stream has, and until when these are all
        for number, (layer, weights) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            before, rest = rest, batch.logit_batch if number == last_storing else rest
            self._layer(stream, number, kv_cache.layers[number], before, rest)
            if not rest.num_tokens:
                break
            if rest is not before:
                token_inputs = token_inputs.index_select(0, batch.logit_rows)
            if layer.token_input is not None:
                own = token_inputs[:, number]
                stream.replace(self._with_token_input(stream.sum(), own, layer.token_input, weights))
            if weights.output_scale is not None:
                x = stream.sum()
                stream.replace((x * weights.output_scale).to(x.dtype))
        if rest is batch:
            stream.keep(batch.logit_rows)
        return self._norm(stream.sum(), self.weights.norm, self.weights.norm_bias)

    def forward_and_choose(
        self, batch: RaggedBatch, kv_cache: KVCache, filters: Sequence[Filter] = (), numbers: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Return what `choose` does of the hidden states that `forward` returns, by one call of the kernels. Their
        logits are [R, vocabulary]: for few rows.
        """
        assert self._fused is not None and self.chooses_at_once
        head, bias = self.weights.head, self.weights.head_bias
        return self._fused.choose(kv_cache.layers, batch, head, bias, filters, numbers)

    @property
    def lends(self) -> bool:
        """Return whether it can hold the leading keys and values of requests for other processes, and they for it."""
        has_states = any(not isinstance(layer.mixer, AttentionSpec) for layer in self.spec.layers)
        return self._fused is not None and self.backend.capabilities.lends and not has_states

    def channel_bytes(self, kv_cache: KVCache, num_tokens: int) -> int:
        """See `Backend.channel_bytes`."""
        assert self._fused is not None
        return self.backend.channel_bytes(self._fused, kv_cache.layers, num_tokens)

    def lend(self, kv_cache: KVCache, channel: Channel, blocks: Sequence[int]) -> None:
        """See `Backend.lend`."""
        assert self._fused is not None
        self.backend.lend(self._fused, kv_cache.layers, channel, blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the rows of the embedding for ids [T]: [T, C]."""
        return self.backend.embed(ids, self.weights.embed)

    def total(self, branch: Tensor) -> Tensor:
        """Return what a block gives, [T, C], from what this process computes of it: here all."""
        return branch

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head to rows of hidden states: [rows, C] -> [rows, vocabulary] in fp32."""
        logits = self.head_products(hidden)
        if logits.dtype != torch.float32:
            logits = logits.float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head_products(self, hidden: Tensor) -> Tensor:
        """Return the products of rows of hidden states with the output head."""
        return self.backend.linear(hidden, self.weights.head, self.weights.head_bias)

    def choose(
        self, hidden: Tensor, filters: Sequence[Filter] = (), numbers: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Return a token for each row of hidden states, and its largest logit: see `Backend.choose_from`."""
        if self.spec.logit_scale != 1.0 or self.spec.logit_softcap is not None:
            return self.backend.choose_from(self.logits(hidden), filters, numbers)
        return self.backend.choose(hidden, self.weights.head, self.weights.head_bias, filters, numbers)

    def _layer(self, stream: ResidualStream, number: int, store: Store, batch: RaggedBatch, rest: RaggedBatch) -> None:
        """Add what a layer gives to the residual stream, which has the rows of `batch` before, and those of `rest`, the
        same or its `logit_batch`, once the layer has stored what it stores.
        """
        layer, weights, lora = self.spec.layers[number], self.weights.layers[number], partial(_lora_rows, rest, number)
        norms, read, mixed = layer.norms, None, None
        if layer.mixer is not None:
            read = self._read(stream, norms, weights.attn_norm, weights.attn_norm_bias)
            if rest is not batch:
                rows, of_all = batch.logit_rows, partial(_lora_rows, batch, number)
                if isinstance(layer.mixer, AttentionSpec):  # whose queries of all rows are not needed
                    self._queries(read, layer.mixer, weights, store, batch, of_all)
                else:
                    mixed = self._mix(read, layer.mixer, weights, store, batch, of_all).index_select(0, rows)
                read = read.index_select(0, rows)
                stream.keep(rows)
                if not rest.num_tokens:
                    return
            if mixed is None:
                mixed = self._mix(read, layer.mixer, weights, store, rest, lora)
            mixed = self.total(mixed)
            if norms.after:
                mixed = self._norm(mixed, weights.post_attn_norm, weights.post_attn_norm_bias)
            if layer.mlp is None or not layer.parallel:
                stream.add(mixed, layer.residual_scale)
        if layer.mlp is not None:
            if not (layer.parallel and layer.shared_norm):
                read = self._read(stream, norms, weights.mlp_norm, weights.mlp_norm_bias)
            assert read is not None
            inner = self.total(mlp(read, layer.mlp, weights, self.backend, stream.sum(), lora))
            if norms.after:
                inner = self._norm(inner, weights.post_mlp_norm, weights.post_mlp_norm_bias)
            if mixed is not None and layer.parallel:  # both have read the same
                stream.add(mixed, layer.residual_scale)
            stream.add(inner, layer.residual_scale)

    def _token_inputs(self, ids: Tensor, x: Tensor) -> Tensor:
        """Return the input of each layer's own, from ids [T] and their embedding [T, C]: [T, L, P]."""
        table, size = self.weights.token_inputs, self.spec.token_input_size
        if table is None:
            return x.new_empty(len(x), 0)
        projected = self.backend.linear(x.to(self.dtype), self.weights.token_projection) * x.shape[1] ** -0.5
        projected = self._norm(projected.view(-1, size), self.weights.token_input_norm, None)
        looked_up = F.embedding(ids, table).to(x.dtype) * size**0.5
        both: Tensor = (projected.to(x.dtype).view_as(looked_up) + looked_up) * 2**-0.5
        return both.view(len(x), -1, size)

    def _with_token_input(self, x: Tensor, own: Tensor, spec: TokenInputSpec, weights: LayerWeights) -> Tensor:
        """Return the residual stream [T, C] with what a layer adds from its own input [T, P]."""
        gate = self.backend.activated(x.to(self.dtype), weights.token_gate, None, spec.activation)
        out = self.backend.linear((gate * own).to(self.dtype), weights.token_out)
        return x + self._norm(out, weights.token_norm, None)

    def _mix(
        self, x: Tensor, spec: Mixer, weights: LayerWeights, store: Store, batch: RaggedBatch, lora: LoraOf
    ) -> Tensor:
        """Return what the mixer of a layer gives of hidden states as it reads them: [T, C] -> [T, C]."""
        if isinstance(spec, AttentionSpec):
            return self._attention(x, spec, weights, store, batch, lora)
        projected = self.backend.linear(x, weights.in_proj, weights.in_proj_bias)
        if isinstance(spec, DeltaSpec | MambaSpec):
            gates = self.backend.linear(x, weights.gates, weights.gates_bias)
            if isinstance(spec, DeltaSpec):
                mixed = self.backend.delta(projected, gates, store, spec, batch, weights)
            else:
                mixed = self.backend.mamba(projected, gates, store, spec, batch, weights)
        else:
            mixed = self.backend.conv(projected, store, spec, batch, weights)
        return self.backend.linear(mixed, weights.out_proj, weights.out_proj_bias)

    def _queries(
        self, x: Tensor, spec: AttentionSpec, weights: LayerWeights, store: Store, batch: RaggedBatch, lora: LoraOf
    ) -> Tensor:
        """Store the keys and values of normed hidden states [T, C], and return their queries: [T, H, D]."""
        if spec.latent is None:
            qkv = self.backend.linear(x, weights.qkv, weights.qkv_bias, lora("qkv"))
        else:
            qkv = compressed(x, spec, weights, self.backend)
        rope = None if spec.rope is None else self.ropes[spec.rope]
        return self.backend.rope_store(qkv, store, spec, batch, rope, weights)

    def _attention(
        self, x: Tensor, spec: AttentionSpec, weights: LayerWeights, store: Store, batch: RaggedBatch, lora: LoraOf
    ) -> Tensor:
        """Return the attention of normed hidden states: [T, C] -> [T, C]."""
        backend, q = self.backend, self._queries(x, spec, weights, store, batch, lora)
        attended = backend.attend(q, store, spec, batch, weights.sinks)
        if spec.latent is not None:
            attended = backend.linear_heads(attended, weights.v_b)
        attended = attended.flatten(1)
        if spec.gate:
            attended = attended * backend.activated(x, weights.attn_gate, None, "sigmoid", lora("attn_gate"))
        return backend.linear(attended, weights.o, weights.o_bias, lora("o"))

    def _read(self, stream: ResidualStream, norms: NormPlace, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return what a block reads of the residual stream."""
        if not norms.before:
            return stream.sum().to(self.dtype)
        assert weight is not None
        return stream.normed(weight, bias)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return self.backend.norm(x, self.spec.norm, weight, bias)


def mlp(
    x: Tensor,
    spec: MlpSpec | ExpertsSpec,
    weights: LayerWeights,
    backend: Backend,
    source: Tensor,
    lora: LoraOf = lambda _: None,
) -> Tensor:
    """Return the MLP or the mixture of experts of x: [T, C] -> [T, C]. `source` is x before its norm."""
    if isinstance(spec, MlpSpec):
        assert weights.mlp is not None
        return _dense(x, spec, weights.mlp, backend, lora)
    routed, read = x, x
    if spec.own_norm is not None:
        routed = _own_norm(source, spec, weights.router_norm, backend)
        read = _own_norm(source, spec, weights.expert_norm, backend)
    logits = backend.linear(routed, weights.router, weights.router_bias)
    expert_ids, expert_weights = backend.route(logits, spec.router, weights.choice_bias)
    if weights.expert_scale is not None:
        expert_weights = expert_weights * weights.expert_scale[expert_ids]
    y = _experts(read, expert_ids, expert_weights, spec, weights, backend)
    if spec.shared is None:
        return y
    assert weights.shared is not None
    shared = _dense(x, spec.shared, weights.shared, backend)
    if spec.shared_gate:
        shared = shared * backend.activated(x, weights.shared_gate, None, "sigmoid")
    if spec.own_norm is not None:
        y = _own_norm(y, spec, weights.post_expert_norm, backend).to(source.dtype)
        shared = _own_norm(shared, spec, weights.post_shared_norm, backend).to(source.dtype)
    return y + shared


def _own_norm(x: Tensor, spec: ExpertsSpec, weight: Tensor | None, backend: Backend) -> Tensor:
    assert spec.own_norm is not None and weight is not None
    return backend.norm(x, spec.own_norm, weight)


def _experts(
    x: Tensor, ids: Tensor, scores: Tensor, spec: ExpertsSpec, weights: LayerWeights, backend: Backend
) -> Tensor:
    """Return the sum over each token's experts, what they read or what they give weighted by their scores."""
    if not spec.router.scales_input:
        return backend.experts(x, ids, scores, spec.expert, weights)
    scaled = (x.unsqueeze(1) * scores.unsqueeze(-1)).to(x.dtype).flatten(0, 1)  # [T x top_k, C]
    ones = torch.ones_like(scores).reshape(-1, 1)
    each = backend.experts(scaled, ids.reshape(-1, 1), ones, spec.expert, weights)
    return reduce(torch.add, each.view(*ids.shape, -1).unbind(1))


def _dense(x: Tensor, spec: MlpSpec, weights: MlpWeights, backend: Backend, lora: LoraOf = lambda _: None) -> Tensor:
    if spec.gated:
        inner = backend.gated(x, weights.gate_up, weights.up_bias, spec.activation, lora("up"))
    else:
        inner = backend.activated(x, weights.up, weights.up_bias, spec.activation, lora("up"))
    return backend.linear(inner, weights.down, weights.down_bias, lora("down"))


def _lora_rows(batch: RaggedBatch, layer: int, target: str) -> LoraRows | None:
    """Return what the adapters of a step add to a weight, if there are any."""
    return None if batch.adapters is None else batch.adapters.at(layer, target)
