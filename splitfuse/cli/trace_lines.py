"""Reads the trace of a server for commands."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import msgspec

from splitfuse.clients.sync import Client
from splitfuse.errors import ServerError
from splitfuse.server.trace_feed import TraceLine, decode_line
from splitfuse.version import __version__


def trace_lines(server: Client, seconds: float | None = None) -> Generator[list[TraceLine], None, None]:
    """Yield the lines of a trace as they come, some at once. Raises ServerError for a server of another version."""
    is_empty = True
    with closing(server.trace(seconds)) as received:
        for text in received:
            is_empty = False
            try:
                lines = [decode_line(line) for line in text.splitlines()]
            except msgspec.DecodeError as error:
                raise ServerError(
                    f"the trace of {server.url} cannot be read by splitfuse {__version__}: {error}; call the splitfuse "
                    "of the server's version, which GET /version tells"
                ) from error
            yield lines
    if is_empty:
        raise ServerError(f"the server at {server.url} sent an empty trace: it may be ending, or something is between")
