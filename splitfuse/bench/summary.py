"""Makes rows of a table from results: one for each load, with its repetitions combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from splitfuse.bench import metrics
from splitfuse.bench.results import Point, Results, by_load
from splitfuse.core.slo.targets import NO_SLO, SloTargets

NO_TARGETS: Mapping[str, str] = MappingProxyType({})
TTFT_PERCENTS = (50, 95)
ITL_PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True)
class Spread:
    """Summarizes a figure over the repetitions of a load."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(metrics.mean(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """Return `1.43 ±0.05`, the larger distance from the mean; `1.43` if there was no repetition."""
        if self.count < 2:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ±{max(self.high - self.mean, self.mean - self.low):.2g}"


@dataclass(frozen=True)
class Row:
    """Summarizes one load on one system. Percentiles are over all repetitions together; times are in seconds."""

    clients: int | None
    rate: float | None
    throughput: Spread
    """Requests/s by the clock."""
    token_throughput: Spread
    """Generated tokens/s."""
    littles_law: float | None
    goodput: dict[float, Spread]
    """Requests/s which met the SLO, by the SLO's tokens/s."""
    slo_goodput: Spread | None
    """Requests/s which met the given targets; None if none were given."""
    latency: float
    """Mean time from sending to the last token."""
    ttft: dict[int, float]
    """Time to first token, by percentile."""
    itl: dict[int, float]
    """Inter-token latency, by percentile."""
    num_counted: int
    num_failed: int

    @property
    def load(self) -> str:
        """Return the name of the load: `8` (clients), `1.5/s` (open loop) or `as recorded` (a trace's own times)."""
        if self.clients is not None:
            return str(self.clients)
        return "as recorded" if self.rate is None else f"{self.rate:g}/s"


def rows(
    results: Results, speeds: Sequence[float] = metrics.SPEEDS, targets: Mapping[str, str] = NO_TARGETS
) -> list[Row]:
    """Return the rows of all loads, sorted by clients or rate; with goodput at these targets, which are written as in
    `SchedulerConfig.targets`. Raises ConfigError for invalid ones.
    """
    slo = SloTargets.parse(**targets)
    return [_row(points, speeds, slo, results.prompt_speed) for points in by_load(results.points)]


def cells(row: Row, speeds: Sequence[float]) -> dict[str, str]:
    """Return the cells of a row by their headings, for tables in a terminal and in a page."""
    return {
        "requests/s": str(row.throughput),
        "tokens/s": f"{row.token_throughput.mean:.1f}",
        "Little": "" if row.littles_law is None else f"{row.littles_law:.3g}",
        **{f"goodput\nat {speed:g}": str(row.goodput[speed]) for speed in speeds},
        **({} if row.slo_goodput is None else {"goodput\nat SLO": str(row.slo_goodput)}),
        "latency": f"{row.latency:.3g} s",
        **{f"TTFT\nP{percent}": f"{seconds:.3g} s" for percent, seconds in row.ttft.items()},
        **{f"ITL\nP{percent} ms": f"{1e3 * seconds:.3g}" for percent, seconds in row.itl.items()},
        "counted": str(row.num_counted),
        "failed": f"{row.num_failed} of {row.num_counted}" if row.num_failed else "",
    }


def _row(points: list[Point], speeds: Sequence[float], slo: SloTargets, prompt_speed: float) -> Row:
    records = [record for point in points for record in metrics.answered(point)]
    num_counted = sum(len(metrics.counted(point)) for point in points)
    ttfts = [metrics.ttft(record) for record in records]
    gaps = [gap for record in records for gap in metrics.gaps(record)]
    laws = [law for point in points if (law := metrics.littles_law(point)) is not None]
    return Row(
        clients=points[0].clients,
        rate=points[0].rate,
        throughput=Spread.of([metrics.throughput(point) for point in points]),
        token_throughput=Spread.of([metrics.token_throughput(point) for point in points]),
        littles_law=metrics.mean(laws) if laws else None,
        goodput={each: Spread.of([metrics.goodput(point, each, prompt_speed) for point in points]) for each in speeds},
        slo_goodput=None if slo == NO_SLO else Spread.of([metrics.slo_goodput(point, slo) for point in points]),
        latency=metrics.mean([record.done - record.sent for record in records]),
        ttft={percent: metrics.percentile(ttfts, percent) for percent in TTFT_PERCENTS},
        itl={percent: metrics.percentile(gaps, percent) for percent in ITL_PERCENTS},
        num_counted=num_counted,
        num_failed=num_counted - len(records),
    )
