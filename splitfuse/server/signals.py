"""Waits for what ends a server: signals, and whatever comes first."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any


class Signals:
    """Signals to end: `drain` is set by any of them, `now` if requests are not waited for."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self.interrupted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while the context lasts."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # what starts us may block them
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            loop.remove_signal_handler(signal.SIGINT)

    def _terminate(self) -> None:
        if self.drain.is_set():
            self.now.set()
        self.drain.set()

    def _interrupt(self) -> None:
        self.interrupted = True
        self.drain.set()
        self.now.set()


async def wait_first(*events: Awaitable[Any], timeout: float | None = None) -> None:
    """Wait for the first of these, at most `timeout` seconds. Tasks go on; coroutines are cancelled."""
    tasks = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for event, task in zip(events, tasks, strict=True):
        if event is not task:
            task.cancel()
