"""Connections: how many are open, which give way, when silent ones are closed, and that a hang-up is noticed."""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from server_process import make_certificate

from splitfuse.config.server import ServerConfig
from splitfuse.server.connections import (
    FILES_OF_A_REPLICA,
    FILES_OF_OUR_OWN,
    LEAST_CONNECTIONS,
    MAX_HEADERS,
    connection_limit,
    num_newcomers,
)
from splitfuse.server.listen import HttpServer, Receive, Scope, Send, listening_sockets

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
EARLY = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """An HTTP server whose application answers at once, or at /slow when it has the body and `go_on` is set."""

    def __init__(self, http: HttpServer, address: tuple[str, int]) -> None:
        self.http, self.address = http, address
        self.now = 0.0
        self.go_on = asyncio.Event()
        self.begun = self.cut_off = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            while (message := await receive()).get("more_body", False):
                pass
            if message["type"] == "http.disconnect":
                return
            self.begun += 1
            gone = asyncio.create_task(receive())
            await asyncio.wait([gone, asyncio.create_task(self.go_on.wait())], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.cut_off += 1
                return
            gone.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def connect(self, data: bytes = b"", **settings: Any) -> Peer:
        reader, writer = await asyncio.open_connection(*self.address, **settings)
        writer.write(data)
        return reader, writer

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)


async def is_answered(peer: Peer, data: bytes = GET) -> bool:
    """Whether a request on a connection is answered."""
    reader, writer = peer
    writer.write(data)
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        return head.startswith(b"HTTP/1.1 200") and await reader.readexactly(2) == b"ok"
    except (ConnectionError, asyncio.IncompleteReadError):
        return False


async def closed(peer: Peer) -> None:
    """Wait until the server has closed a connection without an answer."""
    with suppress(ConnectionError):
        assert await asyncio.wait_for(peer[0].read(), PATIENCE) == b""


@asynccontextmanager
async def serving(max_connections: int = 100, **settings: Any) -> AsyncIterator[Server]:
    config = ServerConfig(port=0, **settings)
    with listening_sockets("127.0.0.1", 0, config.client_timeout) as (listener,):
        http = HttpServer(config, max_connections=max_connections, clock=lambda: server.now)
        server = Server(http, listener.getsockname())
        http.app = server.app
        task = asyncio.create_task(http.serve([listener]))
        try:
            yield server
            assert not task.done()
        finally:
            http.should_exit = http.force_exit = True
            await task


def test_silent_clients_give_way_to_new_ones() -> None:
    async def run() -> None:
        async with serving(32) as server:
            kept = await server.connect()
            assert await is_answered(kept)
            busy = await server.connect(POST + b"{}")
            await server.wait_until(lambda: server.begun == 1)
            silent = [await server.connect(data) for data in 20 * (b"", GET[:9], POST, POST + b"{")]
            assert await is_answered(await server.connect())
            assert await is_answered(kept), "it gave way to clients without a request"
            assert len(server.http.connections) <= 32
            server.go_on.set()
            assert await is_answered(busy, b"")
            assert server.cut_off == 0
            for _, writer in silent:
                writer.close()
            await server.wait_until(lambda: len(server.http.connections) <= 3)

    asyncio.run(run())


def test_unfinished_bodies_give_way_before_a_new_client() -> None:
    async def run() -> None:
        async with serving(32) as server:
            held = [await server.connect(POST + b"{") for _ in range(40)]
            await server.wait_until(lambda: len(server.http.connections) == 32)
            server.now = 1.0
            new = [await server.connect() for _ in range(8)]
            assert all([await is_answered(peer) for peer in new]) and len(held) == 40

    asyncio.run(run())


def test_a_crowd_is_accepted_in_few_turns_of_the_loop() -> None:
    """One connection a turn would let a new client wait for all before it, while each turn has much else to do."""

    async def run() -> None:
        async with serving(320) as server:
            silent = [await server.connect() for _ in range(320)]
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                asyncio.get_running_loop().call_soon(turn)

            crowd = [socket.socket() for _ in range(100)]
            for each in crowd:
                each.setblocking(False)
                each.connect_ex(server.address)  # it is in the system's queue before the loop turns
            turn()
            assert await is_answered(await server.connect())
            assert turns < 100, f"{turns} turns for {len(crowd)} new clients and {len(silent)} before them"
            for each in crowd:
                each.close()

    asyncio.run(run())


