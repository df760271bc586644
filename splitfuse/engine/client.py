"""The boundary between whoever speaks to people and whatever computes: open a request, read its outputs, close it.

EngineClient is the interface; an engine in a thread, in another process, or several behind a router are the same to
whoever uses it. Everything here but the engine's own thread runs in one event loop, and belongs to it.
"""

from __future__ import annotations

import asyncio
import enum
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.request import FinishReason, RequestOutput
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import (
    Add,
    EngineInfo,
    EngineStats,
    Failed,
    Finish,
    Loading,
    Ready,
    Report,
    StepReport,
    Stop,
)
from splitfuse.errors import EngineDiedError, InvalidRequestError

if TYPE_CHECKING:  # a front that speaks to engine processes needs no PyTorch
    from splitfuse.engine.engine import Engine


class EngineState(enum.StrEnum):
    """STARTING -> READY -> DEAD; an engine that is restarted goes back to STARTING."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class Stream:
    """The outputs of one request, as an asynchronous iterator; the last one has a finish_reason.

    Whoever opened it must read it to its end or close it: `async with client.open(...) as stream`. Iterating raises
    EngineDiedError if the engine is gone.
    """

    def __init__(self, request: Add, finish: Callable[[Finish], None]) -> None:
        self.request = request
        self.num_tokens = 0  # received so far
        self.began: float | None = None
        """When its first step began, on the monotonic clock."""
        self.left = math.inf
        """When nothing more of it was to come, or was wanted."""
        self.spent: asyncio.Future[LatencyBreakdown | None] = asyncio.get_running_loop().create_future()
        """The engine's account, which may come later than that; None from one that died or refused it."""
        self._finish = finish
        self._opened = time.monotonic()
        self._outputs: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._ended = False  # nothing more will come
        self._released = False  # nothing more is wanted

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if self._ended or self._released:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._outputs.popleft()

    def stop(self, num_tokens: int) -> None:
        """A stop string has been seen: the request ends with its first `num_tokens` tokens, the stream with what was
        read.
        """
        self._release(FinishReason.STOP, num_tokens)

    def close(self) -> None:
        """Nobody reads any more. A request that has not ended is aborted."""
        self._release(FinishReason.ABORT, None)

    def push(self, output: RequestOutput, step_seconds: float) -> None:
        """For the client that made it."""
        if self.began is None:
            self.began = max(self._opened, time.monotonic() - step_seconds)
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._ended = True
            self.settle(output.latency_breakdown)
        if not self._released:
            self._outputs.append(output)
            self._news.set()

    def fail(self, error: Exception) -> None:
        """For the client that made it: there will be no more outputs."""
        self._error = error
        self._ended = True
        self.settle(None)
        self._news.set()

    def settle(self, spent: LatencyBreakdown | None) -> None:
        """For the client that made it: no engine knows it any more."""
        self.left = min(self.left, time.monotonic())
        if not self.spent.done():
            self.spent.set_result(spent)

    def _release(self, reason: FinishReason, num_tokens: int | None) -> None:
        if not self._released:
            self._released = True
            self._outputs.clear()
            if not self._ended:
                self.left = time.monotonic()
                self._finish(Finish(self.request.request_id, reason, num_tokens, self.left))
        self._news.set()


class EngineClient(ABC):
    """Requests in, outputs out."""

    @property
    @abstractmethod
    def state(self) -> EngineState: ...

    @property
    @abstractmethod
    def stage(self) -> Loading:
        """How far start-up has come; the last stage is `ready`."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """Once it has been READY. Raises EngineDiedError before."""

    @property
    @abstractmethod
    def stats(self) -> list[EngineStats]:
        """Of each engine behind this client, after its last step."""

    @property
    @abstractmethod
    def outstanding_tokens(self) -> int:
        """Tokens still to be computed, at most, for the requests that are open."""

    @property
    def silent(self) -> bool:
        """Whether nothing has been heard of the engine for longer than usual."""
        return False

    @abstractmethod
    def open(self, request: Add) -> Stream:
        """Begin a request. Raises InvalidRequestError if it is beyond the engine's limits or its id is taken,
        EngineDiedError if no engine is ready.
        """

    @abstractmethod
    async def start(self) -> None:
        """Load. Returns when the engine is ready, or raises what kept it from that."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine. Streams that are open get an EngineDiedError."""


