"""Ablation: Dynamic SplitFuse against three older scheduling policies, on the same engine and kernels.

    python -m benchmarks.policies [--model DIR] [--quantization int8] --out FOLDER            # the engine itself
    python -m benchmarks.policies --simulate [--machine a100-70b] --out FOLDER               # on a virtual clock

Each policy (bench/baselines.py) runs with its own best token budget: the candidate with the highest mean goodput over
all clients and SLOs, and among equals the lowest inter-token latency, in a simulation with this machine's cost model,
which is made if none is stored. Then all policies are measured in turns at each number of clients, on one model that is
loaded once, without SLO scheduling. Writes results as `splitfuse bench run` does, a file for each policy, and a
report.html of all; prints the ratios, and where those of the paper are reached.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.baselines import POLICIES, make_baseline
from splitfuse.bench.measure import MakeWorkload, measure
from splitfuse.bench.report.page import write_report
from splitfuse.bench.results import Results, save
from splitfuse.bench.summary import Row, rows
from splitfuse.bench.target import EngineTarget
from splitfuse.bench.workload import Independent, Lengths, Loads
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.engine.calibrate import load_or_time
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.runtime.calibration import Calibration, load
from splitfuse.runtime.environment import environment_info
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.simulator.deployment import SimulationConfig
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import simulate

OURS = "splitfuse"
AS_GOOD = 0.02
"""Relative difference of goodput below which budgets are equally good."""
PAPER = {"goodput": 2.3, "latency": 2.0, "ITL P95": 3.7}
"""Ratios of DeepSpeed-FastGen to vLLM, "up to" (its abstract): effective throughput, latency, tail token latency."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: the bundled model)")
    parser.add_argument("--quantization")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--clients", default="1,4,8,16,32")
    parser.add_argument("--max-num-batched-tokens", default="64,128,256,512,1024,2048", help="candidates")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--requests", type=int, default=48, help="requests that count at each point")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--prompt", type=float, default=512)
    parser.add_argument("--generate", type=float, default=64)
    parser.add_argument("--prompt-speed", type=float, default=metrics.PROMPT_TOKENS_PER_SECOND)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", action="store_true", help="simulate, without an engine")
    parser.add_argument("--machine", choices=sorted(MACHINES), help="with --simulate: published machine")
    parser.add_argument("--cost-model", type=Path, help="with --simulate: cost model file (default: this machine's)")
    arguments = parser.parse_args()
    if not arguments.simulate and (arguments.machine or arguments.cost_model):
        parser.error("--machine and --cost-model require --simulate")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        clients=numbers(arguments.clients),
        budgets=numbers(arguments.max_num_batched_tokens),
        max_num_seqs=arguments.max_num_seqs,
        requests=arguments.requests,
        repeat=arguments.repeat,
        prompt_speed=arguments.prompt_speed,
        lengths=Lengths(arguments.prompt, arguments.generate),
        seed=arguments.seed,
    )
    settings = {
        "model": arguments.model,
        "quantization": arguments.quantization,
        "num_threads": arguments.num_threads,
        "max_num_batched_tokens": max(plan.budgets),
        "max_num_seqs": plan.max_num_seqs,
        "enable_prefix_caching": False,
    }
    model = None if arguments.machine or arguments.cost_model else load_model(EngineConfig.from_settings(settings))
    calibration = cost_model(settings, model, arguments.machine, arguments.cost_model)
    budgets = {policy: best_budget(plan, calibration, policy) for policy in POLICIES}
    if arguments.simulate:
        results = {policy: simulated(plan, calibration, policy, budgets[policy]) for policy in POLICIES}
    else:
        assert model is not None
        results = measured(plan, model, settings, budgets, arguments.out)
    for policy, result in results.items():
        save(result, arguments.out / f"{policy}.json")
    print_results(results)
    title = f"Four policies on {calibration.name}{', simulated' if arguments.simulate else ''}"
    write_report(list(results.values()), arguments.out / "report.html", title=title)
    print(f"\n{arguments.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The loads of the ablation."""

    clients: tuple[int, ...]
    budgets: tuple[int, ...]
    max_num_seqs: int
    requests: int
    repeat: int
    prompt_speed: float
    lengths: Lengths
    seed: int

    def loads(self, clients: Sequence[int], *, repeat: int = 1) -> Loads:
        return Loads(clients=tuple(clients), requests=self.requests, repeat=repeat, prompt_speed=self.prompt_speed)

    def workload(self, seed: int) -> MakeWorkload:
        return lambda target: Independent(replace(self.lengths, room=target.room), target.vocabulary, seed)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def cost_model(
    settings: Mapping[str, Any], model: LoadedModel | None, machine: str | None, file: Path | None
) -> Calibration:
    """Return the cost model of a published machine, a file, or this machine, which is made if none is stored."""
    if machine is not None:
        return MACHINES[machine]
    if file is not None:
        return load(file)
    assert model is not None
    print("timing steps, unless a cost model is stored", file=sys.stderr, flush=True)
    return load_or_time(EngineConfig.from_settings(settings), seconds=8.0, progress=False)


def simulated(plan: Plan, calibration: Calibration, policy: str, budget: int) -> Results:
    """Simulate all clients, with the repetitions of the measurement."""
    simulation = SimulationConfig(
        calibration=calibration,
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=plan.max_num_seqs),
        policy=policy,
        enable_prefix_caching=False,
    )
    loads = plan.loads(plan.clients, repeat=plan.repeat)
    return simulate(simulation, plan.workload(plan.seed), loads, system=label(policy, budget), about=environment_info())


