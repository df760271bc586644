"""`splitfuse bench report`: write an HTML report of measured and simulated results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfuse.cli.flags import cli_errors
from splitfuse.cli.loads import SPEEDS, SloFlag, check_writable, parse_speeds, parse_targets


@cli_errors()
def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Results of `splitfuse bench run` or `splitfuse simulate`.")],
    out: Annotated[Path, typer.Option(help="File of the report.")] = Path("report.html"),
    slo: SloFlag = SPEEDS,
    ttft: Annotated[str | None, typer.Option(help="TTFT of a further SLO: 1s, or 2ms/token.")] = None,
    itl: Annotated[str | None, typer.Option(help="ITL of that SLO: 250ms, or 250ms/p99.")] = None,
    tpot: Annotated[str | None, typer.Option(help="TPOT of that SLO, such as 100ms.")] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Benchmark results",
) -> None:
    """Write a self-contained HTML report: the five figures of the paper, tables and settings."""
    from splitfuse.bench.report.page import write_report
    from splitfuse.bench.results import load

    speeds, targets = parse_speeds(slo), parse_targets({"ttft": ttft, "itl": itl, "tpot": tpot})
    check_writable(out)
    write_report([load(file) for file in files], out, speeds=speeds, targets=targets, title=title)
    print(out)