class LocalClient(EngineClient):
    """What an engine in a thread and one in a process have in common: one engine, its streams, its reports."""

    def __init__(self) -> None:
        self._state = EngineState.STARTING
        self._death = ""  # why it is dead
        self._stage = Loading("starting")
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._streams: dict[str, Stream] = {}
        self._ending: dict[str, Stream] = {}  # ended by us: the engine has not said yet that it knows
        self._checked: tuple[object, object] = (None, None)  # the prompt and parameters of the last request
        self.on_step: Callable[[StepReport], None] = lambda _: None
        """Sees every step: for metrics."""
        self.on_planned: Callable[[str], None] = lambda _: None
        """Sees the memory plan, before anything is loaded."""

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def stage(self) -> Loading:
        return self._stage

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDiedError("the engine is not ready yet")
        return self._info

    @property
    def stats(self) -> list[EngineStats]:
        return [self._stats]

    @property
    def outstanding_tokens(self) -> int:
        limits = self.info.limits
        return sum(
            len(s.request.prompt_token_ids)
            + limits.room(len(s.request.prompt_token_ids), s.request.params)
            - s.num_tokens
            for s in self._streams.values()
        )

    def open(self, request: Add) -> Stream:
        if self._state is EngineState.DEAD:
            raise EngineDiedError(f"the engine is dead: {self._death}")
        if self._state is not EngineState.READY:
            raise EngineDiedError(f"the engine is {self._state}")
        if request.request_id in self._streams:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        self._check(request)
        stream = self._streams[request.request_id] = Stream(request, self._finish)
        self._send(request)
        return stream

    def _check(self, request: Add) -> None:
        """Once for all choices of a prompt, which come one after the other: it reads every token."""
        prompt, params = self._checked
        if request.prompt_token_ids is not prompt or request.params is not params:
            self.info.limits.check(request.prompt_token_ids, request.params)
            self._checked = (request.prompt_token_ids, request.params)

    @abstractmethod
    def _send(self, command: Add | Finish | Stop) -> None:
        """Hand a command to the engine, without waiting."""

    def _finish(self, command: Finish) -> None:
        stream = self._streams.pop(command.request_id, None)
        if stream is not None and self._state is EngineState.READY:
            self._ending[command.request_id] = stream
            self._send(command)

    def _take(self, report: Report) -> None:
        """Take in what the engine says, in the event loop."""
        match report:
            case StepReport():
                self._stats = report.stats
                self.on_step(report)
                for output in report.outputs:
                    ending = self._ending.get(output.request_id)
                    if ending is not None:  # by us: this was on its way, or is the last we hear of it
                        if output.finish_reason is not None:
                            del self._ending[output.request_id]
                            ending.settle(output.latency_breakdown)
                        continue
                    stream = self._streams.get(output.request_id)
                    if stream is None:
                        continue
                    if output.finish_reason is not None:
                        del self._streams[output.request_id]
                    stream.push(output, report.stats.step_seconds)
            case Loading():
                self._stage = report
                if report.memory_plan:
                    self.on_planned(report.memory_plan)
            case Ready():
                self._info, self._state, self._stage = report.info, EngineState.READY, Loading("ready", 1.0)
            case Failed():
                self._die(report.error)

    def _die(self, why: str) -> None:
        """The engine is gone: so are its requests."""
        self._state, self._death = EngineState.DEAD, why
        streams, ending = self._streams, self._ending
        self._streams, self._ending = {}, {}
        self._stats = EngineStats()
        for stream in (*streams.values(), *ending.values()):
            stream.fail(EngineDiedError(f"the engine died while the request ran: {why}"))


class AsyncEngine(LocalClient):
    """An engine in a thread of this process. What it does with the interpreter's lock held delays the event loop, so a
    server uses a process; this is for programs that want both in one, and for tests.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._events: asyncio.AbstractEventLoop | None = None
        self._loop = EngineLoop(engine, self._report)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._take(Ready(self._loop.info))
        self._thread.start()

    async def close(self) -> None:
        if self._thread.is_alive():
            self._send(Stop())
            await asyncio.to_thread(self._thread.join)
        self._die("it was closed")

    def _send(self, command: Add | Finish | Stop) -> None:
        self._loop.commands.put(command)

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:
            self._report(Failed(repr(error)))

    def _report(self, report: Report) -> None:
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(self._take, report)
        except RuntimeError:  # the event loop is closed: nobody listens
            self._loop.commands.put(Stop())
