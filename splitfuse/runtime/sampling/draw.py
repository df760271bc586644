"""Draw tokens at random: temperature, top_k, top_p, min_p."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfuse.core.plan import SamplingState
from splitfuse.core.sampling_params import SamplingParams

_MASK = 2**64 - 1


def is_filtered(params: SamplingParams) -> bool:
    """Return whether a token is drawn from a part of the vocabulary only."""
    return bool(params.top_k or params.top_p < 1.0 or params.min_p)


class Draws:
    """Draws tokens for rows of scores [rows, vocab], from those that their filters keep if `filtering`."""

    def __init__(self, scores: Tensor, rows: Sequence[SamplingState], *, filtering: bool) -> None:
        self._scores, self._rows, self._filtering = scores, rows, filtering
        if filtering:
            self._token_ids, self._cumulative, self._num_kept = _filtered(scores, rows)
            self._total = self._cumulative.gather(1, self._num_kept - 1)
        else:
            self._cumulative = _weights(scores, rows).cumsum(-1)
            self._total = self._cumulative[:, -1:]

    def first(self) -> list[int]:
        """Return a token for each row: inverse of the cumulative distribution, by id or, filtered, by weight."""
        return [token for (token,) in self._draw(slice(None), [[_number(row, 0)] for row in self._rows])]

    def further(self, index: int, count: int) -> list[int]:
        """Return tokens for a row, each drawn as the first one, with another number."""
        (tokens,) = self._draw(
            slice(index, index + 1), [[_number(self._rows[index], attempt) for attempt in range(1, count + 1)]]
        )
        return tokens

    def among(self, index: int, allowed: NDArray[np.int64], attempt: int) -> int | None:
        """Return a token for a row out of some that are allowed: of those that are kept too, or if there are none, of
        those that the filters keep of them. None if all have the score -inf.
        """
        choices = [(allowed, self._filtering)]
        if self._filtering and len(allowed) > 1:
            kept = self._token_ids[index, : int(self._num_kept[index])].cpu().numpy()
            choices.insert(0, (np.intersect1d(kept, allowed), False))
        for tokens, filtering in choices:
            scores = self._scores[index, torch.from_numpy(tokens).to(self._scores.device)]
            if len(tokens) and scores.amax() > -math.inf:
                if len(tokens) == 1:
                    return int(tokens[0])
                row = self._rows[index]
                draws = Draws(scores.unsqueeze(0), [row], filtering=filtering)
                ((place,),) = draws._draw(slice(None), [[_number(row, attempt)]])
                return int(tokens[place])
        return None

    def _draw(self, part: slice, numbers: list[list[float]]) -> list[list[int]]:
        cumulative, total = self._cumulative[part], self._total[part]
        # The first entry above number * total, which has a weight above 0: number < 1.
        drawn = torch.searchsorted(
            cumulative, torch.tensor(numbers, dtype=torch.float64, device=total.device) * total, right=True
        )
        if self._filtering:
            drawn = self._token_ids[part].gather(1, drawn)
        tokens: list[list[int]] = drawn.tolist()
        return tokens


def _filtered(scores: Tensor, rows: Sequence[SamplingState]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row tokens in falling order of weight, equal ones by id, their cumulative weights, and how many
    [rows, 1] are kept by top_k, top_p and min_p.

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
    return ids.gather(1, order), cumulative, kept


def uniform(seed: int, choice: int, position: int, attempt: int = 0) -> float:
    """Return a number in [0, 1) that is a pure function of its keys.

    Counter-based: each key is a jump ahead in the SplitMix64 sequence that starts where the one before led (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). 53 bits, all a float64 can hold.
    """
    state = 0
    # An attempt counts down, so that it is no position of another seed whose jump is none.
    for key in (seed, choice, position, -1 - attempt) if attempt else (seed, choice, position):
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


def _number(row: SamplingState, attempt: int) -> float:
    return uniform(row.seed, row.choice, len(row.prompt_token_ids) + len(row.output_token_ids), attempt)


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=like.device).unsqueeze(1)
