"""Measures what a gateway costs: processor time for each request, and for each event of a stream.

    python -m benchmarks.server.gateway [--streams 100] [--events 200] [--requests 300] [--turns 3]

The gateway is a process of its own; its only cell, in this process, answers at once with streams of events of a token's
size, or with short answers, and never computes. Clients are in this process too. Printed are processor seconds of the
gateway's process alone, so other programs on the machine change them little.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from splitfuse.clients.http_stream import Address, post_stream

EVENT = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" token","logprobs":null}]}\n\n'
PAUSE = 0.01
"""Seconds between two events of a stream."""
METRICS = b'splitfuse:engine_ready{model_name="none",engine="0",address="",role="mixed"} 1.0\n'


class Cell:
    """Answers without computing: `/stream` with events, one each PAUSE, all else with a short body."""

    def __init__(self, num_events: int) -> None:
        self._num_events = num_events

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if found := re.search(rb"content-length: (\d+)", head):
            await reader.readexactly(int(found[1]))
        if b"/v1/completions" in head.partition(b"\r\n")[0]:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(self._num_events):
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                await asyncio.sleep(PAUSE)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            body = METRICS if b"/metrics" in head else b"{}"
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(address: Address, count: int) -> int:
    """Send so many requests at once, and return how many events came."""
    seen = 0

    def take(data: bytes, now: float) -> None:
        nonlocal seen
        del data, now
        seen += 1

    async def one(number: int) -> None:
        body = b'{"prompt": "%d%s", "stream": true}' % (number, 2000 * b"x")
        status, _ = await post_stream(address, "/v1/completions", body, take, timeout=600.0)
        assert status == 200, status

    await asyncio.gather(*(one(number) for number in range(count)))
    return seen


async def measure(num_streams: int, num_events: int, num_requests: int, turns: int) -> None:
    long, short = Cell(num_events), Cell(0)
    cells = {"events": long, "requests": short}
    for what, cell in cells.items():
        server = await asyncio.start_server(cell.serve, "127.0.0.1", 0, backlog=1024)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, "-m", "splitfuse.cli", "gateway", "--port", "0", "--server", url]
            gateway = subprocess.Popen([*command, "--name", f"gateway-{os.getpid()}"], stderr=log)
            try:
                while (found := re.search(r"requests on at (http\S+)", said(log))) is None:
                    assert gateway.poll() is None, said(log)
                    await asyncio.sleep(0.05)
                address = Address.of(found[1])
                count = num_streams if what == "events" else num_requests
                await ask(address, 10)
                for _ in range(turns):
                    began, at = processor_seconds(gateway.pid), time.monotonic()
                    seen = await ask(address, count)
                    took = processor_seconds(gateway.pid) - began
                    of = seen if what == "events" else count
                    print(
                        f"{count} at once, {of} {what}: {1e6 * took / of:7.1f} us of processor time each, "
                        f"{time.monotonic() - at:.1f} s in all",
                        flush=True,
                    )
            finally:
                gateway.terminate()
                gateway.wait()
        server.close()


def said(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.streams, arguments.events, arguments.requests, arguments.turns))


if __name__ == "__main__":
    main()
