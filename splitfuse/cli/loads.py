"""What the commands about loads share: flags that are read, files that are written, the table of results."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfuse.cli.flags import given
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.measure import MakeWorkload
    from splitfuse.bench.results import Results

CLIENTS = "1,2,4,8,16,32"
SLAS = "2,4,6"


def workload_maker(
    *,
    prompt: float | None,
    generate: float | None,
    deviation: float | None,
    turns: int | None,
    prefix: int | None,
    prefixes: int | None,
    trace: Path | None,
    seed: int,
) -> MakeWorkload:
    """What the flags ask for, once the target is known. Raises ConfigError for flags that do not go together."""
    from splitfuse.bench.target import Target
    from splitfuse.bench.workload import Chat, Independent, Lengths, SharedPrefix, Trace, Workload

    kinds = [name for name, value in (("turns", turns), ("prefix", prefix), ("trace", trace)) if value is not None]
    if len(kinds) > 1:
        raise ConfigError(f"--{kinds[0]} and --{kinds[1]} are two workloads: give one")
    if prefixes is not None and prefix is None:
        raise ConfigError("--prefixes says how many different ones of --prefix there are: give that too")
    given_lengths = {"prompt": prompt, "generate": generate, "deviation": deviation}
    for name, value in given_lengths.items():
        if trace is not None and value is not None:
            raise ConfigError(f"--{name} is in the trace's lines: leave it out, or --trace")
    usual = Lengths(**{"prompt": 512.0, "generate": 64.0, **given(given_lengths)})

    def make(target: Target) -> Workload:
        if trace is not None:
            return Trace.read(trace, target.vocabulary, seed=seed, room=target.room)
        lengths = dataclasses.replace(usual, room=target.room)
        if turns is not None:
            return Chat(lengths, target.answer_vocabulary, turns, seed)
        if prefix is not None:
            return SharedPrefix(lengths, target.vocabulary, prefix, prefixes or 1, seed)
        return Independent(lengths, target.vocabulary, seed)

    return make


def numbers(name: str, text: str | None, kind: Any) -> tuple[Any, ...]:
    if text is None:
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} takes numbers with commas between them, such as 1,2,4, not {text!r}") from None


def promises(text: str) -> tuple[float, ...]:
    slas = numbers("sla", text, float)
    if not all(0 < each < float("inf") for each in slas):
        raise ConfigError(f"--sla takes tokens a second above 0, not {text!r}")
    return slas


def check_writable(out: Path) -> None:
    """Before anything is measured."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: name a file in a folder that exists")


def save_results(results: Results, out: Path) -> None:
    from splitfuse.bench.results import save

    try:
        save(results, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def print_table(results: Results, slas: tuple[float, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from splitfuse.bench.summary import rows

    table = Table(title=results.system, title_justify="left", header_style="bold")
    open_loop = bool(results.points) and results.points[0].clients is None
    table.add_column("arrivals" if open_loop else "clients", justify="right")
    effective = [f"kept at {sla:g}" for sla in slas]
    first, gap = ("first\ntoken P50", "P95"), ("token\nP50 ms", "P95", "P99")
    for name in ("requests/s", "tokens/s", "Little", *effective, *first, *gap, "failed"):
        table.add_column(name, justify="right")
    for row in rows(results, slas):
        table.add_row(
            row.load,
            str(row.throughput),
            f"{row.token_throughput.mean:.1f}",
            "" if row.littles_law is None else f"{row.littles_law:.3g}",
            *(str(row.effective[sla]) for sla in slas),
            *(f"{row.first_token[percent]:.3g} s" for percent in (50, 95)),
            *(f"{1e3 * row.gaps[percent]:.3g}" for percent in (50, 95, 99)),
            f"{row.num_failed} of {row.num_counted}" if row.num_failed else "",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
