"""The command line: which commands there are. Their flags are generated from the configurations' fields.

`generate` and `plan-memory` are in generate.py, `serve`, `ps` and `stop` in server.py, `chat` in chat.py,
`explain` in explain.py, `bench run` and `bench report` in bench.py, `calibrate` and `simulate` in simulate.py, and
`tune` in tune.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

import splitfuse
from splitfuse.cli.bench import bench
from splitfuse.cli.chat import chat
from splitfuse.cli.explain import explain
from splitfuse.cli.flags import SAMPLING_HELP
from splitfuse.cli.generate import generate, plan_memory
from splitfuse.cli.server import ps, serve, stop
from splitfuse.cli.simulate import calibrate, simulate
from splitfuse.cli.tune import tune

__all__ = ["SAMPLING_HELP", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Dynamic SplitFuse serving of large language models.",
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(ps)
app.command()(stop)
app.command()(explain)
app.command("plan-memory")(plan_memory)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command()(simulate)
app.command()(tune)


def main() -> None:
    """Run the command line. A flag that is none ends it with status 2."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"splitfuse {splitfuse.__version__}")
        raise typer.Exit


@app.callback()
def _global_flags(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass
