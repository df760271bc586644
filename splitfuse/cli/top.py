"""`splitfuse top`: show live in a terminal what a server does."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import typer

from splitfuse.cli.flags import ApiKeyFlag, UrlFlag, cli_errors, connect
from splitfuse.cli.trace import NameArgument
from splitfuse.errors import ConfigError, ServerError, SplitfuseError

if TYPE_CHECKING:
    from splitfuse.cli.top_state import LiveState
    from splitfuse.clients.sync import Client
    from splitfuse.server.trace_feed import TraceLine

DRAW_SECONDS = 0.25
"""Time from one drawing to the next."""
ONCE_SECONDS = 2.0
"""Time for which a single view looks."""
ORDERS = ("age", "tokens", "phase", "slo")
"""Orders of requests."""


@cli_errors()
def top(
    name: NameArgument = None,
    sort: Annotated[str, typer.Option(help=f"Order of requests: {', '.join(ORDERS)}.")] = ORDERS[0],
    once: Annotated[bool, typer.Option("--once", help="Print one view, of two seconds, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    url: UrlFlag = None,
    api_key: ApiKeyFlag = None,
) -> None:
    """Show live what a server does: engines, steps, KV blocks, latencies, and requests with their phases.

    Keys: q ends it, p pauses it, s takes another order of requests. Where the output is no terminal, it prints one view
    and ends. Needs an administrator's key if the server has keys; without, a server on this machine.
    """
    if sort not in ORDERS:
        raise ConfigError(f"--sort must be one of {', '.join(ORDERS)}, not {sort!r}")
    with connect(name, url, api_key) as server:
        if once or as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            _print_once(server, sort, as_json=as_json)
        else:
            _Screen(server, sort).run()


def _print_once(server: Client, sort: str, *, as_json: bool) -> None:
    from splitfuse.cli.top_state import LiveState
    from splitfuse.cli.trace_lines import trace_lines

    state = LiveState()
    for lines in trace_lines(server, ONCE_SECONDS):
        for line in lines:
            state.take(line)
    if as_json:
        print(json.dumps(state.as_dict(sort), indent=2))
        return
    from splitfuse.cli.tables import console
    from splitfuse.cli.top_view import LiveView

    console().print(LiveView(state, server.url, sort=sort))


class _Screen:
    """Draws what comes on the whole terminal, until a key ends it."""

    def __init__(self, server: Client, sort: str) -> None:
        from splitfuse.cli.top_state import LiveState

        self._server, self._sort = server, sort
        self._state = LiveState()
        self._lock = threading.Lock()
        self._error: SplitfuseError | None = None
        self._has_ended = threading.Event()

    def run(self) -> None:
        """Draw until q, Ctrl-C, or the end of the server, which raises ServerError."""
        from rich.console import Console
        from rich.live import Live

        from splitfuse.cli.top_view import LiveView
        from splitfuse.cli.trace_lines import trace_lines

        stream = trace_lines(self._server)
        first = next(stream)  # refused before the screen is taken
        self._take(first)
        reading = threading.Thread(target=self._read, args=(stream,), daemon=True)
        reading.start()
        paused: LiveState | None = None
        console = Console()
        with _single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                with self._lock:
                    state = paused or self._state
                    view = LiveView(state, self._server.url, sort=self._sort, paused=paused is not None, keys=True)
                    live.update(view, refresh=True)
                if self._has_ended.is_set():
                    break
                key = _key(DRAW_SECONDS)
                if key in ("q", "\x03", "\x04"):
                    return
                if key == "s":
                    self._sort = ORDERS[(ORDERS.index(self._sort) + 1) % len(ORDERS)]
                elif key == "p":
                    with self._lock:
                        paused = None if paused is not None else deepcopy(self._state)
        raise self._error or ServerError(f"the server at {self._server.url} has ended")

    def _read(self, stream: Iterator[list[TraceLine]]) -> None:
        try:
            for lines in stream:
                self._take(lines)
        except SplitfuseError as error:
            self._error = error
        self._has_ended.set()

    def _take(self, lines: list[TraceLine]) -> None:
        with self._lock:
            for line in lines:
                self._state.take(line)


@contextmanager
def _single_keys() -> Iterator[None]:
    """Let the terminal give each key at once, and not show it."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _key(seconds: float) -> str:
    """Return the next key, or nothing if none is pressed for some time. A closed terminal presses q."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return (os.read(sys.stdin.fileno(), 1).decode("latin-1") or "q") if ready else ""
