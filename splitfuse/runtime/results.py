"""Turns the hidden states of a step into results of its chunks: tokens, logprobs, and what PoolingParams ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import isfinite

from torch import Tensor

from splitfuse.core.plan import Chunk, ChunkResult, TokenLogprob
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.drawing import GREEDY, Filter
from splitfuse.models.decoder import Decoder
from splitfuse.runtime.sampling.pool import pool
from splitfuse.runtime.sampling.request import RequestSampling, Row
from splitfuse.runtime.sampling.sampler import prompt_logprobs, sample, unusable

Requests = Mapping[str, RequestSampling]
"""Type of the requests of a step, by id."""


def results_of(chunks: Sequence[Chunk], hidden: Tensor, requests: Requests, decoder: Decoder) -> dict[str, ChunkResult]:
    """Return the result of each chunk from its rows of `hidden` [sum of num_logits, C]. A chunk with unusable logits
    has one with `error`, and does not affect the others. The tokens are not taken yet.
    """
    if (plain := plain_rows(chunks, requests)) is not None:
        return _plain_results_of(chunks, hidden, plain, decoder)
    row_ends = list(accumulate(chunk.num_logits for chunk in chunks))
    last_rows = [(c, end - 1) for c, end in zip(chunks, row_ends, strict=True) if c.samples]
    sampling = [(c, row) for c, row in last_rows if requests[c.request_id].state.pooling is None]
    results = _sampled(hidden, sampling, requests, decoder)
    if len(sampling) < len(last_rows):
        pooling = [(c, row) for c, row in last_rows if c.request_id not in results]
        results |= _pooled(hidden, pooling, requests, decoder)
    for chunk, end in zip(chunks, row_ends, strict=True):
        result = results.get(chunk.request_id, ChunkResult())
        if chunk.num_logits > chunk.num_choices and result.error is None:
            rows = hidden[end - chunk.num_logits : end - chunk.num_choices]
            result = _with_prompt_logprobs(result, chunk, rows, requests[chunk.request_id], decoder)
        results[chunk.request_id] = result
    return results


def plain_rows(chunks: Sequence[Chunk], requests: Requests) -> list[RequestSampling] | None:
    """Return the requests of the rows of a step if kernels can choose all its tokens, otherwise None."""
    rows = []
    for chunk in chunks:
        if chunk.num_logits:
            request = requests[chunk.request_id]
            if chunk.num_logits > 1 or not chunk.samples or not request.is_plain:
                return None
            rows.append(request)
    return rows


def draws_of(rows: Sequence[RequestSampling]) -> tuple[list[Filter], list[float]]:
    """Return the filter of each row, all of which are plain, and the number that it is drawn by; nothing if none is
    drawn.
    """
    filters = [request.filter for request in rows]
    if all(each is GREEDY for each in filters):
        return [], []
    return filters, [0.0 if request.filter is GREEDY else request.number for request in rows]


def plain_results(chunks: Sequence[Chunk], tokens: Sequence[int], peaks: Sequence[float]) -> dict[str, ChunkResult]:
    """Return the results of a plain step from the token of each row and its largest logit."""
    if all(map(isfinite, peaks)):
        chosen = [ChunkResult((token,)) for token in tokens]
    else:
        chosen = [
            ChunkResult((token,)) if fault is None else ChunkResult(error=fault)
            for token, fault in zip(tokens, map(unusable, peaks), strict=True)
        ]
    if len(chosen) == len(chunks):
        return {chunk.request_id: result for chunk, result in zip(chunks, chosen, strict=True)}
    rest = iter(chosen)
    return {chunk.request_id: next(rest) if chunk.samples else ChunkResult() for chunk in chunks}


def _plain_results_of(
    chunks: Sequence[Chunk], hidden: Tensor, rows: Sequence[RequestSampling], decoder: Decoder
) -> dict[str, ChunkResult]:
    filters, numbers = draws_of(rows)
    tokens, peaks = list[int](), list[float]()
    for part in _parts(len(rows), decoder):
        some = hidden if part == slice(0, len(rows)) else hidden[part]
        found = decoder.choose(some, filters[part], numbers[part])
        tokens += found[0]
        peaks += found[1]
    return plain_results(chunks, tokens, peaks)


def _sampled(
    hidden: Tensor, sampling: Sequence[tuple[Chunk, int]], requests: Requests, decoder: Decoder
) -> dict[str, ChunkResult]:
    """Choose a token for each chunk, and more after drafts that are right, from its rows of `hidden`, of which the last
    one is given.
    """
    rows: list[Row] = []
    for chunk, last in sampling:
        rows += requests[chunk.request_id].rows(last - chunk.num_drafts, chunk.drafts)
    chosen: dict[str, list[ChunkResult]] = {chunk.request_id: [] for chunk, _ in sampling}
    for part in _parts(len(rows), decoder):
        numbers, states, matchers = zip(*rows[part], strict=True)
        logits = decoder.logits(hidden if len(numbers) == len(hidden) else hidden[list(numbers)])
        backend = decoder.backend
        found = sample(logits, states, topk=backend.topk, draw=backend.draw, matchers=matchers)
        for state, result in zip(states, found, strict=True):
            chosen[state.request_id].append(result)
    return {chunk.request_id: _accepted(chunk.drafts, chosen[chunk.request_id]) for chunk, _ in sampling}


def _accepted(drafts: Sequence[int], results: Sequence[ChunkResult]) -> ChunkResult:
    """Return the results of the rows of a chunk as one: up to the first token that is not what was drafted, or before
    the first error, which comes again in the next step.
    """
    kept = [results[0]]
    for draft, result in zip(drafts, results[1:], strict=False):
        if kept[-1].token_ids != (draft,) or result.error is not None:
            break
        kept.append(result)
    if len(kept) == 1:
        return kept[0]
    return ChunkResult(tuple(r.token_ids[0] for r in kept), tuple(entry for r in kept for entry in r.logprobs))


def _pooled(
    hidden: Tensor, pooling: Sequence[tuple[Chunk, int]], requests: Requests, decoder: Decoder
) -> dict[str, ChunkResult]:
    """Return the numbers that PoolingParams ask for, of each chunk from its row of `hidden`."""
    results: dict[str, ChunkResult] = {}
    for part in _parts(len(pooling), decoder):
        names = [chunk.request_id for chunk, _ in pooling[part]]
        wanted = [requests[name].state.pooling or PoolingParams() for name in names]
        results |= zip(names, pool(hidden[[row for _, row in pooling[part]]], wanted, decoder.logits), strict=True)
    return results


def _with_prompt_logprobs(
    result: ChunkResult, chunk: Chunk, hidden: Tensor, request: RequestSampling, decoder: Decoder
) -> ChunkResult:
    """Return `result` with the logprobs of the prompt tokens that follow the rows of `hidden`."""
    first, state = chunk.end - chunk.num_logits + 1, request.state
    targets = state.prompt_token_ids[first : first + len(hidden)]
    try:
        logprobs = tuple(_prompt_logprobs(hidden, targets, state.params.prompt_logprobs or 0, decoder))
    except RequestFailedError as error:
        return ChunkResult(error=str(error))
    return replace(result, prompt_logprobs=logprobs)


def _prompt_logprobs(hidden: Tensor, targets: Sequence[int], count: int, decoder: Decoder) -> Iterator[TokenLogprob]:
    for part in _parts(len(targets), decoder):
        yield from prompt_logprobs(decoder.logits(hidden[part]), targets[part], count)


def _parts(num_rows: int, decoder: Decoder) -> Iterator[slice]:
    """Return slices of rows that the output head is applied to at once."""
    step = decoder.backend.capabilities.head_rows
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
