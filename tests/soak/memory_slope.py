"""Memory that a request leaks, in the front and in the engine: the slope over 20,000 short requests.

    python -m tests.soak.memory_slope [--requests N] [--warm-up N] [SERVE FLAGS ...]

Anonymous resident memory is read at rest, every 500 requests, after a warm-up in which every block of the KV cache is
written once. All prompts differ; half of the answers are streamed; two of eight connections are opened for each
request. The slope is by least squares, with its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from random import Random

import httpx
import numpy as np
from server_load import Measured, children, http_request, wait_until_idle
from server_process import server_process

CONNECTIONS, NEW_CONNECTIONS = 8, 2
STEP = 500
WORDS = ("Anna", "Erik", "has", "had", "a", "the", "red", "old", "boat", "house", "cello", "and", "sails", "by", "sea")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--warm-up", type=int, default=12_000)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with server_process(folder, f"soak-{folder.name}", *flags) as server, server.client() as client:
        pids = {"front": server.process.pid, "engine": children(server.process.pid)[0]}
        with httpx.Client(base_url=client.url, timeout=60, trust_env=False) as http:
            _measure(http, pids, arguments.warm_up, arguments.requests)


def _measure(http: httpx.Client, pids: dict[str, int], warm_up: int, num_requests: int) -> None:
    address = (http.base_url.host, http.base_url.port or 0)
    asyncio.run(_send(address, 0, warm_up))
    rows: list[list[int]] = []
    began = time.monotonic()
    for done in range(0, num_requests + 1, STEP):
        if done:
            asyncio.run(_send(address, warm_up + done - STEP, STEP))
        wait_until_idle(http)
        measured = [Measured.of(pid) for pid in pids.values()]
        rows.append([done, *(m.anonymous for m in measured), *(m.num_files for m in measured)])
        if done % (10 * STEP) == 0:
            megabytes = ", ".join(
                f"{name} {m.anonymous / 2**20:.2f} MiB" for name, m in zip(pids, measured, strict=True)
            )
            print(f"{done:6} requests: {megabytes}; open files {[m.num_files for m in measured]}", flush=True)
    print(f"{num_requests / (time.monotonic() - began):.0f} requests/s")
    table = np.array(rows, dtype=float)
    for column, name in enumerate(pids, start=1):
        for what, part in (("all", table), ("second half", table[len(table) // 2 :])):
            (slope, _), covariance = np.polyfit(part[:, 0], part[:, column], 1, cov=True)
            print(f"{name}, {what}: {slope:.0f} ± {covariance[0, 0] ** 0.5:.0f} bytes/request")


async def _send(address: tuple[str, int], first: int, count: int) -> None:
    numbers = iter(range(first, first + count))
    async with asyncio.TaskGroup() as group:
        for number in range(CONNECTIONS):
            group.create_task(_send_sequentially(address, numbers, keep_alive=number >= NEW_CONNECTIONS))


async def _send_sequentially(address: tuple[str, int], numbers: object, *, keep_alive: bool) -> None:
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    for number in numbers:  # type: ignore[attr-defined]
        random = Random(number)
        body = {
            "prompt": " ".join(random.choices(WORDS, k=random.randint(2, 20))),
            "max_tokens": random.randint(1, 8),
            "ignore_eos": True,
            "stream": random.random() < 0.5,
        }
        reader, writer = connection or await asyncio.open_connection(*address)
        writer.write(http_request("/v1/completions", body, keep_alive=keep_alive))
        await _read_answer(reader)
        if keep_alive:
            connection = reader, writer
        else:
            writer.close()
            await writer.wait_closed()
    if connection is not None:
        connection[1].close()


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"rejected: {head!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
    if b"content-length" in fields:
        json.loads(await reader.readexactly(int(fields[b"content-length"])))
        return
    while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()


if __name__ == "__main__":
    main()
