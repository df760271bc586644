"""`splitfuse bench report`: one HTML page from the results of measurements and simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfuse.cli.flags import cli_errors
from splitfuse.cli.loads import SLAS, check_writable, parse_slas


@cli_errors()
def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Results of `splitfuse bench run` or `splitfuse simulate`.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    sla: Annotated[str, typer.Option(help="Tokens a second that are promised.")] = SLAS,
    title: Annotated[str, typer.Option(help="Its heading.")] = "What a load gave",
) -> None:
    """Make one HTML page of results: the five figures of the paper, tables, settings. It needs no network."""
    from splitfuse.bench.report.page import write_report
    from splitfuse.bench.results import load

    slas = parse_slas(sla)
    check_writable(out)
    write_report([load(file) for file in files], out, slas=slas, title=title)
    print(out)
