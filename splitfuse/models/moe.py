"""A mixture of experts in place of an MLP: whom a token visits, and the weighted sum of what they say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from splitfuse.kernels.reference import Kernels, Weight
from splitfuse.models.spec import MoESpec


def mixture(
    x: Tensor,
    router: Weight,
    w13: Sequence[Weight],
    w2: Sequence[Weight],
    *,
    moe: MoESpec,
    activation: str,
    kernels: Kernels,
) -> Tensor:
    """x [T, C] -> [T, C], with the packed router [E, C] and of each expert w13 [2I, C] and w2 [C, I]."""
    expert_ids, weights = kernels.route(kernels.linear(x, router), moe.top_k, moe.renormalize)
    return kernels.experts(x, expert_ids, weights, w13=w13, w2=w2, kind=activation)
