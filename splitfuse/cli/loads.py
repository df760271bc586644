"""Flags, files and tables that the commands about loads share."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from splitfuse.cli.flags import given
from splitfuse.config import setting
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from splitfuse.bench.measure import Loads, MakeWorkload
    from splitfuse.bench.results import Results

CLIENTS = "1,2,4,8,16,32"
SLAS = "2,4,6"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """Flags of a workload: common to `bench run`, `simulate` and `tune`."""

    prompt: float | None = setting(None, "Mean prompt length in tokens (default: 512).")
    generate: float | None = setting(None, "Mean answer length in tokens (default: 64).")
    deviation: float | None = setting(None, "Standard deviation of both, as a fraction of the mean (default: 0.3).")
    turns: int | None = setting(None, "Turns of each conversation; --prompt is the new part of a turn.")
    prefix: int | None = setting(None, "Length in tokens of a shared prefix; --prompt follows it.")
    prefixes: int | None = setting(None, "Number of different prefixes (default: 1).")
    trace: Path | None = setting(  # noqa: RUF009 - a field, like the others
        None, "A .jsonl file of requests to replay; at its recorded times (at), if it has any."
    )
    seed: int = setting(0, "Seed of prompts, lengths and arrivals.")

    @classmethod
    def taken_from(cls, flags: dict[str, Any]) -> Self:
        """Take these flags out of all flags of a command."""
        return cls(**{field.name: flags.pop(field.name) for field in dataclasses.fields(cls)})

    def workload_maker(self) -> MakeWorkload:
        """Return a maker of the workload for a target. Raises ConfigError for flags that exclude each other."""
        from splitfuse.bench.target import Target
        from splitfuse.bench.workload import Lengths, Trace, Workload, workload_from

        trace = self.trace
        kinds = [name for name in ("turns", "prefix", "trace") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ConfigError(f"--{kinds[0]} and --{kinds[1]} are mutually exclusive workloads")
        if self.prefixes is not None and self.prefix is None:
            raise ConfigError("--prefixes requires --prefix, the length of each prefix")
        lengths = given({name: getattr(self, name) for name in ("prompt", "generate", "deviation")})
        if trace is not None and lengths:
            raise ConfigError(f"--{next(iter(lengths))} and --trace are mutually exclusive: a trace has lengths")
        default = Lengths(**{"prompt": 512.0, "generate": 64.0, **lengths})

        def make(target: Target) -> Workload:
            if trace is not None:
                return Trace.read(trace, target.vocabulary, seed=self.seed, room=target.room)
            lengths = dataclasses.replace(default, room=target.room)
            return workload_from(dataclasses.asdict(self), lengths, target.vocabulary, target.answer_vocabulary)

        return make


@dataclass(frozen=True, kw_only=True)
class LoadFlags(WorkloadFlags):
    """Flags of a workload and its loads: common to `bench run` and `simulate`."""

    clients: str | None = setting(None, f"Closed loops: numbers of clients, one after the other (default: {CLIENTS}).")
    rate: str | None = setting(None, "Open loops: arrival rates in requests/s (Poisson), such as 0.5,1.")
    requests: int | None = setting(None, "Requests that count at each load (default: 4 per client plus 32, or 100).")
    spacing: float | None = setting(
        None, "Seconds between the starts of clients (default: a quarter of a lone request's latency)."
    )
    prompt_speed: float = setting(512.0, "Prompt speed of the SLA in tokens/s, which gives the TTFT target.")
    sla: str = setting(SLAS, "SLAs of the table, in tokens/s: goodput is reported for each.")

    def loads(self, *, repeat: int) -> Loads:
        """Return the loads. Raises ConfigError for invalid ones."""
        from splitfuse.bench.measure import Loads

        clients = self.clients
        if clients is None and self.rate is None and (self.trace is None or not _is_timed(self.trace)):
            clients = CLIENTS
        return Loads(
            clients=numbers("clients", clients, int),
            rates=numbers("rate", self.rate, float),
            requests=self.requests,
            repeat=repeat,
            spacing=self.spacing,
            prompt_speed=self.prompt_speed,
        )


def _is_timed(trace: Path) -> bool:
    from splitfuse.bench.workload import TokenIds, Trace

    return Trace.read(trace, TokenIds(2)).is_timed


def numbers(name: str, text: str | None, kind: type[Number]) -> tuple[Number, ...]:
    """Parse comma-separated numbers of the flag `name`; empty for None."""
    if text is None:
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} {text!r} must be comma-separated numbers, such as 1,2,4") from None


def parse_slas(text: str) -> tuple[float, ...]:
    """Parse --sla. Raises ConfigError for speeds that are not positive."""
    slas = numbers("sla", text, float)
    if not all(0 < each < float("inf") for each in slas):
        raise ConfigError(f"--sla {text!r} must be positive speeds in tokens/s, such as 2,4,6")
    return slas


def check_writable(out: Path) -> None:
    """Raise a ConfigError, before anything is measured, if the file cannot be written."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: name a file in an existing folder")


def save_results(results: Results, out: Path) -> None:
    """Write results. Raises ConfigError if that fails."""
    from splitfuse.bench.results import save

    try:
        save(results, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def show(table: Table) -> None:
    """Print a table: at the width of the terminal, or 160 columns wide."""
    _console().print(table)


def print_table(results: Results, slas: tuple[float, ...]) -> None:
    """Print the results of `bench run` or `simulate`; as two tables, throughput and latency, on a narrow terminal."""
    console = _console()
    load, throughput, latency = _columns(results, slas)
    whole = _table(results.system, [load, *throughput, *latency])
    if console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(results.system, [load, *throughput]))
        console.print(_table(None, [load, *latency]))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


Column: TypeAlias = tuple[str, list[str]]
"""A heading, and a value for each load."""


def _columns(results: Results, slas: tuple[float, ...]) -> tuple[Column, list[Column], list[Column]]:
    """Return the columns of loads, of throughput and of latency."""
    from splitfuse.bench.summary import rows

    found = rows(results, slas)
    open_loop = bool(results.points) and results.points[0].clients is None
    load = ("arrivals" if open_loop else "clients", [row.load for row in found])
    throughput = [
        ("requests/s", [str(row.throughput) for row in found]),
        ("tokens/s", [f"{row.token_throughput.mean:.1f}" for row in found]),
        ("Little", ["" if row.littles_law is None else f"{row.littles_law:.3g}" for row in found]),
        *((f"goodput\nat {sla:g}", [str(row.goodput[sla]) for row in found]) for sla in slas),
    ]
    latency = [
        *(
            (head, [f"{row.ttft[percent]:.3g} s" for row in found])
            for head, percent in (("TTFT\nP50", 50), ("P95", 95))
        ),
        *(
            (head, [f"{1e3 * row.itl[percent]:.3g}" for row in found])
            for head, percent in (("ITL\nP50 ms", 50), ("P95", 95), ("P99", 99))
        ),
        ("failed", [f"{row.num_failed} of {row.num_counted}" if row.num_failed else "" for row in found]),
    ]
    return load, throughput, latency


def _table(title: str | None, columns: list[Column]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for head, _ in columns:
        table.add_column(head, justify="right")
    for values in zip(*(values for _, values in columns), strict=True):
        table.add_row(*values)
    return table
