"""Compare policies on the engine itself under SLOs of several kinds, in turns, and each with its simulation.

    python -m benchmarks.measured_slos --model DIR [--quantization int8] [--clients 16] [--requests 32] [--turns 3]

In each turn our policy runs under each SLO, and each other policy once, judged by all of them; every second turn in
reverse order. One model is loaded once, loads are closed loops. The machine is calibrated before each run
(`--seconds`), and the run simulated with that, all steps as much longer or shorter as those of the run were in sum: a
machine that others use too has another speed within a minute. A target is a time (`250ms`), or a multiple of what the
first calibration says of a lone prompt of 512 tokens (`ttft=1.15x`, for each token of a prompt) or of a step of one
decode (`itl=12x`, `itl=10x/p95`, `tpot=8x`). Prints goodput, measured and simulated, the ratio to the best other
policy, and the median and P95 of first tokens and gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.load import closed_loop
from splitfuse.bench.results import Point
from splitfuse.bench.target import EngineTarget
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import PER_TOKEN
from splitfuse.core.events import StepRecord
from splitfuse.core.slo.attainable import USUAL_PROMPT, prompt_seconds
from splitfuse.core.slo.cost_model import CostModel, StepFeatures, features_of
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.calibrate import calibrate
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.runtime.calibration import Calibration
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget

SLOS = ("ttft=4x,itl=12x", "ttft=3x,itl=10x/p95", "ttft=4x,tpot=8x", "ttft=1.15x,itl=12x")
OTHERS = {"by age": ("splitfuse", None), "prefill-first": ("prefill-first", 2048), "orca": ("orca", 2048)}
"""Policies to compare with, by name: the policy, and its token budget; None for the chosen one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: the bundled model)")
    parser.add_argument("--quantization")
    parser.add_argument("--dtype")
    parser.add_argument("--slo", action="append", help=f"may be repeated (default: {', '.join(SLOS)})")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="requests that count in each run")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt", type=float, default=USUAL_PROMPT)
    parser.add_argument("--generate", type=float, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each calibration")
    arguments = parser.parse_args()
    settings = {"enable_prefix_caching": False} | {
        name: value for name in ("model", "quantization", "dtype") if (value := getattr(arguments, name)) is not None
    }
    config = EngineConfig.from_settings(settings)
    model = load_model(config)
    calibration, _ = calibrate(config, model, seconds=arguments.seconds)
    slos = [absolute(slo, calibration.cost) for slo in arguments.slo or SLOS]
    systems = [System(f"ours, {name_of(slo)}", slo=slo) for slo in slos]
    systems += [System(name, policy=policy, budget=budget) for name, (policy, budget) in OTHERS.items()]
    for turn in range(arguments.turns):
        for system in systems if turn % 2 == 0 else systems[::-1]:
            calibration, _ = calibrate(config, model, seconds=arguments.seconds)
            target = LoadedTarget(system.config(settings), model, calibration.cost, system.policy)
            point = asyncio.run(drive(target, arguments, turn))
            system.measured.append(point)
            slowdown = target.measured_seconds / target.calibrated_seconds
            today = replace(calibration, cost=calibration.cost.slower(slowdown))
            simulated = SimulatedTarget(system.simulation(today, settings))
            del target
            gc.collect()
            system.simulated.append(virtual_time.run(drive(simulated, arguments, turn)))
            both = " and ".join(f"{metrics.throughput(some[-1]):.2f}" for some in (system.measured, system.simulated))
            print(
                f"turn {turn}, {system.name}: {both} requests/s (simulated); steps {slowdown:.2f} times as calibrated",
                flush=True,
            )
    show(systems, slos)


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


def name_of(slo: dict[str, str]) -> str:
    return " ".join(slo.values())


@dataclass
class System:
    """Holds a policy, and its loads so far, one for each turn."""

    name: str
    slo: dict[str, str] = field(default_factory=dict)
    policy: str = "splitfuse"
    budget: int | None = None
    measured: list[Point] = field(default_factory=list)
    simulated: list[Point] = field(default_factory=list)

    def config(self, settings: dict[str, Any]) -> EngineConfig:
        return EngineConfig.from_settings({**settings, **self.slo, "max_num_batched_tokens": self.budget})

    def simulation(self, calibration: Calibration, settings: dict[str, Any]) -> SimulationConfig:
        return SimulationConfig.of(calibration, self.config(settings), policy=self.policy)


class LoadedTarget(EngineTarget):
    """Our engine, with a model that is already loaded and a cost model, which it uses under an SLO."""

    def __init__(self, config: EngineConfig, model: LoadedModel, cost: CostModel, policy: str) -> None:
        super().__init__(config, policy=policy)
        self._model, self._cost = model, cost
        self.measured_seconds = self.calibrated_seconds = 0.0
        """Seconds that all steps took, and that the calibration says of them."""

    def _make_client(self) -> EngineClient:
        policy = make_baseline(self._policy, self._config.scheduler)
        cost = self._cost if self._config.scheduler.slo_enabled else None
        engine = Engine(self._config, self._model, policy=policy, cost=cost)
        engine.scheduler.budget.choose(self._cost)
        engine.events.subscribe(StepRecord, self._add)
        return AsyncEngine(engine)

    def _add(self, step: StepRecord) -> None:
        self.measured_seconds += step.measured_seconds
        self.calibrated_seconds += self._cost.seconds(features_of(step.plan))


async def drive(target: EngineTarget | SimulatedTarget, arguments: argparse.Namespace, seed: int) -> Point:
    """Return the requests of a closed loop."""
    await target.start()
    try:
        lengths = Lengths(arguments.prompt, arguments.generate, room=target.room)
        workload = Independent(lengths, target.vocabulary, seed)
        return await closed_loop(target, workload, clients=arguments.clients, requests=arguments.requests)
    finally:
        await target.close()


def goodput(points: Sequence[Point], slo: SloTargets) -> float:
    """Return the requests/s that meet an SLO, the mean of all turns."""
    return metrics.mean([metrics.slo_goodput(point, slo) for point in points])


def show(systems: Sequence[System], slos: Sequence[dict[str, str]]) -> None:
    """Print goodput under each SLO, measured (simulated), and the times of each system."""
    print("\ngoodput, requests/s: measured (simulated)\n")
    others = [system for system in systems if not system.slo]
    heads = ["SLO", "ours", *(system.name for system in others), "ours / best other", "measured / simulated"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for slo in slos:
        targets = SloTargets.parse(**slo)
        row = [next(system for system in systems if system.slo == slo), *others]
        real = [goodput(system.measured, targets) for system in row]
        virtual = [goodput(system.simulated, targets) for system in row]
        cells = [f"{each:.2f} ({other:.2f})" for each, other in zip(real, virtual, strict=True)]
        ratios = [quotient(real[0], max(real[1:])), quotient(real[0], virtual[0])]
        print(f"| {' | '.join([name_of(slo), *cells, *ratios])} |")
    print("\n| | requests/s | first token P50, P95, longest, s | gap P50, P95, longest, ms |\n|---|---|---|---|")
    for system in systems:
        records = [record for point in system.measured for record in metrics.counted(point)]
        first = [metrics.ttft(record) for record in records]
        cells = [
            f"{metrics.mean([metrics.throughput(point) for point in system.measured]):.2f}",
            spread(first, 1.0),
            spread([gap for record in records for gap in metrics.gaps(record)], 1e3),
        ]
        print(f"| {' | '.join([system.name, *cells])} |")


def spread(values: Sequence[float], unit: float) -> str:
    return ", ".join(f"{unit * metrics.percentile(values, each):.3g}" for each in (50, 95, 100))


def quotient(over: float, under: float) -> str:
    return f"{over / under:.2f}" if under else "-"


if __name__ == "__main__":
    main()
