"""Compares a simulation with the measurement that it predicts, load by load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.measure import MakeWorkload, workload_maker
from splitfuse.bench.results import Point, Results, by_load
from splitfuse.bench.summary import Row, rows
from splitfuse.bench.workload import Loads
from splitfuse.errors import ConfigError
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.simulate import simulate

TOKEN_PERCENT = 95
"""Percentile of the inter-token latency whose prediction is judged."""


@dataclass(frozen=True)
class Comparison:
    """Holds one load, measured and predicted."""

    measured: Row
    predicted: Row

    @property
    def throughput_error(self) -> float:
        """Return the relative error of the predicted throughput; negative if less was predicted than measured."""
        return self.predicted.throughput.mean / self.measured.throughput.mean - 1.0

    @property
    def itl_error(self) -> float:
        """Return the relative error of the predicted P95 inter-token latency."""
        return self.predicted.itl[TOKEN_PERCENT] / self.measured.itl[TOKEN_PERCENT] - 1.0


def predict(deployment: Deployment | SimulationConfig, measured: Results, *, about: dict[str, Any]) -> Results:
    """Simulate the measured loads with the same requests and repetitions.

    Raises ConfigError for a trace: results do not contain its requests.
    """
    make_workload = workload_of(measured)
    points: tuple[Point, ...] = ()
    predicted = replace(measured, points=())
    for same in by_load(measured.points):
        loads = Loads(
            clients=() if same[0].clients is None else (same[0].clients,),
            rate=() if same[0].rate is None else (same[0].rate,),
            requests=len(metrics.counted(same[0])),
            repeat=len(same),
            prompt_speed=measured.prompt_speed,
        )
        predicted = simulate(deployment, make_workload, loads, system=f"{measured.system}, simulated", about=about)
        points += predicted.points
    return replace(predicted, points=points)


def compare(measured: Results, predicted: Results) -> list[Comparison]:
    """Return the comparisons, load by load. Raises ConfigError if their loads differ."""
    left, right = rows(measured), rows(predicted)
    if [row.load for row in left] != [row.load for row in right]:
        loads, others = (", ".join(row.load for row in each) for each in (left, right))
        raise ConfigError(f"measurement and simulation have different loads: {loads} and {others}")
    return [Comparison(*pair) for pair in zip(left, right, strict=True)]


def mean_error(errors: Sequence[float]) -> float:
    """Return the mean of the absolute errors."""
    return metrics.mean([abs(error) for error in errors])


def workload_of(results: Results) -> MakeWorkload:
    """Return a maker of the measured workload. Raises ConfigError for a trace, which results do not contain."""
    kind = results.workload.get("kind")
    if kind not in ("independent", "prefix", "chat"):
        raise ConfigError(f"a workload of kind {kind!r} cannot be repeated from its results alone")
    return workload_maker(results.workload)