def best_budget(plan: Plan, calibration: Calibration, policy: str) -> int:
    """Return the budget with the highest mean goodput over clients and SLOs; among equals, the lowest ITL P95."""
    goodput, itl = {}, {}
    for budget in plan.budgets:
        table = rows(simulated(replace(plan, repeat=1), calibration, policy, budget))
        goodput[budget] = metrics.mean([spread.mean for row in table for spread in row.goodput.values()])
        itl[budget] = metrics.mean([row.itl[95] for row in table])
    as_good = [budget for budget in plan.budgets if goodput[budget] >= (1.0 - AS_GOOD) * max(goodput.values())]
    best = min(as_good, key=itl.__getitem__)
    figures = ", ".join(f"{budget}: {goodput[budget]:.2f} and {1e3 * itl[budget]:.0f} ms" for budget in plan.budgets)
    print(f"{policy:14} budget {best:5} (simulated, goodput and ITL P95: {figures})", flush=True)
    return best


def label(policy: str, budget: int) -> str:
    return f"{policy}, budget {budget}"


# The engine itself ---------------------------------------------------------------------------------------------------


class LoadedTarget(EngineTarget):
    """Our engine, with a model that is already loaded."""

    def __init__(self, config: EngineConfig, model: LoadedModel, policy: str) -> None:
        super().__init__(config, policy=policy)
        self._model = model

    def _make_client(self) -> EngineClient:
        return AsyncEngine(
            Engine(self._config, self._model, policy=make_baseline(self._policy, self._config.scheduler))
        )


def measured(
    plan: Plan, model: LoadedModel, settings: Mapping[str, Any], budgets: Mapping[str, int], out: Path
) -> dict[str, Results]:
    """Measure in turns: at each number of clients all policies, every second time in reverse order."""
    about = environment_info()
    results: dict[str, Results] = {}
    for repetition, clients, policies in _turns(plan):
        for policy in policies:
            config = EngineConfig.from_settings({**settings, "max_num_batched_tokens": budgets[policy]})
            target = LoadedTarget(config, model, policy)
            result = asyncio.run(
                measure(
                    target,
                    plan.workload(plan.seed + repetition),
                    plan.loads([clients]),
                    system=label(policy, budgets[policy]),
                    about=about,
                )
            )
            points = tuple(replace(point, repetition=repetition) for point in result.points)
            before = results[policy].points if policy in results else ()
            results[policy] = replace(result, points=(*before, *points))
            save(results[policy], out / f"{policy}.json")
            rate = metrics.throughput(points[0])
            print(
                f"{clients} clients, {label(policy, budgets[policy])}: {rate:.2f} requests/s",
                file=sys.stderr,
                flush=True,
            )
    return {policy: results[policy] for policy in POLICIES}


