"""Speaks HTTP/1.1 for programs that send many requests: a load generator, which shares the cores with the server that
it measures, and the gateway.

A connection for each request; streams of server-sent events, handed over as they arrive. An event costs a fraction of
the processor time that a client library takes (docs/bench.md has the figures).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from splitfuse.clients.sse import DONE, EventParser
from splitfuse.errors import RequestFailedError, ServerError

CONNECT_SECONDS = 10.0
_HEAD_LIMIT = 2**17
"""Largest number of bytes of a head, and half of those of an answer that are buffered until they are read."""
_PIECE = 2**16
_MOST_DIGITS = 15

TakeEvent = Callable[[bytes, float], None]
"""Callback with the data of an event and its arrival time."""


@dataclass(frozen=True)
class Address:
    """Holds the address of a server, and its API key."""

    host: str
    port: int
    authority: str
    tls: ssl.SSLContext | None
    api_key: str | None

    @classmethod
    def of(cls, url: str, api_key: str | None = None) -> Address:
        """Return the address of an HTTP URL. Raises ValueError for any other."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(url)
        port = parts.port or (443 if secure else 80)
        authority = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname, port, authority, ssl.create_default_context() if secure else None, api_key)

    def head(self, method: str, path: str, length: int) -> bytes:
        """Return the head of a request."""
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {self.authority}\r\nconnection: close\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        ).encode()


async def get(address: Address, path: str, *, timeout: float) -> tuple[int, bytes]:
    """Return status and body.

    Raises ServerError if the server is unreachable, RequestFailedError if the answer breaks off.
    """
    async with exchange(address, address.head("GET", path, 0), timeout=timeout) as answer:
        return answer.status, b"".join([piece async for piece in answer.pieces])


async def post_stream(
    address: Address, path: str, body: bytes, take: TakeEvent, *, timeout: float
) -> tuple[int, bytes]:
    """Post JSON, and pass each event of the stream to `take` until `[DONE]`; return status, and body if not 200.

    Raises ServerError if the server is unreachable, RequestFailedError if the stream breaks off.
    """
    async with exchange(address, address.head("POST", path, len(body)), body, timeout=timeout) as answer:
        if answer.status != 200:
            return answer.status, b"".join([piece async for piece in answer.pieces])
        parser = EventParser()
        async for piece in answer.pieces:
            now = time.monotonic()
            for data in parser.feed(piece):
                if data == DONE:
                    return answer.status, b""
                take(data, now)
        return answer.status, b""


class Answer(NamedTuple):
    """Holds the head of an answer, and gives its body as it arrives."""

    status: int
    headers: list[tuple[bytes, bytes]]
    """Headers, with their names in lower case."""
    pieces: AsyncGenerator[bytes, None]


@asynccontextmanager
async def exchange(
    address: Address, head: bytes, body: bytes = b"", *, timeout: float | None
) -> AsyncGenerator[Answer, None]:
    """Send one request on a connection of its own, and yield the answer.

    Raises ServerError if the server is unreachable, RequestFailedError if the answer breaks off, or does not end within
    `timeout` seconds (None: there is no limit).
    """
    where = f"{address.host}:{address.port}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=address.tls, limit=_HEAD_LIMIT
            )
    except (OSError, TimeoutError, UnicodeError) as error:  # the last for a name that cannot be one
        raise ServerError(f"no server answers at {where}: {error or 'connecting timed out'}") from error
    try:
        async with asyncio.timeout(timeout):
            writer.write(head)
            writer.write(body)
            del body  # a stream may last longer than anyone needs it
            status, headers = await _read_head(reader)
            yield Answer(status, headers, _body(reader, {name: value.lower() for name, value in headers}))
        writer.close()
    except TimeoutError as error:
        limit = "the system's limit" if timeout is None else f"{timeout:g} s"
        raise RequestFailedError(f"the answer from {where} took longer than {limit}") from error
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
        raise RequestFailedError(f"the connection to {where} was lost: {error or type(error).__name__}") from error
    finally:
        if not writer.is_closing():  # the rest of the request is not needed
            writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise RequestFailedError(f"not an HTTP/1.1 answer: {first[:80]!r}")
    fields = (line.partition(b":") for line in lines)
    return int(words[1]), [(name.strip().lower(), value.strip()) for name, _, value in fields]


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces: chunked (RFC 9112, section 7.1), of its stated length, or until the connection ends."""
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := _chunk_size(await reader.readuntil(b"\r\n")):
            yield (await reader.readexactly(size + 2))[:-2]
    elif b"content-length" in headers:
        length = headers[b"content-length"]
        if not length.isdigit() or len(length) > _MOST_DIGITS:
            raise ConnectionError(f"malformed content length {length[:40]!r}")
        yield await reader.readexactly(int(length))
    else:
        while piece := await reader.read(_PIECE):
            yield piece


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        if digits.isalnum():
            return int(digits, 16)
    except ValueError:
        pass
    raise ConnectionError(f"malformed chunk length {digits[:40]!r}")
