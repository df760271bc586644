"""Compare the first minute of an engine, which starts with an estimate of the machine, with the later ones.

    python -m benchmarks.first_minutes [--seeds 5] [--requests 400]
    python -m benchmarks.first_minutes --model DIR [--quantization int8] [--clients 8] [--minutes 10]

In simulation every coefficient of the estimate is off: the speed of all by a fifth (standard deviation of the
logarithm), floor and arithmetic by 15 % more each, the knee by 40 %, contexts by 50 %; the host's time is missing. The
rows `true` start with the machine's own coefficients. With --model a real engine runs, with a cost model that is stored
for it only if --stored is given. Errors are |predicted / actual - 1|. Clients start one after the other, and minutes
are counted from when all have: those who start together would wait for each other's prompts in the first minute alone.
A request counts in the minute it was sent in.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Any

from benchmarks.latency_predictor import RecordedTarget, Recorder, Step
from splitfuse.bench import metrics
from splitfuse.bench.load import SPACING, closed_loop
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import SloTargets
from splitfuse.runtime.calibration import Calibration
from splitfuse.runtime.step_estimate import NOISE
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import SimulationConfig
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import SimulatedTarget

MACHINES_AND_LOADS: dict[str, tuple[CostModel, int, dict[str, str]]] = {
    "0.5b, int8, two AVX-512 cores": (
        CostModel(
            floor=0.013,
            per_token=5e-5,
            knee=19,
            per_token_beyond=3.7e-4,
            per_row=3e-5,
            per_pair=6e-8,
            per_kv_token=3e-7,
            per_request=3e-5,
            noise=0.05,
        ),
        16,
        {"ttft": "2ms/token", "itl": "250ms"},
    ),
    "0.5b, bf16, two AVX-512 cores": (
        CostModel(
            floor=0.022,
            per_token=2e-4,
            knee=17,
            per_token_beyond=7.5e-4,
            per_row=5e-5,
            per_pair=1e-7,
            per_kv_token=4e-7,
            per_request=5e-5,
            noise=0.05,
        ),
        8,
        {"ttft": "3ms/token", "itl": "250ms"},
    ),
    "a100-70b": (replace(MACHINES["a100-70b"].cost, noise=0.03), 48, {"ttft": "1s", "itl": "100ms"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=400, help="simulated requests of each run")
    parser.add_argument("--model", help="folder of a model, for real steps")
    parser.add_argument("--quantization")
    parser.add_argument("--stored", action="store_true", help="use the stored calibration of the model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ttft", default="2ms/token")
    parser.add_argument("--itl", default="250ms")
    arguments = parser.parse_args()
    print("| | steps 1-100 | 101-200 | later | P95 | in time in the first minute | later | goodput | later | ratio |")
    print("|" + "---|" * 10)
    if arguments.model is None:
        for name in MACHINES_AND_LOADS:
            for kind in ("true", "estimated"):
                simulated(name, kind, arguments)
    else:
        real(arguments)


def estimate(truth: CostModel, seed: int) -> CostModel:
    """Return a cost model that is off as an estimate may be."""
    random = Random(seed)

    def times(deviation: float) -> float:
        return math.exp(random.gauss(0.0, deviation))

    speed = times(0.2)
    return replace(
        truth,
        floor=truth.floor * speed * times(0.15),
        per_token=truth.per_token * times(0.3),
        knee=truth.knee * times(0.4),
        per_token_beyond=truth.per_token_beyond * speed * times(0.15),
        per_row=truth.per_row * times(0.5),
        per_pair=truth.per_pair * times(0.5),
        per_kv_token=truth.per_kv_token * times(0.5),
        per_request=0.0,
        noise=NOISE,
    )


def simulated(name: str, kind: str, arguments: argparse.Namespace) -> None:
    """Print the errors of all seeds together, and the mean goodput."""
    truth, clients, slo = MACHINES_AND_LOADS[name]
    parts: list[list[float]] = [[], [], []]
    pairs = []
    for seed in range(arguments.seeds):
        calibration = Calibration(name=name, cost=truth, num_blocks=8192, block_size=32, max_model_len=8192)
        target = SimulatedTarget(SimulationConfig(calibration=calibration, scheduler=SchedulerConfig(**slo)))  # type: ignore[arg-type]
        (replica,) = target._replicas
        predictor = replica.scheduler.policy.predictor
        assert isinstance(predictor, LatencyPredictor)
        if kind == "estimated":
            predictor.cost = estimate(truth, seed)
        recorder = Recorder(predictor)
        loop = closed_loop(target, workload(target, seed), clients=clients, requests=arguments.requests)
        records = virtual_time.run(loop).records
        pairs.append(minutes(records, SloTargets.parse(**slo)))
        for part, some in zip(parts, errors(recorder.steps), strict=True):
            part += some
    show(f"{name}, {kind}", parts, pairs)


def real(arguments: argparse.Namespace) -> None:
    """Drive an engine in this process for some minutes, and print the same."""
    slo = {"ttft": arguments.ttft, "itl": arguments.itl}
    settings: dict[str, Any] = {"model": arguments.model, "quantization": arguments.quantization, **slo}

    async def run() -> tuple[list[Step], list[MeasuredRequest]]:
        target = RecordedTarget(EngineConfig.from_settings(settings))
        records: list[MeasuredRequest] = []
        try:
            await target.start()
            requests, clock = workload(target, 0), asyncio.get_running_loop().time
            end = clock() + 60 * arguments.minutes

            async def ask(number: int, count: int) -> float:
                sent = clock()
                answer = await target.ask(requests.first(f"client {number}", count))
                records.append(
                    MeasuredRequest(number, sent, answer.num_prompt_tokens, answer.token_times, answer.error)
                )
                return clock() - sent

            async def client(number: int, pause: float) -> None:
                await asyncio.sleep(pause)
                count = 1
                while clock() < end:
                    await ask(number, count)
                    count += 1

            space = SPACING * await ask(0, 0)
            await asyncio.gather(*(client(number, number * space) for number in range(arguments.clients)))
        finally:
            await target.close()
        return target.recorder.steps, records

    with tempfile.TemporaryDirectory() as empty:
        if not arguments.stored:
            os.environ["XDG_CACHE_HOME"] = empty
        steps, records = asyncio.run(run())
    kind = "calibrated" if arguments.stored else "estimated"
    show(f"{arguments.clients} clients, {kind}", errors(steps), [minutes(records, SloTargets.parse(**slo))])


def workload(target: Target, seed: int) -> Independent:
    """Return requests of about 512 + 64 tokens."""
    return Independent(Lengths(512, 64, room=target.room), target.vocabulary, seed)


def errors(steps: Sequence[Step]) -> list[list[float]]:
    """Return the errors of the first hundred steps, of the second, and of those that follow."""
    found = [abs(step.corrected / step.actual - 1.0) for step in steps]
    return [found[:100], found[100:200], found[200:]]


@dataclass(frozen=True)
class Period:
    """Counts the requests that were sent in some seconds, and those of them that were in time."""

    sent: int
    in_time: int
    seconds: float

    @property
    def goodput(self) -> float:
        return self.in_time / self.seconds if self.seconds else 0.0

    def __add__(self, other: Period) -> Period:
        return Period(self.sent + other.sent, self.in_time + other.in_time, self.seconds + other.seconds)


def minutes(records: Sequence[MeasuredRequest], targets: SloTargets) -> tuple[Period, Period]:
    """Return the first minute with all clients, and what follows."""
    starts: dict[int, float] = {}
    for record in records:
        if record is not records[0]:  # which is alone
            starts[record.client] = min(record.sent, starts.get(record.client, record.sent))
    start = max(starts.values())
    end = max(record.sent for record in records)

    def period(begin: float, end: float) -> Period:
        sent = [record for record in records if begin <= record.sent < end]
        return Period(len(sent), sum(metrics.meets_slo(record, targets) for record in sent), max(end - begin, 0.0))

    return period(start, min(start + 60.0, end)), period(start + 60.0, end)


def show(name: str, parts: Sequence[Sequence[float]], pairs: Sequence[tuple[Period, Period]]) -> None:
    """Print a line of the table."""
    cells = [f"{median(part):.1%}" if part else "" for part in parts]
    last = sorted(parts[-1])
    cells.append(f"{last[int(0.95 * len(last))]:.1%}" if last else "")
    periods = [sum(each, Period(0, 0, 0.0)) for each in zip(*pairs, strict=True)]
    cells += [f"{period.in_time} of {period.sent}" for period in periods]
    first, later = (period.goodput for period in periods)
    cells += [f"{first:.2f}", f"{later:.2f}", f"{first / later:.2f}" if later else ""]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
