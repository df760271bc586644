"""Changes logits before a token is chosen: logit_bias, penalties, min_tokens, thoughts without a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from splitfuse.core.plan import SamplingState


def is_adjusted(row: SamplingState) -> bool:
    """Return whether any logit of a row is changed."""
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or ((params.presence_penalty or params.frequency_penalty) and row.output_token_ids)
        or len(row.output_token_ids) < params.min_tokens
        or (row.thought is not None and row.thought.forbidden is not None)
    )


def adjusted(logits: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Return a float64 copy of logits [rows, vocab] with biases, penalties and forbidden ends applied.

    A token id outside the vocabulary has no logit and changes nothing: least of all one of the next row.
    """
    scores = logits.to(torch.float64, copy=True)
    flat, vocabulary = scores.view(-1), range(scores.shape[1])
    starts = range(0, flat.numel(), len(vocabulary))  # where each row begins in `flat`
    owners = list(zip(starts, rows, strict=True))

    bias = {
        start + token: value
        for start, row in owners
        for token, value in row.params.logit_bias.items()
        if token in vocabulary
    }
    _update(flat, bias, lambda old, value: old + value)

    repetition = {
        start + token: row.params.repetition_penalty
        for start, row in owners
        if row.params.repetition_penalty != 1.0
        for token in {*row.prompt_token_ids, *row.output_token_ids}
        if token in vocabulary
    }
    _update(flat, repetition, lambda old, value: torch.where(old < 0, old * value, old / value))

    penalty = {
        start + token: row.params.presence_penalty + row.params.frequency_penalty * count
        for start, row in owners
        if row.params.presence_penalty or row.params.frequency_penalty
        for token, count in Counter(row.output_token_ids).items()
        if token in vocabulary
    }
    _update(flat, penalty, lambda old, value: old - value)

    forbidden = {
        start + token: -math.inf
        for start, row in owners
        if len(row.output_token_ids) < row.params.min_tokens
        for token in (*row.eos_token_ids, *row.params.stop_token_ids)
        if token in vocabulary
    } | {
        start + token: -math.inf
        for start, row in owners
        if row.thought is not None and (token := row.thought.forbidden) is not None
    }
    _update(flat, forbidden, lambda _, value: value)
    return scores


def _update(flat: Tensor, values: Mapping[int, float], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the entries of `flat` at the indices in `values` by change(entry, value), all at once."""
    if values:
        index = torch.tensor(list(values), device=flat.device)
        flat[index] = change(flat[index], torch.tensor(list(values.values()), dtype=flat.dtype, device=flat.device))
