"""Counts for Prometheus what a gateway passes on, and shows what it knows of its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from splitfuse.gateway.cell import Cell

PREFIX = "splitfuse:gateway_"


class GatewayMetrics(Collector):
    """Counts what happens; belongs to the event loop's thread."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self.answers: Counter[tuple[str, ...]] = Counter()
        """Counts of answers that cells gave, by cell and HTTP status."""
        self.retries: Counter[tuple[str, ...]] = Counter()
        """Counts of requests that a cell did not answer, by cell and cause."""
        self.broken: Counter[tuple[str, ...]] = Counter()
        """Counts of answers that broke off, by cell."""
        self.refused: Counter[tuple[str, ...]] = Counter()
        """Counts of requests that the gateway itself refused before any answer, by the error's code."""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its samples."""
        cells = self._cells
        gauges = (
            ("cell_ready", "1 while a cell takes requests, else 0.", [float(each.is_ready) for each in cells]),
            ("cell_engines", "Engines of a cell that are ready.", [each.num_ready_engines for each in cells]),
            ("cell_open_requests", "Requests of this gateway that a cell has.", [each.num_open for each in cells]),
            ("cell_load_seconds", "Seconds of an engine that a cell has to do.", [each.load for each in cells]),
        )
        for name, description, values in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, description, labels=("cell",))
            for each, value in zip(cells, values, strict=True):
                gauge.add_metric((str(each.number),), value)
            yield gauge
        counters: tuple[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], int]], ...] = (
            ("answers", "Answers of a cell, by HTTP status.", ("cell", "status"), self.answers),
            (
                "retries",
                "Requests tried at another cell, by the one that did not answer.",
                ("cell", "cause"),
                self.retries,
            ),
            ("broken_answers", "Answers of a cell that broke off.", ("cell",), self.broken),
            ("refused", "Requests that no cell answered, by the error's code.", ("kind",), self.refused),
        )
        for name, description, labels, counts in counters:
            counter = CounterMetricFamily(PREFIX + name, description, labels=labels)
            for of, count in counts.items():
                counter.add_metric(of, count)
            yield counter
