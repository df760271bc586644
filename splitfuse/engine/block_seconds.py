"""Estimates how long a KV block takes to come from a tier or from another machine."""

from __future__ import annotations

GAIN = 1 / 4
"""Weight of the newest blocks in the estimate."""
LEAST = 1e-6
"""Least time of a block."""
HALF_LIFE = 30.0
"""Seconds in which half of the difference to the first estimate goes, while nothing comes."""


class BlockSeconds:
    """Estimates the seconds of a block by those that have come. An estimate above the first one goes back to it while
    nothing comes: what is taken to be slow is asked for nothing, and would be taken to be slow for ever.
    """

    def __init__(self, first: float) -> None:
        """`first` is the estimate before anything has come."""
        self._first = self._seconds = first
        self._measured = 0.0

    def at(self, now: float) -> float:
        """Return the estimate."""
        above = self._seconds - self._first
        return self._first + above * 0.5 ** (max(now - self._measured, 0.0) / HALF_LIFE) if above > 0 else self._seconds

    def update(self, seconds: float, now: float) -> None:
        """Take note of how long a block has taken, of some that came."""
        before = self.at(now)
        self._seconds, self._measured = before + GAIN * (max(seconds, LEAST) - before), now

    def raise_to(self, seconds: float, now: float) -> None:
        """Take note of how long a block takes at least, of some that did not come in time."""
        self._seconds, self._measured = max(self.at(now), seconds), now
