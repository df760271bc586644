"""Defines the boundary between a front and its engines: open a request, read its outputs, close it.

EngineClient is the interface; an engine in a thread, one in another process, or several behind a router look the same
to their user. Everything here runs in one event loop and belongs to it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Self

from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.replica_view import ReplicaView
from splitfuse.core.request import FinishReason, RequestOutput
from splitfuse.engine.guard import check_process
from splitfuse.engine.messages import (
    AdapterLoaded,
    Add,
    Command,
    EngineInfo,
    EngineStats,
    Failed,
    Finish,
    LoadAdapter,
    Loading,
    Report,
    SetTracing,
    StepReport,
    Traced,
    UnloadAdapter,
)
from splitfuse.engine.trace import TraceLevel, TraceRecord
from splitfuse.errors import AdapterError, EngineUnavailableError, InvalidRequestError

_logger = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Moves from STARTING to READY to DEAD; an engine that is restarted goes back to STARTING."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class Stream:
    """Iterates over the outputs of one request; the last one has a finish_reason.

    Read it to its end or close it: `async with client.open(request) as stream`. Iterating raises EngineUnavailableError
    if the engine is gone.
    """

    def __init__(self, request: Add, finish: Callable[[Finish], None]) -> None:
        self.request = request
        self.num_tokens = 0  # received so far
        self.began: float | None = None
        """Time at which its first step began, on the monotonic clock."""
        self.ended_at = math.inf
        """Time at which the request finished or was abandoned."""
        self.breakdown: asyncio.Future[LatencyBreakdown] = asyncio.get_running_loop().create_future()
        """Breakdown of its latency, which the engine may report after `ended_at`."""
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
        """End the request after its first `num_tokens` tokens, because a stop string was found, and the stream here."""
        self._release(FinishReason.STOP, num_tokens)

    def close(self) -> None:
        """Stop reading, and abort the request if it has not ended."""
        self._release(FinishReason.ABORT, None)

    def push(self, output: RequestOutput, step_seconds: float) -> None:
        """Add an output; of one that is not wanted any more, only that it has ended counts. Called by the client that
        opened the stream.
        """
        if output.finish_reason is not None:
            self._ended = True
            self._settle(output.latency_breakdown)
        if not self._released:
            if self.began is None:
                self.began = max(self._opened, time.monotonic() - step_seconds)
            self.num_tokens += len(output.token_ids)
            self._outputs.append(output)
            self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error. Called by the client that opened it."""
        self._error = error
        self._ended = True
        self._settle(None)
        self._news.set()

    def _settle(self, breakdown: LatencyBreakdown | None) -> None:
        """Note that no engine holds the request any more."""
        self.ended_at = min(self.ended_at, time.monotonic())
        if not self.breakdown.done():
            failed = {LatencyPhase.FAILED: self.ended_at - self._opened}
            self.breakdown.set_result(breakdown or LatencyBreakdown(self._opened, self.ended_at, failed))

    def _release(self, reason: FinishReason, num_tokens: int | None) -> None:
        if not self._released:
            self._released = True
            self._outputs.clear()
            if not self._ended:
                self.ended_at = time.monotonic()
                self._finish(Finish(self.request.request_id, reason, num_tokens, self.ended_at))
        self._news.set()


class EngineClient(ABC):
    """Takes requests and gives their outputs.

    >>> async with client.open(Add("first", prompt_token_ids, SamplingParams(max_tokens=8))) as stream:
    ...     async for output in stream:
    ...         print(output.token_ids)
    """

    @property
    @abstractmethod
    def state(self) -> EngineState:
        """Return whether requests can be opened now."""

    @property
    @abstractmethod
    def stage(self) -> Loading:
        """Return how far start-up has come; the last stage is `ready`."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """Return what does not change while the engine lives. Raises EngineUnavailableError before it was READY."""

    @property
    @abstractmethod
    def stats(self) -> list[EngineStats]:
        """Return the counters of each engine behind this client, after its last step."""

    @property
    def engines(self) -> list[LocalClient]:
        """Return the engines behind this client."""
        return []

    @property
    @abstractmethod
    def outstanding_tokens(self) -> int:
        """Return the most tokens that are still to be computed for the open requests."""

    @property
    def silent(self) -> bool:
        """Return whether the engine has sent nothing for longer than usual."""
        return False

    @property
    def adapters(self) -> Mapping[str, str]:
        """Return the digests of the LoRA adapters that requests can have, by name."""
        return {}

    @property
    def loading_adapters(self) -> Collection[str]:
        """Return the names of the LoRA adapters that are being loaded, also again after an engine has died."""
        return ()

    def check_not_loading(self, name: str) -> None:
        """Raise EngineUnavailableError if the LoRA adapter of a name is being loaded."""
        if name in self.loading_adapters:
            raise EngineUnavailableError(f"the adapter {name!r:.200} is being loaded: send the request again")

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter from a folder or the Hub under a name, which another one gives up.

        Raises AdapterError, EngineUnavailableError if an engine is not ready, or loads an adapter of that name already.
        """
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        """Take a LoRA adapter from new requests; those which have it, or hold it, go on with it.

        Raises EngineUnavailableError while an adapter of that name is being loaded.
        """
        raise NotImplementedError

    def has_adapter(self, digest: str) -> bool:
        """Return whether requests can be opened that have the LoRA adapter of a digest."""
        return digest in self.adapters.values()

    def hold_adapter(self, digest: str) -> None:
        """Keep a LoRA adapter, even if it loses its name, for a request that will be opened; until `let_go_adapter`."""
        raise NotImplementedError

    def let_go_adapter(self, digest: str) -> None:
        """End what one `hold_adapter` began."""
        raise NotImplementedError

    @abstractmethod
    def open(self, request: Add) -> Stream:
        """Begin a request that keeps to `info.limits`: check it with `EngineLimits.check` where it enters.

        Raises InvalidRequestError if a request with its id is running, EngineUnavailableError if no engine is ready.
        """

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Returns when the engine is ready; raises the error that prevented it."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine. Open streams raise EngineUnavailableError."""


