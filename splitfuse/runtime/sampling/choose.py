"""Chooses tokens that the forms of answers allow: first choose, then ask whether that is allowed.

Mostly it is, and where it is not, few tokens are, and these are looked for. The result is the one of a choice among
nothing but allowed tokens. For a greedy one the next best are tried in their order. For a random one tokens are drawn
until one is allowed, which has the distribution of those that are: P(token) / P(allowed), exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from splitfuse.runtime.sampling.draw import Draws
from splitfuse.runtime.sampling.grammar import TRIES, Matcher, TokenIds


def choose(choices: Mapping[int, Choice], matchers: Mapping[int, Matcher]) -> dict[int, int]:
    """Return the tokens of rows, chosen as `choices` say among those that the matcher of each row allows. A row has
    none if nothing is allowed that has a score.
    """
    tokens: dict[int, int] = {}
    allowed: dict[int, TokenIds] = {}
    waiting = []
    for i, choice in choices.items():
        matcher = matchers[i]
        if (forced := matcher.forced()) is not None:
            allowed[i] = forced
        elif matcher.take(choice.first):
            tokens[i] = choice.first
        elif (token := next(filter(matcher.take, choice.further(matcher)), None)) is not None:
            tokens[i] = token
        else:
            waiting.append(i)
    allowed |= zip(waiting, Matcher.allowed([matchers[i] for i in waiting]), strict=True)
    for i, those in allowed.items():
        token = choices[i].among(those) if len(those) else None
        if token is not None and matchers[i].take(token, nothing_else=True):
            tokens[i] = token
    return tokens


class Choice(Protocol):
    """Chooses a token for one row."""

    first: int
    """Token that is chosen if it is allowed."""

    def further(self, matcher: Matcher) -> Iterable[int]:
        """Return tokens, of which the first one that the matcher allows is chosen otherwise."""

    def among(self, allowed: TokenIds) -> int | None:
        """Return the token that is chosen if none of these is allowed, out of all that are, if one has a score."""


class Greedy:
    """Chooses the allowed token with the largest of scores[index], the first of equal ones. `best` and `peaks` are the
    best of all tokens, and their scores.
    """

    def __init__(self, scores: Tensor, index: int, best: list[int], peaks: list[float]) -> None:
        self.first = best[0]
        self._scores, self._index, self._best, self._peaks = scores, index, best, peaks

    def further(self, matcher: Matcher) -> Iterable[int]:
        if not matcher.is_loose:  # then the allowed ones are sooner looked through
            return ()
        return (token for token, peak in zip(self._best[1:], self._peaks[1:], strict=True) if peak > -math.inf)

    def among(self, allowed: TokenIds) -> int | None:
        index = torch.from_numpy(allowed).to(self._scores.device)
        scores = self._scores[self._index, index].double().cpu().numpy()
        best = scores.argmax()
        return int(allowed[best]) if scores[best] > -math.inf else None


class Drawn:
    """Chooses an allowed token at random, as `Draws` says; `first` is the first one drawn."""

    def __init__(self, draws: Draws, index: int, first: int) -> None:
        self.first = first
        self._draws, self._index = draws, index

    def further(self, matcher: Matcher) -> Iterable[int]:  # noqa: ARG002 - as many for each: they decide the token
        return self._draws.further(self._index, TRIES - 1)

    def among(self, allowed: TokenIds) -> int | None:
        return self._draws.among(self._index, allowed, TRIES)
