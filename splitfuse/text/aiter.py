"""Merges asynchronous generators into one, whatever they yield."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

_Item = TypeVar("_Item")


async def merged(sources: Sequence[AsyncGenerator[_Item, None]]) -> AsyncGenerator[_Item, None]:
    """Yield the items of all sources as they come. An error of one ends them all, and so does closing.

    A source is resumed only after its last item was processed: an item may refer to the source's current state.
    """
    news: asyncio.Queue[tuple[_Item, asyncio.Event] | Exception | None] = asyncio.Queue()

    async def forward(source: AsyncGenerator[_Item, None]) -> None:
        done = asyncio.Event()
        try:
            async with aclosing(source):
                async for item in source:
                    done.clear()
                    news.put_nowait((item, done))
                    await done.wait()
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(forward(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            new = await news.get()
            if new is None:
                running -= 1
            elif isinstance(new, Exception):
                raise new
            else:
                item, done = new
                yield item
                done.set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
