"""Cells that do what a test says, and a gateway before them, all on real sockets and in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import httpx
from patience import PATIENCE

from splitfuse.clients.http_stream import Address
from splitfuse.config.server import ServerConfig
from splitfuse.gateway.app import Gateway
from splitfuse.gateway.cell import Cell
from splitfuse.server.listen import HttpServer, listening_sockets

METRICS = b'splitfuse:engine_ready{model_name="m",engine="0",address="",role="mixed"} 1.0\n'


class Asked(NamedTuple):
    """What a cell was asked."""

    cell: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


Act = Callable[[Asked], Awaitable[None]]


async def answer(asked: Asked, body: bytes = b'{"ok":true}', status: int = 200, **headers: str) -> None:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    asked.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if asked.method == "HEAD" else body))


async def begin_stream(asked: Asked, *pieces: bytes, content_type: str = "text/event-stream; charset=utf-8") -> None:
    asked.writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n".encode())
    asked.writer.write(b"transfer-encoding: chunked\r\n\r\n")
    for piece in pieces:
        asked.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    await asked.writer.drain()


async def end_stream(asked: Asked) -> None:
    asked.writer.write(b"0\r\n\r\n")


class ScriptedCells:
    """Several cells, and a gateway before them. What is no look of the gateway is noted in `asked`."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.asked: list[Asked] = []
        self.ready: dict[int, bytes] = {}
        """Answers to /ready of the cells that are not ready."""
        self.metrics: bytes | None = METRICS
        """Answer to /metrics; None: there is none."""
        self.raw_ready: bytes | None = None
        """All that is sent as the answer to /ready, in place of one."""
        self.metrics_key: str | None = None
        self.urls: list[str] = []
        self.gateway: Gateway
        self.http: httpx.AsyncClient

    @property
    def cells(self) -> list[Cell]:
        return list(self.gateway.cells.values())

    async def serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            method, path, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            asked = Asked(number, method, path, headers, body, reader, writer)
            if path == "/ready":
                if self.raw_ready is not None:
                    writer.write(self.raw_ready)
                    return
                told = self.ready.get(number)
                await answer(asked, told or b'{"stage":"ready"}', 503 if told else 200)
            elif path == "/metrics":
                if self.metrics is None:
                    return
                is_right = self.metrics_key is None or headers.get("authorization") == f"Bearer {self.metrics_key}"
                await answer(asked, self.metrics, 200 if is_right else 401)
            else:
                self.asked.append(asked)
                await self.act(asked)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other end has left
        finally:
            writer.close()

    async def look(self) -> None:
        """Let the gateway look at all cells."""
        await asyncio.gather(*(each.look() for each in self.cells))


@asynccontextmanager
async def scripted_cells(
    act: Act, count: int = 2, *, key: str | None = None, config: ServerConfig | None = None
) -> AsyncGenerator[ScriptedCells, None]:
    """Cells that do `act` when they are asked, and a gateway that looks at them once, and again when a test says so."""
    scripted = ScriptedCells(act)
    async with AsyncExitStack() as stack:
        for number in range(count):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int = number) -> None:
                await scripted.serve(number, reader, writer)

            listening = await asyncio.start_server(serve, "127.0.0.1", 0)
            stack.callback(listening.close)
            scripted.urls.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        # The clock stands still: what is full stays so.
        cells = [Cell(n, url, Address.of(url, key), clock=lambda: 0.0) for n, url in enumerate(scripted.urls)]
        scripted.gateway = Gateway(cells, config or ServerConfig())
        if key is None or scripted.metrics_key is not None:
            await scripted.look()
        url = await stack.enter_async_context(serving(scripted.gateway, config or ServerConfig()))
        scripted.http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False)
        )
        yield scripted


@asynccontextmanager
async def serving(gateway: Gateway, config: ServerConfig) -> AsyncGenerator[str, None]:
    """The URL of a gateway that serves meanwhile."""
    server = HttpServer(config, max_connections=1000)
    server.app = gateway
    with listening_sockets("127.0.0.1", 0, config.client_timeout) as (listener,):
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