def test_the_longest_idle_connection_gives_way() -> None:
    async def run() -> None:
        async with serving(16) as server:
            peers = [await server.connect() for _ in range(16)]
            assert all([await is_answered(peer) for peer in [*peers, peers[0]]])
            assert await is_answered(await server.connect())
            await closed(peers[1])
            assert all([await is_answered(peer) for peer in [peers[0], *peers[2:]]])

    asyncio.run(run())


def test_no_client_gives_way_whose_request_has_come() -> None:
    """Requests come on all idle connections, and new clients too, while the loop is held up."""

    async def run() -> None:
        async with serving(32) as server:
            peers = [await server.connect() for _ in range(32)]
            assert all([await is_answered(peer) for peer in peers])
            for _, writer in peers:  # from here on without a turn of the loop
                writer.get_extra_info("socket")._sock.send(GET)
            new = [socket.create_connection(server.address) for _ in range(8)]
            for peer in new:
                peer.sendall(GET)
            peers += [await asyncio.open_connection(sock=peer) for peer in new]
            assert all([await is_answered(peer, b"") for peer in peers])

    asyncio.run(run())


def test_a_new_client_waits_while_all_are_busy() -> None:
    async def run() -> None:
        async with serving(4) as server:
            busy = [await server.connect(POST + b"{}") for _ in range(4)]
            await server.wait_until(lambda: server.begun == 4)
            late = await server.connect(GET)
            server.go_on.set()
            assert await is_answered(late, b"")
            assert sum([await is_answered(peer, b"") for peer in busy]) == 4

    asyncio.run(run())


SILENT = {
    "nothing": b"",
    "half a head": GET[:20],
    "half a next head": GET + GET[:20],
    "half a body after its answer": EARLY + b"{",
}


@pytest.mark.parametrize("sent", SILENT.values(), ids=SILENT)
def test_a_client_that_falls_silent_is_disconnected(sent: bytes) -> None:
    async def run() -> None:
        async with serving(client_timeout=3.0, keep_alive_timeout=1000.0) as server:
            silent, idle, busy = await server.connect(sent), await server.connect(), await server.connect(POST + b"{}")
            assert not sent.startswith((GET, EARLY)) or await is_answered(silent, b"")
            assert await is_answered(idle)
            await server.wait_until(lambda: server.begun == 1 and len(server.http.connections) == 3)
            server.now = 4.0
            await closed(silent)
            assert await is_answered(idle), "it has time until the next request"
            server.go_on.set()
            assert await is_answered(busy, b"")

    asyncio.run(run())


def test_a_head_must_come_whole_in_time_but_a_body_may_go_on() -> None:
    async def run() -> None:
        async with serving(client_timeout=3.0) as server:
            head, body = await server.connect(GET[:5]), await server.connect(POST)
            await server.wait_until(lambda: len(server.http.connections) == 2)
            server.now = 2.0
            await server.wait_until(lambda: bool(server.http.server_state.tasks))
            head[1].write(GET[5:10])
            body[1].write(b"{")
            (task,) = server.http.server_state.tasks
            assert not task.done()
            await is_answered(await server.connect())  # by now the others' bytes have been read
            server.now = 4.0
            await closed(head)
            server.go_on.set()
            assert await is_answered(body, b"}")

    asyncio.run(run())


def test_an_idle_connection_is_closed_after_its_own_time() -> None:
    async def run() -> None:
        async with serving(client_timeout=3.0, keep_alive_timeout=90.0) as server:
            peer = await server.connect()
            assert await is_answered(peer)
            server.now = 89.0
            assert await is_answered(peer)
            server.now = 180.0
            await closed(peer)

    asyncio.run(run())


