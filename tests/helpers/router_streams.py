"""Streams of requests through a router, for tests of engines that die, are drained, or run elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from random import Random
from typing import Any

import msgspec
from patience import PATIENCE

from splitfuse.core.events import StepScheduled
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream


def run(test: Awaitable[Any]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@asynccontextmanager
async def running(*engines: LocalClient, name_key: bytes | None = None) -> AsyncIterator[Router]:
    router = Router(engines, name_key=name_key)
    await router.start()
    try:
        yield router
    finally:
        await router.close()


def requests(count: int, *, max_tokens: int) -> list[Add]:
    """Random prompts; every second request is greedy."""
    rng = Random(count)
    made = []
    for number in range(count):
        prompt = tuple(rng.randrange(5, 700) for _ in range(rng.randrange(1, 120)))
        temperature = 0.9 if number % 2 else 0.0
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature, seed=number)
        made.append(Add(str(number), prompt, params))
    return made


async def read(stream: Stream) -> list[int]:
    async with stream:
        return [token async for output in stream for token in output.token_ids]


@asynccontextmanager
async def closed_loop(
    router: Router, wanted: Sequence[Add], answers: Sequence[list[int]], name: str = "loop"
) -> AsyncIterator[list[Stream]]:
    """Send each request again as soon as its answer has come, until the context ends: then requests run whenever an
    engine is killed or drained, on however fast a machine. Asserts that every answer is the expected one.

    Gives the list of all streams so far, once each of the first ones has a token.
    """
    streams: list[Stream] = []
    is_over = False

    async def send(request: Add, answer: list[int]) -> None:
        for number in count():
            await until(lambda: router.state is EngineState.READY)
            if is_over and number:
                return
            again = msgspec.structs.replace(request, request_id=f"{name} {request.request_id}.{number}")
            streams.append(stream := router.open(again))
            assert await read(stream) == answer, again.request_id

    async with asyncio.TaskGroup() as clients:
        for request, answer in zip(wanted, answers, strict=True):
            clients.create_task(send(request, answer))
        await until(lambda: len(streams) >= len(wanted) and all(each.num_tokens for each in streams[: len(wanted)]))
        yield streams
        is_over = True


@contextmanager
def held(engine: Engine, request: Add, num_tokens: int) -> Iterator[threading.Event]:
    """Hold an engine of this process before a request has one token more than so many, until the event is set."""
    go_on, start = threading.Event(), len(request.prompt_token_ids) + num_tokens - 1

    def hold(step: StepScheduled) -> None:
        if any(chunk.request_id == request.request_id and chunk.start >= start for chunk in step.plan.chunks):
            go_on.wait()

    engine.events.subscribe(StepScheduled, hold)
    try:
        yield go_on
    finally:
        go_on.set()


def resumed(streams: Sequence[Stream]) -> list[Stream]:
    """Return the streams that went on at another engine, or at a restarted one."""
    return [stream for stream in streams if stream.num_resumed]
