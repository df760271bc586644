"""The only network: a pre-norm decoder over blocked KV. What differs between families is data in ModelSpec.

Knows neither where weights come from (weights.py) nor which requests a batch serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.kernels.reference import Kernels, Store, Weight
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.moe import mixture
from splitfuse.models.ragged_batch import RaggedBatch
from splitfuse.models.rope import rope_tables
from splitfuse.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer. Linear weights are packed; norms and biases are plain vectors, None where the spec has none."""

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
    router: Weight = None  # [E, C]: these three instead of gate_up and down, where the spec has experts
    w13: Weight = None  # [E, 2I, C]
    w2: Weight = None  # [E, C, I]


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """All of a network's weights."""

    embed: Tensor  # [vocabulary, C]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Weight  # [vocabulary, C]


class Decoder:
    """Hidden states and logits of ragged batches."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, kernels: Kernels) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.cos, self.sin = rope_tables(spec.rope, spec.max_position, weights.embed.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where batches and caches must be."""
        return self.weights.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and the KV cache."""
        return self.weights.embed.dtype

    def forward(self, batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        """Compute the batch and write its keys and values: final hidden states [R, C] of its `logit_rows`, normed."""
        x = self.kernels.embed(batch.ids, self.weights.embed)  # [tokens, hidden]
        for layer, window, store in zip(self.weights.layers, self.spec.windows, kv_cache.layers, strict=True):
            x = self._attention(x, layer, window, batch, store)
            x = self._mlp(x, layer)
        rows = self.kernels.gather(x, batch.logit_rows)
        return self.kernels.norm(rows, self.weights.norm, self.spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head on rows of hidden states: [rows, C] -> [rows, vocabulary] in fp32."""
        logits = self.kernels.linear(hidden, self.weights.head).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _attention(
        self, x: Tensor, layer: LayerWeights, window: int | None, batch: RaggedBatch, store: Store
    ) -> Tensor:
        kernels, spec = self.kernels, self.spec
        normed = kernels.norm(x, layer.attn_norm, spec.norm_eps)
        q = kernels.rope_store(
            kernels.linear(normed, layer.qkv, layer.qkv_bias),
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            cos=self.cos,
            sin=self.sin,
            store=store,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=spec.norm_eps,
        )  # [tokens, heads, head_dim]
        mixed = kernels.attend(
            q,
            store,
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
            block_tables=batch.block_tables,
            scale=spec.attention_scale,
            window=window,
            softcap=spec.attention_softcap,
        )
        return kernels.linear(mixed.flatten(1), layer.o, layer.o_bias, residual=x)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        kernels, spec = self.kernels, self.spec
        normed = kernels.norm(x, layer.mlp_norm, spec.norm_eps)
        if spec.moe is not None:
            return x + mixture(
                normed,
                layer.router,
                layer.w13,
                layer.w2,
                moe=spec.moe,
                activation=spec.activation,
                kernels=kernels,
            )
        gated = kernels.activate(kernels.linear(normed, layer.gate_up, layer.gate_up_bias), spec.activation)
        return kernels.linear(gated, layer.down, layer.down_bias, residual=x)
