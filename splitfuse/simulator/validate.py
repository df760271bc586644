"""A simulation beside the measurement that it should have predicted, load by load, with the error of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.measure import Loads, MakeWorkload
from splitfuse.bench.results import Point, Results, by_load
from splitfuse.bench.summary import Row, rows
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Chat, Independent, Lengths, SharedPrefix, Workload
from splitfuse.errors import ConfigError
from splitfuse.simulator.simulate import Deployment, simulate

TOKEN_PERCENT = 95
"""The percentile of gaps between tokens whose prediction is judged."""


@dataclass(frozen=True)
class Comparison:
    """One load, measured and predicted."""

    measured: Row
    predicted: Row

    @property
    def throughput_error(self) -> float:
        """As a share of what was measured; below 0, less was predicted."""
        return self.predicted.throughput.mean / self.measured.throughput.mean - 1.0

    @property
    def gap_error(self) -> float:
        """Of the P95 gap between tokens."""
        return self.predicted.gaps[TOKEN_PERCENT] / self.measured.gaps[TOKEN_PERCENT] - 1.0


def predict(deployment: Deployment, measured: Results, *, about: dict[str, Any]) -> Results:
    """The same loads, as often, with the same requests. Raises ConfigError for a workload that results do not describe
    in full: a trace.
    """
    make_workload = workload_of(measured)
    points: tuple[Point, ...] = ()
    predicted = replace(measured, points=())
    for same in by_load(measured.points):
        loads = Loads(
            clients=() if same[0].clients is None else (same[0].clients,),
            rates=() if same[0].rate is None else (same[0].rate,),
            requests=len(metrics.counted(same[0])),
            repeat=len(same),
            prompt_speed=measured.prompt_speed,
        )
        predicted = simulate(deployment, make_workload, loads, system=f"{measured.system}, simulated", about=about)
        points += predicted.points
    return replace(predicted, points=points)


def compare(measured: Results, predicted: Results) -> list[Comparison]:
    """Load by load. Raises ConfigError if they are not of the same loads."""
    left, right = rows(measured), rows(predicted)
    if [row.load for row in left] != [row.load for row in right]:
        raise ConfigError("measurement and simulation are not of the same loads")
    return [Comparison(*pair) for pair in zip(left, right, strict=True)]


def mean_error(errors: Sequence[float]) -> float:
    """Of their sizes."""
    return metrics.mean([abs(error) for error in errors])


def workload_of(results: Results) -> MakeWorkload:
    """The workload that the settings in results describe. Raises ConfigError for one they do not describe in full."""
    settings = results.workload
    kind = settings.get("kind")
    if kind not in ("independent", "prefix", "chat"):
        raise ConfigError(f"a simulation cannot repeat a workload of the kind {kind!r} from its results alone")

    def make(target: Target) -> Workload:
        lengths = Lengths(settings["prompt"], settings["generate"], settings["deviation"], target.room)
        if kind == "prefix":
            return SharedPrefix(lengths, target.vocabulary, settings["prefix"], settings["prefixes"], settings["seed"])
        if kind == "chat":
            return Chat(lengths, target.answer_vocabulary, settings["turns"], settings["seed"])
        return Independent(lengths, target.vocabulary, settings["seed"])

    return make
