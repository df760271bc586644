"""Sends what the engines and the server do, as it happens: GET /v1/splitfuse/trace, a line of JSON an event.

    {"event": "begin", "model": "...", "time": 5120.25, ...}
    {"event": "records", "engine": 0, "records": [["step", 17, ...], ...]}
    {"event": "request", "request_id": "...", "status": 200, "phases": {"reading": 0.0002, ...}, ...}
    {"event": "status", "dropped": 0, ...}
    {"event": "end", "dropped": 0}

What `splitfuse trace` and `splitfuse top` read. A client that reads too slowly gets less, and is told how many events
it has not got: the server waits for none and keeps at most MAX_PENDING_BYTES for each.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.slo.targets import SloViolation
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import EngineStats
from splitfuse.engine.trace import TraceLevel, TraceRecord
from splitfuse.errors import EngineUnavailableError, InvalidRequestError
from splitfuse.server.auth import check_observer
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Dialect, Route, bearer_or_header_key
from splitfuse.server.explain import describe_breakdown
from splitfuse.server.openai.dialect import ErrorBody, error_body
from splitfuse.server.paging import query_of
from splitfuse.server.state import AppState
from splitfuse.server.traces import EngineChange, EngineRecords, RequestEnd, TraceEvent
from splitfuse.version import __version__

MAX_PENDING_BYTES = 2**21
"""Bytes that wait for one client; further events are dropped."""
MAX_SECONDS = 86400.0
"""Longest time of a trace."""
SEND_SECONDS = 0.1
"""Time from one writing to the next."""
STATUS_SECONDS = 1.0
"""Time from one status to the next."""


class _Line(msgspec.Struct, frozen=True, tag_field="event", tag=True):
    """Is one line of the stream. All times are seconds on the monotonic clock of the server's machine."""


class TraceBegin(_Line, frozen=True, tag="begin"):
    """Begins a trace. `unix_time` is the time of day at `time`; `num_blocks` the KV blocks of each engine."""

    version: str
    model: str
    time: float
    unix_time: float
    num_blocks: int
    slo_enabled: bool
    engines: tuple[EngineState, ...]


class TracedRecords(_Line, frozen=True, tag="records"):
    """Has what an engine, by its index, has traced in a step or between two: see engine/trace.py."""

    engine: int
    records: tuple[TraceRecord, ...]


class TracedChange(_Line, frozen=True, tag="engine"):
    """Tells that an engine has changed its state."""

    engine: int
    state: EngineState
    reason: str
    time: float


class TracedRequest(_Line, frozen=True, tag="request"):
    """Tells that an HTTP request has ended: the facts of `splitfuse explain`.

    Ids of its requests at the engine, one a choice, begin with `id`. `why` says in words why its SLO was missed.
    """

    id: str
    request_id: str
    route: str
    status: int
    key: str | None
    arrival: float
    ended: float
    engine_opened: float | None
    """Time at which it was sent to an engine; None if it was not."""
    phases: dict[LatencyPhase, float]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reasons: Mapping[str, int]
    """Numbers of choices, by finish reason."""
    error: str | None
    ttft: float | None
    preemptions: int
    slo_met: bool | None
    slo_violation: SloViolation | None
    why: str


class TraceStatus(_Line, frozen=True, tag="status"):
    """Tells the state of all engines, every second, and how many events were dropped so far."""

    time: float
    engines: tuple[tuple[EngineState, EngineStats], ...]
    num_requests: int
    """Requests that the server has accepted and not answered yet."""
    is_draining: bool
    dropped: int


class TraceEnd(_Line, frozen=True, tag="end"):
    """Ends a trace."""

    time: float
    dropped: int


TraceLine: TypeAlias = TraceBegin | TracedRecords | TracedChange | TracedRequest | TraceStatus | TraceEnd

decode_line = msgspec.json.Decoder(TraceLine).decode
"""Function that returns the event in a line."""
_encode = msgspec.json.Encoder().encode


class TraceQueue:
    """Holds the lines that a client has not been sent yet."""

    def __init__(self, max_bytes: int = MAX_PENDING_BYTES) -> None:
        self.dropped = 0
        """Number of events for which there was no room."""
        self._max_bytes = max_bytes
        self._lines = bytearray()

    def put(self, event: TraceEvent) -> None:
        """Add an event, if there is room."""
        line = _encode(line_of(event)) + b"\n"
        if len(self._lines) + len(line) > self._max_bytes:
            self.dropped += 1
        else:
            self._lines += line

    def take(self) -> bytes:
        """Return all lines, and forget them."""
        lines, self._lines = bytes(self._lines), bytearray()
        return lines


