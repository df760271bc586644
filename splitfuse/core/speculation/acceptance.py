"""Learns how often the guesses of a draft model are right, by how sure it is of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

CONFIDENCES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
"""Bounds between kinds of guesses, by the model's confidence."""
CHANCES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Chances that a guess of each kind is right before any was checked."""
MEAN = 0.8
"""Chance that the next guess is right before any was made: that of a good model. With less, a draft model of half the
size, which pays only if it is good, would never be tried.
"""
GAIN = 1 / 8
"""Weight of the newest guess of a request in its own chances."""
COMMON_GAIN = 1 / 64
"""Weight of the newest guess in the chances that requests begin with."""
RETURN = 1 / 128
"""Part by which the mean of a request without guesses goes back to that of all, in each of its steps."""
FORGOTTEN = 1 / 32
"""Part by which what is known of all requests goes back to the beginning with each new one, so that now and then one
tries a model whose guesses were poor.
"""


class Acceptance:
    """Learns the chances for one request, or for all (`common`), with which new ones begin.

    >>> common = Acceptance()
    >>> own = common.begin()
    >>> before = own.chance(0.9)
    >>> own.observe([0.9, 0.9, 0.4], num_right=2)
    >>> own.chance(0.9) > before, own.chance(0.4) < 0.35
    (True, True)
    """

    def __init__(self, common: Acceptance | None = None) -> None:
        self._common = common
        self._chances: list[float] = list(CHANCES if common is None else common._chances)
        self.mean: float = MEAN if common is None else common.mean
        """Chance that the next guess is right if all before it are, whatever it will be."""

    def begin(self) -> Acceptance:
        """Return the chances that a new request begins with."""
        self.mean += FORGOTTEN * (MEAN - self.mean)
        self._chances = [own + FORGOTTEN * (first - own) for own, first in zip(self._chances, CHANCES, strict=True)]
        return Acceptance(self)

    def chance(self, confidence: float) -> float:
        """Return the chance that a guess is right if all before it are."""
        return self._chances[_kind(confidence)]

    def note_guess(self, chance: float) -> None:
        """Take in the chance of a guess that was made."""
        self.mean += GAIN * (chance - self.mean)
        if self._common is not None:
            self._common.mean += COMMON_GAIN * (chance - self._common.mean)

    def note_pause(self) -> None:
        """Take in that nothing was guessed, since it was not worth it."""
        if self._common is not None:
            self.mean += RETURN * (self._common.mean - self.mean)

    def observe(self, confidences: Sequence[float], num_right: int) -> None:
        """Take in that so many of the first guesses of a step were right, and the next one, if there is one, wrong."""
        for number, confidence in enumerate(confidences[: num_right + 1]):
            self._learn(_kind(confidence), number < num_right)

    def _learn(self, kind: int, is_right: bool) -> None:
        self._chances[kind] += GAIN * (is_right - self._chances[kind])
        if (common := self._common) is not None:
            common._chances[kind] += COMMON_GAIN * (is_right - common._chances[kind])


def _kind(confidence: float) -> int:
    return bisect_right(CONFIDENCES, confidence)
