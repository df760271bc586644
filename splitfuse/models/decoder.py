"""Computes the only network: a decoder over blocked KV, layer by layer as its ModelSpec says.

Knows neither where weights come from (weights.py) nor which requests a batch serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import Backend, ExpertsSpec, LayerWeights, MlpSpec, NetworkPlan, NetworkWeights
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.rope import rope_table
from splitfuse.models.spec import ModelSpec


class Decoder:
    """Computes hidden states and logits of ragged batches.

    >>> decoder = Decoder(spec, weights, ReferenceBackend())                         # doctest: +SKIP
    >>> hidden = decoder.forward(batch, kv_cache)     # [rows that need logits, hidden]  # doctest: +SKIP
    >>> decoder.logits(hidden)                        # [rows, vocabulary], fp32         # doctest: +SKIP
    """

    def __init__(self, spec: ModelSpec, weights: NetworkWeights, backend: Backend) -> None:
        self.spec = spec
        self.weights = weights
        self.backend = backend
        self.ropes = tuple(rope_table(rope, spec.max_position, self.device) for rope in spec.ropes)
        self._fused = backend.compile_network(
            NetworkPlan(layers=spec.layers, weights=weights, ropes=self.ropes, norm_eps=spec.norm_eps)
        )

    @property
    def device(self) -> torch.device:
        """Return the device of the weights, where batches and caches must be too."""
        return self.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights, activations and the KV cache."""
        return self.weights.norm.dtype

    def forward(self, batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        """Compute the batch and write its keys and values; return the normed hidden states [R, C] of its
        `logit_rows`.
        """
        if self._fused is not None:
            return self._fused(kv_cache.layers, batch)
        backend, eps = self.backend, self.spec.norm_eps
        x = backend.embed(batch.ids, self.weights.embed)  # [T, C], the residual stream
        for layer, weights, store in zip(self.spec.layers, self.weights.layers, kv_cache.layers, strict=True):
            spec = layer.attention
            qkv = backend.linear(backend.norm(x, weights.attn_norm, eps), weights.qkv, weights.qkv_bias)
            rope = self.ropes[spec.rope]
            q = backend.rope_store(qkv, store, spec, batch, rope, weights.q_norm, weights.k_norm, eps)  # [T, H, D]
            attended = backend.attend(q, store, spec, batch).flatten(1)
            x = x + backend.linear(attended, weights.o, weights.o_bias)
            x = x + mlp(backend.norm(x, weights.mlp_norm, eps), layer.mlp, weights, backend)
        return backend.norm(x.index_select(0, batch.logit_rows), self.weights.norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head to rows of hidden states: [rows, C] -> [rows, vocabulary] in fp32."""
        logits = self.backend.linear(hidden, self.weights.head)
        if logits.dtype != torch.float32:
            logits = logits.float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def mlp(x: Tensor, spec: MlpSpec | ExpertsSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    """Return the MLP or the mixture of experts of x: [T, C] -> [T, C]."""
    if isinstance(spec, MlpSpec):
        gated = backend.gated(x, weights.gate_up, weights.gate_up_bias, spec.activation)
        return backend.linear(gated, weights.down, weights.down_bias)
    scores = backend.linear(x, weights.router)
    expert_ids, expert_weights = backend.route(scores, spec.top_k, spec.renormalize)
    return backend.experts(x, expert_ids, expert_weights, w13=weights.w13, w2=weights.w2, activation=spec.activation)
