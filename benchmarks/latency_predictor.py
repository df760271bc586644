"""Measure how well step times are predicted on a changing machine, with core/slo/latency_predictor.py and without.

    python -m benchmarks.latency_predictor [--hours 1] [--minutes 0] [--model DIR] [--quantization int8]

In simulation, the machine differs from the cost model: every coefficient is off by up to a tenth, its speed drifts by
a quarter over the hour, neighbours take memory bandwidth or arithmetic for half a minute, every step has noise of 5 %,
and one in a hundred is delayed. `--minutes` measures a real engine (by default, of the bundled model) under the same
kind of load: conversations, long prompts, short questions at random. Errors are |predicted / actual - 1|. Both columns
are of the same steps, whose plans were made with the correction.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from benchmarks.slo import MACHINES, calibration
from splitfuse.bench.metrics import percentile
from splitfuse.bench.target import EngineTarget, Target
from splitfuse.bench.workload import Chat, Independent, Lengths
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Machine, SimulationConfig
from splitfuse.simulator.simulate import Replica, SimulatedTarget

TARGETS = {"ttft": "4ms/token", "itl": "250ms"}
NOISE = 0.05
DELAYED, DELAY_SECONDS = 0.01, 0.1
ALONE_SECONDS, NEIGHBOUR_SECONDS = 90.0, 30.0
CHATTERS, READERS, QUESTIONS_PER_SECOND = 6, 1, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0, help="hours of simulation; 0 skips it")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes of a real engine")
    parser.add_argument("--model", help="its model (default: the bundled one)")
    parser.add_argument("--quantization")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    step_response()
    if arguments.hours:
        for machine in MACHINES:
            simulated(machine, arguments.hours, arguments.seed)
    if arguments.minutes:
        real(arguments.minutes, {"model": arguments.model, "quantization": arguments.quantization}, arguments.seed)


@dataclass(frozen=True)
class Step:
    """Times of a step in seconds."""

    uncorrected: float
    corrected: float
    actual: float


class Recorder:
    """Records each step's predictions before the predictor observes its time."""

    def __init__(self, forecast: LatencyPredictor | None) -> None:
        assert forecast is not None, "an engine without SLO scheduling predicts nothing"
        self.steps: list[Step] = []
        observe = forecast.observe

        def see(step: StepFeatures, seconds: float) -> float:
            predicted = observe(step, seconds)
            self.steps.append(Step(forecast.cost.seconds(step), predicted, seconds))
            return predicted

        forecast.observe = see  # type: ignore[method-assign]


def step_response() -> None:
    """Print the response to a machine that is suddenly slower or faster, without noise."""
    cost, step = CostModel(floor=0.1, per_token=0.0), StepFeatures(tokens=1)
    for times in (2.0, 0.5):
        forecast, factors = LatencyPredictor(cost), []
        for _ in range(200):
            forecast.observe(step, 0.1 * times)
            factors.append(forecast.seconds(step) / cost.floor)
        within = next(n for n, factor in enumerate(factors, start=1) if abs(factor / times - 1.0) < 0.1)
        overshoot = max((factor / times if times > 1.0 else times / factor) for factor in factors) - 1.0
        print(f"steps {times:g} times as long: within 10 % after {within} steps, overshoot {max(overshoot, 0.0):.1%}")


# The simulated machine -----------------------------------------------------------------------------------------------


class Changing:
    """A machine that differs from its calibration. Call `seconds` in the order of time."""

    def __init__(self, cost: CostModel, seed: int) -> None:
        self._random = Random(seed)
        self._cost = self._off(cost, 0.9, 1.1)
        self._now_cost = self._cost
        self._neighbour = False
        self._until = 0.0
        self.noise: list[float] = []

    def seconds(self, step: StepFeatures, now: float) -> float:
        """Return the time of a step that begins now."""
        random = self._random
        while now >= self._until:
            self._neighbour = not self._neighbour and self._until > 0.0
            self._until += random.expovariate(1 / (NEIGHBOUR_SECONDS if self._neighbour else ALONE_SECONDS))
            self._now_cost = self._off(self._cost, 1.0, 2.0) if self._neighbour else self._cost
        drift = 1.0 + 0.25 * math.sin(2 * math.pi * now / 3600)
        noise = random.lognormvariate(0.0, NOISE)
        steady = drift * self._now_cost.seconds(step)
        actual = steady * noise
        if random.random() < DELAYED:
            actual += random.expovariate(1 / DELAY_SECONDS)
        self.noise.append(abs(steady / actual - 1.0))
        return actual

    def _off(self, cost: CostModel, low: float, high: float) -> CostModel:
        """Return the cost model with each coefficient times a random factor."""
        return cost.scaled(lambda: self._random.uniform(low, high))


class ChangingReplica(Replica):
    """A simulated engine on a changing machine."""

    def __init__(self, simulation: SimulationConfig, machine: Changing) -> None:
        super().__init__(Machine(engine=simulation))
        self._machine = machine

    def step_seconds(self, step: StepFeatures) -> float:
        return self._machine.seconds(step, asyncio.get_running_loop().time())


