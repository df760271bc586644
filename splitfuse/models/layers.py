"""The parts of a layer, each by its kind: normed hidden states in, what is added to the residual out."""

from __future__ import annotations

from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import (
    AttentionSpec,
    Backend,
    ExpertsSpec,
    LayerWeights,
    MlpSpec,
    RopeTable,
    Store,
)


def attention(
    x: Tensor,
    spec: AttentionSpec,
    weights: LayerWeights,
    *,
    batch: RaggedBatch,
    store: Store,
    rope: RopeTable,
    norm_eps: float,
    backend: Backend,
) -> Tensor:
    """Return the attention of x [T, C] over its requests' tokens: [T, C]. Writes keys and values to the store."""
    qkv = backend.linear(x, weights.qkv, weights.qkv_bias)
    q = backend.rope_store(qkv, store, spec, batch, rope, weights.q_norm, weights.k_norm, norm_eps)  # [T, H, D]
    out = backend.attend(q, store, spec, batch)
    return backend.linear(out.flatten(1), weights.o, weights.o_bias)


def mlp(x: Tensor, spec: MlpSpec | ExpertsSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    """Return the MLP or the mixture of experts of x: [T, C] -> [T, C]."""
    if isinstance(spec, MlpSpec):
        gated = backend.gated(x, weights.gate_up, weights.gate_up_bias, spec.activation)
        return backend.linear(gated, weights.down, weights.down_bias)
    scores = backend.linear(x, weights.router)
    expert_ids, expert_weights = backend.route(scores, spec.top_k, spec.renormalize)
    return backend.experts(x, expert_ids, expert_weights, w13=weights.w13, w2=weights.w2, activation=spec.activation)
