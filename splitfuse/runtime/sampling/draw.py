"""Draws tokens at random, from numbers that are a function of a request's seed and position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfuse.core.plan import SamplingState
from splitfuse.kernels.drawing import Filter, kept_tokens

_MASK = 2**64 - 1

Draw = Callable[[Tensor, Sequence[int], Sequence[Filter], Sequence[Sequence[float]]], list[list[int]]]
"""Type of `Backend.draw`, which draws tokens for some rows of scores by numbers from 0 to below 1."""


class Draws:
    """Draws tokens for requests, from the row of scores [rows, vocab] that each has in `places`."""

    def __init__(self, scores: Tensor, places: Sequence[int], rows: Sequence[SamplingState], draw: Draw) -> None:
        self._scores, self._places, self._rows, self._draw = scores, places, rows, draw
        params = (row.params for row in rows)
        self._filters = [Filter(each.temperature, each.top_k, each.top_p, each.min_p) for each in params]

    def first(self) -> list[int]:
        """Return a token for each request."""
        drawn = self._draw(self._scores, self._places, self._filters, [[_number(row, 0)] for row in self._rows])
        return [token for (token,) in drawn]

    def further(self, index: int, count: int) -> list[int]:
        """Return tokens for a request, each drawn as the first one, with another number."""
        numbers = [_number(self._rows[index], attempt) for attempt in range(1, count + 1)]
        return self._draw(self._scores, [self._places[index]], [self._filters[index]], [numbers])[0]

    def among(self, index: int, allowed: NDArray[np.int64], attempt: int) -> int | None:
        """Return a token for a request out of some that are allowed: of those that are kept too, or if there are none,
        of those that the filter keeps of them. None if all have the score -inf.
        """
        row, each = self._scores[self._places[index]], self._filters[index]
        choices = [(allowed, each)]
        if not each.keeps_all and len(allowed) > 1:
            kept = kept_tokens(row, each).cpu().numpy()
            choices.insert(0, (np.intersect1d(kept, allowed), Filter(each.temperature)))
        for tokens, filter_ in choices:
            scores = row[torch.from_numpy(tokens).to(row.device)]
            if len(tokens) and scores.amax() > -math.inf:
                if len(tokens) == 1:
                    return int(tokens[0])
                ((place,),) = self._draw(scores.unsqueeze(0), [0], [filter_], [[_number(self._rows[index], attempt)]])
                return int(tokens[place])
        return None


def uniform(seed: int, choice: int, position: int, attempt: int = 0) -> float:
    """Return a number in [0, 1) that is a pure function of its keys.

    Counter-based: each key is a jump ahead in the SplitMix64 sequence that starts where the one before led (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). 53 bits, all a float64 can hold.
    """
    return number_at(stream_of(seed, choice), position, attempt)


def stream_of(seed: int, choice: int) -> int:
    """Return where the sequence is after the keys that a request keeps: see `number_at`."""
    return _jump(_jump(0, seed), choice)


def number_at(stream: int, position: int, attempt: int = 0) -> float:
    """Return what `uniform` does, from where `stream_of` has led."""
    state = _jump(stream, position)
    if attempt:  # counted down, so that it is no position of another seed whose jump is none
        state = _jump(state, -1 - attempt)
    return (state >> 11) * 2.0**-53


def _jump(state: int, key: int) -> int:
    state = (state + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _number(row: SamplingState, attempt: int) -> float:
    return uniform(row.seed, row.choice, row.num_tokens, attempt)
