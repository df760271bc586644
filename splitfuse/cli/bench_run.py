"""`splitfuse bench run`: drive a server or an engine with a load, and measure it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from splitfuse.cli.flags import given, with_flags
from splitfuse.cli.loads import LoadFlags, check_writable, parse_slas, print_table, save_results
from splitfuse.config import EngineConfig
from splitfuse.deploy.daemon import KEY_VARIABLES
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.target import Target


@with_flags(also={"Load": LoadFlags})
def bench_run(
    url: Annotated[
        str | None, typer.Option(help="Drive the server there; left out, an engine is loaded here by the engine flags.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="For --url.", envvar=KEY_VARIABLES["api_key"])] = None,
    replicas: Annotated[int, typer.Option(help="Engines here, a process each, which share the cores.")] = 1,
    policy: Annotated[
        str, typer.Option(help="How an engine here composes passes: splitfuse, prefill-first, orca or static.")
    ] = "splitfuse",
    repeat: Annotated[int, typer.Option(help="Times that each load is measured: the spread is told.")] = 2,
    ignore_eos: Annotated[bool, typer.Option(help="Generate on after the model's end token.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write everything there, as JSON, after each load.")] = None,
    label: Annotated[str | None, typer.Option(help="What to call it in legends.")] = None,
    about: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE to keep with the results; may be given several times.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="With --url: prompts are of token ids below this, if the server does not say.")
    ] = None,
    pid: Annotated[int | None, typer.Option(help="With --url: the server's process here, for its memory.")] = None,
    timeout: Annotated[float, typer.Option(help="With --url: seconds that an answer may take.")] = 600.0,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Drive a load and tell what came: by the clock, with steady clients, warm-up dropped.

    Prompts are random and all different, lengths normal, answers greedy. docs/bench.md says what each figure means.
    """
    from splitfuse.bench.measure import measure
    from splitfuse.runtime.environment import environment_info

    load = LoadFlags.taken_from(flags)
    loads, slas = load.loads(repeat=repeat), parse_slas(load.sla)
    notes = _notes(about or [])
    make_workload = load.workload_maker()
    keys = (api_key or "").split()
    target: Target
    if url is not None:
        from splitfuse.bench.endpoint import Endpoint

        _refuse_engine_flags(flags, replicas, policy)
        target = Endpoint(
            url,
            model=flags["model"],
            api_key=keys[0] if keys else None,
            ignore_eos=ignore_eos,
            vocab_size=vocab_size,
            timeout=timeout,
            pid=_own_pid(url) if pid is None else pid,
        )
    else:
        from splitfuse.bench.target import EngineTarget

        for name, value in (("vocab-size", vocab_size), ("pid", pid)):
            if value is not None:
                raise ConfigError(f"--{name} is for --url: leave it out")
        target = EngineTarget(given(flags), policy=policy, replicas=replicas, ignore_eos=ignore_eos)
    if out is not None:
        check_writable(out)
    results = asyncio.run(
        measure(
            target,
            make_workload,
            loads,
            system=label or _default_label(url, flags, policy),
            replicas=replicas,
            about={**environment_info(), **notes},
            on_start=_tell_target,
            on_point=lambda results: None if out is None else save_results(results, out),
            progress=not quiet and sys.stderr.isatty(),
        )
    )
    print_table(results, slas)
    if out is not None:
        print(f"splitfuse: {out} has every request's timings", file=sys.stderr)


def _refuse_engine_flags(flags: dict[str, Any], replicas: int, policy: str) -> None:
    for name, (_, field) in EngineConfig.setting_fields().items():
        if name != "model" and flags[name] != field.default:
            raise ConfigError(f"--{name.replace('_', '-')} is for an engine loaded here: leave it out, or --url")
    if replicas != 1:
        raise ConfigError("--replicas is for engines here: leave it out, or --url")
    if policy != "splitfuse":
        raise ConfigError("--policy is for an engine here: leave it out, or --url")


def _own_pid(url: str) -> int | None:
    """Of the server, if it is one of ours on this machine."""
    from splitfuse.deploy.registry import deployments

    address = url.rstrip("/").removesuffix("/v1")
    return next((deployment.pid for deployment in deployments() if deployment.url == address), None)


def _default_label(url: str | None, flags: dict[str, Any], policy: str) -> str:
    if url is not None:
        return urlsplit(url).netloc
    budget, usual = flags["max_num_batched_tokens"], EngineConfig().scheduler.max_num_batched_tokens
    parts = [policy if flags["quantization"] is None else f"{policy} {flags['quantization']}"]
    return ", ".join(parts if budget == usual else [*parts, f"budget {budget}"])


def _notes(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE; a value that reads as a number is one."""
    notes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--about takes NAME=VALUE, not {pair!r}")
        try:
            notes[name] = float(value)
        except ValueError:
            notes[name] = value
    return notes


def _tell_target(target: Target) -> None:
    """What was found out about it, before the load begins."""
    said = {name: value for name, value in target.about.items() if name not in ("memory_plan", "engine") and value}
    if "startup_seconds" in said:
        said["startup_seconds"] = round(said["startup_seconds"], 2)
    print("\n".join(f"{name:<16} {value}" for name, value in said.items()), file=sys.stderr, flush=True)
