"""Flags, files and tables that the commands about loads share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from splitfuse.cli.flags import given
from splitfuse.config import setting
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.measure import Loads, MakeWorkload
    from splitfuse.bench.results import Results

CLIENTS = "1,2,4,8,16,32"
SPEEDS = "2,4,6"

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
    prompt_speed: float = setting(512.0, "Prompt speed of the SLO in tokens/s, which gives the TTFT target.")
    slo: str = setting(SPEEDS, "SLOs of the table, in tokens/s: goodput is reported for each.")

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


def parse_speeds(text: str) -> tuple[float, ...]:
    """Parse --slo. Raises ConfigError for speeds that are not positive."""
    speeds = numbers("slo", text, float)
    if not all(0 < each < float("inf") for each in speeds):
        raise ConfigError(f"--slo {text!r} must be positive speeds in tokens/s, such as 2,4,6")
    return speeds


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
