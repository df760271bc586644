"""Draws the five figures of the paper from results. Lines join their points in the order of clients.

style.py has their looks. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from splitfuse.bench.report.style import COLOURS, PALE, look, write_legend
from splitfuse.bench.results import Results
from splitfuse.bench.summary import ITL_PERCENTS, Row, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.0  # inches
LABEL_WIDTH = 24  # characters


@dataclass(frozen=True)
class Series:
    """Holds one system under one workload, as it is drawn."""

    results: Results
    rows: tuple[Row, ...]
    colour: str

    @property
    def name(self) -> str:
        """Return the name for legends."""
        parts = [self.results.system]
        if self.results.replicas > 1:
            parts.append(f"{self.results.replicas} replicas")
        if self.results.tensor_parallel_size > 1:
            parts.append(f"on {self.results.tensor_parallel_size} devices")
        if self.results.simulated:
            parts.append("simulated")
        return ", ".join(parts)

    @property
    def style(self) -> dict[str, Any]:
        """Return the style of its points and lines: filled and solid if measured, hollow and dashed if simulated."""
        hollow = self.results.simulated
        return {
            "color": self.colour,
            "label": fill(self.name, LABEL_WIDTH),
            "linestyle": (0, (4, 2)) if hollow else "-",
            "marker": "o",
            "markerfacecolor": "white" if hollow else self.colour,
            "zorder": 3,
            "clip_on": False,
        }


def colours(systems: Sequence[str]) -> dict[str, str]:
    """Return a colour for each system, in their order."""
    names = list(dict.fromkeys(systems))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def throughput_latency(series: Sequence[Series]) -> Figure:
    """Draw the mean latency of a request against requests/s; points are labelled with clients or arrival rate."""
    with look():
        figure, (axes,) = _panels(1, height=4.4)
        for each in series:
            x = [row.throughput.mean for row in each.rows]
            y = [row.latency for row in each.rows]
            axes.plot(x, y, **each.style)
            for row in each.rows:
                spread = row.throughput
                axes.plot([spread.low, spread.high], [row.latency] * 2, **_bar(each))
                axes.annotate(
                    row.load,
                    (spread.mean, row.latency),
                    xytext=(5, -9) if each.results.simulated else (-5, 4),
                    textcoords="offset points",
                    ha="left" if each.results.simulated else "right",
                    fontsize=7,
                    color=each.colour,
                )
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        _plain_numbers(axes)
        axes.set_xlabel("requests/s")
        axes.set_ylabel("mean latency of a request, s")
        write_legend(axes)
        return figure


def goodput(series: Sequence[Series], speeds: Sequence[float]) -> Figure:
    """Draw goodput against clients: a panel for each SLO, that of given targets last."""
    panels: dict[str, Callable[[Row], Spread]] = {
        f"SLO of {speed:g} tokens/s": partial(_goodput, speed=speed) for speed in speeds
    }
    if all(row.slo_goodput is not None for each in series for row in each.rows):
        panels["given SLO"] = _slo_goodput
    return _against_load(series, panels, "goodput (requests/s)")


def _goodput(row: Row, speed: float) -> Spread:
    return row.goodput[speed]


def _slo_goodput(row: Row) -> Spread:
    assert row.slo_goodput is not None
    return row.slo_goodput


def token_latency(series: Sequence[Series]) -> Figure:
    """Draw the inter-token latency against clients: a panel for each percentile."""
    panels = {f"P{percent}": partial(_itl, percent=percent) for percent in ITL_PERCENTS}
    return _against_load(series, panels, "inter-token latency, ms", logarithmic=True)


def _itl(row: Row, percent: int) -> Spread:
    return Spread.of([max(1e3 * row.itl[percent], 0.01)])  # a logarithm has no zero


def scaling(series: Sequence[Series], size: Callable[[Results], int], what: str, speed: float) -> Figure | None:
    """Draw the best throughput and goodput at `speed` against replicas or devices, with linear scaling.

    None if no system has more than one size.
    """
    lines = list(_lines(series, size))
    if not lines:
        return None
    with look():
        figure, panels = _panels(2, height=3.8, sharey=True)
        values: tuple[Callable[[Row], Spread], ...] = (lambda row: row.throughput, lambda row: row.goodput[speed])
        titles = ("throughput", f"goodput at {speed:g} tokens/s")
        for axes, value, title in zip(panels, values, titles, strict=True):
            axes.set_title(title)
            sizes = set[int]()
            for line in lines:
                x = [size(each.results) for each in line]
                best = [max((value(row) for row in each.rows), key=lambda spread: spread.mean) for each in line]
                axes.plot(x, [best[0].mean / x[0] * n for n in x], color=PALE, lw=1, ls=":", zorder=1)
                times = best[-1].mean / best[0].mean if best[0].mean else float("nan")
                name = line[0].results.system + (", simulated" if line[0].results.simulated else "")
                label = f"{fill(name, LABEL_WIDTH)}\n{times:.3g} times {x[0]}"
                axes.plot(x, [spread.mean for spread in best], **{**line[0].style, "label": label})
                for n, spread in zip(x, best, strict=True):
                    axes.plot([n, n], [spread.low, spread.high], **_bar(line[0]))
                sizes |= set(x)
            axes.set_xlim(left=0)
            _ticks(axes, sorted(sizes), [str(n) for n in sorted(sizes)])
            axes.set_xlabel(what)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("requests/s, at the best load")
        write_legend(panels[-1])
        return figure


def smallest(series: Sequence[Series]) -> list[Series]:
    """Return each system with its fewest replicas and devices: larger sizes are for `scaling`."""
    more: list[Series] = []
    for size in (lambda r: r.replicas, lambda r: r.tensor_parallel_size):
        more += [each for line in _lines(series, size) for each in line[1:]]
    return [each for each in series if all(each is not other for other in more)]


def _lines(series: Sequence[Series], size: Callable[[Results], int]) -> Iterator[list[Series]]:
    """Yield the series that differ in size alone, sorted by size; only where there are several sizes."""

    def others(each: Series) -> str:
        about = each.results
        shape = about.replicas * about.tensor_parallel_size // size(about)  # the dimension that is not `size`
        return repr((about.system, about.simulated, shape, sorted(about.workload.items())))

    groups: dict[str, dict[int, Series]] = {}
    for each in series:
        groups.setdefault(others(each), {}).setdefault(size(each.results), each)
    for group in groups.values():
        if len(group) > 1:
            yield [group[count] for count in sorted(group)]


def _panels(count: int, *, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a row of panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _against_load(
    series: Sequence[Series], panels: Mapping[str, Callable[[Row], Spread]], what: str, *, logarithmic: bool = False
) -> Figure:
    """Draw values against clients or rates, a panel for each, with pale bars for the spread of repetitions."""
    loads = sorted({_load(row): row.load for each in series for row in each.rows}.items())
    closed = all(row.clients for each in series for row in each.rows)
    with look():
        figure, all_axes = _panels(len(panels), height=3.6, sharey=True)
        for axes, (title, value) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(title)
            for each in series:
                x = [_load(row) for row in each.rows]
                spreads = [value(row) for row in each.rows]
                axes.plot(x, [spread.mean for spread in spreads], **each.style)
                for place, spread in zip(x, spreads, strict=True):
                    if spread.count > 1:
                        axes.plot([place, place], [spread.low, spread.high], **_bar(each))
            if all(place > 0 for place, _ in loads):
                axes.set_xscale("log", base=2)
            _ticks(axes, [place for place, _ in loads], [text for _, text in loads])
            axes.set_xlabel("clients" if closed else "clients, or arrival rate")
        if logarithmic:
            all_axes[0].set_yscale("log")
            _plain_numbers(all_axes[0])
        else:
            all_axes[0].set_ylim(bottom=0)
        all_axes[0].set_ylabel(what)
        write_legend(all_axes[-1])
    return figure


def _bar(each: Series) -> dict[str, Any]:
    """Return the style of a point's spread."""
    return {"color": each.colour, "alpha": 0.3, "linewidth": 4, "solid_capstyle": "butt", "zorder": 2}


def _plain_numbers(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers instead of powers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _load(row: Row) -> float:
    return float(row.clients or row.rate or 0.0)


def _ticks(axes: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    named = dict(zip(places, texts, strict=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: named.get(value, "")))
