"""Runs scenarios, judges their requests, and compares goodputs pair by pair of equal seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import splitfuse
from benchmarks.dominance.loop import OURS, System, drive
from benchmarks.dominance.points import MAX_NUM_SEQS, Scenario, Slo
from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest
from splitfuse.config.engine import MAX_TOKEN_BUDGET
from splitfuse.core.slo.targets import SloTargets

OTHERS = (
    System("prefill-first", 2048),
    System("orca", 2048),
    System("static", 2048),
    *(System("splitfuse", budget) for budget in (256, 512, 1024, 2048)),
)
OUR_SYSTEM = System(OURS, MAX_TOKEN_BUDGET)
WARM_UP = 0.1
"""Fraction of the requests which are sent before the window in which they count, at least."""
HALF_WIDTH = 0.02
"""Half of the 95 % interval of a ratio at which no more seeds are run."""
BATCHES = 10
"""Number of parts of a window, each of as many requests, whose differences say how certain a ratio is (the method of
batch means; Law and Kelton, Simulation Modeling and Analysis): one long run has what several short ones never come to,
such as late requests whose turn comes.
"""
CLOSE = 0.8
"""Goodput relative to the best other, under any SLO of a scenario, from which a policy is run with further seeds."""
STUDENT = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
"""Quantiles 0.975 of Student's distribution by degrees of freedom; for more they are hardly less."""


@dataclass(frozen=True)
class Settings:
    """Says how often each point is run, and what of it is known already."""

    requests: int = 1200
    """Requests of a run: at least 1,000 of them are in the window, with 64 clients too."""
    seeds: int = 1
    """Runs of each point at least."""
    most_seeds: int = 4
    ours: System = OUR_SYSTEM
    tag: str = ""
    """Name of our policy's version."""


@dataclass(frozen=True)
class Outcome:
    """Counts the requests of one run that were sent in the window, under one SLO."""

    seconds: float
    """Length of the window."""
    sent: int
    met: int
    late_first: int
    """Requests whose first token was late."""
    longest: float
    """Longest time from sending a request to its last token."""
    batches: Sequence[tuple[float, int]] = ()
    """Seconds of each part of the window, and how many of its requests met the SLO."""

    @property
    def goodput(self) -> float:
        return self.met / self.seconds

    @property
    def late_gaps(self) -> int:
        """Return the requests whose first token alone was in time."""
        return self.sent - self.met - self.late_first


@dataclass(frozen=True)
class Line:
    """Holds a run as the file of results has it: of one system, with one seed, judged by some SLOs."""

    key: str
    """Digest of all that the run depends on, besides the seed."""
    scenario: str
    system: str
    seed: int
    outcomes: Mapping[str, Outcome]
    """By SLO."""

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Line:
        fields = json.loads(text)
        fields["outcomes"] = {slo: Outcome(**outcome) for slo, outcome in fields["outcomes"].items()}
        return cls(**fields)

    @property
    def has_batches(self) -> bool:
        """Return whether it was judged as runs are now: older results have no batches."""
        return all(len(outcome.batches) == BATCHES for outcome in self.outcomes.values())


def policy_version() -> str:
    """Return a digest of the scheduler's source, which stands for the version of our policy."""
    root = Path(splitfuse.__file__).parent / "core"
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))).hexdigest()[:12]


def key_of(scenario: Scenario, slos: Sequence[Slo], system: System, settings: Settings) -> str:
    """Return what a run depends on, besides the seed, as a digest."""
    machine = scenario.calibration
    what: list[object] = [machine.cost, machine.num_blocks, machine.block_size, scenario.requests_of, scenario.load]
    what += [
        str(system),
        settings.requests,
        [scenario.targets(slo) for slo in slos],
        settings.tag if system.is_ours else "",
    ]
    if scenario.clients:
        what += [scenario.spacing, "answers come after the next plan"]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def run(scenario: Scenario, slos: Sequence[Slo], system: System, seed: int, settings: Settings) -> Line:
    """Run a scenario once. Our policy is given the SLO, which must be one; others run once for all."""
    workload, machine = scenario.requests_of, scenario.calibration
    sessions = workload.sessions(settings.requests, seed)
    arrivals = scenario.arrivals(len(sessions), seed)
    scheduler = system.make_scheduler(machine, max_num_seqs=MAX_NUM_SEQS, caches_prefixes=workload.caches_prefixes)
    targets: Sequence[SloTargets] = ()
    if system.is_ours:
        (slo,) = slos
        targets = scenario.targets(slo)
    records = drive(
        *(scheduler, machine, sessions),
        arrivals=arrivals,
        clients=scenario.clients,
        spacing=scenario.spacing,
        targets=targets,
    )
    outcomes = {str(slo): judge(records, scenario.targets(slo), clients=scenario.clients) for slo in slos}
    return Line(key_of(scenario, slos, system, settings), str(scenario), str(system), seed, outcomes)


