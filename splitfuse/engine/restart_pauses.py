"""Says how long to wait before a process that has died is started again: an engine, or a front of a server."""

from __future__ import annotations


class RestartPauses:
    """Doubles the pause before each restart, from the first to the longest, and begins anew with a process that was
    ready for a while.

    >>> pauses = RestartPauses(0.5, 30.0, stable=10.0)
    >>> pauses.next(None), pauses.next(3.0), pauses.next(12.0)
    (0.5, 1.0, 0.5)
    """

    def __init__(self, first: float, longest: float, *, stable: float) -> None:
        """A process that was ready for `stable` seconds has died for the first time, not again."""
        self._first, self._longest, self._stable = first, longest, stable
        self._pause = first

    def next(self, ready_for: float | None) -> float:
        """Return the seconds before the next restart of a process that was ready for so many seconds; None: it was
        not.
        """
        if ready_for is not None and ready_for >= self._stable:
            self._pause = self._first
        pause, self._pause = self._pause, min(2 * self._pause, self._longest)
        return pause
