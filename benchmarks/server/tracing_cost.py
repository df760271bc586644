"""Cost of a trace: the steps of 32 running requests, traced and not, in many short turns of one engine process.

    python -m benchmarks.server.tracing_cost [--model FOLDER] [--streams N] [--prompt N] [--generate N] [FLAGS]

Engine FLAGS are given as --name=value. The front is this process, which encodes the records as a server does for one
client of /v1/splitfuse/trace. See recording_cost for what is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.server.front_cost import parsed, settings_of
from benchmarks.server.recording_cost import compare
from splitfuse.config.engine import EngineConfig
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.server.trace_feed import TraceFeed, TraceQueue
from splitfuse.server.trace_stream import SEND_SECONDS
from splitfuse.server.traces import TraceHub


async def measure() -> None:
    """Print each pair of turns, and the ratios of all."""
    arguments, flags = parsed(__doc__, prompt=16, generate=64)
    client = SupervisedEngine(SubprocessLauncher(EngineConfig.from_settings({"num_blocks": 400, **settings_of(flags)})))
    feed, num_bytes = TraceFeed(TraceHub(client.engines)), 0

    async def send(queue: TraceQueue) -> None:
        nonlocal num_bytes
        while True:
            await asyncio.sleep(SEND_SECONDS)
            num_bytes += len(queue.take())

    @contextmanager
    def traced() -> Iterator[None]:
        nonlocal num_bytes
        with feed.open() as queue:
            sender = asyncio.create_task(send(queue))
            yield
            sender.cancel()
            num_bytes += len(queue.take())

    await client.start()
    num_steps = await compare(client, arguments, "traced", traced)
    await client.close()
    print(f"{num_bytes / num_steps:.0f} bytes a step")


if __name__ == "__main__":
    asyncio.run(measure())
