"""Finds the placement of engines on machines with the highest goodput: whole requests on each, or prompts on some.

Every candidate is a deployment of all machines, simulated under the same load. For each the largest Poisson rate that
meets the SLO is searched; a candidate that does not sustain a rate above the best so far is not searched any further,
and one whose engines could not compute that much (bounds.py) is not simulated at all. The most capable are tried first.
That finds what searching all of them would, as long as a deployment that sustains a rate sustains smaller ones, too.

The idea of deciding by simulation is DistServe's (Zhong et al., OSDI 2024); here not to split is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from splitfuse.bench.measure import MakeWorkload
from splitfuse.config.values import EngineRole
from splitfuse.errors import ConfigError
from splitfuse.simulator.bounds import Bounds
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig, without_targets
from splitfuse.simulator.parallel import MEETING_SECONDS, tensor_parallel
from splitfuse.simulator.rates import PRECISION, Goal, largest_load, sustains
from splitfuse.simulator.simulate import SimulatedTarget

MAX_MACHINES = 64
"""Largest number of machines: the number of placements grows with its square."""
LEAST = 1024
"""Smallest rate that is tried: that of machines which are always busy, divided by so much."""
BUDGETS = (128, 256, 512, 1024, 2048)
"""Candidates for the token budget of machines that compute prompts."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Says which placements are tried: all that use exactly `machines` machines."""

    machines: int
    budgets: tuple[int, ...] = BUDGETS
    tensor_parallel: tuple[int, ...] = (1,)
    """Numbers of machines that an engine may be spread over."""
    meeting_seconds: float = MEETING_SECONDS
    """Time of a step in which the machines of an engine wait for each other."""
    link: Link | None = None
    """Connection of a machine; None: requests stay where their prompt was computed."""
    price: float = 0.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.machines <= MAX_MACHINES:
            raise ConfigError(f"--place {self.machines} must be a number of machines from 1 to {MAX_MACHINES}")
        for name, values in (("max-num-batched-tokens", self.budgets), ("tensor-parallel", self.tensor_parallel)):
            if not values or min(values) < 1:
                raise ConfigError(f"--{name} must be positive integers, not {','.join(map(str, values)) or 'none'}")
        if min(self.tensor_parallel) > self.machines:
            raise ConfigError(
                f"--tensor-parallel {min(self.tensor_parallel)} needs more machines than the {self.machines} of --place"
            )


@dataclass(frozen=True)
class Part:
    """Describes equal engines of one role."""

    role: EngineRole
    engines: int
    tensor_parallel: int
    budget: int
    keeps_slo: bool
    """True if it schedules by deadlines, false if first come, first served."""

    def __str__(self) -> str:
        over = f" over {self.tensor_parallel} machines each" if self.tensor_parallel > 1 else ""
        how = (
            "" if self.role is EngineRole.GENERATION else f", budget {self.budget}{', SLO scheduling' * self.keeps_slo}"
        )
        return f"{self.engines} {self.role}{over}{how}"


