"""Computes queries, keys and values of latent attention: from compressed vectors to those of each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.kernels.interface import AttentionSpec, Backend, LayerWeights


def expanded(x: Tensor, spec: AttentionSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    """Return for hidden states [T, C] the row that other attention projects at once, [T, (H + 2 Hk) D]: heads of
    queries and keys with the rotated elements first, and of values, filled up with zeros.
    """
    latent, tokens = spec.latent, len(x)
    assert latent is not None
    rows = backend.linear(x, weights.qkv, weights.qkv_bias)
    q, kv, shared_keys = rows.split_with_sizes((latent.q_width(spec.num_heads), latent.kv_rank, latent.rope_dim), dim=1)
    if weights.q_a_norm is not None:
        q = backend.linear(backend.norm(q.contiguous(), latent.norm, weights.q_a_norm), weights.q_b)
    assert weights.kv_a_norm is not None
    kv = backend.linear(backend.norm(kv.contiguous(), latent.norm, weights.kv_a_norm), weights.kv_b)
    keys, values = kv.view(tokens, spec.num_heads, -1).split_with_sizes((latent.nope_dim, latent.v_dim), dim=2)
    keys = torch.cat((shared_keys.unsqueeze(1).expand(-1, spec.num_heads, -1), keys), dim=2)
    heads = (q.view(tokens, spec.num_heads, -1), keys, values)
    return torch.cat([F.pad(each, (0, spec.head_dim - each.shape[2])) for each in heads], dim=1).flatten(1)
