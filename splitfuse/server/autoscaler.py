"""Changes the number of a server's replicas by its load: as many as its recent arrivals need to meet their SLO.

core/capacity.py computes that number, for simulations too; this module decides when to ask for it, and scales.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from splitfuse.core.capacity import replicas_wanted
from splitfuse.engine.client import EngineClient
from splitfuse.errors import SplitfuseError

CHECK_SECONDS = 10.0
"""Seconds from one count of the replicas that are needed to the next."""
COUNTING_SHARE = 1 / 20
"""Fraction of the time that counting may take."""
USUAL_START = 60.0
"""Seconds that the start of a replica is taken to need before one was measured."""
LONGEST_PAUSE = 300.0
"""Longest time until replicas that could not be started are tried again, in seconds."""

_logger = logging.getLogger(__name__)


class Autoscaler:
    """Scales a client between `least` and `most` replicas. Belongs to the event loop's thread."""

    def __init__(self, client: EngineClient, least: int, most: int) -> None:
        self._client, self._least, self._most = client, least, most

    @contextmanager
    def running(self) -> Iterator[None]:
        """Scale while the context lasts."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        pause = CHECK_SECONDS
        while True:
            await asyncio.sleep(pause)
            try:
                pause = max(CHECK_SECONDS, await self.check() / COUNTING_SHARE)
            except SplitfuseError as error:
                pause = min(2 * pause, LONGEST_PAUSE)
                _logger.warning("the number of replicas stays %d: %s", self._client.num_replicas, error)
            except Exception:
                _logger.exception("the number of replicas cannot be changed")

    async def check(self) -> float:
        """Scale to the number of replicas that is needed. Returns the seconds that counting took. Raises SplitfuseError
        if there are too few, and none more can be had.
        """
        began = time.monotonic()
        wanted = await self.count()
        took = time.monotonic() - began
        await self._scale(wanted)
        return took

    async def count(self) -> int:
        """Return the number of replicas that is needed."""
        client, now = self._client, time.monotonic()
        times = next((each.step_times for each in client.stats if each.step_times is not None), None)
        if times is None:  # no engine has made a step
            return max(client.num_replicas, self._least)
        starts = [each.start_seconds for each in client.engines if each.start_seconds is not None]
        return await asyncio.to_thread(
            replicas_wanted,
            [arrival for engine in client.engines for arrival in engine.arrivals],
            times,
            now=now,
            num_replicas=client.num_replicas,
            start_seconds=max(starts, default=USUAL_START),
            least=self._least,
            most=self._most,
        )

    async def _scale(self, wanted: int) -> None:
        """Scale to `wanted` replicas or, if that fails, part of the way. Raises SplitfuseError if that fails too."""
        before = self._client.num_replicas
        while wanted != before:
            try:
                moved = await self._client.scale(wanted)
            except SplitfuseError:
                if wanted <= before + 1:
                    raise
                wanted = (before + wanted) // 2
                continue
            _logger.info("replicas: %d, not %d, by load; %d requests went on elsewhere", wanted, before, moved)
            return
