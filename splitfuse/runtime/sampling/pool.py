"""Reads the numbers that PoolingParams ask for, from the rows of one step. A row's depend on nothing but that row."""

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
    return [
        _result(values[i], math.isnan) if asked.token_ids else embedding_result(hidden[i].float().tolist())
        for i, asked in enumerate(wanted)
    ]


def embedding_result(values: Sequence[float]) -> ChunkResult:
    """Return the result of a request for an embedding, or an error if not all of it are finite numbers."""
    return _result(values, lambda value: not math.isfinite(value))


def _result(values: Sequence[float], is_bad: Callable[[float], bool]) -> ChunkResult:
    bad = next(filter(is_bad, values), None)
    if bad is not None:
        return ChunkResult(error=f"the model computed unusable numbers: {bad} among them")
    return ChunkResult(values=tuple(values), is_complete=True)
