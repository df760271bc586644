"""Cost of a recording: the same 32 requests to one engine process, recorded and not, in turns.

    python -m benchmarks.server.recording_cost [--model FOLDER] [--streams N] [--prompt N] [--generate N] [FLAGS]

Engine FLAGS are given as --name=value. The front is this process, which records as a server does. Compared are the mean
step time, by the engine's own clock, and the total time of all requests, in which the time between steps counts.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.server.front_cost import Turn, make_prompts, parsed, ratios, settings_of
from splitfuse.config import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineClient
from splitfuse.engine.messages import Add, EngineStats
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.trace import TraceLevel
from splitfuse.recording.recorder import Recorder
from splitfuse.server.traces import EngineRecords, TraceEvent, TraceHub


async def measure() -> None:
    """Print each pair of turns, and the ratios of all."""
    arguments, flags = parsed(__doc__, prompt=64, generate=64)
    config = EngineConfig.from_settings({"num_blocks": 400, **settings_of(flags)})
    path = Path(tempfile.mkdtemp(prefix="bench-")) / "engine.rec"
    client, recorder = make_replicas(config), Recorder(path, config, max_mib=1024)
    hub = TraceHub(client.engines)

    def take(event: TraceEvent) -> None:
        if isinstance(event, EngineRecords):
            recorder.take(event.engine, event.records)

    @contextmanager
    def recorded() -> Iterator[None]:
        unsubscribe = hub.subscribe(take, TraceLevel.PLANS)
        yield
        unsubscribe()

    await client.start()
    recorder.start_engine(0, client.engines[0].info)  # which begins the file
    await compare(client, arguments, "recorded", recorded)
    await client.close()
    recorder.close()
    requests = arguments.streams * (arguments.turns + 1)
    print(f"{recorder.num_bytes} bytes of {requests} requests: {recorder.num_bytes / requests:.0f} each")


async def compare(
    client: EngineClient, arguments: argparse.Namespace, word: str, watched: Callable[[], AbstractContextManager[None]]
) -> list[tuple[Turn, Turn]]:
    """Print each pair of turns, a plain one and one within `watched()`, called `word`, and the ratios of all."""
    pairs: list[tuple[Turn, Turn]] = []
    for turn in range(-1, arguments.turns):
        found: dict[bool, Turn] = {}
        for watches in (True, False) if turn % 2 else (False, True):
            prompts = make_prompts(turn, arguments.streams, arguments.prompt)
            with watched() if watches else nullcontext():
                found[watches] = await run(client, f"{turn} {watches}", prompts, arguments.generate)
        if turn >= 0:  # the first warms up
            pairs.append((found[False], found[True]))
            print(f"turn {turn}: {described(found[False])}; {word} {described(found[True])}", flush=True)
    print(f"mean step {word} / plain: {ratios([b.mean_step / a.mean_step for a, b in pairs])}")
    print(f"total time {word} / plain: {ratios([b.seconds / a.seconds for a, b in pairs])}")
    return pairs


async def run(client: EngineClient, name: str, prompts: list[list[int]], generate: int) -> Turn:
    """Generate for all prompts together."""
    steps: list[float] = []

    def note(stats: EngineStats) -> None:
        steps.append(stats.step_seconds)

    client.engines[0].on_step = note
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts):
            group.create_task(read(client, f"{name} {number}", prompt, generate))
    return Turn(time.monotonic() - began, len(steps), sum(steps))


async def read(client: EngineClient, name: str, prompt: list[int], generate: int) -> None:
    params = SamplingParams(max_tokens=generate, ignore_eos=True)
    async with client.open(Add(name, tuple(prompt), params)) as stream:
        async for _ in stream:
            pass


def described(turn: Turn) -> str:
    return f"{turn.seconds:.2f} s, {turn.steps} steps of {1000 * turn.mean_step:.2f} ms"


if __name__ == "__main__":
    asyncio.run(measure())
