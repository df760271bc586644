"""Draws tokens at random in PyTorch: temperature, top_k, top_p, min_p.

This is the meaning of `Backend.draw`. A row of scores has weights, e^((score - largest) / temperature), in float64. A
token is the first one at which they, added up, exceed a part of their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Filter(NamedTuple):
    """Says which tokens may be drawn, and how the probabilities of all are spread: see SamplingParams."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def keeps_all(self) -> bool:
        """Return whether any token may be drawn."""
        return not (self.top_k or self.top_p < 1.0 or self.min_p)


GREEDY = Filter(0.0)
"""Filter of a row whose best token is taken."""


def exact_draw(
    scores: Tensor, rows: Sequence[int], filters: Sequence[Filter], numbers: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Return what `Backend.draw` must give, by PyTorch."""
    drawn: list[list[int]] = [[] for _ in rows]
    for keeps_all in (True, False):
        part = [i for i, each in enumerate(filters) if each.keeps_all is keeps_all]
        if part:
            places = [rows[i] for i in part]
            taken = scores if places == [*range(len(scores))] else scores[places]
            where = torch.tensor([numbers[i] for i in part], dtype=torch.float64, device=scores.device)
            draw = _any if keeps_all else _kept
            for i, tokens in zip(part, draw(taken, [filters[i] for i in part], where), strict=True):
                drawn[i] = tokens
    return drawn


def kept_tokens(scores: Tensor, each: Filter) -> Tensor:
    """Return the tokens of one row of scores [vocab] that a filter keeps."""
    token_ids, _, num_kept = _filtered(scores.unsqueeze(0), [each])
    return token_ids[0, : int(num_kept)]


def _any(scores: Tensor, filters: Sequence[Filter], numbers: Tensor) -> list[list[int]]:
    cumulative = _weights(scores, filters).cumsum(-1)
    return _search(cumulative, cumulative[:, -1:], numbers).tolist()


def _kept(scores: Tensor, filters: Sequence[Filter], numbers: Tensor) -> list[list[int]]:
    token_ids, cumulative, num_kept = _filtered(scores, filters)
    places = _search(cumulative, cumulative.gather(1, num_kept - 1), numbers)
    return token_ids.gather(1, places).tolist()


def _search(cumulative: Tensor, total: Tensor, numbers: Tensor) -> Tensor:
    # The first entry above number * total, which has a weight above 0: number < 1.
    return torch.searchsorted(cumulative, numbers * total, right=True)


def _filtered(scores: Tensor, filters: Sequence[Filter]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row tokens in falling order of weight, equal ones by id, their cumulative weights, and how many
    [rows, 1] are kept by top_k, top_p and min_p.

    In that order every filter keeps a beginning: top_k the tokens that weigh no less than the k-th, top_p those before
    the threshold is crossed and the one that crosses it, min_p those of at least min_p times the first one's weight.
    """
    weights = _weights(scores, filters)
    vocab = weights.shape[1]
    top_k = [min(each.top_k, vocab) for each in filters]
    limited = _column(top_k, weights) > 0
    top_p = _column([each.top_p if each.top_p < 1.0 else math.inf for each in filters], weights)
    min_p = _column([each.min_p for each in filters], weights)

    total = weights.cumsum(-1)[:, -1:]
    # Only what may be kept is sorted. Tokens below (1 - top_p) / vocab weigh less than 1 - top_p together, so top_p
    # drops them all; half of that is on the safe side of rounding. With top_k, the k-th weight is the bound.
    floor = torch.maximum((1.0 - top_p) * total / (2 * vocab), min_p)
    kth = torch.full_like(total, -1.0)
    if any(top_k):
        largest = weights.topk(max(top_k)).values
        kth = torch.where(limited, largest.gather(1, _column([max(k - 1, 0) for k in top_k], weights).long()), kth)
        floor = torch.where(limited, kth, floor)
    width = int((weights >= floor).count_nonzero(-1).amax())

    # [rows, width], by id first, so that the stable sort leaves equal ones in that order
    ids = weights.topk(width, sorted=False).indices.sort().values
    weights, order = weights.gather(1, ids).sort(descending=True, stable=True)
    cumulative = weights.cumsum(-1)
    kept = (weights >= kth).count_nonzero(-1).unsqueeze(1)
    total = torch.where(limited, cumulative.gather(1, kept - 1), total)
    kept = kept.minimum(torch.searchsorted(cumulative, top_p * total) + 1)
    kept = kept.minimum((weights >= min_p).count_nonzero(-1).unsqueeze(1))
    return ids.gather(1, order), cumulative, kept


def _weights(scores: Tensor, filters: Sequence[Filter]) -> Tensor:
    """Return unnormalized probabilities [rows, vocab] in float64, the largest exactly 1 at any temperature above 0."""
    scores = scores.double()
    temperature = _column([each.temperature for each in filters], scores)
    return ((scores - scores.amax(-1, keepdim=True)) / temperature).exp()


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=like.device).unsqueeze(1)
