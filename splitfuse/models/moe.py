"""Mixture of experts: which experts a token visits, and the weighted sum of what they say. Both are data."""

from __future__ import annotations

from torch import Tensor

from splitfuse.kernels.reference import Kernels, Weight
from splitfuse.models.spec import MoESpec


def route(router_logits: Tensor, moe: MoESpec) -> tuple[Tensor, Tensor]:
    """Scores [T, E] -> expert ids and weights, both [T, k], best first; softmax in fp32 before the choice.

    Source: Shazeer et al., arXiv 1701.06538; with `renormalize`, Mixtral's rule (arXiv 2401.04088).
    """
    probabilities = router_logits.float().softmax(dim=-1)
    weights, expert_ids = probabilities.topk(moe.top_k, dim=-1)
    if moe.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return expert_ids, weights


def mixture(
    x: Tensor, router: Weight, w13: Weight, w2: Weight, *, moe: MoESpec, activation: str, kernels: Kernels
) -> Tensor:
    """x [T, C] -> [T, C], with router [E, C], w13 [E, 2I, C] and w2 [E, C, I], all packed."""
    expert_ids, weights = route(kernels.linear(x, router), moe)
    return kernels.experts(x, expert_ids, weights, w13, w2, activation)
