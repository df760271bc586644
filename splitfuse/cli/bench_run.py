"""`splitfuse bench run`: drive a server or an engine with a load, and measure it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from splitfuse.bench.workload import Loads
from splitfuse.cli.flags import ApiKeyFlag, changed, flag_of, given, take, with_flags
from splitfuse.cli.loads import SPEEDS, SloFlag, WorkloadFlags, check_writable, parse_speeds, parse_targets, take_loads
from splitfuse.cli.tables import print_results
from splitfuse.config.engine import TARGETS, EngineConfig
from splitfuse.deploy.daemon import first_key
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.target import Target


@with_flags(also=(WorkloadFlags, Loads))
def bench_run(
    url: Annotated[
        str | None,
        typer.Option(help="Server to measure (default: an engine in this process, by the engine flags)."),
    ] = None,
    api_key: ApiKeyFlag = None,
    replicas: Annotated[int, typer.Option(help="Engines that share the cores, each in its own process.")] = 1,
    policy: Annotated[
        str,
        typer.Option(help="Policy of an engine in this process: splitfuse, prefill-first, orca or static."),
    ] = "splitfuse",
    repeat: Annotated[int, typer.Option(help="Repetitions of each load; the table shows their spread.")] = 2,
    ignore_eos: Annotated[bool, typer.Option(help="Continue after the model's EOS token.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write all results to this JSON file, after each load.")] = None,
    label: Annotated[str | None, typer.Option(help="Name in legends.")] = None,
    about: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE to store with the results; may be repeated.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="With --url: number of token ids, if the server does not report it."),
    ] = None,
    pid: Annotated[int | None, typer.Option(help="With --url: process of the server, to report its memory.")] = None,
    timeout: Annotated[float, typer.Option(help="With --url: maximum seconds of an answer.")] = 600.0,
    slo: SloFlag = SPEEDS,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Measure throughput, goodput and latency under a load: with steady clients, by the clock, without the warm-up.

    Prompts are random and distinct, lengths normally distributed, answers greedy. docs/bench.md explains each figure.
    With --ttft, --itl or --tpot, goodput is shown for that SLO, too; of a --url they judge the answers only.
    """
    from splitfuse.bench.measure import measure
    from splitfuse.bench.results import save
    from splitfuse.runtime.environment import environment_info

    workload = take(WorkloadFlags, flags)
    loads, speeds = take_loads(flags, workload.trace, repeat=repeat), parse_speeds(slo)
    targets = parse_targets(flags)
    notes = _notes(about or [])
    make_workload = workload.maker()
    target: Target
    if url is not None:
        from splitfuse.bench.endpoint import Endpoint

        _refuse_engine_flags(flags, replicas, policy)
        target = Endpoint(
            url,
            model=flags["model"],
            api_key=first_key(api_key),
            ignore_eos=ignore_eos,
            vocab_size=vocab_size,
            timeout=timeout,
            pid=_own_pid(url) if pid is None else pid,
        )
    else:
        from splitfuse.bench.target import EngineTarget

        for name, value in (("vocab_size", vocab_size), ("pid", pid)):
            if value is not None:
                raise ConfigError(f"{flag_of(name)} requires --url")
        config = EngineConfig.from_settings(given(flags))
        target = EngineTarget(config, policy=policy, replicas=replicas, ignore_eos=ignore_eos)
    check_writable(out)
    results = asyncio.run(
        measure(
            target,
            make_workload,
            loads,
            system=label or _default_label(url, flags, policy),
            replicas=replicas,
            about={**environment_info(), **notes},
            on_start=_print_target,
            on_point=lambda results: None if out is None else save(results, out),
            progress=not quiet and sys.stderr.isatty(),
        )
    )
    print_results(results, speeds, targets)
    if out is not None:
        print(f"splitfuse: results written to {out}", file=sys.stderr)


def _refuse_engine_flags(flags: dict[str, Any], replicas: int, policy: str) -> None:
    settings = {name: flags[name] for name in EngineConfig.setting_fields() if name not in ("model", *TARGETS)}
    for name in changed(settings):
        raise ConfigError(f"{flag_of(name)} and --url are mutually exclusive: it configures an engine here")
    if replicas != 1:
        raise ConfigError("--replicas and --url are mutually exclusive")
    if policy != "splitfuse":
        raise ConfigError("--policy and --url are mutually exclusive")


def _own_pid(url: str) -> int | None:
    """Return the process of the server, if it is one of this user's deployments."""
    from splitfuse.deploy.registry import deployments

    address = url.rstrip("/").removesuffix("/v1")
    return next((deployment.pid for deployment in deployments() if deployment.url == address), None)


def _default_label(url: str | None, flags: dict[str, Any], policy: str) -> str:
    if url is not None:
        return urlsplit(url).netloc
    budget, default = flags["max_num_batched_tokens"], EngineConfig().scheduler.max_num_batched_tokens
    parts = [policy if flags["quantization"] is None else f"{policy} {flags['quantization']}"]
    return ", ".join(parts if budget == default else [*parts, f"budget {budget}"])


def _notes(pairs: list[str]) -> dict[str, Any]:
    """Parse NAME=VALUE pairs; numeric values become numbers."""
    notes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--about {pair!r} must be NAME=VALUE, such as price=3")
        try:
            notes[name] = float(value)
        except ValueError:
            notes[name] = value
    return notes


def _print_target(target: Target) -> None:
    """Print the facts about the target, before the load begins."""
    facts = {name: value for name, value in target.about.items() if name not in ("memory_plan", "engine") and value}
    if "startup_seconds" in facts:
        facts["startup_seconds"] = round(facts["startup_seconds"], 2)
    print("\n".join(f"{name:<16} {value}" for name, value in facts.items()), file=sys.stderr, flush=True)