def _turns(plan: Plan) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (repetition, clients, policies in their order)."""
    for repetition in range(plan.repeat):
        for number, clients in enumerate(plan.clients):
            order = list(POLICIES)
            yield repetition, clients, order if (repetition + number) % 2 == 0 else order[::-1]


# Output -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """SplitFuse against another policy at one load; above 1 is better."""

    figure: str
    """Name of the figure in PAPER."""
    other: str
    where: str
    value: float


def print_results(results: Mapping[str, Results]) -> None:
    """Print every point, the ratios, and where those of the paper are reached."""
    tables = {policy: rows(result) for policy, result in results.items()}
    print(
        f"\n{'clients':>7} {'policy':14} {'requests/s':>13}"
        + "".join(f"{f'goodput at {s:g}':>14}" for s in metrics.SPEEDS),
        end="",
    )
    print(f"{'latency s':>11}{'ITL P50 ms':>14}{'P95 ms':>9}")
    for number in range(len(tables[OURS])):
        for policy, table in tables.items():
            row = table[number]
            goodput = "".join(f"{row.goodput[s]!s:>14}" for s in metrics.SPEEDS)
            times = f"{row.latency:11.2f}{1e3 * row.itl[50]:14.1f}{1e3 * row.itl[95]:9.1f}"
            print(f"{row.load:>7} {policy:14} {row.throughput!s:>13}{goodput}{times}")
    found = list(ratios(tables))
    print("\nSplitFuse against each (above 1 it is better)")
    print(
        f"{'clients':>7} {'against':14}"
        + "".join(f"{f'goodput {s:g}':>12}" for s in metrics.SPEEDS)
        + f"{'latency':>12}{'ITL P95':>12}"
    )
    for row, other in product(tables[OURS], [policy for policy in tables if policy != OURS]):
        own = [each for each in found if each.other == other and each.where.startswith(f"{row.load} clients")]
        print(f"{row.load:>7} {other:14}" + "".join(f"{each.value:12.2f}" for each in own))
    print("\nBest points: the highest goodput at any number of clients")
    for s in metrics.SPEEDS:
        best = {policy: max(row.goodput[s].mean for row in table) for policy, table in tables.items()}
        others = ", ".join(f"{quotient(best[OURS], best[p]):.2f} against {p}" for p in best if p != OURS)
        print(f"  at {s:g} tokens/s: {best[OURS]:.2f}; {others}")
    print()
    for figure, paper in PAPER.items():
        reached = [each for each in found if each.figure == figure and each.value >= paper]
        largest = max((each for each in found if each.figure == figure), key=lambda each: each.value)
        where = "; ".join(f"{each.value:.2f} against {each.other} at {each.where}" for each in reached) or (
            f"nowhere; the largest is {largest.value:.2f} against {largest.other} at {largest.where}"
        )
        print(f"The paper's {paper:g} times in {figure}: {where}")


def ratios(tables: Mapping[str, Sequence[Row]]) -> Iterator[Ratio]:
    """Yield the ratios at every load, against every other policy."""
    for number, ours in enumerate(tables[OURS]):
        for policy, table in tables.items():
            if policy == OURS:
                continue
            theirs, where = table[number], f"{ours.load} clients"
            for s in metrics.SPEEDS:
                value = quotient(ours.goodput[s].mean, theirs.goodput[s].mean)
                yield Ratio("goodput", policy, f"{where}, {s:g} tokens/s", value)
            yield Ratio("latency", policy, where, quotient(theirs.latency, ours.latency))
            yield Ratio("ITL P95", policy, where, quotient(theirs.itl[95], ours.itl[95]))


def quotient(over: float, under: float) -> float:
    """Return over / under; infinite or NaN for under = 0."""
    return over / under if under else (float("inf") if over else float("nan"))


if __name__ == "__main__":
    main()