@dataclass(frozen=True)
class Placement:
    """Describes a placement by its parts: one if requests stay on a machine, two if they are handed over."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    @property
    def is_split(self) -> bool:
        return len(self.parts) > 1

    def deployment(self, engine: SimulationConfig, space: Space) -> Deployment:
        """Return the deployment of such engines."""
        machines: list[Machine] = []
        for part in self.parts:
            calibration = tensor_parallel(
                engine.calibration, part.tensor_parallel, meeting_seconds=space.meeting_seconds
            )
            scheduler = replace(engine.scheduler, max_num_batched_tokens=part.budget)
            if not part.keeps_slo:
                scheduler = without_targets(scheduler)
            own = replace(engine, calibration=calibration, scheduler=scheduler)
            size = part.tensor_parallel
            machine = Machine(engine=own, role=part.role, gpus=size, price=size * space.price, watts=size * space.watts)
            machines += [machine] * part.engines
        return Deployment(
            machines=tuple(machines),
            link=space.link,
            kv_bytes_per_token=engine.calibration.kv_bytes_per_token,
            long_queue=float("inf"),  # a placement is judged by what its parts do, without borrowing
        )


def placements(space: Space) -> Iterator[Placement]:
    """Yield all placements, those that do not split first."""
    sizes = sorted({size for size in space.tensor_parallel if size <= space.machines})
    budgets = sorted(set(space.budgets))
    for size in sizes:
        if space.machines % size == 0:
            for budget in budgets:
                for keeps_slo in (True, False):
                    yield Placement((Part(EngineRole.MIXED, space.machines // size, size, budget, keeps_slo),))
    if space.link is None:
        return
    for size in sizes:
        for engines in range(1, space.machines // size + 1):
            left = space.machines - engines * size
            for other in sizes:
                if left and left % other == 0:
                    generation = Part(EngineRole.GENERATION, left // other, other, budgets[0], keeps_slo=False)
                    for budget in budgets:
                        yield Placement((Part(EngineRole.PROMPT, engines, size, budget, keeps_slo=False), generation))


@dataclass(frozen=True)
class Placed:
    """Holds a placement and the largest rate that it sustains; `is_bound` if it sustains no more than that."""

    placement: Placement
    rate: float
    is_bound: bool


@dataclass(frozen=True)
class Search:
    """Holds the results of all placements, and the best."""

    found: tuple[Placed, ...]
    machines: int

    @property
    def best(self) -> Placed:
        """Return the placement with the largest rate; of equally good ones, the first: not to split, if that is one."""
        most = max(each.rate for each in self.found if not each.is_bound)
        return next(each for each in self.found if not each.is_bound and each.rate * PRECISION >= most)

    def best_of(self, *, split: bool) -> Placed | None:
        """Return the best placement of those that split, or of those that do not; None if there is none."""
        some = [each for each in self.found if each.placement.is_split is split]
        return max(some, key=lambda each: (not each.is_bound, each.rate), default=None)


def search(
    engine: SimulationConfig,
    make_workload: MakeWorkload,
    space: Space,
    goal: Goal,
    *,
    exhaustive: bool = False,
    on_trial: Callable[[], None] = lambda: None,
) -> Search:
    """Search for the placement with the largest rate that reaches the goal. `exhaustive` searches each one's rate.

    Raises ConfigError if no placement sustains any rate, or if the size of the KV is unknown and there is a link.
    """
    if space.link is not None and not engine.calibration.kv_bytes_per_token:
        raise ConfigError(
            "the cost model does not say how many KV bytes a token has: give --kv-bytes-per-token, or calibrate again"
        )
    candidates = [(placement, placement.deployment(engine, space)) for placement in placements(space)]
    bounds = Bounds(make_workload(SimulatedTarget(candidates[0][1])), goal)
    capacities = {placement: bounds.capacity(deployment.machines) for placement, deployment in candidates}
    least = max(capacities.values()) / LEAST
    found: dict[Placement, Placed] = {}
    best = 0.0
    # those that do not split come first, as they win ties
    for placement, deployment in sorted(candidates, key=lambda each: (each[0].is_split, -capacities[each[0]])):
        if best and not exhaustive and bounds.largest_rate(deployment.machines) < best * PRECISION:
            found[placement] = Placed(placement, best, is_bound=True)
            continue

        @cache
        def is_sustained(rate: float, deployment: Deployment = deployment) -> bool:
            on_trial()
            return sustains(deployment, make_workload, rate, goal)

        if best and not exhaustive and not is_sustained(best * PRECISION):
            found[placement] = Placed(placement, best, is_bound=True)
            continue
        start = capacities[placement]
        rate = 0.0
        if best or is_sustained(start) or is_sustained(least):
            rate = largest_load(is_sustained, start, least=least)
        found[placement] = Placed(placement, rate, is_bound=False)
        best = max(best, rate)
    if not best:
        raise ConfigError("no placement meets the SLO, however low the rate: `splitfuse tune` without --place says why")
    return Search(tuple(found[placement] for placement, _ in candidates), space.machines)
