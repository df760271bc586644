"""Changes the number of a server's replicas while it serves.

An engine that is not needed any more is drained, with the KV blocks of its requests, and then ended; its place is kept,
so that the numbers of the others stay, and taken again by the next one that is started.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.errors import EngineUnavailableError, InvalidRequestError

_logger = logging.getLogger(__name__)


class Scaler:
    """Starts and ends replicas of a router. Belongs to the event loop's thread."""

    def __init__(
        self,
        running: Sequence[LocalClient],
        spare: Sequence[LocalClient] = (),
        *,
        why_no_more: str,
        adopt: Callable[[LocalClient], object],
        empty: Callable[[LocalClient], Awaitable[int]],
        check_open: Callable[[], object],
    ) -> None:
        """`running` are the replicas that there are at the start, and `spare` those that can be started too, in their
        order; `why_no_more` says what limits them. `adopt` is called with a replica before it is started, and `empty`
        lets the requests of one go on elsewhere and returns how many have. `empty` and `check_open` raise
        EngineUnavailableError if no other engine takes requests.
        """
        self._replicas, self._spare = [*running], [*spare]
        self._why_no_more, self._adopt, self._empty, self._check_open = why_no_more, adopt, empty, check_open
        self._change = ""  # being made, in words
        self._leaving: list[LocalClient] = []
        self._is_closed = False

    @property
    def num_replicas(self) -> int:
        """Return how many replicas there are, ready or not."""
        return sum(each.state is not EngineState.STOPPED for each in self._replicas)

    @property
    def most(self) -> int:
        """Return how many replicas there can be."""
        return len(self._replicas) + len(self._spare)

    def has(self, engine: LocalClient) -> bool:
        """Return whether an engine is one of those whose number changes."""
        return engine in self._replicas

    def is_leaving(self, engine: LocalClient) -> bool:
        """Return whether a replica is being ended."""
        return engine in self._leaving

    async def scale(self, count: int) -> int:
        """Change the number of replicas to `count`. See EngineClient.scale."""
        if not self.most:
            raise InvalidRequestError(
                f"there are no replicas whose number could change: {self._why_no_more}", parameter="replicas"
            )
        if not 1 <= count <= self.most:
            raise InvalidRequestError(
                f"there cannot be {count} replicas, but 1 to {self.most}: {self._why_no_more}", parameter="replicas"
            )
        if self._change:
            raise EngineUnavailableError(f"the number of replicas is being changed {self._change}: wait for that")
        before = self.num_replicas
        self._change = f"from {before} to {count}"
        try:
            if count >= before:
                await self._start(count - before)
                return 0
            return await self._end(before - count)
        finally:
            self._change = ""

    async def _start(self, count: int) -> None:
        """Start `count` more replicas. If one does not start, they are ended again."""
        starting = [each for each in self._replicas if each.state is EngineState.STOPPED][:count]
        while len(starting) < count:
            self._replicas.append(self._spare.pop(0))
            starting.append(self._replicas[-1])
        for each in starting:
            self._adopt(each)
        try:
            errors = await asyncio.gather(*(each.start() for each in starting), return_exceptions=True)
            if failed := next(filter(None, errors), None):
                raise failed
        except BaseException:
            if not self._is_closed:  # else all are closed
                await self._end_again(starting)
            raise

    async def _end(self, count: int) -> int:
        """End `count` replicas: those that take no requests first, and of the others the newest."""
        running = [each for each in reversed(self._replicas) if each.state is not EngineState.STOPPED]
        leaving = self._leaving = sorted(running, key=_is_open)[:count]
        were_drained = [each.is_drained for each in leaving]
        try:
            for each in leaving:  # so that none receives the requests of another
                each.is_drained = True
            moved = sum(await asyncio.gather(*map(self._empty, leaving)))
            self._check_open()  # those that stay may have died since the first was empty
            await asyncio.gather(*(each.stop() for each in leaving))
        except BaseException:
            for each, was_drained in zip(leaving, were_drained, strict=True):
                if not was_drained and each.state is not EngineState.STOPPED:
                    each.undrain()
            raise
        finally:
            self._leaving = []
        return moved

    async def _end_again(self, engines: Sequence[LocalClient]) -> None:
        """End engines of which one could not be started; the others may have requests by now. One that is ready
        stays where no other engine is.
        """
        self._leaving = [*engines]
        try:
            for each in engines:
                each.is_drained = True
            for failure in await asyncio.gather(*map(self._end_one, engines), return_exceptions=True):
                if isinstance(failure, Exception):
                    _logger.error("a replica could not be ended", exc_info=failure)
        finally:
            self._leaving = []

    async def _end_one(self, engine: LocalClient) -> None:
        """End an engine that has just been started, if another is ready or this one is not."""
        if engine.state is EngineState.READY:
            try:
                await self._empty(engine)
            except EngineUnavailableError as error:
                _logger.warning("a replica is kept that was started with one that did not start: %s", error)
                engine.undrain()
                return
        await engine.stop()

    async def close(self) -> None:
        """Release the replicas that were never started, once and for all."""
        self._is_closed = True
        await asyncio.gather(*(each.close() for each in self._spare))


def _is_open(engine: LocalClient) -> bool:
    return engine.state is EngineState.READY and not engine.is_drained
