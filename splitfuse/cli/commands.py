"""Joins all commands in one command line."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from splitfuse.cli.bench_report import bench_report
from splitfuse.cli.bench_run import bench_run
from splitfuse.cli.calibrate import calibrate
from splitfuse.cli.chat import chat
from splitfuse.cli.drain import drain
from splitfuse.cli.engine import engine
from splitfuse.cli.explain import explain
from splitfuse.cli.gateway import gateway
from splitfuse.cli.generate import generate
from splitfuse.cli.models import models
from splitfuse.cli.plan_memory import plan_memory
from splitfuse.cli.ps import ps
from splitfuse.cli.rank import rank
from splitfuse.cli.replay import replay
from splitfuse.cli.scale import scale
from splitfuse.cli.serve import serve
from splitfuse.cli.simulate import simulate
from splitfuse.cli.stop import stop
from splitfuse.cli.top import top
from splitfuse.cli.trace import trace
from splitfuse.cli.tune import tune
from splitfuse.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Dynamic SplitFuse serving of large language models.",
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(engine)
app.command()(gateway)
app.command()(rank)
app.command()(ps)
app.command()(stop)
app.command()(drain)
app.command()(scale)
app.command()(explain)
app.command()(top)
app.command()(trace)
app.command()(replay)
app.command()(models)
app.command("plan-memory")(plan_memory)
bench = typer.Typer(no_args_is_help=True, help="Measure a server or an engine, and report.")
bench.command("run")(bench_run)
bench.command("report")(bench_report)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command()(simulate)
app.command()(tune)


def run() -> None:
    """Run the command line. An unknown flag ends it with status 2."""
    _mend_standard_streams()
    app()


def _mend_standard_streams() -> None:
    """Open the null device for each standard stream that is closed, since the next file or connection would take its
    place, and let no character raise that a stream cannot hold.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if fd else "replace")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"splitfuse {__version__}")
        raise typer.Exit


@app.callback()
def _global_flags(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass
