"""What the commands about loads share: flags that are read, files that are written, the table of results."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

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


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """What is asked: what `bench run`, `simulate` and `tune` have in common."""

    prompt: float | None = setting(None, "Mean tokens of a prompt; left out, 512.")
    generate: float | None = setting(None, "Mean tokens of an answer; left out, 64.")
    deviation: float | None = setting(None, "Standard deviation of both, as a share of the mean; left out, 0.3.")
    turns: int | None = setting(None, "Conversations of so many turns: --prompt is what is new in each.")
    prefix: int | None = setting(None, "So many tokens that prompts begin with together: --prompt comes after them.")
    prefixes: int | None = setting(None, "Different ones of these; left out, 1.")
    trace: Path | None = setting(  # noqa: RUF009 - a field, like the others
        None, "A .jsonl file of requests to repeat; with times (at), as they came."
    )
    seed: int = setting(0, "Of prompts, lengths and arrivals.")

    @classmethod
    def taken_from(cls, flags: dict[str, Any]) -> Self:
        """Out of all flags of a command, which keeps the rest."""
        return cls(**{field.name: flags.pop(field.name) for field in dataclasses.fields(cls)})

    def workload_maker(self) -> MakeWorkload:
        """The workload, once the target is known. Raises ConfigError for flags that do not go together."""
        from splitfuse.bench.target import Target
        from splitfuse.bench.workload import Chat, Independent, Lengths, SharedPrefix, Trace, Workload

        turns, prefix, trace = self.turns, self.prefix, self.trace
        kinds = [name for name in ("turns", "prefix", "trace") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ConfigError(f"--{kinds[0]} and --{kinds[1]} are two workloads: give one")
        if self.prefixes is not None and prefix is None:
            raise ConfigError("--prefixes says how many different ones of --prefix there are: give that too")
        lengths = given({name: getattr(self, name) for name in ("prompt", "generate", "deviation")})
        if trace is not None and lengths:
            raise ConfigError(f"--{next(iter(lengths))} is in the trace's lines: leave it out, or --trace")
        usual = Lengths(**{"prompt": 512.0, "generate": 64.0, **lengths})

        def make(target: Target) -> Workload:
            if trace is not None:
                return Trace.read(trace, target.vocabulary, seed=self.seed, room=target.room)
            lengths = dataclasses.replace(usual, room=target.room)
            if turns is not None:
                return Chat(lengths, target.answer_vocabulary, turns, self.seed)
            if prefix is not None:
                return SharedPrefix(lengths, target.vocabulary, prefix, self.prefixes or 1, self.seed)
            return Independent(lengths, target.vocabulary, self.seed)

        return make


@dataclass(frozen=True, kw_only=True)
class LoadFlags(WorkloadFlags):
    """Which load: what `bench run` and `simulate` have in common."""

    clients: str | None = setting(None, f"Closed loops of so many clients, one after the other; left out, {CLIENTS}.")
    rate: str | None = setting(None, "Open loops instead: so many requests a second at random (Poisson), such as 1,2.")
    requests: int | None = setting(None, "That count at each load; left out, 4 for each client and 32; 100 at a rate.")
    spacing: float | None = setting(
        None, "Seconds between the starts of clients; left out, a quarter of a request's time alone."
    )
    prompt_speed: float = setting(512.0, "Prompt tokens a second, by which a first token counts as promised.")
    sla: str = setting(SLAS, "Tokens a second that are promised, for the table.")

    def loads(self, *, repeat: int) -> Loads:
        """Raises ConfigError for what is none."""
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


def numbers(name: str, text: str | None, kind: Any) -> tuple[Any, ...]:
    if text is None:
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} takes numbers with commas between them, such as 1,2,4, not {text!r}") from None


def parse_slas(text: str) -> tuple[float, ...]:
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


def show(table: Table) -> None:
    """To a terminal at its width, to a pipe or file with room for all of it."""
    _console().print(table)


def print_table(results: Results, slas: tuple[float, ...]) -> None:
    """The table of results that `bench run` and `simulate` print; in two, what was served and how late, where the
    terminal is too narrow for one.
    """
    console = _console()
    load, served, late = _columns(results, slas)
    whole = _table(results.system, [load, *served, *late])
    if console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(results.system, [load, *served]))
        console.print(_table(None, [load, *late]))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


Column: TypeAlias = tuple[str, list[str]]
"""A head, and the values below it, one for each load."""


def _columns(results: Results, slas: tuple[float, ...]) -> tuple[Column, list[Column], list[Column]]:
    """The loads, what was served, and how late."""
    from splitfuse.bench.summary import rows

    found = rows(results, slas)
    open_loop = bool(results.points) and results.points[0].clients is None
    load = ("arrivals" if open_loop else "clients", [row.load for row in found])
    served = [
        ("requests/s", [str(row.throughput) for row in found]),
        ("tokens/s", [f"{row.token_throughput.mean:.1f}" for row in found]),
        ("Little", ["" if row.littles_law is None else f"{row.littles_law:.3g}" for row in found]),
        *((f"kept at {sla:g}", [str(row.effective[sla]) for row in found]) for sla in slas),
    ]
    late = [
        *(
            (head, [f"{row.first_token[percent]:.3g} s" for row in found])
            for head, percent in (("first\ntoken P50", 50), ("P95", 95))
        ),
        *(
            (head, [f"{1e3 * row.gaps[percent]:.3g}" for row in found])
            for head, percent in (("token\nP50 ms", 50), ("P95", 95), ("P99", 99))
        ),
        ("failed", [f"{row.num_failed} of {row.num_counted}" if row.num_failed else "" for row in found]),
    ]
    return load, served, late


def _table(title: str | None, columns: list[Column]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for head, _ in columns:
        table.add_column(head, justify="right")
    for values in zip(*(values for _, values in columns), strict=True):
        table.add_row(*values)
    return table
