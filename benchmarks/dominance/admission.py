"""Admission of `on_time_only` requests: how many of those admitted are on time, and how many are refused.

    python -m benchmarks.dominance.admission [--points TEXT] [--noise S] [--strict F] [--seeds N]

Poisson arrivals on machines of the grid, below their capacity and far beyond it, with a kind of SLO each. A fraction
--strict of the requests has `on_time_only`. Prints in percent how many of those were refused, and how many of those
that were admitted were late; the goodput of all, and that without `on_time_only`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from random import Random

from benchmarks.dominance.compare import OUR_SYSTEM, WARM_UP
from benchmarks.dominance.loop import drive
from benchmarks.dominance.points import FASTGEN, MAX_NUM_SEQS, Scenario, Slo
from splitfuse.bench import metrics
from splitfuse.simulator.machines import MACHINES

LOADS = ("60%", "90%", "120%", "200%")
POINTS = (
    ("0.5b-int8", "paper-small", Slo(*FASTGEN[1])),
    ("0.5b-int8", "azure-code", Slo("2", "tpot 3")),
    ("0.5b-bf16", "two-classes", Slo("2/token", "p95 3")),
    ("7b-int8-avx2", "short", Slo("5", "itl 1.5")),
    ("a100-70b", "paper", Slo(*FASTGEN[1])),
    ("opt-13b", "sharegpt", Slo("250ms", "tpot 100ms")),
    ("opt-66b", "azure-code-2k", Slo("1.2", "itl 3")),
    ("splitwise-a100", "azure-conv", Slo("5/token", "p99 10")),
    ("splitwise-h100", "long-answers", Slo("2", "tpot 1.5")),
    ("splitwise-h100", "prefix", Slo("5", "itl 3")),
)
"""Machines, workloads and SLOs; their loads are LOADS."""


@dataclass(frozen=True)
class Run:
    """Describes a scenario, which is run once with `on_time_only` and once without."""

    scenario: Scenario
    noise: float
    strict: float
    requests: int
    seeds: int


@dataclass
class Count:
    """Counts the requests in the window of one run or several."""

    seconds: float = 0.0
    asked: int = 0
    """Number of requests with `on_time_only`."""
    refused: int = 0
    late: int = 0
    """Number of those admitted that missed their SLO."""
    met: int = 0
    """Number of all requests that met their SLO."""

    @property
    def goodput(self) -> float:
        return self.met / self.seconds


def run(what: Run, *, strict: float) -> Count:
    """Run a scenario with a fraction of the requests `on_time_only`."""
    scenario, workload = what.scenario, what.scenario.requests_of
    machine = scenario.calibration
    machine = replace(machine, cost=replace(machine.cost, noise=what.noise))
    count = Count()
    for seed in range(1, what.seeds + 1):
        sessions = workload.sessions(what.requests, seed)
        random = Random(f"{seed} strict")
        on_time_only = [random.random() < strict for _ in sessions]
        targets = scenario.targets(scenario.slos[0])
        records = drive(
            OUR_SYSTEM.make_scheduler(machine, max_num_seqs=MAX_NUM_SEQS, caches_prefixes=workload.caches_prefixes),
            machine,
            sessions,
            arrivals=scenario.arrivals(len(sessions), seed),
            targets=targets,
            on_time_only=on_time_only,
        )
        counted = records[int(WARM_UP * len(records)) :]
        count.seconds += counted[-1][0].sent - counted[0][0].sent
        for record, kind in counted:
            met = metrics.meets_slo(record, targets[kind])
            count.met += met
            if on_time_only[record.client]:
                count.asked += 1
                count.refused += record.error is not None
                count.late += record.error is None and not met
    return count


def row(what: Run) -> tuple[str, Count, Count]:
    """Return a line of the table, and what it counts with and without `on_time_only`."""
    strict, all_taken = run(what, strict=what.strict), run(what, strict=0.0)
    admitted = strict.asked - strict.refused
    text = f"{what.scenario!s:40}{what.scenario.slos[0]!s:28}"
    text += f"{100 * strict.refused / strict.asked:8.1f}{100 * strict.late / max(admitted, 1):8.2f}"
    return text + f"{strict.goodput:9.3f}{all_taken.goodput:9.3f}", strict, all_taken


def runs(words: Sequence[str], *, noise: float, strict: float, requests: int, seeds: int) -> list[Run]:
    """Return the runs whose names contain all words."""
    assert all(machine in MACHINES for machine, *_ in POINTS)
    scenarios = [Scenario(machine, load_of, load, (slo,)) for machine, load_of, slo in POINTS for load in LOADS]
    chosen = (each for each in scenarios if all(word in f"{each}/{each.slos[0]}" for word in words))
    return [Run(each, noise, strict, requests, seeds) for each in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="", help="only points whose names contain all of these words")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the logarithm of step times")
    parser.add_argument("--strict", type=float, default=1.0, help="fraction of the requests with on_time_only")
    parser.add_argument("--requests", type=int, default=300, help="requests of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    todo = runs(
        arguments.points.split(),
        noise=arguments.noise,
        strict=arguments.strict,
        requests=arguments.requests,
        seeds=arguments.seeds,
    )
    print(f"{'':68}{'refused':>8}{'late':>8}{'goodput':>9}{'without':>9}", flush=True)
    counts = []
    with Pool(arguments.processes) as pool:
        for text, *both in pool.imap(row, todo):
            counts.append(both)
            print(text, flush=True)
    strict = [each for each, _ in counts]
    asked, refused, late = (sum(getattr(each, name) for each in strict) for name in ("asked", "refused", "late"))
    ratios = [(a.goodput / b.goodput) if b.met else 1.0 for a, b in counts]
    print(
        f"{asked} asked, {refused} refused, {late} of those admitted late; "
        f"goodput {sum(ratios) / len(ratios):.3f} of that without on_time_only"
    )


if __name__ == "__main__":
    main()
