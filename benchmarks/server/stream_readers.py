"""Processor time that a streamed event costs the client: our own reader against httpx.

    python -m benchmarks.server.stream_readers [--streams 32] [--events 500]

A server in another process sends events as our own server does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import httpx

from splitfuse.bench.endpoint import _decode_event
from splitfuse.clients.http_stream import Address, post_stream

EVENT = {
    "id": "cmpl-0123456789abcdef",
    "created": 1763800000,
    "model": "storyteller",
    "choices": [{"index": 0, "text": " goose", "logprobs": None, "finish_reason": None, "token_ids": [1234]}],
    "object": "text_completion",
    "usage": None,
}


def serve(events: int, tell: Connection) -> None:
    """Answer every connection with so many events, each in a chunk of its own."""
    event = b"data: " + json.dumps(EVENT).encode() + b"\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(event), event)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(events):
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0.005)  # as steps do, so that events are read one by one
        end = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def read_ours(url: str) -> int:
    """Read a stream; return its number of events."""
    seen = 0

    def take(data: bytes, _: float) -> None:
        nonlocal seen
        seen += len(_decode_event(data).choices[0].token_ids or ())

    await post_stream(Address.of(url), "/v1/completions", b"{}", take, timeout=100)
    return seen


def httpx_reader() -> Callable[[str], Awaitable[int]]:
    """Return a reader that uses httpx."""
    client = httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits(max_connections=None))

    async def read(url: str) -> int:
        seen = 0
        async with client.stream("POST", url + "/v1/completions", content=b"{}") as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    seen += len(json.loads(line[6:])["choices"][0]["token_ids"])
        return seen

    return read


async def measure(name: str, read: Callable[[str], Awaitable[int]], url: str, streams: int) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    seen = sum(await asyncio.gather(*(read(url) for _ in range(streams))))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    print(f"{name:<6} {seen} events: {1e6 * cpu / seen:6.1f} us of processor time per event, {wall:.2f} s in total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--events", type=int, default=500)
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(arguments.events, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    for _ in range(2):
        asyncio.run(measure("ours", read_ours, url, arguments.streams))
        asyncio.run(measure("httpx", httpx_reader(), url, arguments.streams))
    server.kill()


if __name__ == "__main__":
    main()
