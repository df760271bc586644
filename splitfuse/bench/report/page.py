"""Writes a self-contained HTML report of results: figures as SVG, tables, settings of each system. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from splitfuse.bench import metrics
from splitfuse.bench.report.style import as_svg, require_matplotlib
from splitfuse.bench.results import Results, load_order
from splitfuse.bench.summary import NO_TARGETS, Row, cells, rows
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.report.figures import Series

SCALING_SPEED = 4.0
"""SLO in tokens/s of the figures of scaling."""
KINDS = {"chat": "Conversations", "prefix": "Shared prefixes", "trace": "A trace"}


def write_report(
    results: Sequence[Results],
    out: Path,
    *,
    speeds: Sequence[float] = metrics.SPEEDS,
    targets: Mapping[str, str] = NO_TARGETS,
    title: str = "Benchmark results",
) -> None:
    """Write the page of page.html, with goodput at these `speeds` of the paper's SLO and at these targets.

    Raises ConfigError if matplotlib is missing, if there is nothing to show, or if the file cannot be written.
    """
    require_matplotlib()
    from splitfuse.bench.report import figures

    results = [each for each in results if each.points]
    if not results or not speeds:
        raise ConfigError("there is nothing to report: no file has a point, or --slo is empty")
    colour_of = figures.colours([each.system for each in results])
    all_speeds = sorted({*speeds, SCALING_SPEED})
    series = [figures.Series(each, tuple(rows(each, all_speeds, targets)), colour_of[each.system]) for each in results]
    scaled = [
        (heading, what, figures.scaling(series, size, what, SCALING_SPEED))
        for heading, what, size in (
            ("Replicas", "replicas", lambda r: r.replicas),
            ("Tensor parallel", "devices of one model", lambda r: r.tensor_parallel_size),
        )
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = _text
    environment.globals |= {
        "as_svg": as_svg, "cells": cells, "describe": describe, "figures": figures, "rows_of": _rows
    }  # fmt: skip
    page = environment.get_template("page.html").render(
        title=title,
        series=series,
        workloads=_by_workload(series),
        speeds=speeds,
        targets=", ".join(f"{name} {value}" for name, value in targets.items()),
        scaled=scaled,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def _by_workload(series: Sequence[Series]) -> list[list[Series]]:
    """Return the series of each workload, whatever its seed."""
    groups: dict[str, list[Series]] = {}
    for each in series:
        same = {name: value for name, value in each.results.workload.items() if name != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(each)
    return list(groups.values())


def _rows(series: Sequence[Series]) -> list[tuple[Row, Series]]:
    """Return the rows of a table: loads, and below each the systems."""
    both = [(row, each) for each in series for row in each.rows]
    return sorted(both, key=lambda pair: load_order(pair[0].clients, pair[0].rate))


def describe(workload: Mapping[str, Any]) -> str:
    """Return a heading for a workload."""
    kind = KINDS.get(str(workload.get("kind")))
    if "prompt" not in workload or "generate" not in workload:
        return kind or "A load"
    lengths = f"prompts of {workload['prompt']:g} tokens, answers of {workload['generate']:g}"
    return f"{kind}: {lengths}" if kind else lengths[0].upper() + lengths[1:]


def _text(value: Any) -> str:
    """Return a value of the record as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items() if part is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)
