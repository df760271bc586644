"""Turns what the engines and the server do into lines of JSON, once for all the clients that read traces.

feed = TraceFeed(hub)
with feed.open() as queue:
    queue.take()                  # the lines of what happened meanwhile
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import msgspec

from splitfuse.core.latency.phases import BEFORE_ENGINE, LatencyPhase
from splitfuse.core.slo.targets import SloViolation
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import EngineStats
from splitfuse.engine.trace import TraceLevel, TraceRecord
from splitfuse.server.errors import RefusedError
from splitfuse.server.explain import why_missed
from splitfuse.server.traces import EngineChange, EngineRecords, RequestEnd, TraceEvent, TraceHub

MAX_PENDING_BYTES = 2**21
"""Bytes that wait for one client; further events are dropped."""
MAX_TRACES = 32
"""Number of clients that may read traces at once."""


class _Line(msgspec.Struct, frozen=True, tag_field="event", tag=True, omit_defaults=True):
    """Writes one line of the stream, without what is absent. All times are seconds on the monotonic clock of the
    server's machine.
    """


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
    """Holds what an engine, by its index, has traced in a step or between two: see engine/trace.py."""

    engine: int
    records: tuple[TraceRecord, ...]


class TracedChange(_Line, frozen=True, tag="engine"):
    """Tells that an engine has changed its state."""

    engine: int
    state: EngineState
    reason: str
    time: float


class TracedRequest(_Line, frozen=True, kw_only=True, tag="request"):
    """Tells that an HTTP request has ended: the facts of `splitfuse explain`.

    Ids of its requests at the engine, one a choice, begin with `id`. `why` says in words why its SLO was missed.
    """

    id: str
    request_id: str
    route: str
    status: int
    key: str | None = None
    arrival: float
    ended: float
    engine_opened: float | None = None
    """Time at which it was sent to an engine; None if it was not."""
    phases: dict[LatencyPhase, float]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reasons: Mapping[str, int]
    """Numbers of choices, by finish reason."""
    error: str | None = None
    ttft: float | None = None
    preemptions: int
    slo_met: bool | None = None
    slo_violation: SloViolation | None = None
    why: str = ""


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


def encode_line(line: TraceLine) -> bytes:
    """Return a line as it is sent."""
    return _encode(line) + b"\n"


class TraceQueue:
    """Holds the lines that a client has not been sent yet."""

    def __init__(self, max_bytes: int = MAX_PENDING_BYTES) -> None:
        self.dropped = 0
        """Number of events for which there was no room."""
        self._max_bytes = max_bytes
        self._lines = bytearray()

    def put(self, line: bytes) -> None:
        """Add the line of an event, if there is room."""
        if len(self._lines) + len(line) > self._max_bytes:
            self.dropped += 1
        else:
            self._lines += line

    def take(self) -> bytes:
        """Return all lines, and forget them."""
        lines, self._lines = bytes(self._lines), bytearray()
        return lines


class TraceFeed:
    """Feeds the queues of all clients that read traces. Belongs to the event loop's thread."""

    def __init__(self, hub: TraceHub) -> None:
        self._hub = hub
        self._num_open = 0
        self._newest: tuple[object, bytes] = None, b""

    @contextmanager
    def open(self) -> Iterator[TraceQueue]:
        """Open a queue. Raises RefusedError (429) if too many are open."""
        if self._num_open >= MAX_TRACES:
            message = f"{MAX_TRACES} traces are being read, the most that this server feeds: end one"
            raise RefusedError(429, message, code="rate_limit_exceeded", headers={"retry-after": "10"})
        queue = TraceQueue()
        self._num_open += 1
        unsubscribe = self._hub.subscribe(lambda event: queue.put(self._line(event)), TraceLevel.STEPS)
        try:
            yield queue
        finally:
            unsubscribe()
            self._num_open -= 1

    def _line(self, event: TraceEvent) -> bytes:
        """Return the line of an event, which the hub tells all queues before the next one."""
        newest = event.record if isinstance(event, RequestEnd) else event  # its context must not be kept
        if self._newest[0] is not newest:
            self._newest = newest, encode_line(line_of(event))
        return self._newest[1]


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
            return TracedRequest(
                id=event.unique_id,
                request_id=record.request_id,
                route=record.route,
                status=record.status,
                key=record.key,
                arrival=arrival,
                ended=event.ended,
                engine_opened=None if breakdown is None else arrival + breakdown.seconds_in(BEFORE_ENGINE),
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
                why=why_missed(record, breakdown),
            )
