"""Streams of requests through a router, for tests of engines that die, are drained, or run elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from patience import PATIENCE

from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import LocalClient
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
