"""Prints the tables of all commands, at the width of the terminal, or 160 columns wide in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from splitfuse.bench.results import Results

PAGE_ONLY = ("latency", "ITL\nP90 ms", "counted")
"""Columns of results for which a terminal has no room."""


def make_table(
    title: str | None, heads: Iterable[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = ()
) -> Table:
    """Return a table of numbers; the columns `left` are text."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def console() -> Console:
    """Return the console that tables are printed to."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def print_results(results: Results, speeds: Sequence[float], targets: Mapping[str, str]) -> None:
    """Print the results of `bench run` or `simulate`; as several tables, latency apart from throughput and, if that is
    not enough, goodput from both, on a narrow terminal.
    """
    from splitfuse.bench.summary import cells, rows

    found = rows(results, speeds, targets)
    load = "arrivals" if found and found[0].clients is None else "clients"
    lines = [{load: row.load, **cells(row, speeds)} for row in found]
    heads = [head for head in (lines[0] if lines else (load,)) if head not in PAGE_ONLY]

    def table(title: str | None, heads: Sequence[str]) -> Table:
        return make_table(title, heads, [[line[head] for head in heads] for line in lines])

    target, parts = console(), [heads]

    def fits(heads: Sequence[str]) -> bool:
        wide = target.options.update(max_width=1000)
        return target.measure(table(None, heads), options=wide).maximum <= target.width

    for beginning in ("TTFT", "goodput"):
        if all(map(fits, parts)):
            break
        cut = next(place for place, head in enumerate(parts[0]) if head.startswith(beginning))
        parts = [parts[0][:cut], [load, *parts[0][cut:]], *parts[1:]]
    for part in parts:
        target.print(table(results.system if part is parts[0] else None, part))
