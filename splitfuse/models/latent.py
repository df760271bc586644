"""Projects the queries and keys of latent attention, which is computed over compressed vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.weights import LayerWeights


def compressed(x: Tensor, spec: AttentionSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    """Return for hidden states [T, C] the row that `rope_store` takes, [T, (H + 1) D]: the queries of each head and the
    key of all, each with the elements to rotate first.
    """
    latent, tokens = spec.latent, len(x)
    assert latent is not None
    rows = backend.linear(x, weights.qkv, weights.qkv_bias)
    q, kv, shared_key = rows.split_with_sizes((latent.q_width(spec.num_heads), latent.kv_rank, latent.rope_dim), dim=1)
    if weights.q_a_norm is not None:
        q = backend.linear(backend.norm(q.contiguous(), latent.norm, weights.q_a_norm), weights.q_b)
    assert weights.kv_a_norm is not None
    kv = backend.norm(kv.contiguous(), latent.norm, weights.kv_a_norm)
    rotated, others = q.view(tokens, spec.num_heads, -1).split_with_sizes((latent.rope_dim, latent.nope_dim), dim=2)
    absorbed = backend.linear_heads(others.to(kv.dtype).contiguous(), weights.k_b)
    queries = torch.cat((rotated, absorbed.to(q.dtype)), dim=2)
    return torch.cat((queries.flatten(1), shared_key, kv.to(q.dtype)), dim=1)
