"""Streams frames to one console until it goes, or the server ends."""

from __future__ import annotations

import asyncio

from splitfuse.server.console.store import FRAME_SECONDS, ConsoleStore
from splitfuse.server.context import SILENCE_SECONDS, RequestContext
from splitfuse.server.errors import ClientGoneError
from splitfuse.server.state import AppState

LOOK_SECONDS = 1.0
"""Time after which the stages of engines that start are looked at again."""


async def stream_frames(state: AppState, store: ConsoleStore, context: RequestContext) -> None:
    """Answer with server-sent events: a Start and Frames. It waits for the console to read, which is dropped frames if
    it is too slow.
    """
    viewer = store.open()

    async def send() -> None:
        silent = 0.0
        while True:
            while viewer.is_late:
                await context.send_events([viewer.take()])
                silent = 0.0
            if store.has_ended and state.admission.draining:
                return
            if store.pause > FRAME_SECONDS:
                await asyncio.sleep(store.pause)
            store.look()
            if not await store.wait(viewer, LOOK_SECONDS):
                silent += LOOK_SECONDS + store.pause
                if silent >= SILENCE_SECONDS:
                    await context.send_events([context.dialect.comment])
                    silent = 0.0

    try:
        await context.unless_gone(send(), deadline=None)
        await context.end_events()
    except ClientGoneError:
        return  # as all consoles do: nothing to log
    finally:
        store.close(viewer)