def judge(records: Sequence[tuple[MeasuredRequest, int]], targets: Sequence[SloTargets], *, clients: int) -> Outcome:
    """Return the outcome: requests that warm up the load, at least one of each client of a closed loop, and the last of
    its clients do not count.
    """
    first, last = max(int(WARM_UP * len(records)), clients), max(len(records) - max(clients, 1), 1)
    start, end = records[min(first, last - 1)][0].sent, records[last][0].sent if last < len(records) else math.inf
    counted = [(record, targets[kind]) for record, kind in records if start <= record.sent < end]
    late_first, met = 0, []
    for record, slo in counted:
        is_late = metrics.ttft(record) > slo.ttft_target(record.num_prompt_tokens)
        late_first += is_late
        met.append(not is_late and metrics.meets_slo(record, slo))
    longest = max(record.done - record.sent for record, _ in counted)
    bounds = [len(counted) * number // BATCHES for number in range(BATCHES + 1)]
    times = [*(record.sent for record, _ in counted), end]
    batches = [(times[last] - times[first], sum(met[first:last])) for first, last in pairwise(bounds)]
    return Outcome(end - start, len(counted), sum(met), late_first, longest, batches)


@dataclass
class Comparison:
    """Compares the runs of one point: goodputs by system and seed."""

    scenario: Scenario
    slo: Slo
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.scenario}/{self.slo}"

    def add(self, line: Line) -> None:
        if (outcome := line.outcomes.get(str(self.slo))) is not None:
            self.outcomes.setdefault(line.system, {})[line.seed] = outcome

    def goodput(self, system: str) -> float:
        """Return the goodput of a system in requests/s, over all its seeds."""
        return _goodput(self.outcomes[system].values())

    @property
    def ours(self) -> str:
        return next(system for system in self.outcomes if system.startswith(OURS))

    @property
    def best_other(self) -> str:
        """Return the other policy with the highest goodput."""
        return max((str(system) for system in OTHERS), key=self.goodput)

    def is_close(self, other: str) -> bool:
        """Return whether another policy may yet prove to be the best other."""
        best = self.best_other
        return other == best or self.goodput(other) >= CLOSE * self.goodput(best) > 0.0

    def ratio(self, other: str | None = None) -> tuple[float, float]:
        """Return our goodput relative to another's, by default the best other's, over the seeds that both have; and
        half of its 95 % interval. 1 if both are 0.
        """
        ours, theirs = self.outcomes[self.ours], self.outcomes[other or self.best_other]
        seeds = sorted(ours.keys() & theirs.keys())
        both = [[each[seed] for seed in seeds] for each in (ours, theirs)]
        our, their = map(_goodput, both)
        if not their:
            return (math.inf, math.inf) if our else (1.0, 0.0)
        ratio = our / their
        misses = [a - b for a, b in zip(*map(_changes, both), strict=True)]
        if len(misses) < 2:
            return ratio, math.inf
        deviation = math.sqrt(sum(each**2 for each in misses) / (len(misses) - 1))
        return ratio, ratio * STUDENT[min(len(misses), len(STUDENT)) - 1] * deviation / math.sqrt(len(misses))

    @property
    def is_certain(self) -> bool:
        """Return whether the ratio is known well enough, or certainly above 1."""
        ratio, half_width = self.ratio()
        if half_width <= HALF_WIDTH or ratio == math.inf:
            return True
        return ratio > 1.0 and ratio * math.exp(-half_width / ratio) > 1.0  # on a logarithmic scale, as ratios are


def _goodput(outcomes: Iterable[Outcome]) -> float:
    """Return the requests/s that met the SLO in all these windows together."""
    some = list(outcomes)
    return sum(outcome.met for outcome in some) / sum(outcome.seconds for outcome in some)


def _changes(outcomes: Sequence[Outcome]) -> list[float]:
    """Return by how much each batch changes the goodput of all together, relative to it and times their number."""
    batches = [batch for outcome in outcomes for batch in outcome.batches]
    seconds, met = (metrics.mean(each) for each in zip(*batches, strict=True)) if batches else (1.0, 1.0)
    return [(its_met / met if met else 0.0) - its_seconds / seconds for its_seconds, its_met in batches]


def complete(scenario: Scenario, slos: Sequence[Slo], known: Iterable[Line], settings: Settings) -> Iterator[Line]:
    """Yield the runs that a scenario still needs. All seeds from 1 on: first the least number of them, then more for
    the points whose ratio is not certain, of the policies that are close to the best.
    """
    lines = {(line.key, line.seed): line for line in known}
    comparisons = {slo: Comparison(scenario, slo) for slo in slos}

    def needed(some: Sequence[Slo], system: System, seed: int) -> Iterator[Line]:
        key = key_of(scenario, some, system, settings)
        if (key, seed) not in lines:
            lines[key, seed] = run(scenario, some, system, seed, settings)
            yield lines[key, seed]
        for comparison in comparisons.values():
            comparison.add(lines[key, seed])

    others: Sequence[System] = OTHERS
    for seed in range(1, settings.most_seeds + 1):
        unclear = [slo for slo in slos if seed <= settings.seeds or not comparisons[slo].is_certain]
        if not unclear:
            return
        if seed > 1:
            others = [each for each in OTHERS if any(comparisons[slo].is_close(str(each)) for slo in unclear)]
        for system in others:
            yield from needed(scenario.slos, system, seed)
        for slo in unclear:
            yield from needed([slo], settings.ours, seed)
