"""Finds the placement of engines for `splitfuse tune --place`, and prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitfuse.cli.flags import numbers
from splitfuse.cli.loads import WorkloadFlags, load_text, unit
from splitfuse.cli.tables import console, make_table
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.measure import MakeWorkload
    from splitfuse.simulator.deployment import SimulationConfig
    from splitfuse.simulator.placement import Search, Space


def read_space(
    place: int, budgets: Sequence[int], tensor_parallel: str, meeting_seconds: float | None, link: float | None
) -> Space:
    """Return the placements that are tried. Raises ConfigError for flags that say something impossible."""
    from splitfuse.simulator.deployment import Link
    from splitfuse.simulator.parallel import MEETING_SECONDS
    from splitfuse.simulator.placement import BUDGETS, Space

    if place > 1 and link is None:
        raise ConfigError(
            "--place needs --link, the bytes/s of a machine's connection such as 25e9: what splitting costs"
        )
    sizes = numbers("tensor_parallel", tensor_parallel, int)
    if meeting_seconds is not None and max(sizes, default=1) == 1:
        raise ConfigError("--meeting-time needs --tensor-parallel above 1, such as 1,2: one machine waits for no other")
    return Space(
        machines=place,
        budgets=tuple(budgets) or BUDGETS,
        tensor_parallel=sizes,
        meeting_seconds=MEETING_SECONDS if meeting_seconds is None else meeting_seconds,
        link=None if link is None else Link(link),
    )


def find_placement(
    engine: SimulationConfig,
    make_workload: MakeWorkload,
    space: Space,
    load: WorkloadFlags,
    attainment: float,
    requests: int,
    *,
    progress: bool,
) -> Search:
    """Return the placements that were searched, once they and the best are printed."""
    from tqdm import tqdm

    from splitfuse.core.slo.targets import SloTargets
    from splitfuse.simulator.placement import search
    from splitfuse.simulator.rates import Goal

    targets = SloTargets.parse(**engine.scheduler.targets)
    goal = Goal.of(targets, attainment, requests)
    with tqdm(desc="simulated loads", unit="load", disable=not progress) as bar:
        found = search(engine, make_workload, space, goal, on_trial=lambda: bar.update() and None)
    best = found.best
    rows = [
        (
            str(each.placement),
            f"{'at most ' if each.is_bound else ''}{each.rate:.3g}{' *' if each is best else ''}",
            f"{each.rate / space.machines:.3g}",
        )
        for each in sorted(found.found, key=lambda each: (each.is_bound, -each.rate))
    ]
    title = f"{unit(load)}/s at {100 * attainment:.4g} % SLO attainment on {space.machines} machines (* is best)"
    heads = ("placement", "sustained", "for each machine")
    console().print(make_table(title, heads, rows, left=["placement"]))
    verdict = "split prompts from generation" if best.placement.is_split else "do not split prompts from generation"
    print(f"{verdict}: {best.placement} sustains {best.rate:.3g} {unit(load)}/s (Poisson), with {load_text(load)}")
    other = found.best_of(split=not best.placement.is_split)
    if other is not None:
        how = "sustains no more than that" if other.is_bound else f"sustains {other.rate:.3g}"
        print(f"the best that {'does not split' if best.placement.is_split else 'splits'} {how}: {other.placement}")
    return found
