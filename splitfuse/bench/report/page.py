"""A self-contained HTML report of results: figures as SVG, tables, settings of each system. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfuse.bench import metrics
from splitfuse.bench.report.style import as_svg, require_matplotlib
from splitfuse.bench.results import Results, load_order
from splitfuse.bench.summary import ITL_PERCENTS, TTFT_PERCENTS, Row, rows
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from splitfuse.bench.report.figures import Series

SCALING_SLA = 4.0
"""SLA in tokens/s of the figures of scaling."""
OWN_LINES = (
    "startup_seconds",
    "idle_resident_bytes",
    "resident_bytes",
    "command",
    "memory_plan",
    "engine",
    "parameters",
)
"""Entries of `about` that have a line of their own."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2933; background: #fff;
       margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 1080px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .2rem; padding-top: 1rem; border-top: 1px solid #dfe3e8; }
h3 { font-size: 1rem; margin: 2rem 0 .1rem; }
p { max-width: 46rem; margin: .3rem 0 .8rem; }
.lead, .note { color: #52606d; }
.note { font-size: .87rem; }
figure { margin: .4rem 0 1.2rem; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; }
th { color: #52606d; font-weight: 600; border-bottom: 1px solid #b6bec8; vertical-align: bottom; }
td.name, th.name { text-align: left; }
tr.first td { border-top: 1px solid #e6e9ed; }
td small { color: #7b8794; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em;
       box-sizing: border-box; }
.simulated { background: #fff !important; border: 2px solid; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.1rem; font-size: .86rem;
     margin: .4rem 0 1.2rem; }
dt { color: #52606d; } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f7f9; padding: .7rem .9rem; overflow-x: auto; border-radius: 6px; }
"""


def write_report(
    results: Sequence[Results], out: Path, *, slas: Sequence[float] = metrics.SLAS, title: str = "Benchmark results"
) -> None:
    """Write the page.

    Raises ConfigError if matplotlib is missing, if there is nothing to show, or if the file cannot be written.
    """
    require_matplotlib()
    results = [each for each in results if each.points]
    if not results or not slas:
        raise ConfigError("there is nothing to report: no file has a point, or --sla is empty")
    page = "".join(_page(results, slas, title))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def _page(results: Sequence[Results], slas: Sequence[float], title: str) -> Iterator[str]:
    from splitfuse.bench.report import figures

    colour_of = figures.colours([each.system for each in results])
    all_slas = sorted({*slas, SCALING_SLA})
    series = [figures.Series(each, tuple(rows(each, all_slas)), colour_of[each.system]) for each in results]
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    yield f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
    yield f"<h1>{escape(title)}</h1>\n"
    yield f'<p class="lead">{escape(_lead(results))}</p>\n'
    speeds = " or ".join(f"{speed:g}" for speed in sorted({each.prompt_speed for each in results}))
    yield (
        "<p><b>Goodput</b> is the requests/s which meet the SLA: the first token arrives within "
        f"prompt&nbsp;tokens&nbsp;/&nbsp;{speeds} seconds, and at every token the exponential moving average (span 16) "
        "of the inter-token latency is below 1&nbsp;/&nbsp;SLA seconds, for an SLA in tokens/s. Requests/s are counted "
        "by the clock, over a window in which the load is steady. Pale bars, and ± in tables, are the spread of "
        "repetitions.</p>\n"
    )
    for workload, same in _by_workload(series):
        yield from _workload(workload, same, slas)
    for size, what, heading in (
        (lambda r: r.replicas, "replicas", "Replicas"),
        (lambda r: r.tensor_parallel_size, "devices of one model", "Tensor parallel"),
    ):
        figure = figures.scaling(series, size, what, SCALING_SLA)
        if figure is not None:
            yield f"<h2>{heading}</h2>\n<p>Dotted: linear scaling.</p>\n"
            yield _figure(figure, f"Throughput against {what}.")
    yield "<h2>Settings of each system</h2>\n"
    for each in series:
        yield from _settings(each)
    yield f'<p class="note">Written by splitfuse, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>\n</body>\n</html>\n'


def _lead(results: Sequence[Results]) -> str:
    machines = {_machine(each.about["machine"]) for each in results if "machine" in each.about}
    systems = list(dict.fromkeys(each.system for each in results))
    return f"{', '.join(systems)}. " + ("; ".join(sorted(machines)) + "." if machines else "")


def _machine(machine: Any) -> str:
    if not isinstance(machine, Mapping):
        return str(machine)
    return (
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, {machine.get('system')}"
    )


def _by_workload(series: Sequence[Series]) -> Iterator[tuple[Mapping[str, Any], list[Series]]]:
    groups: dict[str, list[Series]] = {}
    for each in series:
        same = {name: value for name, value in each.results.workload.items() if name != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(each)
    for group in groups.values():
        yield group[0].results.workload, group


def _workload(workload: Mapping[str, Any], series: list[Series], slas: Sequence[float]) -> Iterator[str]:
    from splitfuse.bench.report import figures

    yield f"<h2>{escape(describe(workload))}</h2>\n"
    yield f'<p class="note">{escape(", ".join(f"{name} {_plain(value)}" for name, value in workload.items()))}</p>\n'
    drawn = figures.smallest(series)
    yield "<h3>Throughput and latency</h3>\n<p>Further right and down is better. Labels are numbers of clients.</p>\n"
    yield _figure(figures.throughput_latency(drawn), "Mean latency of a request against requests/s.")
    yield "<h3>Goodput (effective throughput)</h3>\n"
    yield _figure(figures.goodput(drawn, slas), "Goodput against clients.")
    yield "<h3>Inter-token latency</h3>\n"
    yield _figure(figures.token_latency(drawn), "Percentiles of the inter-token latency.")
    yield from _table(series, slas)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(workload: Mapping[str, Any]) -> str:
    """Return a heading for a workload."""
    kinds = {"chat": "Conversations", "prefix": "Shared prefixes", "trace": "A trace"}
    if "prompt" not in workload or "generate" not in workload:
        return kinds.get(str(workload.get("kind")), "A load")
    lengths = f"prompts of {workload['prompt']:g} tokens, answers of {workload['generate']:g}"
    kind = kinds.get(str(workload.get("kind")))
    return f"{kind}: {lengths}" if kind else lengths[0].upper() + lengths[1:]


def _figure(figure: Figure, alternative: str) -> str:
    return f'<figure role="img" aria-label="{escape(alternative)}">\n{as_svg(figure)}</figure>\n'


def _table(series: Sequence[Series], slas: Sequence[float]) -> Iterator[str]:
    """Yield the table: loads, and below each the systems."""
    heads = ["requests/s", "Little", *(f"goodput<br>at {each:g} tokens/s" for each in slas), "latency, s"]
    heads += [f"TTFT<br>P{percent}, s" for percent in TTFT_PERCENTS]
    heads += [f"ITL<br>P{percent}, ms" for percent in ITL_PERCENTS]
    yield '<div class="scroll"><table>\n<tr><th>clients</th><th class="name">system</th>'
    yield "".join(f"<th>{head}</th>" for head in (*heads, "tokens/s", "counted", "failed")) + "</tr>\n"
    loads = sorted({load_order(row.clients, row.rate) for each in series for row in each.rows})
    for load in loads:
        first = True
        for each in series:
            for row in each.rows:
                if load_order(row.clients, row.rate) == load:
                    yield _line(each, row, slas, first=first)
                    first = False
    yield "</table></div>\n"
    yield (
        '<p class="note">Little: clients divided by the mean latency, which the original reports as throughput; under '
        "a steady load it agrees with the clock. TTFT: time to first token. ITL: inter-token latency. Percentiles are "
        "over all repetitions together.</p>\n"
    )


def _line(each: Series, row: Row, slas: Sequence[float], *, first: bool) -> str:
    numbers = [str(row.throughput), "" if row.littles_law is None else f"{row.littles_law:.3g}"]
    numbers += [str(row.goodput[sla]) for sla in slas]
    numbers += [f"{row.latency:.3g}", *(f"{row.ttft[percent]:.3g}" for percent in TTFT_PERCENTS)]
    numbers += [f"{1e3 * row.itl[percent]:.3g}" for percent in ITL_PERCENTS]
    numbers += [f"{row.token_throughput.mean:.0f}", str(row.num_counted), str(row.num_failed or "")]
    cells = "".join(f"<td>{_pale_spread(number)}</td>" for number in numbers)
    load = f"<td>{escape(row.load) if first else ''}</td>"
    name = f'<td class="name">{_dot(each)}{escape(each.name)}</td>'
    return f"<tr{' class=first' if first else ''}>{load}{name}{cells}</tr>\n"


def _pale_spread(number: str) -> str:
    mean, plus_minus, spread = number.partition(" ±")
    return f"{mean} <small>±{spread}</small>" if plus_minus else mean


def _dot(each: Series) -> str:
    kind = " simulated" if each.results.simulated else ""
    return f'<span class="dot{kind}" style="background:{each.colour};border-color:{each.colour}"></span>'


def _settings(each: Series) -> Iterator[str]:
    about = each.results.about
    lines: dict[str, str] = {}
    if "startup_seconds" in about:
        lines["start-up"] = f"{about['startup_seconds']:.1f} s" if _is_number(about["startup_seconds"]) else ""
    for name, what in (("idle_resident_bytes", "memory, idle"), ("resident_bytes", "memory, after the load")):
        if _is_number(about.get(name)):
            lines[what] = f"{about[name] / 1e9:.2f} GB"
    for name in ("engine", "parameters"):
        if isinstance(about.get(name), Mapping):
            lines[name] = ", ".join(f"{key} {value}" for key, value in about[name].items() if value is not None)
    for name, value in about.items():
        if name not in OWN_LINES and value is not None:
            if name == "machine":
                text = _machine(value)
            elif isinstance(value, Mapping):
                text = ", ".join(f"{key} {part}" for key, part in value.items())
            else:
                text = str(value)
            lines[name.replace("_", " ")] = text
    yield f"<h3>{_dot(each)}{escape(each.name)}</h3>\n"
    yield f'<p class="note">{escape(describe(each.results.workload))}</p>\n<dl>\n'
    yield (
        "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in lines.items() if text) + "</dl>\n"
    )
    if "command" in about:
        yield f"<pre>{escape(str(about['command']))}</pre>\n"
    if about.get("memory_plan"):
        yield f"<pre>{escape(str(about['memory_plan']))}</pre>\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
