"""Runs an event loop with a virtual clock: while all tasks wait, the clock advances to the next due time.

Code that asks the loop for the time runs unchanged. It must not wait for anything else: no sockets, no threads.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine as `asyncio.run` does, in virtual time from 0.

    Raises RuntimeError if all remaining tasks wait for something that will never happen.
    """
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class _Clock(selectors.DefaultSelector):
    """Advances the clock instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)  # Ctrl-C comes through a socket
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock in virtual time: no event is due, but tasks remain")
            self.now = math.nextafter(self.now + timeout, math.inf)  # the loop runs what is due before now, not at it
        return ready
