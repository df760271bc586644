"""Draw tokens at random: temperature, top_k, top_p, min_p."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from splitfuse.core.plan import SamplingState
from splitfuse.core.sampling_params import SamplingParams

_MASK = 2**64 - 1


def is_filtered(params: SamplingParams) -> bool:
    """Return whether a token is drawn from a part of the vocabulary only."""
    return bool(params.top_k or params.top_p < 1.0 or params.min_p)


def draw(scores: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """Draw a token for each row of scores [rows, vocab]: inverse of the cumulative distribution, tokens by id."""
    cumulative = _weights(scores, rows).cumsum(-1)
    drawn: list[int] = _invert(cumulative, cumulative[:, -1:], rows).flatten().tolist()
    return drawn


def draw_filtered(scores: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """Draw from the tokens that top_k, top_p and min_p keep, in falling order of weight, equal ones by id.

    In that order every filter keeps a beginning: top_k the tokens that weigh no less than the k-th, top_p those before
    the threshold is crossed and the one that crosses it, min_p those of at least min_p times the first one's weight.
    """
    weights = _weights(scores, rows)
    vocab = weights.shape[1]
    top_k = [min(row.params.top_k, vocab) for row in rows]
    limited = _column(top_k, weights) > 0
    top_p = _column([row.params.top_p if row.params.top_p < 1.0 else math.inf for row in rows], weights)
    min_p = _column([row.params.min_p for row in rows], weights)

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
    drawn = _invert(cumulative, cumulative.gather(1, kept - 1), rows)
    token_ids: list[int] = ids.gather(1, order.gather(1, drawn)).flatten().tolist()
    return token_ids


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number in [0, 1) that is a pure function of its three keys.

    Counter-based: each key is a jump ahead in the SplitMix64 sequence that starts where the one before led (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). 53 bits, all a float64 can hold.
    """
    state = 0
    for key in (seed, choice, position):
        state = (state + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def _weights(scores: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Return unnormalized probabilities [rows, vocab] in float64, the largest exactly 1 at any temperature above 0."""
    scores = scores.double()
    temperature = _column([row.params.temperature for row in rows], scores)
    return ((scores - scores.amax(-1, keepdim=True)) / temperature).exp()


def _invert(cumulative: Tensor, total: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Return the index [rows, 1] of the first entry above uniform * total, which has a weight above 0: uniform < 1."""
    numbers = [uniform(row.seed, row.choice, len(row.prompt_token_ids) + len(row.output_token_ids)) for row in rows]
    return torch.searchsorted(cumulative, _column(numbers, total) * total, right=True)


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=like.device).unsqueeze(1)
