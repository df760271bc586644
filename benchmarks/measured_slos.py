"""Compare policies on the engine itself under SLOs of several kinds, in turns, and each with its simulation.

    python -m benchmarks.measured_slos --model DIR [--quantization int8] [--clients 16] [--requests 64] [--turns 3]
    python -m benchmarks.measured_slos --model DIR ... --out FILE    # measure alone, and keep the runs
    python -m benchmarks.measured_slos --runs FILE                   # simulate them, without the engine

In each turn our policy runs under each SLO, and each other policy once, judged by all of them; every second turn in
reverse order. One model is loaded once, loads are closed loops. The machine is calibrated before each run
(`--seconds`), and that cost model is what engine and simulation begin with. Simulated steps take what the steps of the
run did (splitfuse/simulator/pace.py): a machine that others use too has another speed within a minute, and holds a step
up now and then. What becomes of requests hangs on moments, so each run is simulated SIMULATIONS times, each of which
begins about a step later in it. Nothing that was measured of its requests is used.

A target is a time (`250ms`), or a multiple of what the first calibration says of a lone prompt of 512 tokens
(`ttft=1.15x`, for each token of a prompt) or of a step of one decode (`itl=12x`, `itl=10x/p95`, `tpot=8x`). Prints
goodput, measured and simulated, the ratio to the best other policy, and the median and P95 of first tokens and gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from splitfuse.bench import metrics
from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.load import closed_loop
from splitfuse.bench.results import Point
from splitfuse.bench.target import EngineTarget
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import PER_TOKEN
from splitfuse.core.events import RequestFinished, StepRecord
from splitfuse.core.slo.attainable import USUAL_PROMPT, prompt_seconds
from splitfuse.core.slo.cost_model import CostModel, Sample, StepFeatures, features_of
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.calibrate import calibrate
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.runtime.calibration import Calibration
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig
from splitfuse.simulator.pace import MeasuredMachine
from splitfuse.simulator.simulate import SimulatedTarget

SLOS = ("ttft=4x,itl=12x", "ttft=3x,itl=10x/p95", "ttft=4x,tpot=8x", "ttft=2x,tpot=12x")
OTHERS = {"by age": ("splitfuse", None), "prefill-first": ("prefill-first", 2048), "orca": ("orca", 2048)}
"""Policies to compare with, by name: the policy, and its token budget; None for the chosen one."""
SIMULATIONS = 8
"""Number of simulations of each run."""
PROGRESS_SECONDS = 10.0
"""Seconds between two lines about a run that is under way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: the bundled model)")
    parser.add_argument("--quantization")
    parser.add_argument("--dtype")
    parser.add_argument("--slo", action="append", help=f"may be repeated (default: {', '.join(SLOS)})")
    parser.add_argument("--others", default=",".join(OTHERS), help="policies to compare with (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="requests that count in each run under an SLO")
    parser.add_argument("--other-requests", type=int, help="the same in each run of another policy (default: the same)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt", type=float, default=USUAL_PROMPT)
    parser.add_argument("--generate", type=float, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each calibration")
    parser.add_argument("--out", type=Path, help="file to keep the runs in, with all their steps, for `--runs`")
    parser.add_argument("--runs", type=Path, help="file of runs that are simulated; other options do not count")
    arguments = parser.parse_args()
    if unknown := set(arguments.others.split(",")) - OTHERS.keys():
        parser.error(f"--others {unknown.pop()}: choose from {', '.join(OTHERS)}")
    if arguments.runs is None:
        runs = measure(arguments)
        if arguments.out is not None:
            print(f"kept in {arguments.out}: --runs {arguments.out} simulates them, on a machine that may be busy")
            return
    else:
        runs = msgspec.json.decode(arguments.runs.read_bytes(), type=list[Run])
    for run in runs:
        run.simulate()
    show(runs)


def measure(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs of all turns. Each is kept in the file, if there is one, as soon as it has ended."""
    began = time.monotonic()
    settings = {"enable_prefix_caching": False} | {
        name: value for name in ("model", "quantization", "dtype") if (value := getattr(arguments, name)) is not None
    }
    config = EngineConfig.from_settings(settings)
    model = load_model(config)
    print(f"  the model is loaded after {time.monotonic() - began:.0f} s", flush=True)
    calibration, _ = calibrate(config, model, seconds=arguments.seconds)
    load = Load(arguments.prompt, arguments.generate, arguments.clients, arguments.requests)
    other_load = replace(load, requests=arguments.other_requests or arguments.requests)
    systems = [System(load, slo=absolute(slo, calibration.cost)) for slo in arguments.slo or SLOS]
    systems += [System(other_load, *OTHERS[name], other=name) for name in arguments.others.split(",")]
    runs: list[Run] = []
    for turn in range(arguments.turns):
        for system in systems if turn % 2 == 0 else systems[::-1]:
            say = Progress(f"{time.monotonic() - began:4.0f} s, turn {turn}, {system.name}")
            say("calibrating", 0)
            calibration, _ = calibrate(config, model, seconds=arguments.seconds)
            target = LoadedTarget(system.config(settings), model, calibration.cost, system.policy)
            point = asyncio.run(drive(target, system.load, turn, say))
            runs.append(Run(system, settings, calibration, turn, point, target.steps, target.num_missed))
            del target
            gc.collect()
            print(f"turn {turn}, {runs[-1].measurement}", flush=True)
            if arguments.out is not None:
                arguments.out.write_bytes(msgspec.json.encode(runs))
    return runs


def absolute(slo: str, cost: CostModel) -> dict[str, str]:
    """Return the settings of an SLO, whose multiples become times of this machine.

    >>> absolute("ttft=2x,itl=10x/p95,tpot=50ms", CostModel(floor=0.0, per_token=0.001))
    {'ttft': '2ms/token', 'itl': '10ms/p95', 'tpot': '50ms'}
    """
    prompt = prompt_seconds(cost, USUAL_PROMPT, max_num_batched_tokens=2048) / USUAL_PROMPT
    decode = cost.seconds(StepFeatures().plus(start=USUAL_PROMPT, count=1, rows=1))
    found = {}
    for part in slo.split(","):
        name, _, value = part.partition("=")
        time, slash, measure = value.partition("/")
        if time.endswith("x"):
            seconds = float(time.removesuffix("x")) * (prompt if name == "ttft" else decode)
            value = f"{1e3 * seconds:.4g}ms{PER_TOKEN if name == 'ttft' else slash + measure}"
        found[name] = value
    return found


@dataclass(frozen=True)
class Load:
    """Describes a closed loop."""

    prompt: float
    generate: float
    clients: int
    requests: int


@dataclass(frozen=True)
class System:
    """Is a policy under a load: ours with an SLO, or another one."""

    load: Load
    policy: str = "splitfuse"
    budget: int | None = None
    slo: dict[str, str] = field(default_factory=dict)
    other: str = ""
    """Name of another policy."""

    @property
    def name(self) -> str:
        return self.other or f"ours, {' '.join(self.slo.values())}"

    def config(self, settings: dict[str, Any]) -> EngineConfig:
        return EngineConfig.from_settings({**settings, **self.slo, "max_num_batched_tokens": self.budget})


@dataclass
class Run:
    """Holds what was measured of a system in a turn, and what was simulated of it."""

    system: System
    settings: dict[str, Any]
    calibration: Calibration
    """Calibration that was made just before."""
    turn: int
    measured: Point
    steps: list[Sample]
    """Each step, with the time from its end to the next plan, unless the engine was idle between."""
    num_missed: int = 0
    """Number of all requests that missed the SLO by the clock of the engine."""
    simulated: list[Point] = field(default_factory=list)

    @property
    def measurement(self) -> str:
        """Return what was measured, in a sentence."""
        text = f"{self.system.name}: {metrics.throughput(self.measured):.2f} requests/s"
        if self.system.slo:
            slo = SloTargets.parse(**self.system.slo)
            missed = sum(not metrics.meets_slo(each, slo) for each in self.measured.records)
            text += f"; in time {goodput([self.measured], slo)}"
            text += f"; missed by {missed} of all {len(self.measured.records)}, at the engine by {self.num_missed}"
        slowdown = sum(each.seconds for each in self.steps) / sum(
            self.calibration.cost.seconds(each.features) for each in self.steps
        )
        return f"{text}; steps took {slowdown:.2f} times as long as calibrated"

    def simulate(self) -> None:
        """Simulate the run on a machine with its steps, and print both."""
        config = SimulationConfig.of(
            self.calibration,
            self.system.config(self.settings),
            policy=self.system.policy,
        )
        of_run = MeasuredMachine.of(self.steps, self.calibration.cost)
        self.simulated = []
        for number in range(SIMULATIONS):
            pace = replace(of_run.pace, start=number / len(self.steps))
            machine = Machine(engine=config, step_times=of_run.step_times, pace=pace)
            target = SimulatedTarget(Deployment(machines=(machine,)))
            self.simulated.append(virtual_time.run(drive(target, self.system.load, self.turn)))
        text = f"{metrics.mean([metrics.throughput(each) for each in self.simulated]):.2f} requests/s"
        if self.system.slo:
            text += f"; in time {goodput(self.simulated, SloTargets.parse(**self.system.slo))}"
        print(f"turn {self.turn}, {self.measurement}\n  simulated: {text}", flush=True)


class LoadedTarget(EngineTarget):
    """Runs our engine, with a model that is already loaded and a cost model, which it uses under an SLO."""

    def __init__(self, config: EngineConfig, model: LoadedModel, cost: CostModel, policy: str) -> None:
        super().__init__(config, policy=policy)
        self._model, self._cost = model, cost
        self.steps: list[Sample] = []
        self.num_missed = 0
        """Number of requests that missed their SLO by the clock of the engine."""
        self._ended_at = 0.0  # when the newest step did

    def _make_client(self) -> EngineClient:
        policy = make_baseline(self._policy, self._config.scheduler)
        cost = self._cost if self._config.scheduler.slo_enabled else None
        engine = Engine(self._config, self._model, policy=policy, cost=cost)
        engine.scheduler.budget.choose(self._cost)
        engine.events.subscribe(StepRecord, self._add)
        engine.events.subscribe(RequestFinished, self._note_end)
        return AsyncEngine(engine)

    def _add(self, step: StepRecord) -> None:
        if self.steps and len(step.plan.new_requests) < len(step.plan.chunks):  # it was not idle
            before = self.steps[-1]
            self.steps[-1] = replace(before, seconds=before.seconds + max(step.start_time - self._ended_at, 0.0))
        self.steps.append(Sample(features_of(step.plan), step.measured_seconds))
        self._ended_at = step.end_time

    def _note_end(self, event: RequestFinished) -> None:
        self.num_missed += event.request.slo.met is False


class Progress:
    """Prints how far a run is, every PROGRESS_SECONDS at most."""

    def __init__(self, name: str) -> None:
        self._name, self._began, self._next = name, time.monotonic(), 0.0

    def __call__(self, activity: str, num_done: int) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + PROGRESS_SECONDS
            print(f"  {self._name}: {now - self._began:.0f} s, {activity}, {num_done} done that count", flush=True)


async def drive(
    target: EngineTarget | SimulatedTarget,
    load: Load,
    seed: int,
    on_progress: Callable[[str, int], None] = lambda *_: None,
) -> Point:
    """Return the requests of a closed loop."""
    await target.start()
    try:
        lengths = Lengths(load.prompt, load.generate, room=target.room)
        workload = Independent(lengths, target.vocabulary, seed)
        how = {"clients": load.clients, "requests": load.requests}
        return await closed_loop(target, workload, **how, on_progress=on_progress)
    finally:
        await target.close()


@dataclass(frozen=True)
class Goodput:
    """Holds the requests/s that meet an SLO: the mean of some loads, and the standard deviation of one of them."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" +- {self.deviation:.2f}" if self.deviation else "")


def goodput(points: Sequence[Point], slo: SloTargets) -> Goodput:
    """Return the requests/s of loads that meet an SLO."""
    values = [metrics.slo_goodput(point, slo) for point in points]
    mean = metrics.mean(values)
    squares = sum((each - mean) ** 2 for each in values)
    return Goodput(mean, (squares / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0)


def show(runs: Sequence[Run]) -> None:
    """Print goodput under each SLO, measured (simulated), and the times of each system."""
    print("\ngoodput, requests/s: measured (simulated, +- the standard deviation of a simulation)\n")
    names = list(dict.fromkeys(run.system.name for run in runs))
    of_system = {name: [run for run in runs if run.system.name == name] for name in names}
    others = [name for name in names if not of_system[name][0].system.slo]
    heads = ["SLO", "ours", *others, "ours / best other", "measured / simulated"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in names:
        if slo := of_system[name][0].system.slo:
            targets = SloTargets.parse(**slo)
            row = [of_system[name], *(of_system[other] for other in others)]
            real = [goodput([run.measured for run in some], targets) for some in row]
            virtual = [goodput([point for run in some for point in run.simulated], targets) for some in row]
            cells = [f"{each} ({other})" for each, other in zip(real, virtual, strict=True)]
            best = max((each.mean for each in real[1:]), default=0.0)
            ratios = [quotient(real[0].mean, best), quotient(real[0].mean, virtual[0].mean)]
            print(f"| {' | '.join([' '.join(slo.values()), *cells, *ratios])} |")
    heads = ["", "requests/s", "first token P50, P95, longest, s", "gap P50, P95, longest, ms"]
    print(f"\nmeasured (simulated)\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in names:
        measured = [run.measured for run in of_system[name]]
        simulated = [point for run in of_system[name] for point in run.simulated]
        cells = [f"{each} ({other})" for each, other in zip(times(measured), times(simulated), strict=True)]
        print(f"| {' | '.join([name, *cells])} |")


def times(points: Sequence[Point]) -> tuple[str, str, str]:
    """Return the throughput of loads, and percentiles of their first tokens and gaps."""
    records = [record for point in points for record in metrics.counted(point)]
    return (
        f"{metrics.mean([metrics.throughput(point) for point in points]):.2f}",
        spread([metrics.ttft(record) for record in records], 1.0),
        spread([gap for record in records for gap in metrics.gaps(record)], 1e3),
    )


def spread(values: Sequence[float], unit: float) -> str:
    return ", ".join(f"{unit * metrics.percentile(values, each):.3g}" for each in (50, 95, 100))


def quotient(over: float, under: float) -> str:
    return f"{over / under:.2f}" if under else "-"


if __name__ == "__main__":
    main()
