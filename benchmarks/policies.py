"""The ablation: Dynamic SplitFuse against three older ways to compose a step, on the same engine and kernels.

    python -m benchmarks.policies [--model DIR] [--quantization int8] --out FOLDER            # the engine itself
    python -m benchmarks.policies --simulate [--machine a100-70b] --out FOLDER               # on a virtual clock

Each policy (core/baselines.py) has its own best budget: the one of `--budgets` with the highest effective throughput,
on average over all clients and SLAs, of equals the one with the lowest token latency, in a simulation with this
machine's cost model, which is made if none is kept.
Then all are driven in turns, at each number of clients one after the other, on one model that is loaded once. Nobody is
promised anything. Writes results as `splitfuse bench run` does, a file for each policy, and report.html of all; prints
the ratios, and where those that the paper reports are seen.
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
from splitfuse.bench.measure import Loads, MakeWorkload, measure
from splitfuse.bench.report.page import write_report
from splitfuse.bench.results import Results, save
from splitfuse.bench.summary import Row, rows
from splitfuse.bench.target import EngineTarget
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config import EngineConfig, SchedulerConfig
from splitfuse.core.baselines import POLICIES, scheduler_class
from splitfuse.engine.client import AsyncEngine, EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.profile import load_or_profile
from splitfuse.runtime.calibration import Calibration, load
from splitfuse.runtime.environment import environment_info
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import Deployment, simulate

OURS = "splitfuse"
AS_GOOD = 0.02
"""Budgets whose effective throughput differs by less are as good."""
PAPER = {"effective": 2.3, "latency": 2.0, "token P95": 3.7}
"""DeepSpeed-FastGen against vLLM, "up to" (its abstract): effective throughput, mean latency, tail of token latency."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or name; left out, the bundled model")
    parser.add_argument("--quantization")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--clients", default="1,4,8,16,32")
    parser.add_argument("--budgets", default="64,128,256,512,1024,2048")
    parser.add_argument("--seats", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--requests", type=int, default=48, help="that count at each point")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--prompt", type=float, default=512)
    parser.add_argument("--generate", type=float, default=64)
    parser.add_argument("--prompt-speed", type=float, default=metrics.PROMPT_TOKENS_PER_SECOND)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", action="store_true", help="drive no engine")
    parser.add_argument("--machine", choices=sorted(MACHINES), help="with --simulate: a published machine")
    parser.add_argument("--model-of-cost", type=Path, help="with --simulate: a cost model; left out, this machine's")
    arguments = parser.parse_args()
    if not arguments.simulate and (arguments.machine or arguments.model_of_cost):
        parser.error("--machine and --model-of-cost are for --simulate")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        clients=numbers(arguments.clients),
        budgets=numbers(arguments.budgets),
        seats=arguments.seats,
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
        "max_num_seqs": plan.seats,
        "enable_prefix_caching": False,
    }
    model = None if arguments.machine or arguments.model_of_cost else load_model(EngineConfig.from_settings(settings))
    calibration = cost_model(settings, model, arguments.machine, arguments.model_of_cost)
    budgets = {policy: best_budget(plan, calibration, policy) for policy in POLICIES}
    if arguments.simulate:
        results = {policy: simulated(plan, calibration, policy, budgets[policy]) for policy in POLICIES}
    else:
        assert model is not None
        results = measured(plan, model, settings, budgets, arguments.out)
    for policy, result in results.items():
        save(result, arguments.out / f"{policy}.json")
    tell(results)
    title = f"Four policies on {calibration.name}{', simulated' if arguments.simulate else ''}"
    write_report(list(results.values()), arguments.out / "report.html", title=title)
    print(f"\n{arguments.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is driven."""

    clients: tuple[int, ...]
    budgets: tuple[int, ...]
    seats: int
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
    """A published machine's, a file's, or that of this machine, which is made if none is kept."""
    if machine is not None:
        return MACHINES[machine]
    if file is not None:
        return load(file)
    assert model is not None
    print("unless a cost model is kept, steps are timed now", file=sys.stderr, flush=True)
    return load_or_profile(Engine, EngineConfig.from_settings(settings), model)


def simulated(plan: Plan, calibration: Calibration, policy: str, budget: int) -> Results:
    """All clients, as often as they are measured."""
    deployment = Deployment(
        calibration=calibration,
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=plan.seats),
        policy=policy,
        enable_prefix_caching=False,
    )
    loads = plan.loads(plan.clients, repeat=plan.repeat)
    return simulate(deployment, plan.workload(plan.seed), loads, system=label(policy, budget), about=environment_info())


