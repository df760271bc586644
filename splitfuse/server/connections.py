"""Accepts connections, bounds their number, and closes those on which a client keeps the server waiting.

Decides which connection gives way to a new one when there is no room, and when a silent one is closed. The HTTP on
a connection is uvicorn's.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import re
import resource
import socket
import ssl
import termios
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from functools import partial
from heapq import merge
from itertools import chain
from operator import itemgetter
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from splitfuse.config.server import ServerConfig

FILES_OF_OUR_OWN, FILES_OF_A_REPLICA = 64, 8
"""Numbers of descriptors that are left for other things than connections."""
IDLE_CONNECTIONS = 4096
"""Number of connections between two requests that are kept, besides those of max_queued_requests."""
LEAST_CONNECTIONS = 16
"""Number of connections that are accepted even where files are so few that accepting may fail."""
MAX_HEADERS = 200
"""Number of lines of a request's head, from the second on."""
RETRY_SECONDS = 0.5
"""Pause after the system had no descriptor or memory for a connection."""
QUIET_SECONDS = 60.0
"""Time between two log lines of one kind about connections."""
WRITE_CHUNK = "splitfuse.write_chunk"
"""Name of the extension, as ASGI calls it, by which a part of a body is written at once: `send` takes four times as
long for what the client of a stream gets with every step.
"""

_logger = logging.getLogger(__name__)


class Waits(Enum):
    """Says what a connection waits for its client to send."""

    HEAD = "the first byte or the rest of a head, or of a body after its answer"
    BODY = "the rest of a body, for which the application sets a time"
    REQUEST = "another request, after an answer"


