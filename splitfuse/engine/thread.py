"""Runs an engine in a thread of this process, for an event loop in another."""

from __future__ import annotations

import asyncio
import threading

from splitfuse.engine.client import LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Command, Failed, Report, Stop


class AsyncEngine(LocalClient):
    """Runs an engine in a thread of this process.

    What the engine does with the GIL held delays the event loop, so a server uses SupervisedEngine; this
    is for programs that want both in one process, and for tests.

    >>> client = AsyncEngine(Engine.load(EngineConfig()))
    >>> await client.start()
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._engine_loop = EngineLoop(engine, self._report)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._take(self._engine_loop.info)
        self._thread.start()

    async def close(self) -> None:
        if self._thread.is_alive():
            self._send(Stop())
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._engine.close)  # also if it has failed: others may want the folder of a tier
        self._die("it was closed")

    def _send(self, command: Command) -> None:
        self._engine_loop.commands.put(command)

    def _run(self) -> None:
        try:
            self._engine_loop.run()
        except Exception as error:
            self._report(Failed(repr(error)))

    def _report(self, report: Report) -> None:
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(self._take, report)
        except RuntimeError:  # the event loop is closed, so no one reads the reports
            self._engine_loop.commands.put(Stop())