class LocalClient(EngineClient):
    """Manages the streams of one engine on this machine, in a thread or in a process, from its reports."""

    state = EngineState.STARTING
    stage = Loading("starting")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._death = ""
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._streams: dict[str, Stream] = {}
        self._ending: dict[str, Stream] = {}  # ended by us, not yet confirmed by the engine
        self._adapters: dict[str, str] = {}
        self._changed_adapters: dict[str, str | None] = {}  # paths of those loaded since the start, None: unloaded
        self._loading: dict[str, tuple[str, asyncio.Future[None]]] = {}  # paths and ends, by name
        self._present: set[str] = set()  # digests of the adapters that the engine has
        self._holds: Counter[str] = Counter()  # digests -> requests that hold them
        self.on_step: Callable[[EngineStats], None] = lambda _: None
        """Listener that is called with every step, for metrics."""
        self.on_planned: Callable[[str], None] = lambda _: None
        """Listener that is called with the memory plan, before anything is loaded."""
        self.on_trace: Callable[[tuple[TraceRecord, ...]], None] = lambda _: None
        """Listener that is called with what the engine traces: see `set_tracing`."""
        self.on_state: Callable[[], None] = lambda: None
        """Listener that is called when `state` has changed."""
        self._trace_level = TraceLevel.OFF
        self.keeps_view = False
        """Whether `view` is kept, for a router."""
        self.view: ReplicaView | None = None
        """What is known of the open requests, while the engine is ready: whoever opens one adds it."""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailableError("the engine is not ready yet")
        return self._info

    @property
    def engines(self) -> list[LocalClient]:
        return [self]

    @property
    def death(self) -> str:
        """Return why the engine died last; empty if it never did."""
        return self._death

    @property
    def stats(self) -> list[EngineStats]:
        return [self._stats]

    @property
    def outstanding_tokens(self) -> int:
        limits = self.info.limits
        return sum(
            len(s.request.prompt_token_ids)
            + limits.max_new_tokens(len(s.request.prompt_token_ids), s.request.params)
            - s.num_tokens
            for s in self._streams.values()
        )

    @property
    def adapters(self) -> Mapping[str, str]:
        return self._adapters

    @property
    def loading_adapters(self) -> Collection[str]:
        return self._loading.keys()

    def set_tracing(self, level: TraceLevel) -> None:
        """Set how much the engine traces, now and after a restart."""
        if level is not self._trace_level:
            self._trace_level = level
            if self.state is EngineState.READY:
                self._send(SetTracing(level))

    async def load_adapter(self, name: str, path: str) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.state}: load the adapter again when it is ready")
        self.check_not_loading(name)
        await asyncio.shield(self._begin_load(name, path))

    def unload_adapter(self, name: str) -> None:
        self.check_not_loading(name)
        self._adapters.pop(name, None)
        self._changed_adapters[name] = None
        self._unload_unused()

    def has_adapter(self, digest: str) -> bool:
        return digest in self._present

    def hold_adapter(self, digest: str) -> None:
        self._holds[digest] += 1

    def let_go_adapter(self, digest: str) -> None:
        self._holds[digest] -= 1
        if not self._holds[digest]:
            del self._holds[digest]
            self._unload_unused()

    def _begin_load(self, name: str, path: str) -> asyncio.Future[None]:
        loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[name] = path, loading
        self._send(LoadAdapter(name, path))
        return loading

    def _unload_unused(self) -> None:
        """Unload the adapters that have neither a name nor a request; not while one is loaded, which may be the same as
        one of them.
        """
        if self.state is EngineState.READY and not self._loading:
            for digest in self._present - set(self._adapters.values()) - self._holds.keys():
                self._present.remove(digest)
                self._send(UnloadAdapter(digest))

    def open(self, request: Add) -> Stream:
        check_process(self._pid)
        if self.state is EngineState.DEAD:
            raise EngineUnavailableError(f"the engine is dead: {self._death}")
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.state}")
        if request.request_id in self._streams:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        if request.adapter and not self.has_adapter(request.adapter):
            raise EngineUnavailableError("the adapter of the request is not loaded any more: send the request again")
        num_prompt = len(request.prompt_token_ids)
        assert self.info.limits.fits(num_prompt, request.params), "call EngineLimits.check() before submitting"
        stream = Stream(request, self._finish)
        self._send(request)
        self._streams[request.request_id] = stream
        return stream

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Send a command to the engine without waiting."""

    def _finish(self, command: Finish) -> None:
        stream = self._streams.pop(command.request_id, None)
        if stream is not None and self.state is EngineState.READY:
            self._ending[command.request_id] = stream
            self._send(command)

    def _enter(self, state: EngineState) -> None:
        """Change the state, and tell of it."""
        if state is not self.state:
            self.state = state
            try:
                self.on_state()
            except Exception:
                _logger.exception("a listener failed on a state")

    def _take(self, report: Report) -> None:
        """Process a report of the engine, in the event loop."""
        match report:
            case StepReport():
                if report.traced:
                    self._tell(report.traced)
                before, self._stats = self._stats, report.stats
                if 0 < before.token_budget != report.stats.token_budget > 0:
                    _logger.info("token budget of a step: %d, not %d", report.stats.token_budget, before.token_budget)
                try:
                    if report.stats.num_steps != before.num_steps:  # else it tells of requests that ended between steps
                        self.on_step(report.stats)
                except Exception:
                    _logger.exception("a listener failed on a step")
                if self.view is not None:
                    stats, now = report.stats, time.monotonic()
                    blocks = stats.num_available_blocks
                    self.view.take(report.outputs, stats.step_times, available_blocks=blocks, now=now)
                for output in report.outputs:
                    streams = self._ending if output.request_id in self._ending else self._streams
                    if (stream := streams.get(output.request_id)) is not None:
                        stream.push(output, report.stats.step_seconds)
                        if output.finish_reason is not None:
                            del streams[output.request_id]
            case Traced():
                self._tell(report.records)
            case Loading():
                self.stage = report
                if report.memory_plan:
                    self.on_planned(report.memory_plan)
            case EngineInfo():
                self._info, self.stage = report, Loading("ready", 1.0)
                self.view = view_of(report) if self.keeps_view else None
                self._stats = EngineStats(token_budget=report.token_budget, attainable=report.attainable)
                self._enter(EngineState.READY)
                if self._trace_level is not TraceLevel.OFF:  # before any request
                    self._send(SetTracing(self._trace_level))
                self._adapters = dict(report.adapters)
                self._present = set(self._adapters.values())
                for name, path in self._changed_adapters.items():  # after a restart
                    self._adapters.pop(name, None)
                    if path is not None:
                        self._begin_load(name, path).add_done_callback(partial(_log_failure, name))
                self._unload_unused()
            case AdapterLoaded():
                self._take_adapter(report)
            case Failed():
                self._die(report.error)

    def _tell(self, records: tuple[TraceRecord, ...]) -> None:
        try:
            self.on_trace(records)
        except Exception:
            _logger.exception("a listener failed on a trace")

    def _take_adapter(self, report: AdapterLoaded) -> None:
        if report.name not in self._loading:  # the engine has died since
            return
        path, loading = self._loading.pop(report.name)
        if report.error:
            loading.set_exception(AdapterError(report.error))
        else:
            self._adapters[report.name], self._changed_adapters[report.name] = report.digest, path
            self._present.add(report.digest)
            loading.set_result(None)
        self._unload_unused()

    def _die(self, why: str) -> None:
        """Fail all requests, since the engine is gone."""
        loading, self._loading, self._adapters, self._present = self._loading, {}, {}, set()
        for _, each in loading.values():
            each.set_exception(EngineUnavailableError(f"the engine died while it loaded the adapter: {why}"))
        self._death, self.view = why, None
        self._enter(EngineState.DEAD)
        streams, ending = self._streams, self._ending
        self._streams, self._ending = {}, {}
        self._stats = EngineStats()
        for stream in (*streams.values(), *ending.values()):
            stream.fail(EngineUnavailableError(f"the engine died while the request ran: {why}"))


def view_of(info: EngineInfo) -> ReplicaView:
    """Return what is known of an engine that has just become ready."""
    view = ReplicaView(
        num_blocks=info.limits.num_blocks,
        block_size=info.limits.block_size,
        max_num_seqs=info.max_num_seqs,
        token_budget=info.max_num_batched_tokens,
    )
    view.times = info.step_times
    return view


def _log_failure(name: str, loading: asyncio.Future[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        _logger.error("the adapter %s could not be loaded again: %s", name, error)
