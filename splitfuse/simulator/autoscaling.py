"""Simulates a server that has as many replicas as its arrivals need: `replicas_wanted` (core/replicas/capacity.py) says
how many, replicas take a while to start, and are drained before they are stopped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from splitfuse.bench.target import Answer
from splitfuse.bench.workload import LoadRequest
from splitfuse.core.replicas.capacity import WANTED_IN_TIME, WINDOW, Arrival, replicas_wanted
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.simulate import Replica, SimulatedTarget, prompt_ids


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    """Says how many replicas a server may have, and how it changes their number. Raises ConfigError for what cannot be.

    The defaults are the server's.
    """

    least: int
    most: int
    start_seconds: float = 60.0
    """Seconds from the start of a replica until it takes requests."""
    check_seconds: float = 10.0
    """Seconds from one count of the replicas that are needed to the next."""
    window: float = WINDOW
    in_time: float = WANTED_IN_TIME

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"autoscaling needs 1 <= least <= most replicas, not {self.least} and {self.most}")
        if not (self.start_seconds >= 0 and self.check_seconds > 0 and self.window >= 60):
            raise ConfigError(
                f"autoscaling needs seconds to start of at least 0, checks some seconds apart and a window of at least "
                f"60 s, not {self.start_seconds}, {self.check_seconds} and {self.window}"
            )

    def wanted(self, arrivals: Sequence[Arrival], times: StepTimes, *, now: float, num_replicas: int) -> int:
        """Return how many replicas there should be, where there are `num_replicas`."""
        return replicas_wanted(
            arrivals,
            times,
            now=now,
            num_replicas=num_replicas,
            start_seconds=self.start_seconds,
            least=self.least,
            most=self.most,
            window=self.window,
            in_time=self.in_time,
        )


class AutoscaledTarget(SimulatedTarget):
    """Simulates replicas of one engine that are started and drained; at first there are the least. Close it after the
    load: it counts on until then.
    """

    def __init__(self, engine: SimulationConfig, scaling: Autoscaling) -> None:
        super().__init__(Deployment.of(engine, replicas=scaling.most))
        self._scaling = scaling
        self._times = StepTimes(engine.calibration.cost)
        self._arrivals: deque[Arrival] = deque()
        self._starting: dict[Replica, asyncio.TimerHandle] = {}
        self._scaler: asyncio.Task[None] | None = None
        self._changed_at = 0.0
        self.replica_seconds = 0.0
        """Seconds of all replicas together, from their starts on until they are drained."""
        self.counts: list[tuple[float, int]] = []
        """Times at which the number of replicas changed, starting ones included, and the number from then on."""
        for replica in self._replicas[scaling.least :]:
            replica.is_started = False

    async def start(self) -> None:
        await super().start()
        self._note(self._num_paid)
        self._scaler = asyncio.create_task(self._scale_forever())

    async def close(self) -> None:
        assert self._scaler is not None, "it was started"
        self._scaler.cancel()
        for handle in self._starting.values():
            handle.cancel()
        self._note(self._num_paid)

    async def answer(self, request: LoadRequest, targets: SloTargets) -> Answer:
        now = asyncio.get_running_loop().time()
        arrival = Arrival(now, len(prompt_ids(request)), request.max_tokens, targets)
        self._arrivals.append(arrival)
        answer = await super().answer(request, targets)
        arrival.num_generated, arrival.has_ended = len(answer.token_times), True
        return answer

    @property
    def _num_paid(self) -> int:
        return sum(each.is_running for each in self._replicas) + len(self._starting)

    async def _scale_forever(self) -> None:
        scaling, loop = self._scaling, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(scaling.check_seconds)
            while self._arrivals and self._arrivals[0].at < loop.time() - scaling.window:
                self._arrivals.popleft()
            wanted = scaling.wanted(self._arrivals, self._times, now=loop.time(), num_replicas=self._num_paid)
            self._scale(wanted)

    def _scale(self, wanted: int) -> None:
        before = self._num_paid
        for replica in self._replicas:
            if (
                self._num_paid < wanted
                and not replica.is_running
                and not replica.num_open
                and replica not in self._starting
            ):
                self._begin(replica)
        for replica in reversed(self._replicas):  # those first which have not started yet
            if self._num_paid > wanted and replica in self._starting:
                self._starting.pop(replica).cancel()
        for replica in reversed(self._replicas):
            if self._num_paid > wanted and replica.is_running:
                replica.drain()
        if self._num_paid != before:
            self._note(before)

    def _begin(self, replica: Replica) -> None:
        def ready() -> None:
            del self._starting[replica]
            replica.is_started = True

        self._starting[replica] = asyncio.get_running_loop().call_later(self._scaling.start_seconds, ready)

    def _note(self, before: int) -> None:
        """Count the seconds of the replicas that there were until now."""
        now = asyncio.get_running_loop().time()
        self.replica_seconds += before * (now - self._changed_at)
        self._changed_at = now
        self.counts.append((now, self._num_paid))
