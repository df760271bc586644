"""`splitfuse bench report`: write an HTML report of measured and simulated results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfuse.cli.flags import cli_errors
from splitfuse.cli.loads import SPEEDS, SloFlag, check_writable, parse_speeds


@cli_errors()
def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Results of `splitfuse bench run` or `splitfuse simulate`.")],
    out: Annotated[Path, typer.Option(help="File of the report.")] = Path("report.html"),
    slo: SloFlag = SPEEDS,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Benchmark results",
) -> None:
    """Write a self-contained HTML report: the five figures of the paper, tables and settings."""
    from splitfuse.bench.report.page import write_report
    from splitfuse.bench.results import load

    speeds = parse_speeds(slo)
    check_writable(out)
    write_report([load(file) for file in files], out, speeds=speeds, title=title)
    print(out)