def best_budget(plan: Plan, calibration: Calibration, policy: str) -> int:
    """Of those with which as many requests a second keep their promises as with any, over all clients and SLAs, the one
    with the lowest P95 of token latency.
    """
    kept, gaps = {}, {}
    for budget in plan.budgets:
        table = rows(simulated(replace(plan, repeat=1), calibration, policy, budget))
        kept[budget] = metrics.mean([spread.mean for row in table for spread in row.effective.values()])
        gaps[budget] = metrics.mean([row.gaps[95] for row in table])
    as_good = [budget for budget in plan.budgets if kept[budget] >= (1.0 - AS_GOOD) * max(kept.values())]
    best = min(as_good, key=gaps.__getitem__)
    told = ", ".join(f"{budget}: {kept[budget]:.2f} and {1e3 * gaps[budget]:.0f} ms" for budget in plan.budgets)
    print(f"{policy:14} budget {best:5} (simulated, requests/s kept and token P95: {told})", flush=True)
    return best


def label(policy: str, budget: int) -> str:
    return f"{policy}, budget {budget}"


# The engine itself ---------------------------------------------------------------------------------------------------


class LoadedTarget(EngineTarget):
    """Our engine, of a model that is loaded already."""

    def __init__(self, settings: Mapping[str, Any], model: LoadedModel, policy: str) -> None:
        super().__init__(settings, policy=policy)
        self._model = model

    def _make_client(self) -> EngineClient:
        config = EngineConfig.from_settings(self._settings)
        return AsyncEngine(Engine(config, self._model, scheduler=scheduler_class(self._policy, config.scheduler)))


def measured(
    plan: Plan, model: LoadedModel, settings: Mapping[str, Any], budgets: Mapping[str, int], out: Path
) -> dict[str, Results]:
    """In turns: at each number of clients one policy after the other, the other way round each second time."""
    about = environment_info()
    results: dict[str, Results] = {}
    for repetition, clients, policies in _turns(plan):
        for policy in policies:
            target = LoadedTarget({**settings, "max_num_batched_tokens": budgets[policy]}, model, policy)
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
    """(repetition, clients, the policies in their order)."""
    for repetition in range(plan.repeat):
        for number, clients in enumerate(plan.clients):
            order = list(POLICIES)
            yield repetition, clients, order if (repetition + number) % 2 == 0 else order[::-1]


# What is told --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """SplitFuse against another policy at one load; above 1 is better."""

    figure: str
    """One of PAPER."""
    other: str
    where: str
    value: float


def tell(results: Mapping[str, Results]) -> None:
    """Every point; the ratios; where the paper's are reached."""
    tables = {policy: rows(result) for policy, result in results.items()}
    print(
        f"\n{'clients':>7} {'policy':14} {'requests/s':>13}" + "".join(f"{f'kept at {s:g}':>14}" for s in metrics.SLAS),
        end="",
    )
    print(f"{'latency s':>11}{'token P50 ms':>14}{'P95 ms':>9}")
    for number in range(len(tables[OURS])):
        for policy, table in tables.items():
            row = table[number]
            kept = "".join(f"{row.effective[s]!s:>14}" for s in metrics.SLAS)
            times = f"{row.latency:11.2f}{1e3 * row.gaps[50]:14.1f}{1e3 * row.gaps[95]:9.1f}"
            print(f"{row.load:>7} {policy:14} {row.throughput!s:>13}{kept}{times}")
    found = list(ratios(tables))
    print("\nSplitFuse against each (above 1 it is better)")
    print(
        f"{'clients':>7} {'against':14}"
        + "".join(f"{f'kept at {s:g}':>12}" for s in metrics.SLAS)
        + f"{'latency':>12}{'token P95':>12}"
    )
    for row, other in product(tables[OURS], [policy for policy in tables if policy != OURS]):
        own = [each for each in found if each.other == other and each.where.startswith(f"{row.load} clients")]
        print(f"{row.load:>7} {other:14}" + "".join(f"{each.value:12.2f}" for each in own))
    print("\nBest points: the most requests/s kept at any number of clients")
    for s in metrics.SLAS:
        best = {policy: max(row.effective[s].mean for row in table) for policy, table in tables.items()}
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
    """At every load, against every other policy."""
    for number, ours in enumerate(tables[OURS]):
        for policy, table in tables.items():
            if policy == OURS:
                continue
            theirs, where = table[number], f"{ours.load} clients"
            for s in metrics.SLAS:
                value = quotient(ours.effective[s].mean, theirs.effective[s].mean)
                yield Ratio("effective", policy, f"{where}, {s:g} tokens/s", value)
            yield Ratio("latency", policy, where, quotient(theirs.latency, ours.latency))
            yield Ratio("token P95", policy, where, quotient(theirs.gaps[95], ours.gaps[95]))


def quotient(over: float, under: float) -> float:
    """NaN for nothing of nothing."""
    return over / under if under else (float("inf") if over else float("nan"))


if __name__ == "__main__":
    main()