def test_a_client_silent_in_the_handshake_gives_way(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("no openssl here")
    tls = {"tls_certificate": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    context = ssl.create_default_context(cafile=tls["tls_certificate"])
    context.check_hostname = False

    async def run() -> None:
        async with serving(8, client_timeout=3.0, **tls) as server:
            silent = [await server.connect(data) for data in 10 * (b"", b"\x16\x03\x01")]
            assert await is_answered(await server.connect(ssl=context))
            assert len(server.http.connections) <= 8
            server.now = 4.0
            for peer in silent:
                await closed(peer)

    asyncio.run(run())


@pytest.mark.parametrize("behind", [b"", GET, POST + b"{}"], ids=["first", "second", "pipelined"])
def test_a_head_of_too_many_headers_is_refused_unread(behind: bytes) -> None:
    async def run() -> None:
        async with serving() as server:
            server.go_on.set()
            most = b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * MAX_HEADERS
            peer = await server.connect(behind + most.replace(b"x: y", b"host: x", 1) + b"\r\n" + most + b"x: y\r\n")
            for _ in range(2 if behind else 1):
                assert await is_answered(peer, b"")
            answer = await peer[0].read()
            assert answer.startswith(b"HTTP/1.1 400")
            assert b"a request has at most 200 headers" in answer

    asyncio.run(run())


def test_a_body_of_many_lines_after_bare_line_feeds() -> None:
    async def run() -> None:
        async with serving() as server:
            server.go_on.set()
            body = b"\n" * (MAX_HEADERS + 1)
            head = b"POST /slow HTTP/1.1\nhost: x\ncontent-length: %d\n\n" % len(body)
            assert await is_answered(await server.connect(), head + body)

    asyncio.run(run())


PIPELINED = {"nothing": b"", "a byte": b"G", "a request": GET, "in one packet": GET}


@pytest.mark.parametrize("what", PIPELINED)
def test_a_hang_up_is_noticed_whatever_was_pipelined(what: str) -> None:
    async def run() -> None:
        async with serving() as server:
            at_once = PIPELINED[what] if what == "in one packet" else b""
            _, writer = await server.connect(POST + b"{}" + at_once)
            await server.wait_until(lambda: server.begun == 1)
            if not at_once:
                writer.write(PIPELINED[what])
                await writer.drain()
                await is_answered(await server.connect())  # the server has had time to read it
            writer.close()
            await server.wait_until(lambda: server.cut_off == 1 and not server.http.connections)

    asyncio.run(run())


def test_pipelined_requests_are_answered_in_order() -> None:
    async def run() -> None:
        async with serving() as server:
            peer = await server.connect(POST + b"{}" + 20 * GET)
            await server.wait_until(lambda: server.begun == 1)
            peer[1].write(POST + b"{}")
            server.go_on.set()
            assert all([await is_answered(peer, b"") for _ in range(22)])

    asyncio.run(run())


def test_pipelining_without_end_ends_a_connection() -> None:
    async def run() -> None:
        async with serving() as server:
            peer = await server.connect(POST + b"{}")
            await server.wait_until(lambda: server.begun == 1)
            peer[1].write(3000 * GET)
            await closed(peer)
            await server.wait_until(lambda: server.cut_off == 1)

    asyncio.run(run())


def test_a_shortage_of_files_is_logged_once_and_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with serving() as server:
            silent = await server.connect()
            await server.wait_until(lambda: len(server.http.connections) == 1)
            shortages = iter(range(3))
            accept = socket.socket.accept

            def short(listener: socket.socket) -> Any:
                if next(shortages, None) is not None:
                    raise OSError(errno.EMFILE, "Too many open files")
                return accept(listener)

            monkeypatch.setattr("splitfuse.server.connections.RETRY_SECONDS", 0.0)
            monkeypatch.setattr(socket.socket, "accept", short)
            assert await is_answered(await server.connect())
            assert next(shortages, None) is None
            await closed(silent)
            assert server.http.connections.limit == LEAST_CONNECTIONS, "further ones would need the files too"

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "no connection can be accepted now: Too many open files; trying again"
    ]


@pytest.mark.parametrize(
    ("files", "replicas", "limit"), [(1024, 1, 952), (1024, 4, 928), (10, 1, 16), (10**6, 1, 5120)]
)
def test_connections_fit_the_hard_limit_of_files(
    files: int, replicas: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (20, files)

    def raise_limit(_: int, to: tuple[int, int]) -> None:
        nonlocal limits
        limits = to

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", raise_limit)
    assert connection_limit(ServerConfig(replicas=replicas)) == limit
    assert limits == (files, files)
    assert FILES_OF_OUR_OWN + FILES_OF_A_REPLICA * replicas <= 96 and 0 < num_newcomers(limit) < limit
