"""Choose tokens that the forms of answers allow: first choose, then ask whether that is allowed.

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
    """Return the chosen tokens of the rows that have any."""
    tokens: dict[int, int] = {}
    for i, choice in choices.items():
        token = next(filter(matchers[i].take, choice.tries(matchers[i])), None)
        if token is not None:
            tokens[i] = token
    waiting = [i for i in choices if i not in tokens]
    for i, allowed in zip(waiting, Matcher.allowed([matchers[i] for i in waiting]), strict=True):
        token = choices[i].among(allowed)
        if token is not None and matchers[i].take_any(token):
            tokens[i] = token
    return tokens


class Choice(Protocol):
    """Chooses a token for one row."""

    def tries(self, matcher: Matcher) -> Iterable[int]:
        """Return tokens, of which the first one that the matcher allows is chosen."""

    def among(self, allowed: TokenIds) -> int | None:
        """Return the token that is chosen if none of these is allowed, out of all that are; None if there is none."""


class Greedy:
    """Chooses the allowed token with the largest score, the first of equal ones. `best` are the best of all tokens."""

    def __init__(self, scores: Tensor, best: list[int]) -> None:
        self._scores, self._best = scores, best

    def tries(self, matcher: Matcher) -> Iterable[int]:
        return self._best if matcher.is_loose else self._best[:1]

    def among(self, allowed: TokenIds) -> int | None:
        if not len(allowed):
            return None
        scores = self._scores[torch.from_numpy(allowed).to(self._scores.device)].double().cpu().numpy()
        best = scores.argmax()
        return int(allowed[best]) if scores[best] > -math.inf else None


class Drawn:
    """Chooses an allowed token at random, as `Draws` says; `token` is the first one drawn."""

    def __init__(self, draws: Draws, index: int, token: int) -> None:
        self._draws, self._index, self._token = draws, index, token

    def tries(self, matcher: Matcher) -> Iterable[int]:  # noqa: ARG002 - as many for each: these choose the token
        yield self._token
        yield from self._draws.further(self._index, TRIES - 1)

    def among(self, allowed: TokenIds) -> int | None:
        return self._draws.among(self._index, allowed, TRIES)
