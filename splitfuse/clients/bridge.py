"""Runs asynchronous code for blocking callers, in an event loop in a thread of its own.

Decides which thread does what, and what an interruption ends.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, TypeVar

from splitfuse.errors import ServerError

CANCEL_SECONDS = 5.0
"""Time for interrupted work to clean up."""

_Result = TypeVar("_Result")


class LoopThread:
    """Runs an event loop in a thread. `close` runs at its end, which comes with `end` or with `owner`."""

    def __init__(self, owner: object, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="splitfuse client", daemon=True).start()
        self.end = weakref.finalize(owner, _end, self._loop, close)
        self.end.atexit = False  # the thread ends with the process

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Return the result of `work`, done in the loop. If the caller is interrupted, it is cancelled. Raises
        ServerError after the end.
        """
        if not self.end.alive:
            work.close()
            raise ServerError("this client is closed: make a new one")
        ended, task = threading.Event(), list[asyncio.Task[Any] | None]()

        async def run() -> _Result:
            task.append(asyncio.current_task())
            try:
                return await work
            finally:
                ended.set()

        async def cancel() -> None:  # begins after `run` if that was handed over at all
            for each in filter(None, task):
                each.cancel()

        try:  # an interruption may come while `run` is handed over: there is no future to cancel then
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result()
        except BaseException:
            if not ended.is_set():
                asyncio.run_coroutine_threadsafe(cancel(), self._loop)
                ended.wait(CANCEL_SECONDS)
            raise

    def iterate(self, items: AsyncGenerator[_Result, None]) -> Generator[_Result, None, None]:
        """Yield what an asynchronous generator yields, and close it with this one."""

        async def following() -> tuple[_Result, ...]:
            async for item in items:
                return (item,)
            return ()

        try:
            while item := self.run(following()):
                yield item[0]
        finally:
            if self.end.alive:
                self.run(items.aclose())


def _end(loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def end() -> None:
        await close()
        # Streams that were left close their own generators in tasks.
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=CANCEL_SECONDS)
        loop.stop()

    if loop.is_running():
        asyncio.run_coroutine_threadsafe(end(), loop)
