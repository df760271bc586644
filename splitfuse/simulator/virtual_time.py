"""An event loop whose clock is virtual: where every task waits, the clock goes on to when the first is due.

What runs in it is the same code that runs in real time, as long as it asks the loop for the time. It must wait for
nothing but the loop: no sockets, no threads.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run it to its end, as `asyncio.run` does, in virtual time, which begins at 0. Raises RuntimeError if all that is
    left waits for something that never comes.
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
    """What the loop waits with: it does not wait, but lets the time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)  # Ctrl-C comes through a socket
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing is due any more, and not all is done")
            self.now = math.nextafter(self.now + timeout, math.inf)  # the loop runs what is due before now, not at it
        return ready
