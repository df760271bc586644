"""Results as the rows of a table: one for each load, its repetitions together. Decides which figures are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfuse.bench import metrics
from splitfuse.bench.results import Point, Results, by_load

LATENCY_PERCENTS = (50, 95)
GAP_PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True)
class Spread:
    """One figure over repetitions."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(metrics.mean(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """`1.43 ±0.05`: the larger distance from the mean. Without repetition, nothing is known of it: `1.43`."""
        if self.count < 2:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ±{max(self.high - self.mean, self.mean - self.low):.2g}"


@dataclass(frozen=True)
class Row:
    """One load on one system. Percentiles are of all repetitions together, times are seconds."""

    clients: int | None
    rate: float | None
    throughput: Spread
    """Requests a second by the clock."""
    token_throughput: Spread
    littles_law: float | None
    effective: dict[float, Spread]
    """Requests a second that kept both promises, by tokens a second promised."""
    latency: float
    """Mean, from sending to the last token."""
    first_token: dict[int, float]
    gaps: dict[int, float]
    num_counted: int
    num_failed: int

    @property
    def load(self) -> str:
        """`8`, of clients; `1.5/s`, of an open loop; `as it came`."""
        if self.clients is not None:
            return str(self.clients)
        return "as it came" if self.rate is None else f"{self.rate:g}/s"


def rows(results: Results, slas: Sequence[float] = metrics.SLAS) -> list[Row]:
    """In the order of clients or rates."""
    return [_row(points, slas, results.prompt_speed) for points in by_load(results.points)]


def _row(points: list[Point], slas: Sequence[float], prompt_speed: float) -> Row:
    records = [record for point in points for record in metrics.answered(point)]
    num_counted = sum(len(metrics.counted(point)) for point in points)
    first_tokens = [metrics.first_token_seconds(record) for record in records]
    gaps = [gap for record in records for gap in metrics.gaps(record)]
    laws = [law for point in points if (law := metrics.littles_law(point)) is not None]
    return Row(
        clients=points[0].clients,
        rate=points[0].rate,
        throughput=Spread.of([metrics.throughput(point) for point in points]),
        token_throughput=Spread.of([metrics.token_throughput(point) for point in points]),
        littles_law=metrics.mean(laws) if laws else None,
        effective={each: Spread.of([metrics.goodput(point, each, prompt_speed) for point in points]) for each in slas},
        latency=metrics.mean([record.done - record.sent for record in records]),
        first_token={percent: metrics.percentile(first_tokens, percent) for percent in LATENCY_PERCENTS},
        gaps={percent: metrics.percentile(gaps, percent) for percent in GAP_PERCENTS},
        num_counted=num_counted,
        num_failed=num_counted - len(records),
    )