def connection_limit(config: ServerConfig) -> int:
    """Return the number of connections to keep open, after raising the limit of open files as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    wanted = config.max_queued_requests + IDLE_CONNECTIONS
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(min(soft - FILES_OF_OUR_OWN - FILES_OF_A_REPLICA * config.max_engines, wanted), LEAST_CONNECTIONS)


def num_newcomers(limit: int) -> int:
    """Return how many of the connections are for clients that have yet to send a request."""
    return max(limit // 16, 1)


class Connections:
    """Holds the open connections, at most `limit`. A new one takes the place of one that waits for its client.

    While fewer than `num_newcomers` wait for a whole request, the longest idle one gives way; from then on the longest
    waiting of these newcomers. Connections whose request is answered or computed never give way.
    """

    def __init__(
        self,
        limit: int,
        *,
        client_timeout: float,
        keep_alive_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self._timeouts = {Waits.HEAD: client_timeout, Waits.REQUEST: keep_alive_timeout}
        self._clock = clock
        self._open: dict[Connection, asyncio.Task[Any]] = {}
        self._closing: set[Connection] = set()
        self._waiting: dict[Waits, dict[Connection, float]] = {waits: {} for waits in Waits}  # since when, in order
        self._changed = asyncio.Event()
        self._logged: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def accept(self, listener: socket.socket, make: Callable[[], Connection], tls: ssl.SSLContext | None) -> None:
        """Accept connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._log(f"no connection can be accepted now: {error.strerror}; trying again")
                if error.errno == errno.EMFILE:  # other things need more files than were left for them
                    self.limit = max(len(self._open) - num_newcomers(self.limit), LEAST_CONNECTIONS)
                self._give_way()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                await self._make_room()
            except asyncio.CancelledError:
                accepted.close()
                raise
            self._open_one(make(), accepted, tls)

    def note(self, connection: Connection, waits: Waits | None, *, anew: bool) -> None:
        """Note what a connection waits for; `anew`: from now on, even if it did before."""
        if connection not in self._open:
            return
        if not anew and waits is not None and connection in self._waiting[waits]:
            return
        self._forget(connection)
        if waits is not None:
            self._waiting[waits][connection] = self._clock()
            self._changed.set()

    def gone(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        self._forget(connection)
        self._open.pop(connection, None)
        self._closing.discard(connection)
        self._changed.set()

    def close_silent(self) -> None:
        """Close the connections that have waited for their client for longer than it may take."""
        for waits, timeout in self._timeouts.items():
            while (oldest := self._oldest(waits)) is not None and self._clock() - oldest[1] >= timeout:
                self._close(oldest[0])

    def _open_one(self, connection: Connection, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Begin a connection, with the handshake of TLS. It is closed if that fails, or is cancelled."""

        def begun(opening: asyncio.Task[Any]) -> None:
            if not opening.cancelled() and not isinstance(error := opening.exception(), OSError) and error is not None:
                _logger.error("a connection failed", exc_info=error)
            if connection.transport is None:
                accepted.close()
                self.gone(connection)

        connection.accepted = accepted
        loop = asyncio.get_running_loop()
        opening = loop.create_task(loop.connect_accepted_socket(lambda: connection, accepted, ssl=tls))
        opening.add_done_callback(begun)
        self._open[connection] = opening
        self.note(connection, Waits.HEAD, anew=True)

    async def _make_room(self) -> None:
        """Wait until there is room for a connection. One that is closing keeps its place until it has closed if more
        than `num_newcomers` / 4 are: otherwise a burst of new connections would push each other out before the first
        bytes of any were read.
        """
        while not self._has_room():
            self._log(f"{self.limit} connections are open, the most that this server keeps: idle ones are closed")
            self._changed.clear()
            if len(self._open) - len(self._closing) >= self.limit and not self._give_way():
                await asyncio.sleep(0)  # a turn of the loop reads what has come
            elif not self._has_room():
                await self._changed.wait()

    def _has_room(self) -> bool:
        num_kept, most_closing = len(self._open) - len(self._closing), num_newcomers(self.limit) // 4
        return num_kept < self.limit and len(self._closing) <= most_closing

    def _give_way(self) -> bool:
        """Close the connection that has waited for its client the longest, if there is one. Return False if there are
        only such whose clients have sent what was not yet read: a loop that was held up comes to it next.
        """
        is_unread = False
        while True:
            for connection in self._by_waiting():
                if not connection.has_unread:
                    break
                is_unread = True
            else:
                return not is_unread
            if self._close(connection):
                return True

    def _by_waiting(self) -> Iterator[Connection]:
        """Yield the connections that wait for their clients, in the order in which they give way."""
        head, body = self._waiting[Waits.HEAD], self._waiting[Waits.BODY]
        new = merge(head.items(), body.items(), key=itemgetter(1))
        both = [(connection for connection, _ in new), self._waiting[Waits.REQUEST]]
        if len(head) + len(body) < num_newcomers(self.limit):
            both.reverse()
        return chain(*both)

    def _oldest(self, waits: Waits) -> tuple[Connection, float] | None:
        """Return the connection that has waited so the longest, and since when."""
        return next(iter(self._waiting[waits].items()), None)

    def _close(self, connection: Connection) -> bool:
        """Close a connection that waits; return whether it closes at once, for its client has read everything."""
        self._forget(connection)
        if connection.transport is not None and connection.transport.get_write_buffer_size():
            connection.transport.close()
            return False
        self._closing.add(connection)
        if connection.transport is None:
            self._open[connection].cancel()
        else:
            connection.transport.abort()
        return True

    def _forget(self, connection: Connection) -> None:
        for waiting in self._waiting.values():
            waiting.pop(connection, None)

    def _log(self, message: str) -> None:
        now = self._clock()
        if now - self._logged.get(message, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._logged[message] = now
            _logger.warning("%s", message)


class _BoundedHeads(h11.Connection):
    """Refuses the head of a request that has many headers before it is parsed, which takes ten microseconds for each:
    in 64 KiB there can be 16,000.
    """

    is_too_long = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Refuse a head of too many lines, then parse as h11 does."""
        if self.their_state is h11.IDLE:
            head = re.split(rb"\n\r?\n", self.trailing_data[0], maxsplit=1)[0]  # h11 takes bare line feeds too
            if head.count(b"\n") > MAX_HEADERS:
                self.is_too_long = True
                raise h11.RemoteProtocolError("too many headers")
        return super().next_event()


class Connection(H11Protocol):
    """Speaks HTTP/1.1 as uvicorn does, notices a client that hangs up whatever else it sent, and tells Connections
    when it waits for its client.
    """

    accepted: socket.socket

    def __init__(self, config: uvicorn.Config, state: ServerState, connections: Connections) -> None:
        super().__init__(config, state, {})
        self.conn: _BoundedHeads = _BoundedHeads(h11.SERVER)
        self._all = connections

    @property
    def waits(self) -> Waits | None:
        """Return what it waits for; None while a request is computed or its answer sent."""
        if self.cycle is None:
            return Waits.HEAD
        if not self.cycle.response_complete:
            return Waits.BODY if self.cycle.more_body else None
        is_between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        return Waits.REQUEST if is_between else Waits.HEAD

    @property
    def has_unread(self) -> bool:
        """Return whether bytes of the client have come, and will be read in the loop's next turn."""
        if self.transport is not None and not self.transport.is_reading():  # closed, or told to pause
            return False
        count = array("i", [0])
        with suppress(OSError, ValueError):  # it was closed
            fcntl.ioctl(self.accepted.fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin as uvicorn does; applications find `write_chunk` in the scope of a request."""
        super().connection_made(cast(asyncio.Transport, transport))
        self.app = partial(_with_write_chunk, self.app, partial(write_chunk, self.transport, self.flow))

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place of the connection free."""
        super().connection_lost(exc)
        self._all.gone(self)

    def data_received(self, data: bytes) -> None:
        """Read as uvicorn does, note what the connection waits for, and keep reading behind a pipelined request."""
        super().data_received(data)
        is_body = self.cycle is not None and self.cycle.more_body
        self._all.note(self, self.waits, anew=is_body)
        # uvicorn stops reading at a pipelined request until the one before is answered, and would not see the end.
        if self.flow.read_paused and self.cycle is not None and not self.cycle.more_body:
            if len(self.conn.trailing_data[0]) > HIGH_WATER_LIMIT:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer 400; a head of too many lines has a message of its own."""
        super().send_400_response(f"a request has at most {MAX_HEADERS} headers" if self.conn.is_too_long else msg)

    def on_response_complete(self) -> None:
        """Go on as uvicorn does, and note that the connection waits for another request."""
        super().on_response_complete()
        self._all.note(self, self.waits, anew=True)


def write_chunk(transport: asyncio.Transport, flow: FlowControl, data: bytes) -> bool:
    """Write a part of a body that has begun in chunks, and return True; False: its client has yet to read what was
    written before, or has left.
    """
    if flow.write_paused or transport.is_closing():
        return False
    if not data:  # a chunk of no bytes would end the body
        return True
    transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True


async def _with_write_chunk(app: Any, write: Callable[[bytes], bool], scope: Any, receive: Any, send: Any) -> None:
    """Run an application that finds `write` in the scope, unless the body of its answer has no chunks."""
    if scope["http_version"] == "1.1" and scope["method"] != "HEAD":
        scope["extensions"] = {WRITE_CHUNK: write}
    await app(scope, receive, send)