def line_of(event: TraceEvent) -> TraceLine:
    """Return an event as it is sent."""
    match event:
        case EngineRecords():
            return TracedRecords(event.engine, event.records)
        case EngineChange():
            return TracedChange(event.engine, event.state, event.reason, event.time)
        case RequestEnd():
            record, breakdown = event.record, event.breakdown
            phases = {} if breakdown is None else breakdown.phases
            arrival = event.ended - record.total_seconds
            before = phases.get(LatencyPhase.READING, 0.0) + phases.get(LatencyPhase.TOKENIZING, 0.0)
            return TracedRequest(
                id=event.unique_id,
                request_id=record.request_id,
                route=record.route,
                status=record.status,
                key=record.key,
                arrival=arrival,
                ended=event.ended,
                engine_opened=None if breakdown is None else arrival + before,
                phases=phases,
                prompt_tokens=record.prompt_tokens,
                cached_tokens=record.cached_tokens,
                generated_tokens=record.generated_tokens,
                finish_reasons=record.finish_reasons,
                error=record.error,
                ttft=record.time_to_first_token_seconds,
                preemptions=0 if breakdown is None else breakdown.num_preemptions,
                slo_met=record.slo_met,
                slo_violation=None if breakdown is None else breakdown.slo_violation,
                why="" if breakdown is None or record.slo_met is not False else describe_breakdown(breakdown),
            )


async def trace(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/splitfuse/trace."""
    check_observer(context.owner, context.scope, "traces")
    seconds = _seconds(query_of(context, QUERY).get("seconds"))
    if context.scope["method"] == "HEAD":
        await context.answer(b"", content_type=TRACE.stream_type)
        return
    queue = TraceQueue()
    unsubscribe = state.traces.subscribe(queue.put, TraceLevel.STEPS)
    try:
        await context.unless_gone(_send(state, context, queue, seconds), deadline=None)
    finally:
        unsubscribe()


async def _send(state: AppState, context: RequestContext, queue: TraceQueue, seconds: float) -> None:
    """Send what comes, until the time is over or the server has ended its last request."""
    end = time.monotonic() + seconds
    next_status = 0.0
    lines = _encode(_begin(state)) + b"\n"
    while True:
        now, is_over = time.monotonic(), state.admission.draining and not state.admission.num_requests
        lines += queue.take()
        if now >= next_status:
            next_status = now + STATUS_SECONDS
            lines += _encode(_status(state, queue.dropped)) + b"\n"
        if now >= end or is_over:
            await context.send_events([lines + _encode(TraceEnd(now, queue.dropped)) + b"\n"])
            await context.end_events()
            return
        if lines:
            await context.send_events([lines])
            lines = b""
        await asyncio.sleep(max(min(SEND_SECONDS, end - now), 0))


def _begin(state: AppState) -> TraceBegin:
    client = state.service.client
    try:
        model, num_blocks, slo_enabled = state.model, client.info.limits.num_blocks, client.info.slo_enabled
    except EngineUnavailableError:  # none was ever ready
        model, num_blocks, slo_enabled = "", 0, False
    engines = tuple(engine.state for engine in client.engines)
    return TraceBegin(__version__, model, time.monotonic(), time.time(), num_blocks, slo_enabled, engines)


def _status(state: AppState, dropped: int) -> TraceStatus:
    client, admission = state.service.client, state.admission
    engines = tuple((engine.state, engine.stats[0]) for engine in client.engines)
    return TraceStatus(time.monotonic(), engines, admission.num_requests, admission.draining, dropped)


def _seconds(text: str | None) -> float:
    """Return for how long to trace; without a time, until the client leaves."""
    if text is None:
        return MAX_SECONDS
    try:
        seconds = msgspec.convert(text, float, strict=False)  # as JSON has numbers: not 1_0
    except msgspec.ValidationError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:
        message = f"seconds must be a number above 0, up to {MAX_SECONDS:.0f}, such as 30, not {text!r:.80}"
        raise InvalidRequestError(message, parameter="seconds")
    return seconds


QUERY: dict[str, dict[str, Any]] = {"seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS}}
TRACE = Dialect(
    error=error_body,
    error_type=ErrorBody,
    key=bearer_or_header_key,
    event=lambda content: _encode(content) + b"\n",
    comment=b"\n",
    stream_type="application/x-ndjson",
)
"""Dialect of a trace: lines of JSON."""
ROUTES = (
    Route(
        *("GET", "/v1/splitfuse/trace", trace, "Steps and requests as they happen, a line of JSON an event", None),
        errors=(400, 403),
        media_type=TRACE.stream_type,
        dialect=TRACE,
        query=QUERY,
    ),
)
"""Route table of traces."""
