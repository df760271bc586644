"""Defines the boundary between a front and its engines: open a request, read its outputs, close it.

EngineClient is the interface; an engine in a thread, one in another process, or several behind a router look the same
to their user. Everything here runs in one event loop and belongs to it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVarTuple

import msgspec

from splitfuse.config.values import EngineRole
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import EngineLimits
from splitfuse.core.replicas.capacity import MOST_ARRIVALS, Arrival
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.client_adapters import ClientAdapters
from splitfuse.engine.guard import check_process
from splitfuse.engine.messages import (
    AdapterLoaded,
    Add,
    Command,
    EngineInfo,
    EngineStats,
    Export,
    Failed,
    Finish,
    Leaving,
    Loading,
    Loan,
    Prefetch,
    Prefetched,
    Report,
    SetTracing,
    StepReport,
    Traced,
)
from splitfuse.engine.stream import Stream
from splitfuse.engine.trace import TraceLevel, TraceRecord
from splitfuse.errors import EngineUnavailableError, InvalidRequestError

DRAINED = "it was drained"
"""Reason why a request leaves an engine that says no other."""
_Ts = TypeVarTuple("_Ts")
_logger = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Moves from STARTING to READY to DEAD; an engine that is restarted goes back to STARTING."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    STOPPED = "stopped"
    """State of an engine that `scale` has ended, until `scale` starts it again."""


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
    def open_limits(self) -> EngineLimits:
        """Return the limits of what can begin now; those of `info` if nothing can."""
        return self.info.limits

    @property
    @abstractmethod
    def stats(self) -> list[EngineStats]:
        """Return the counters of each engine behind this client, after its last step."""

    @property
    def engines(self) -> list[LocalClient]:
        """Return the engines behind this client."""
        return []

    @property
    def num_resumed(self) -> Mapping[str, int]:
        """Return how many times requests went on at another engine, or a restarted one, by the cause."""
        return {}

    async def drain_engine(self, index: int) -> int:
        """Let an engine take no more requests, and those that it has go on at others; one that no other can have ends
        there. Returns how many went on elsewhere, once none is left there.

        Raises InvalidRequestError if there is no such engine, EngineUnavailableError if no other is ready.
        """
        raise InvalidRequestError(f"engine {index} is alone: its requests have no other", parameter="engine")

    def undrain_engine(self, index: int) -> None:
        """Let a drained engine take requests again. Raises InvalidRequestError if there is no such engine."""
        raise InvalidRequestError(f"engine {index} is alone: its requests have no other", parameter="engine")

    async def restart_engine(self, index: int) -> int:
        """Drain an engine, restart it, and let it take requests again. Returns how many went on elsewhere.

        Raises as `drain_engine`; EngineUnavailableError if it does not come back.
        """
        raise InvalidRequestError(f"engine {index} is alone: its requests have no other", parameter="engine")

    @property
    def num_replicas(self) -> int:
        """Return the number of engines, ready or not, that `scale` changes."""
        return 1

    async def scale(self, count: int) -> int:
        """Change the number of replicas to `count`: start some, or end some, whose requests go on at others.
        Returns how many went on elsewhere, once it is done.

        Raises InvalidRequestError for a number that there cannot be, EngineUnavailableError if it cannot be had now,
        and what a new replica raises that does not start. Then there are as many as before, and of new ones at most one
        that is ready, where no other engine is.
        """
        raise InvalidRequestError(f"there cannot be {count} replicas of a lone engine", parameter="replicas")

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
    """Manages the streams of one engine, in a thread, in a process or on another machine, from its reports."""

    restarts: ClassVar[bool] = False
    """True if an engine that has died is started again."""
    address = ""
    """Address of an engine on another machine; empty for one of this machine."""
    keeps_trying = False
    """True if an engine that could not be reached at the start may be reached later."""
    start_seconds: float | None = None
    """Seconds that its last start has taken; None: not known."""
    came_at: float | None = None
    """Time when it was ready first, or again after it was stopped, by the monotonic clock; None: it is not there."""
    state = EngineState.STARTING
    stage = Loading("starting")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.rescue: Callable[[Sequence[Stream], Sequence[Stream], str], None] | None = None
        """Function that lets the streams of an engine which has died go on elsewhere; of these, the second ones may
        have caused its death. The third argument says what that was. None: they fail.
        """
        self.on_moved: Callable[[Stream, LatencyBreakdown | None, str], None] | None = None
        """Function that lets a stream go on elsewhere which `drain` has taken from this engine, or which the engine
        cannot go on with, with the breakdown of its latency here and, if it was not drained, why.
        """
        self.on_ended: Callable[[LocalClient, str], object] = lambda _engine, _request_id: None
        """Listener that is called with the id of each request that the engine has no longer."""
        self.on_death: Callable[[LocalClient], object] = lambda _: None
        """Listener that is called when the engine has died."""
        self.on_leaving: Callable[[LocalClient], object] = lambda _: None
        """Listener that is called when a signal asks the engine to end."""
        self.role = EngineRole.MIXED
        """EngineRole that a router gives it."""
        self.is_drained = False
        """True if it takes no requests, since it is to be restarted or left alone."""
        self.on_available: Callable[[], None] = lambda: None
        """Listener that is called when requests can be opened that could not before."""
        self._death = ""
        self._news = asyncio.Event()  # of a report, or of a state
        self._info: EngineInfo | None = None
        self._identity: tuple[str, ...] = ()
        self._stats = EngineStats()
        self._streams: dict[str, Stream] = {}
        self._ending: dict[str, Stream] = {}  # ended by us, not yet confirmed by the engine
        self._moving: dict[str, Stream] = {}  # the same, and they go on elsewhere
        self._exported: dict[str, int] = {}  # answers to Export, of streams that are here
        self._prefetched: dict[str, int | None] = {}  # answers to Prefetch; None while one is waited for
        self._adapters = ClientAdapters(self.send)
        self.on_step: Callable[[EngineStats], None] = lambda _: None
        """Listener that is called with every step, for metrics."""
        self.on_planned: Callable[[str], None] = lambda _: None
        """Listener that is called with the memory plan, before anything is loaded."""
        self.on_trace: Callable[[tuple[TraceRecord, ...]], None] = lambda _: None
        """Listener that is called with what the engine traces: see `set_tracing`."""
        self.on_state: Callable[[], None] = lambda: None
        """Listener that is called when `state` has changed."""
        self.on_change: Callable[[], None] = lambda: None
        """Listener of a router, which is called when `state`, `info` or `view` may have changed."""
        self._trace_level = TraceLevel.OFF
        self.arrivals: deque[Arrival] = deque(maxlen=MOST_ARRIVALS)
        """Newest requests, also those that have ended."""
        self.ends: deque[tuple[float, bool | None]] = deque(maxlen=MOST_ARRIVALS)
        """Times of the newest ends of answers, and whether their SLO was met; None: they had none."""
        self.keeps_view = False
        """Whether `view` is kept, for a router."""
        self.view: ReplicaView | None = None
        """What is known of the open requests, while the engine is ready: the router adds those that it opens."""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailableError("the engine is not ready yet")
        return self._info

    @property
    def known_info(self) -> EngineInfo | None:
        """Return `info`, that of its last life if it is dead; None if it was never ready."""
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
        return self._adapters.names

    @property
    def loading_adapters(self) -> Collection[str]:
        return self._adapters.loading

    def set_tracing(self, level: TraceLevel) -> None:
        """Set how much the engine traces, now and after a restart."""
        if level is not self._trace_level:
            self._trace_level = level
            if self.state is EngineState.READY:
                self._send(SetTracing(level))

    def adopt_adapters(self, other: LocalClient) -> None:
        """Load what was loaded at another engine since it started, as soon as this one is ready."""
        self._adapters.adopt(other._adapters)

    async def load_adapter(self, name: str, path: str) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.state}: load the adapter again when it is ready")
        self.check_not_loading(name)
        await asyncio.shield(self._adapters.load(name, path))

    def unload_adapter(self, name: str) -> None:
        self.check_not_loading(name)
        self._adapters.unload(name)

    def has_adapter(self, digest: str) -> bool:
        return self._adapters.has(digest)

    def hold_adapter(self, digest: str) -> None:
        self._adapters.hold(digest)

    def let_go_adapter(self, digest: str) -> None:
        self._adapters.let_go(digest)

    def open(self, request: Add) -> Stream:
        request = request.settled
        self._check(request)
        stream = Stream(request, self._finish)
        stream.arrival = self._note_arrival(request)
        stream.on_loan = request.loan is not None
        self._send(request)
        self._follow(stream)
        return stream

    def resume(self, stream: Stream, loan: Loan | None = None) -> None:
        """Go on with a stream that has left its engine. Raises as `open`."""
        self._check(msgspec.structs.replace(stream.request, loan=loan))
        assert self.can_go_on_with(stream), "an answer would go on as another one"
        self._send(msgspec.structs.replace(stream.go_on(self._finish), loan=loan))
        stream.on_loan = loan is not None
        self._follow(stream)

    def can_go_on_with(self, stream: Stream) -> bool:
        """Return whether `resume` can be called with a stream now."""
        adapter = stream.request.adapter
        is_open = self.state is EngineState.READY and not self.is_drained
        return is_open and self._suits(stream) and (not adapter or self.has_adapter(adapter))

    def will_go_on_with(self, stream: Stream) -> bool:
        """Return whether `resume` may be called with a stream at some time, as far as is known."""
        if self.is_drained or self.state is EngineState.STOPPED:
            return False
        if self.state is EngineState.READY:
            return self.can_go_on_with(stream) or (bool(self.loading_adapters) and self._suits(stream))
        return self.state is EngineState.STARTING or self.restarts

    def fetches_from(self, other: LocalClient) -> bool:
        """Return whether KV blocks come here from another engine: of the same memory, or of one that listens."""
        own = self.info.block_sources
        return any("://" in source or source in own for source in other.info.block_sources)

    def goes_on_as(self, other: LocalClient, request: Add) -> bool:
        """Return whether it gives a request the same tokens as another engine, and blocks go from that one to it."""
        is_open = self.state is EngineState.READY and not self.is_drained
        if not is_open or not self.fetches_from(other) or (request.adapter and not self.has_adapter(request.adapter)):
            return False
        fits = self.info.limits.fits(len(request.prompt_token_ids), request.params)
        return fits and self._continuity(request) == other._continuity(request)

    def _suits(self, stream: Stream) -> bool:
        """Return whether the engine gives the same tokens as the one that a stream has left, and has blocks for it."""
        if stream.has_output and stream.continuity != self._continuity(stream.request):
            return False
        may_borrow = self.info.channel_bytes > 0
        return may_borrow or self.info.limits.fits(len(stream.request.prompt_token_ids), stream.request.params)

    def _continuity(self, request: Add) -> tuple[object, ...]:
        """Return what is equal at all engines that give a request the same tokens."""
        model_len = self.info.limits.max_model_len if request.params.max_tokens is None else 0
        return self.info.kv_fingerprint, model_len, *self._identity

    def drain(self) -> list[Stream]:
        """Take no more requests. Returns the streams of those that there are, for `move`."""
        assert self.on_moved is not None, "nothing would take them"
        self.is_drained = True
        return [*self._streams.values(), *self._moving.values()]

    def move(self, stream: Stream, *, num_there: int | None = None) -> None:
        """Let a stream go on elsewhere from the end of the step in flight on, if it is here, with its blocks but for
        the first `num_there`; left out, with those that were not laid ready before.
        """
        request_id = stream.request.request_id
        if self.has(stream):
            self._moving[request_id] = self._streams.pop(request_id)
            self._send(Finish(request_id, FinishReason.MOVED, num_there=num_there))

    def has(self, stream: Stream) -> bool:
        """Return whether a stream is here, and does not leave."""
        return self._streams.get(stream.request.request_id) is stream

    async def export(self, stream: Stream, num_blocks: int, *, more_than: int) -> int:
        """Have the first `num_blocks` blocks of a stream laid ready for another engine, and return how many are, once
        there are more than so many; 0 if it has left, or has none now.
        """
        request_id = stream.request.request_id
        self._exported.pop(request_id, None)
        if not self.has(stream):
            return 0
        self._send(Export(request_id, num_blocks))

        def is_answered() -> bool:
            count = self._exported.get(request_id)
            return (count is not None and (count == 0 or count > more_than)) or not self.has(stream)

        await self.wait_until(is_answered)
        return self._exported.pop(request_id, 0)

    async def wait_exported(self, stream: Stream, more_than: int) -> int:
        """Return how many leading blocks of a stream are laid ready, once there are more than so many; 0 once it has
        left.
        """
        request_id = stream.request.request_id
        await self.wait_until(lambda: self._exported.get(request_id, 0) > more_than or not self.has(stream))
        return self._exported[request_id] if self.has(stream) else 0

    async def prefetch(
        self, request_id: str, names: Sequence[bytes], blocks: Sequence[tuple[int, ...]], sources: tuple[str, ...]
    ) -> int:
        """Let the engine fetch blocks of these names and tokens for a request that will come, and return how many of
        them it has then; 0 if it has died.
        """
        if self.state is not EngineState.READY:
            return 0
        self._prefetched[request_id] = None
        try:
            self._send(Prefetch(request_id, tuple(names), tuple(blocks), sources))
            await self.wait_until(lambda: self._prefetched.get(request_id, 0) is not None)  # a death forgets it
            return self._prefetched.get(request_id) or 0
        finally:
            self._prefetched.pop(request_id, None)

    def undrain(self) -> None:
        """Take requests again."""
        self.is_drained = False
        _call("an engine that is ready", self.on_available)

    @property
    def num_open(self) -> int:
        """Return the number of requests that the engine has."""
        return len(self._streams) + len(self._moving)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once a condition holds, which changes with what the engine reports and with its state."""
        while not condition():
            self._news.clear()
            await self._news.wait()

    @property
    def open_requests(self) -> list[Add]:
        """Return the requests that the engine has."""
        return [stream.request for stream in (*self._streams.values(), *self._moving.values())]

    async def restart(self) -> None:
        """End a drained engine, and return when it is ready again. Raises EngineUnavailableError if it is not soon."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End an engine that has no requests, until `start` is called again."""
        raise NotImplementedError

    def _note_stopped(self) -> None:
        """Forget what was known of an engine that has ended."""
        self._info, self.stage, self.is_drained = None, Loading("starting"), False
        self._enter(EngineState.STOPPED)

    def absolve(self, request: Add) -> None:
        """Note that a request has not killed the engine, as was suspected."""

    def _follow(self, stream: Stream) -> None:
        stream.continuity = self._continuity(stream.request)
        self._streams[stream.request.request_id] = stream

    def _check(self, request: Add) -> None:
        """Raise the error for a request that cannot be opened now."""
        check_process(self._pid)
        if self.state is EngineState.DEAD:
            raise EngineUnavailableError(f"the engine is dead: {self._death}")
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"the engine is {self.state}")
        if self.is_drained:
            raise EngineUnavailableError("the engine is drained")
        if request.request_id in self._streams:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        if request.adapter and not self.has_adapter(request.adapter):
            raise EngineUnavailableError("the adapter of the request is not loaded any more: send the request again")
        assert request.keeps_to(self.info.limits), "call EngineLimits.check() before submitting"

    def _note_arrival(self, request: Add) -> Arrival:
        options = request.scheduling.settled(self.info.targets, time.monotonic())
        num_prompt = len(request.prompt_token_ids)
        assert options.arrival_time is not None and options.targets is not None, "they are settled"
        most = self.info.limits.max_new_tokens(num_prompt, request.params)
        arrival = Arrival(options.arrival_time, num_prompt, most, options.targets)
        self.arrivals.append(arrival)
        return arrival

    def send(self, command: Command) -> None:
        """Send a command, if the engine is ready."""
        if self.state is EngineState.READY:
            self._send(command)

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
            if state is EngineState.READY and self.came_at is None:
                self.came_at = time.monotonic()
            elif state is EngineState.STOPPED:
                self.came_at = None
            self._news.set()
            _call("a state", self.on_state)
        _call("an engine that has changed", self.on_change)

    def _take(self, report: Report) -> None:
        """Process a report of the engine, in the event loop."""
        self._news.set()
        match report:
            case StepReport():
                self._take_step(report)
            case Prefetched():
                if report.request_id in self._prefetched:  # else it took too long
                    self._prefetched[report.request_id] = report.num_blocks
            case Traced():
                _call("a trace", self.on_trace, report.records)
            case Leaving():
                _call("an engine that is asked to end", self.on_leaving, self)
            case Loading():
                self.stage = report
                if report.memory_plan:
                    self.on_planned(report.memory_plan)
            case EngineInfo():
                self._take_info(report)
            case AdapterLoaded():
                self._adapters.take(report)
                _call("an adapter", self.on_available)
            case Failed():
                self._die(report.error)

    def _take_step(self, report: StepReport) -> None:
        """Note what a step says of the engine, and hand its outputs to their streams."""
        self._exported |= {name: count for name, count in report.exported.items() if name in self._streams}
        if report.traced:
            _call("a trace", self.on_trace, report.traced)
        before, self._stats = self._stats, report.stats
        if 0 < before.token_budget != report.stats.token_budget > 0:
            _logger.info("token budget of a step: %d, not %d", report.stats.token_budget, before.token_budget)
        if report.stats.num_steps != before.num_steps:  # else it tells of requests that ended between steps
            _call("a step", self.on_step, report.stats)
        if self.view is not None:
            stats, now = report.stats, time.monotonic()
            blocks = stats.num_available_blocks
            self.view.take(report.outputs, stats.step_times, available_blocks=blocks, now=now)
        has_room = report.stats.num_lent_blocks < before.num_lent_blocks
        for output in report.outputs:
            if output.finish_reason is not None:
                self._exported.pop(output.request_id, None)
                has_room = True
            if output.finish_reason is FinishReason.MOVED:
                self._move(output)
                continue
            streams = self._streams
            for part in (self._moving, self._ending):
                if output.request_id in part:
                    streams = part
            if (stream := streams.get(output.request_id)) is not None:
                stream.push(output, report.stats.step_seconds)
                if output.finish_reason is not None:
                    del streams[output.request_id]
                    if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                        self.ends.append((time.monotonic(), output.slo_met))
                    _call("the end of a request", self.on_ended, self, output.request_id)
        if has_room:
            _call("an engine that has room", self.on_available)

    def _take_info(self, info: EngineInfo) -> None:
        """Begin with an engine that is ready, perhaps again."""
        self._info, self.stage = info, Loading("ready", 1.0)
        self.view = view_of(info) if self.keeps_view else None
        # The model's length, which memory may limit, is heeded where it ends an answer.
        self._identity = tuple(text for name, text in info.identity.items() if name != "max_model_len")
        self._stats = EngineStats(token_budget=info.token_budget, attainable=info.attainable)
        self._enter(EngineState.READY)
        if self._trace_level is not TraceLevel.OFF:  # before any request
            self._send(SetTracing(self._trace_level))
        self._adapters.restore(info.adapters)
        _call("an engine that is ready", self.on_available)

    def _move(self, output: RequestOutput) -> None:
        """Let a stream go on elsewhere whose request has ended here for that: the engine is drained, or says why."""
        stream = self._moving.pop(output.request_id, None) or self._streams.pop(output.request_id, None)
        _call("the end of a request", self.on_ended, self, output.request_id)
        if stream is None:
            return
        stream.block_sources = self.info.block_sources
        if stream.is_over or self.on_moved is None:  # its client has left meanwhile
            stream.push(replace(output, finish_reason=FinishReason.ABORT), 0.0)
        elif not _call("a request that moves", self.on_moved, stream, output.latency_breakdown, output.error or ""):
            stream.fail(died(output.error or DRAINED))

    def _suspects(self) -> Sequence[Stream]:
        """Return the streams whose requests may have caused the death of the engine: all, where nothing is known."""
        return [*self._streams.values(), *self._moving.values()]

    def _die(self, why: str) -> None:
        """Note that the engine is gone: its requests go on elsewhere, or fail."""
        try:
            suspects = self._suspects()
        except Exception:
            _logger.exception("it is not known which requests may have caused the death of an engine")
            suspects = LocalClient._suspects(self)
        self._adapters.forget(why)
        self._death, self.view = why, None
        self._news.set()
        self._enter(EngineState.DEAD)
        self._exported, self._prefetched = {}, {}
        streams, ending = self._streams | self._moving, self._ending
        self._streams, self._ending, self._moving = {}, {}, {}
        self._stats = EngineStats()
        for request_id in streams | ending:
            _call("the end of a request", self.on_ended, self, request_id)
        _call("a death", self.on_death, self)
        for stream in ending.values():
            stream.fail(died(why))
        rescued = list(streams.values())
        if self.rescue is None or not _call("a death", self.rescue, rescued, suspects, why):
            for stream in rescued:
                stream.fail(died(why))


def _call(what: str, listener: Callable[[*_Ts], object], *arguments: *_Ts) -> bool:
    """Call a listener, whose failure must not end the engine. Returns whether it did not fail."""
    try:
        listener(*arguments)
    except Exception:
        _logger.exception("a listener failed on %s", what)
        return False
    return True


def died(why: str) -> EngineUnavailableError:
    """Return the error of a request whose engine has died."""
    return EngineUnavailableError(f"the engine died while the request ran: {why}")


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
