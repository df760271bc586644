"""Goodput of our scheduling policy against others on a grid of points, in simulation.

    python -m benchmarks.dominance --out results.jsonl [--points TEXT] [--quick]

Every policy sees the same arrivals and lengths, on the engine's own scheduler and a virtual clock; only ours is told
the SLO. A point is a machine, a workload, a load and an SLO (points.py). Finished runs are kept in the file of --out:
the command goes on where it was stopped, and after a change of core/ it runs our policy again, and no other.

Prints for each point the best other policy and its goodput, ours, the ratio with half of its 95 % interval, and the
share of our requests that were late by the first token, and by gaps alone; then a summary.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from statistics import median

from benchmarks.dominance.compare import OTHERS, Comparison, Line, Settings, complete, key_of, policy_version
from benchmarks.dominance.loop import OURS, System
from benchmarks.dominance.points import Scenario, Slo, grid
from splitfuse.config.engine import MAX_TOKEN_BUDGET

ENOUGH = 0.98
"""Ratio to the best other policy that a point must reach."""
LARGEST_RATIO = 10.0
"""Ratio that larger ones count as in a geometric mean, and those to a goodput of 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dominance.jsonl"), help="JSON lines of finished runs")
    parser.add_argument("--points", default="", help="only points whose names contain all of these words")
    parser.add_argument("--quick", action="store_true", help="300 requests of each point, which hide what takes longer")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th point")
    parser.add_argument("--budget", type=int, default=MAX_TOKEN_BUDGET, help="token budget of our policy")
    parser.add_argument("--tag", help="name of our policy's version (default: a digest of its source)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings(ours=System(OURS, arguments.budget), tag=arguments.tag or policy_version())
    if arguments.quick:
        settings = replace(settings, requests=300, most_seeds=1)
    points = chosen(arguments.points.split())[:: arguments.every]
    comparisons = run_all(points, settings, arguments.out, processes=arguments.processes)
    print(summary(comparisons))


def chosen(words: Sequence[str]) -> list[tuple[Scenario, Slo]]:
    """Return the points whose names contain all words."""
    points = [(scenario, slo) for scenario in grid() for slo in scenario.slos]
    return [point for point in points if all(word in f"{point[0]}/{point[1]}" for word in words)]


def run_all(
    points: Sequence[tuple[Scenario, Slo]], settings: Settings, out: Path, *, processes: int
) -> list[Comparison]:
    """Run what the points need, print each when it is done, and return them."""
    known: dict[str, list[Line]] = {}
    if out.exists():
        for text in out.read_text(encoding="utf-8").splitlines():
            line = Line.parse(text)
            if line.has_batches:  # others can be compared with none of now
                known.setdefault(line.scenario, []).append(line)
    by_scenario: dict[Scenario, list[Slo]] = {}
    for scenario, slo in points:
        by_scenario.setdefault(scenario, []).append(slo)
    jobs = [Job(scenario, slos, known.get(str(scenario), []), settings) for scenario, slos in by_scenario.items()]
    comparisons = []
    print(HEADING, flush=True)
    finished = Pool(processes).imap_unordered(completed, jobs) if processes > 1 else map(completed, jobs)
    with out.open("a", encoding="utf-8") as file:
        for job, new in finished:
            file.writelines(line.dumped() + "\n" for line in new)
            file.flush()
            for comparison in job.comparisons(new):
                comparisons.append(comparison)
                print(row(comparison), flush=True)
    return comparisons


@dataclass(frozen=True)
class Job:
    """Holds the points of a scenario, and its runs that are known."""

    scenario: Scenario
    slos: Sequence[Slo]
    known: Sequence[Line]
    settings: Settings

    def comparisons(self, new: Sequence[Line]) -> Iterator[Comparison]:
        """Yield the comparison of each point, of the known runs that count and `new` ones."""
        keys = {key_of(self.scenario, self.scenario.slos, system, self.settings) for system in OTHERS}
        for slo in self.slos:
            comparison = Comparison(self.scenario, slo)
            ours = key_of(self.scenario, [slo], self.settings.ours, self.settings)
            for line in (*self.known, *new):
                if line.seed <= self.settings.most_seeds and (line.key in keys or line.key == ours):
                    comparison.add(line)
            yield comparison


def completed(job: Job) -> tuple[Job, list[Line]]:
    """Return the runs that a job still needed."""
    return job, list(complete(job.scenario, job.slos, job.known, job.settings))


HEADING = (
    f"{'point':64} {'best other':18} {'goodput':>9} {'ours':>9} {'ratio':>6} {'+-':>6} {'first':>6} {'gaps':>6}"
    f" {'seeds':>5}"
)


def row(comparison: Comparison) -> str:
    best, ours = comparison.best_other, comparison.ours
    ratio, half_width = comparison.ratio()
    outcomes = comparison.outcomes[ours].values()
    sent = sum(outcome.sent for outcome in outcomes)
    first = sum(outcome.late_first for outcome in outcomes) / sent
    gaps = sum(outcome.late_gaps for outcome in outcomes) / sent
    goodputs = f"{comparison.goodput(best):9.4g} {comparison.goodput(ours):9.4g}"
    width = f"{half_width:6.3f}" if half_width < math.inf else f"{'-':>6}"
    mark = "" if ratio >= ENOUGH else " <"
    shares = f"{first:6.2f} {gaps:6.2f} {len(outcomes):5}{mark}"
    return f"{comparison.name:64} {best:18} {goodputs} {ratio:6.3f} {width} {shares}"


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return how many points are reached, the geometric means of the ratios, and the worst points."""
    ratios = [each.ratio()[0] for each in comparisons]
    alone = sum(each.goodput(each.best_other) == 0.0 for each in comparisons)
    lines = [
        f"\n{reached(comparisons)} points have at least {ENOUGH} of the best other policy, which has none at {alone}",
        f"ratio to the best other: median {median(ratios):.3f}",
        f"geometric mean of the ratios, each at most {LARGEST_RATIO:g}, to",
    ]
    others = {str(system): [each.ratio(str(system))[0] for each in comparisons] for system in OTHERS}
    for name, values in {"the best other": ratios, **others}.items():
        logs = [math.log(min(max(ratio, 1 / LARGEST_RATIO), LARGEST_RATIO)) for ratio in values]
        lines.append(f"  {name:18} {math.exp(sum(logs) / len(logs)):.3f}")
    for what, key in GROUPS.items():
        groups: dict[str, list[Comparison]] = {}
        for each in comparisons:
            groups.setdefault(key(each), []).append(each)
        lines.append(f"by {what}: " + "; ".join(f"{name} {reached(some)}" for name, some in groups.items()))
    short = sorted((each for each in comparisons if each.ratio()[0] < ENOUGH), key=lambda each: each.ratio()[0])
    lines.append(f"points that fall short ({len(short)})" if short else "no point falls short")
    return "\n".join([*lines, *map(row, short)])


def reached(comparisons: Sequence[Comparison]) -> str:
    """Return how many of the points are reached, as `7 of 9`."""
    return f"{sum(each.ratio()[0] >= ENOUGH for each in comparisons)} of {len(comparisons)}"


def _kind_of_load(scenario: Scenario) -> str:
    if scenario.clients:
        return "closed loop"
    return "below the capacity" if scenario.rate < scenario.capacity else "at or above it"


GROUPS: dict[str, Callable[[Comparison], str]] = {
    "machine": lambda each: each.scenario.machine,
    "load": lambda each: _kind_of_load(each.scenario),
    "TTFT target": lambda each: each.slo.ttft,
    "measure of gaps": lambda each: each.slo.gap.split()[0],
}
"""Groups of points whose shares are printed: a name of each point's group."""


if __name__ == "__main__":
    main()
