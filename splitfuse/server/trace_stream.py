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
from typing import Any

import msgspec

from splitfuse.errors import EngineUnavailableError, InvalidRequestError
from splitfuse.server.auth import check_observer
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Dialect, Route, bearer_or_header_key, encode_json
from splitfuse.server.openai.dialect import ErrorBody, error_body
from splitfuse.server.paging import query_of
from splitfuse.server.state import AppState
from splitfuse.server.trace_feed import TraceBegin, TraceEnd, TraceQueue, TraceStatus, encode_line
from splitfuse.version import __version__

MAX_SECONDS = 86400.0
"""Longest time of a trace."""
SEND_SECONDS = 0.1
"""Time from one writing to the next."""
STATUS_SECONDS = 1.0
"""Time from one status to the next."""


async def trace(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/splitfuse/trace."""
    check_observer(context.owner, context.scope, "traces are shown")
    seconds = _seconds(query_of(context, QUERY).get("seconds"))
    if context.scope["method"] == "HEAD":
        await context.answer(b"", content_type=TRACE.stream_type)
        return
    with state.trace_feed.open() as queue:
        await context.unless_gone(_send(state, context, queue, seconds), deadline=None)


async def _send(state: AppState, context: RequestContext, queue: TraceQueue, seconds: float) -> None:
    """Send what comes, until the time is over or the server has ended its last request."""
    end = time.monotonic() + seconds
    next_status = 0.0
    lines = encode_line(_begin(state))
    while True:
        now, is_over = time.monotonic(), state.admission.draining and not state.admission.num_requests
        lines += queue.take()
        if now >= next_status:
            next_status = now + STATUS_SECONDS
            lines += encode_line(_status(state, queue.dropped))
        if now >= end or is_over:
            await context.send_events([lines + encode_line(TraceEnd(now, queue.dropped))])
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
    event=lambda content: encode_json(content) + b"\n",
    comment=b"\n",
    stream_type="application/x-ndjson",
)
"""Dialect of a trace: lines of JSON."""
ROUTES = (
    Route(
        *("GET", "/v1/splitfuse/trace", trace, "Steps and requests as they happen, a line of JSON an event", None),
        errors=(400, 403, 429),
        media_type=TRACE.stream_type,
        dialect=TRACE,
        query=QUERY,
    ),
)
"""Route table of traces."""
