"""The only network: a pre-norm decoder over blocked KV. What differs between families is data in ModelSpec.

Knows neither where weights come from (weights.py) nor which requests a batch serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfuse.kernels.reference import Kernels, LayerWeights, NetworkWeights, Store
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.moe import mixture
from splitfuse.models.ragged_batch import RaggedBatch
from splitfuse.models.rope import rope_tables
from splitfuse.models.spec import ModelSpec


class Decoder:
    """Hidden states and logits of ragged batches."""

    def __init__(self, spec: ModelSpec, weights: NetworkWeights, kernels: Kernels) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.cos, self.sin = rope_tables(spec.rope, spec.max_position, self.device)
        self._fused = kernels.fuse(
            weights,
            windows=spec.windows,
            activation=spec.activation,
            norm_eps=spec.norm_eps,
            cos=self.cos,
            sin=self.sin,
            num_heads=spec.num_heads,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            top_k=spec.moe.top_k if spec.moe else 0,
            renormalize=spec.moe is not None and spec.moe.renormalize,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where batches and caches must be."""
        return self.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and the KV cache."""
        return self.weights.norm.dtype

    def forward(self, batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        """Compute the batch and write its keys and values: final hidden states [R, C] of its `logit_rows`, normed."""
        if self._fused is not None:
            return self._fused(
                kv_cache.layers,
                batch.packed,
                num_tokens=batch.num_tokens,
                num_requests=batch.num_requests,
                table_width=batch.table_width,
                num_rows=batch.num_rows,
            )
        x = self.kernels.embed(batch.ids, self.weights.embed)  # [tokens, hidden]
        for layer, window, store in zip(self.weights.layers, self.spec.windows, kv_cache.layers, strict=True):
            x = self._attention(x, layer, window, batch, store)
            x = self._mlp(x, layer)
        rows = self.kernels.gather(x, batch.logit_rows)
        return self.kernels.norm(rows, self.weights.norm, self.spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head on rows of hidden states: [rows, C] -> [rows, vocabulary] in fp32."""
        logits = self.kernels.linear(hidden, self.weights.head)
        if logits.dtype != torch.float32:
            logits = logits.float()
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
        if spec.moe is not None and layer.router is not None:
            return x + mixture(
                normed,
                layer.router,
                layer.w13,
                layer.w2,
                moe=spec.moe,
                activation=spec.activation,
                kernels=kernels,
            )
        gated = kernels.gated(normed, layer.gate_up, layer.gate_up_bias, spec.activation)
        return kernels.linear(gated, layer.down, layer.down_bias, residual=x)
