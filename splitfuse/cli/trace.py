"""`splitfuse trace`: write what a server does for some seconds into a file that Perfetto opens."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from splitfuse.cli.flags import ApiKeyFlag, UrlFlag, cli_errors, connect
from splitfuse.errors import ConfigError

NameArgument = Annotated[
    str | None,
    typer.Argument(help="Name of the deployment, as ps shows it (default: splitfuse).", show_default=False),
]


@cli_errors()
def trace(
    name: NameArgument = None,
    seconds: Annotated[float, typer.Option(help="Seconds to trace.")] = 30.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("trace.json"),
    url: UrlFlag = None,
    api_key: ApiKeyFlag = None,
) -> None:
    """Trace steps and requests for some seconds, into a file for https://ui.perfetto.dev or chrome://tracing.

    Ctrl-C ends it before. Needs an administrator's key if the server has keys; without, a server on this machine.
    """
    from splitfuse.cli.chrome_trace import ChromeTrace, TraceFile
    from splitfuse.cli.trace_lines import trace_lines
    from splitfuse.server.trace_feed import TraceEnd

    events, is_whole = ChromeTrace(), False
    with connect(name, url, api_key) as server, closing(trace_lines(server, seconds)) as received:
        first = next(received)  # refused before a file is touched
        try:
            opened = TraceFile(output)
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from error
        with opened as file:
            print(f"tracing {server.url} for {seconds:g} s; Ctrl-C ends it before", file=sys.stderr)
            try:
                lines = first
                while lines:
                    for line in lines:
                        is_whole = isinstance(line, TraceEnd)
                        file.write(events.take(line))
                    lines = next(received, [])
            except KeyboardInterrupt:
                is_whole = True
            finally:
                file.write(events.end())
            print(
                f"{output}: {events.num_steps} steps, {events.num_requests} requests, {file.size / 1e6:.1f} MB; open "
                "it at https://ui.perfetto.dev or chrome://tracing"
            )
    if events.dropped:
        print(f"{events.dropped} events are missing: they came faster than they were read", file=sys.stderr)
    if not is_whole:
        print("the server ended before the trace did", file=sys.stderr)
