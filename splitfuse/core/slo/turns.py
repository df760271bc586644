"""Bounds how long the late wait, by what they would wait by age.

A prompt that cannot be in time waits while others are on time. By age it would wait for the work before it. Its turn
comes when `1 / share` times that work, its own included, has been done since it came: from then on it has a `share` of
each step until its first token. So it waits about `1 / share` times as long as by age, however many are late.

Work is counted in seconds of steps, less what decodes took: those go on in any order.
"""

from __future__ import annotations

from collections.abc import Iterable

from splitfuse.core.request import Request


def _by_turn(request: Request) -> tuple[float, int]:
    return request.turn, request.sequence_number


class Turns:
    """Counts the work that has been done, and says whose turn has come."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._done = 0.0

    def accept(self, request: Request, *, own: float, before: float) -> None:
        """Set the turn of a new request: it takes `own` seconds, unfinished ones `before` it."""
        request.turn = self._done + (before + own) / self.share - own

    def advance(self, seconds: float) -> None:
        """Count the work of a step."""
        self._done += seconds

    def have_come(self, prefills: Iterable[Request]) -> list[Request]:
        """Return those whose turn has come, in the order of their turns."""
        return sorted([r for r in prefills if r.turn <= self._done], key=_by_turn)
