"""Holds the flags that the commands about loads share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.bench.workload import Loads, TokenIds, Trace
from splitfuse.cli.flags import given, numbers, take
from splitfuse.config.engine import TARGETS, SchedulerConfig
from splitfuse.config.fields import setting
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.measure import MakeWorkload
    from splitfuse.recording.format import Recording

CLIENTS = "1,2,4,8,16,32"
SPEEDS = "2,4,6"
SloFlag = Annotated[str, typer.Option(help="SLOs in tokens/s for which goodput is shown.")]
MemorySpeedFlag = Annotated[
    float, typer.Option(help="Bytes/s of a simulated --kv-memory-tier, and of copies into and out of the KV cache.")
]
DiskSpeedFlag = Annotated[float, typer.Option(help="Bytes/s of a simulated --kv-disk-tier.")]


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """Holds the flags of a workload, common to `bench run`, `simulate` and `tune`."""

    prompt: float | None = setting(None, "Mean prompt length in tokens (default: 512).")
    generate: float | None = setting(None, "Mean answer length in tokens (default: 64).")
    deviation: float | None = setting(None, "Standard deviation of both, as a fraction of the mean (default: 0.3).")
    turns: int | None = setting(None, "Turns of each conversation; --prompt is the new part of a turn.")
    think: float | None = setting(None, "Mean seconds from an answer to the next turn (default: 0).")
    prefix: int | None = setting(None, "Length in tokens of a shared prefix; --prompt follows it.")
    prefixes: int | None = setting(None, "Number of different prefixes (default: 1).")
    trace: Path | None = setting(  # noqa: RUF009 - a field, like the others
        None, "A .jsonl file of requests, or a recording, to replay; at its recorded times (at), if it has any."
    )
    seed: int = setting(0, "Seed of prompts, lengths and arrivals.")

    def maker(self, recording: Recording | None = None) -> MakeWorkload:
        """Return a maker of the workload for a target. `recording` is `trace` if it is open already: it may be growing.

        Raises ConfigError for flags that exclude each other.
        """
        from splitfuse.bench.measure import workload_maker

        return workload_maker(given(vars(self)) | ({} if recording is None else {"trace": recording}))


def take_loads(flags: dict[str, Any], trace: Path | Recording | None, *, repeat: int) -> Loads:
    """Take the loads out of all flags of a command; by default CLIENTS, or the times of the trace if it has any.

    Raises ConfigError for invalid ones.
    """
    if (
        flags["clients"] is None
        and flags["rate"] is None
        and (trace is None or not Trace.read(trace, TokenIds(2)).is_timed)
    ):
        flags["clients"] = CLIENTS
    return replace(take(Loads, flags), repeat=repeat)


def parse_speeds(text: str) -> tuple[float, ...]:
    """Parse --slo. Raises ConfigError for speeds that are not positive."""
    speeds = numbers("slo", text, float)
    if not all(0 < each < float("inf") for each in speeds):
        raise ConfigError(f"--slo {text!r} must be positive speeds in tokens/s, such as 2,4,6")
    return speeds


def parse_targets(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return the targets among flags, for judging requests by them. Raises ConfigError for invalid ones."""
    return SchedulerConfig(**given({name: flags[name] for name in TARGETS})).targets


def check_writable(out: Path | None) -> None:
    """Raise a ConfigError, before anything is measured, if the file cannot be written."""
    if out is None:
        return
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: name a file in an existing folder")


def unit(load: WorkloadFlags) -> str:
    """Return what arrives at a rate of such a load."""
    return "requests" if load.turns is None else "conversations"


def load_text(load: WorkloadFlags) -> str:
    """Describe the requests of a load."""
    if load.trace is not None:
        return f"the prompts and answers of {load.trace.name}"
    prefix = "" if load.prefix is None else f"a shared prefix of {load.prefix} tokens and "
    new = "turns of about" if load.turns is not None else "prompts of about"
    return f"{prefix}{new} {load.prompt or 512:.6g} tokens and answers of {load.generate or 64:.6g}"
