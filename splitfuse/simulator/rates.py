"""Searches for the largest load that a deployment sustains."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

from splitfuse.bench import metrics
from splitfuse.bench.load import WARM_UP, open_loop
from splitfuse.bench.measure import MakeWorkload
from splitfuse.bench.results import MeasuredRequest, Point
from splitfuse.bench.target import Answer, Target
from splitfuse.bench.workload import Chat, LoadRequest, Workload, poisson
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment
from splitfuse.simulator.simulate import SimulatedTarget

PRECISION = 1.03
"""Ratio of loads, the one sustained and the other not, at which a search ends; settings within it are equally good."""
FIRST_STEP, LAST_STEP = 1.06, 2.0
"""Factors between successive loads of a search."""
KEEPS_UP = 0.95
"""Fraction of the arrivals in the window that must finish in it: a growing queue is not sustained."""


async def poisson_load(target: Target, workload: Workload, rate: float, requests: int) -> Point:
    """Drive a Poisson load of which `requests` sessions count.

    All loads consist of the same requests in the same order, only at other distances.
    """
    seed = int(workload.settings["seed"])
    warm_up = math.ceil(WARM_UP * requests)
    first, last = islice(poisson(1.0, seed=seed, stream="tune"), warm_up, warm_up + requests + 1, requests)
    scale = requests / rate / (last - first)  # chance must not make the window's rate another
    arrivals = (scale * at for at in poisson(1.0, seed=seed, stream="tune"))
    # without its rate, which would give each load other requests
    return await open_loop(target, workload, rate=None, arrivals=arrivals, requests=requests)


def keeps_up(point: Point) -> bool:
    """Return whether requests finished as fast as they came."""
    comes = len(metrics.counted(point)) / metrics.seconds(point)
    return metrics.throughput(point) >= KEEPS_UP * comes


def largest_load(is_sustained: Callable[[float], bool], start: float, least: float) -> float:
    """Return the largest sustained load, to PRECISION; 0 if it is below `least`.

    The search moves away from `start` in growing steps until it has bounds, then bisects.
    """
    low = high = start
    step = FIRST_STEP
    if is_sustained(start):
        while is_sustained(high := low * step):
            low, step = high, min(step**2, LAST_STEP)
    else:
        while not is_sustained(low := high / step):
            high, step = low, min(step**2, LAST_STEP)
            if high < least:
                return 0.0
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_sustained(middle) else (low, middle)
    return low


class Criterion(NamedTuple):
    """Asks for something of a share of the requests."""

    is_met: Callable[[MeasuredRequest], bool]
    share: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Says when a load is sustained: if enough of its requests meet each criterion.

    If no criterion limits the time in the queue, requests must finish as fast as they come, too.
    """

    criteria: tuple[Criterion, ...]
    requests: int
    """Number of sessions that count at each load: requests, or conversations."""
    limits_queue: bool = True
    targets: SloTargets | None = None
    """Targets that the only criterion asks for, if it does."""

    @classmethod
    def of(cls, targets: SloTargets, attainment: float, requests: int) -> Self:
        """Return the goal that a share of the requests meets these targets."""
        if not 0 < attainment <= 1:
            raise ConfigError(f"--slo-attainment {attainment} must be above 0 and at most 1, such as 0.99")
        if requests < 1:
            raise ConfigError(f"--requests must be at least 1, not {requests}")
        criterion = Criterion(partial(metrics.meets_slo, targets=targets), attainment)
        limits_queue = targets.ttft_target(1) < math.inf
        return cls(criteria=(criterion,), requests=requests, limits_queue=limits_queue, targets=targets)

    def is_reached(self, point: Point) -> bool:
        """Return whether a load was sustained."""
        records = metrics.counted(point)
        met = all(metrics.mean([is_met(each) for each in records]) >= share for is_met, share in self.criteria)
        return met and (self.limits_queue or keeps_up(point))


class _Judge(Target):
    """Passes requests on to a target, and counts how many meet the criteria until the verdict is certain."""

    def __init__(self, target: Target, goal: Goal) -> None:
        self._target, self._goal = target, goal
        self._first = math.ceil(WARM_UP * goal.requests)
        self._met, self._missed = ([0] * len(goal.criteria) for _ in range(2))
        self.vocabulary, self.answer_vocabulary, self.room = target.vocabulary, target.answer_vocabulary, target.room
        self.about = target.about
        self.verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        await self._target.start()

    async def close(self) -> None:
        await self._target.close()

    async def ask(self, request: LoadRequest) -> Answer:
        sent = asyncio.get_running_loop().time()
        answer = await self._target.ask(request)
        if 0 <= request.number - self._first < self._goal.requests and not self.verdict.done():
            self._count(MeasuredRequest(0, sent, answer.num_prompt_tokens, answer.token_times, answer.error))
        return answer

    def _count(self, record: MeasuredRequest) -> None:
        for index, (is_met, _) in enumerate(self._goal.criteria):
            (self._met if is_met(record) else self._missed)[index] += 1
        needed = [share * self._goal.requests for _, share in self._goal.criteria]
        if any(self._goal.requests - missed < least for missed, least in zip(self._missed, needed, strict=True)):
            self.verdict.set_result(False)
        elif self._goal.limits_queue and all(met >= least for met, least in zip(self._met, needed, strict=True)):
            self.verdict.set_result(True)


def sustains(
    deployment: Deployment,
    make_workload: MakeWorkload,
    rate: float,
    goal: Goal,
    *,
    make_target: Callable[[Deployment], SimulatedTarget] = SimulatedTarget,
) -> bool:
    """Return whether a deployment sustains a Poisson rate. A load ends as soon as that is certain."""

    async def main() -> bool:
        target = make_target(deployment)
        await target.start()
        workload = make_workload(target)
        if isinstance(workload, Chat):  # of which it is not known how many requests there will be
            return goal.is_reached(await poisson_load(target, workload, rate, goal.requests))
        judge = _Judge(target, goal)
        load = asyncio.ensure_future(poisson_load(judge, workload, rate, goal.requests))
        either: list[asyncio.Future[Any]] = [load, judge.verdict]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if judge.verdict.done():
            load.cancel()
            return judge.verdict.result()
        return goal.is_reached(load.result())

    return virtual_time.run(main())
