"""Changes the number of a server's replicas by its load: as many as its recent arrivals need to meet their SLO.

core/replicas/capacity.py computes that number, for simulations too; this module decides when to ask for it, and scales.
Engines that were named with --engine take part of the load, so that fewer replicas are needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from splitfuse.core.replicas.capacity import IN_TIME, PART, Arrival, replicas_wanted, share_late_alone
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.engine.client import EngineState
from splitfuse.engine.router import Router
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
    """Scales a router between `least` and `most` replicas. Belongs to the event loop's thread."""

    def __init__(self, client: Router, least: int, most: int) -> None:
        self._client, self._least, self._most = client, least, most
        self._is_attainable = True
        """Whether nearly all recent requests could meet their SLO, each alone."""

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
        elsewhere = client.engines_elsewhere
        replicas = [each for each in client.engines if each not in elsewhere]
        starts = [each.start_seconds for each in replicas if each.start_seconds is not None]
        num_elsewhere = sum(each.state is EngineState.READY and not each.is_drained for each in elsewhere)
        arrivals = [arrival for engine in client.engines for arrival in engine.arrivals]
        wanted = await asyncio.to_thread(
            replicas_wanted,
            *(arrivals, times),
            now=now,
            num_replicas=client.num_replicas + num_elsewhere,
            start_seconds=max(starts, default=USUAL_START),
            least=self._least + num_elsewhere,
            most=self._most + num_elsewhere,
        )
        await self._note_late(arrivals, times, now)
        return wanted - num_elsewhere

    async def _note_late(self, arrivals: Sequence[Arrival], times: StepTimes, now: float) -> None:
        """Log once that too many of the recent requests cannot meet their SLO, however many replicas there are."""
        recent = [each for each in arrivals if now - PART <= each.at <= now]
        late = await asyncio.to_thread(share_late_alone, recent, times)
        was_attainable, self._is_attainable = self._is_attainable, late <= 1.0 - IN_TIME
        if was_attainable and not self._is_attainable:
            _logger.warning(
                "%.0f %% of the last minute's requests cannot meet their SLO with any number of replicas: even alone "
                "they take longer than that",
                100 * late,
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