class ChangingTarget(SimulatedTarget):
    """A target with one such engine."""

    def __init__(self, simulation: SimulationConfig, machine: Changing) -> None:
        super().__init__(simulation)
        replica = ChangingReplica(simulation, machine)
        self._replicas = [replica]
        self.recorder = Recorder(replica.scheduler.policy.predictor)


def simulated(name: str, hours: float, seed: int) -> None:
    cost = replace(MACHINES[name], per_kv_token=1e-7, per_row=1e-4)
    machine = Changing(cost, seed)
    target = ChangingTarget(
        SimulationConfig(calibration=calibration(name, cost), scheduler=SchedulerConfig(**TARGETS)), machine
    )
    virtual_time.run(drive(target, 3600 * hours, seed))
    print_errors(f"{name}, {hours:g} h simulated", target.recorder.steps)
    print(f"  of the noise alone: P50 {percentile(machine.noise, 50):.1%}, P95 {percentile(machine.noise, 95):.1%}")


# A real engine -------------------------------------------------------------------------------------------------------


class RecordedTarget(EngineTarget):
    """Our engine, with its predictions recorded."""

    recorder: Recorder

    def _make_client(self) -> EngineClient:
        engine = Engine.load(self._config)
        self.recorder = Recorder(engine.scheduler.policy.predictor)
        return AsyncEngine(engine)


def real(minutes: float, settings: dict[str, Any], seed: int) -> None:
    async def run() -> RecordedTarget:
        target = RecordedTarget(EngineConfig.from_settings({**settings, **TARGETS}))
        try:
            await target.start()
            await drive(target, 60 * minutes, seed)
        finally:
            await target.close()
        return target

    target = asyncio.run(run())
    print_errors(f"{target.about['model']}, {minutes:g} min for real", target.recorder.steps)


# Load and output ----------------------------------------------------------------------------------------------------


async def drive(target: Target, seconds: float, seed: int) -> None:
    """Send conversations with pauses, prompts of half the context, and questions at random, for so many seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    chat = Chat(Lengths(min(100, target.room / 12), 64, room=target.room), target.answer_vocabulary, 5, seed)
    long = Independent(Lengths(min(3000, target.room / 2), 16, room=target.room), target.vocabulary, seed)
    short = Independent(Lengths(min(300, target.room / 6), 48, room=target.room), target.vocabulary, seed)

    async def converse(client: int) -> None:
        random, number = Random(f"{seed} chatter {client}"), 0
        while loop.time() < end:
            request = chat.first(f"chatter {client}", number)
            number += 1
            while request is not None and loop.time() < end:
                answer = await target.ask(request)
                await asyncio.sleep(random.expovariate(1.0))
                request = chat.successor(request, answer.tokens) if answer.error is None else None

    async def read(client: int) -> None:
        random, number = Random(f"{seed} reader {client}"), 0
        while loop.time() < end:
            await target.ask(long.first(f"reader {client}", number))
            number += 1
            await asyncio.sleep(random.expovariate(0.2))

    async def question(group: asyncio.TaskGroup) -> None:
        random, number = Random(f"{seed} questions"), 0
        while loop.time() < end:
            await asyncio.sleep(random.expovariate(QUESTIONS_PER_SECOND))
            group.create_task(target.ask(short.first("questions", number)))
            number += 1

    async with asyncio.TaskGroup() as group:
        for client in range(CHATTERS):
            group.create_task(converse(client))
        for client in range(READERS):
            group.create_task(read(client))
        group.create_task(question(group))


def print_errors(name: str, steps: Sequence[Step]) -> None:
    """Print the errors with and without the correction, of all steps and of the long ones, which take most of the time.

    A negative autocorrelation would show that the correction oscillates.
    """
    middle = median(each.uncorrected for each in steps)
    long = [each for each in steps if each.uncorrected > 2 * middle]
    print(f"\n{name}: {len(steps)} steps, median {1e3 * median(each.actual for each in steps):.3g} ms")
    for kind, some in (("all", steps), (f"{len(long)} long", long)):
        for which in ("uncorrected", "corrected"):
            misses = [math.log(getattr(each, which) / each.actual) for each in some]
            errors = [abs(math.exp(miss) - 1.0) for miss in misses]
            total = sum(getattr(each, which) for each in some) / sum(each.actual for each in some) - 1.0
            print(
                f"  {kind:12} {which:11} P50 {percentile(errors, 50):6.1%}, P95 {percentile(errors, 95):6.1%}; "
                f"sum {total:+6.1%}; autocorrelation {autocorrelation(misses):+.2f}"
            )


def autocorrelation(misses: Sequence[float]) -> float:
    """Return the correlation of each error with the next one; negative if the correction oscillates.

    The largest errors are clipped at P95: a delayed step says nothing about oscillation.
    """
    bound = percentile([abs(miss) for miss in misses], 95)
    clipped = [max(-bound, min(bound, miss)) for miss in misses]
    middle = sum(clipped) / len(clipped)
    off = [miss - middle for miss in clipped]
    return sum(a * b for a, b in pairwise(off)) / sum(a * a for a in off)


if __name__ == "__main__":
    main()
