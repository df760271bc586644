"""Cost of a trace: the same 32 requests to one engine process, traced and not, in turns.

    python -m benchmarks.server.tracing_cost [--model FOLDER] [--streams N] [--prompt N] [--generate N] [FLAGS]

Engine FLAGS are given as --name=value. The front is this process, which encodes the records as a server does for one
client of /v1/splitfuse/trace. See recording_cost for what is compared.
"""

from __future__ import annotations

import asyncio

from benchmarks.server.front_cost import Turn, make_prompts, parsed, ratios, settings_of
from benchmarks.server.recording_cost import described, run
from splitfuse.config import EngineConfig
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.trace import TraceLevel
from splitfuse.server.trace_stream import SEND_SECONDS, TraceQueue
from splitfuse.server.traces import TraceHub


async def measure() -> None:
    """Print each pair of turns, and the ratios of all."""
    arguments, flags = parsed(__doc__, prompt=64, generate=64)
    client = make_replicas(EngineConfig.from_settings({"num_blocks": 400, **settings_of(flags)}))
    hub, queue, num_bytes = TraceHub(client.engines), TraceQueue(), 0

    async def send() -> None:
        nonlocal num_bytes
        while True:
            num_bytes += len(queue.take())
            await asyncio.sleep(SEND_SECONDS)

    await client.start()
    sender = asyncio.create_task(send())
    pairs: list[tuple[Turn, Turn]] = []
    for turn in range(-1, arguments.turns):
        found: dict[bool, Turn] = {}
        for traces in (True, False) if turn % 2 else (False, True):
            unsubscribe = hub.subscribe(queue.put, TraceLevel.STEPS) if traces else lambda: None
            prompts = make_prompts(turn, arguments.streams, arguments.prompt)
            found[traces] = await run(client, f"{turn} {traces}", prompts, arguments.generate)
            unsubscribe()
        if turn >= 0:  # the first warms up
            pairs.append((found[False], found[True]))
            print(f"turn {turn}: {described(found[False])}; traced {described(found[True])}", flush=True)
    sender.cancel()
    await client.close()
    print(f"mean step traced / plain: {ratios([b.mean_step / a.mean_step for a, b in pairs])}")
    print(f"total time traced / plain: {ratios([b.seconds / a.seconds for a, b in pairs])}")
    print(f"{num_bytes / sum(b.steps for _, b in pairs):.0f} bytes a step")


if __name__ == "__main__":
    asyncio.run(measure())
