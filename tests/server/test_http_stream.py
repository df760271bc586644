"""The lean HTTP client on real sockets: chunks in pieces of any length, and answers that break off."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.clients.http_stream import Address, _body, get, post_stream
from splitfuse.errors import RequestFailedError, ServerError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
EVENTS = b'data: {"a": 1}\n\n: a comment\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\ndata: never\n\n'


def chunked(body: bytes, cuts: list[int]) -> bytes:
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    pieces = [body[a:b] for a, b in pairwise(places)]
    return b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def decoded(*pieces: bytes) -> bytes:
    """The chunked body that comes in these pieces."""

    async def run() -> bytes:
        reader = asyncio.StreamReader()

        async def feed() -> None:
            for piece in pieces:
                reader.feed_data(piece)
                await asyncio.sleep(0)
            reader.feed_eof()

        feeding = asyncio.create_task(feed())
        body = b"".join([piece async for piece in _body(reader, {b"transfer-encoding": b"chunked"})])
        await feeding
        return body

    return asyncio.run(run())


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)), st.lists(st.integers(0, 900)))
def test_chunks_decode_from_pieces_of_any_length(body: bytes, cuts: list[int], reads: list[int]) -> None:
    wire = chunked(body, cuts)
    places = sorted({min(read, len(wire)) for read in reads} | {0, len(wire)})
    assert decoded(*(wire[a:b] for a, b in pairwise(places))) == body


@pytest.mark.parametrize("length", [b"zz", b"-5", b""])
def test_malformed_chunk(length: bytes) -> None:
    with pytest.raises(ConnectionError, match="malformed chunk length"):
        decoded(length + b"\r\n")


def answered(answer: bytes, act: Callable[[Address], Awaitable[object]], *, cut: int | None = None) -> object:
    """What `act` gives with a server that reads a request's head and answers so, in two pieces."""

    async def run() -> object:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer[:cut])
            await writer.drain()
            if cut is not None:
                await asyncio.sleep(0.01)
                writer.write(answer[cut:])
            with suppress(ConnectionError):
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await act(Address.of(f"http://127.0.0.1:{port}"))

    return asyncio.run(run())


def stream(seen: list[bytes], *, timeout: float = 60.0) -> Callable[[Address], Awaitable[object]]:
    return lambda address: post_stream(address, "/x", b"{}", lambda data, _: seen.append(data), timeout=timeout)


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + chunked(EVENTS, [3, 20, 21, 44]),
        HEAD + b"Content-Length: %d\r\n\r\n" % len(EVENTS) + EVENTS,
        HEAD + b"\r\n" + EVENTS,
    ],
    ids=["chunked", "length", "close"],
)
@pytest.mark.parametrize("cut", [None, 30, 120, 150])
def test_events_until_done(answer: bytes, cut: int | None) -> None:
    seen: list[bytes] = []
    assert answered(answer, stream(seen), cut=cut) == (200, b"")
    assert seen == [b'{"a": 1}', b'{"b": 2}']


def test_error_body_is_returned_whole() -> None:
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 5\r\n\r\nwrong and more"
    assert answered(answer, stream([])) == (400, b"wrong")
    assert answered(answer, lambda address: get(address, "/", timeout=60)) == (400, b"wrong")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        CHUNKED + b"5\r\nab",
        CHUNKED + b"xyz\r\n",
        HEAD + b"content-length: 9\r\n\r\ndata",
        b"SSH-2.0-x\r\n\r\n",
    ],
)
def test_answer_that_breaks_off(answer: bytes) -> None:
    with pytest.raises(RequestFailedError):
        answered(answer, stream([]))


def test_answer_timeout() -> None:
    async def silent(address: Address) -> None:
        with pytest.raises(RequestFailedError, match=r"took longer than 0\.05 s"):
            await stream([], timeout=0.05)(address)

    async def run() -> None:
        held = asyncio.Event()

        async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await held.wait()
            writer.close()

        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        await silent(Address.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        held.set()
        server.close()

    asyncio.run(run())


def test_unreachable_server() -> None:
    with pytest.raises(ServerError, match="no server answers at 127"):
        asyncio.run(get(Address.of("http://127.0.0.1:1"), "/", timeout=60))
