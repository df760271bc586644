"""Read the numbers that PoolingParams ask for, from the rows of one step. A row's depend on nothing but that row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from splitfuse.core.plan import ChunkResult
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.runtime.sampling.logprobs import log_probabilities


def pool(hidden: Tensor, wanted: Sequence[PoolingParams], head: Callable[[Tensor], Tensor]) -> list[ChunkResult]:
    """Return what `wanted[i]` asks of row i of `hidden` [rows, C]. `head` returns the logits of rows, and is applied
    only to those that need them.

    A row with numbers that cannot be used gives a ChunkResult with `error`, and does not affect the others.
    """
    values: list[list[float]] = [[] for _ in wanted]
    scored = [i for i, each in enumerate(wanted) if each.token_ids]
    if scored:
        logprobs = log_probabilities(head(hidden[scored]))
        for i, row in zip(scored, logprobs, strict=True):
            values[i] = row[list(wanted[i].token_ids)].tolist()
    for i in range(len(wanted)):
        if not wanted[i].token_ids:
            values[i] = hidden[i].float().tolist()
    return [_result(each, is_embedding=not asked.token_ids) for each, asked in zip(values, wanted, strict=True)]


def _result(values: Sequence[float], *, is_embedding: bool) -> ChunkResult:
    bad = next((value for value in values if math.isnan(value) or (is_embedding and math.isinf(value))), None)
    if bad is not None:
        return ChunkResult(error=f"the model computed unusable numbers: {bad} among them")
    return ChunkResult(values=tuple(values), is_complete=True)
