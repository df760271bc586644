"""Makes the application of a server: its route table, and what all routes share: keys, request ids, errors, records.

Decides which path does what. What a dialect's routes do is decided in its package.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.websockets import WebSocketClose

from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.request_output import FinishReason
from splitfuse.server import adapters, engines, trace_stream
from splitfuse.server.access_log import RequestLog, RequestRecord
from splitfuse.server.admission import Admission
from splitfuse.server.anthropic import endpoints as anthropic
from splitfuse.server.anthropic.dialect import ANTHROPIC
from splitfuse.server.auth import ApiKeys
from splitfuse.server.console import endpoints as console
from splitfuse.server.console.store import ConsoleStore
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route, check_method, encode_json
from splitfuse.server.errors import ClientGoneError, RefusedError, answer_to
from splitfuse.server.explain import Explanation, breakdown_of, timing_of, why_missed
from splitfuse.server.listen import App, Receive, Scope, Send
from splitfuse.server.metrics import CONTENT_TYPE, Metrics
from splitfuse.server.openai import endpoints as openai
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.openapi import document
from splitfuse.server.pooling import endpoints as pooling
from splitfuse.server.responses import endpoints as responses
from splitfuse.server.state import AppState
from splitfuse.server.store import AnswerStore
from splitfuse.server.traces import RequestEnd, TraceHub
from splitfuse.server.validation import SchemaBounds
from splitfuse.text.service import CLIENT, TextService
from splitfuse.version import __version__

CLIENT_GONE = 499
"""Status in the log where the client has disconnected before there was one, as other servers write it."""

_logger = logging.getLogger(__name__)


def make_state(
    service: TextService,
    config: ServerConfig,
    *,
    admission: Admission,
    metrics: Metrics,
    log: RequestLog,
    traces: TraceHub,
) -> AppState:
    """Return what all routes share. The caller lets `admission` and `metrics` know of steps."""
    frames = ConsoleStore(traces, lambda: console.describe_model(state)) if config.console else None
    state = AppState(service, config, admission, metrics, log, int(time.time()), AnswerStore.of(config), traces, frames)
    metrics.num_text_restarts = lambda: service.num_ended_processes
    if frames is not None:
        metrics.consoles = lambda: (frames.num_viewers, frames.num_dropped)
    return state


def app_of(
    state: AppState, keys: ApiKeys, *, routes: Sequence[Route] | None = None, note_end: NoteEnd | None = None
) -> App:
    """Return the ASGI application of some routes, or of all. `note_end` notes how a request has ended; left out, that
    is noted in the state.
    """
    note = note_end or functools.partial(_note_end, state)

    def endpoint(*routes: Route) -> _Endpoint:
        return _Endpoint(routes, state, keys, note)

    by_path: dict[str, list[Route]] = {}
    for route in ROUTES if routes is None else routes:
        by_path.setdefault(route.path, []).append(route)
    app = Router(
        [
            *(StarletteRoute(path, endpoint(*each)) for path, each in by_path.items()),
            StarletteRoute(anthropic.PATH + "/{rest:path}", endpoint(_UNKNOWN_MESSAGES)),
        ],
        redirect_slashes=False,
        default=endpoint(_UNKNOWN),
    )
    if not state.config.allow_origin:
        return app
    return CORSMiddleware(
        app,
        allow_origins=state.config.allow_origin,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )


# Routes --------------------------------------------------------------------------------------------------------------


class Health(msgspec.Struct, frozen=True):
    """Says that the process lives."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """Says `ready`, or the stage of start-up, of which a `fraction` (0 to 1) is done."""

    stage: str
    fraction: float


class Version(msgspec.Struct, frozen=True):
    """Holds the version of the server."""

    version: str


async def _health(_: AppState, context: RequestContext) -> None:
    await context.answer(Health())


async def _ready(state: AppState, context: RequestContext) -> None:
    stage, fraction = state.stage
    await context.answer(Readiness(stage, fraction), status=200 if stage == "ready" else 503)


async def _version(_: AppState, context: RequestContext) -> None:
    await context.answer(Version(__version__))


async def _metrics(state: AppState, context: RequestContext) -> None:
    await context.answer(await state.metrics.text(), content_type=CONTENT_TYPE)


async def _explain(state: AppState, context: RequestContext) -> None:
    wanted: str = context.scope["path_params"]["request"]
    await context.answer(await state.explanations.find(wanted, key=context.owner.name))


async def _openapi(state: AppState, context: RequestContext) -> None:
    await context.answer(_document(ROUTES, state.schema_bounds))


@functools.lru_cache(maxsize=2)
def _document(routes: tuple[Route, ...], bounds: SchemaBounds) -> bytes:
    return encode_json(document(routes, bounds))


async def _no_such_route(_: AppState, context: RequestContext) -> None:
    openai.refuse_absent(context.scope["path"])
    plain = re.sub(r"^(/v1)+(?=/)", "", context.scope["path"])  # a base URL without /v1, or one too many
    meant = [route.path for route in ROUTES if route.path in (plain, f"/v1{plain}")]
    hint = f"did you mean {meant[0]}?" if meant else "/openapi.json lists all"
    raise RefusedError(404, f"there is no such route; {hint}", code="no_such_route")


_EXPLAIN = "/v1/splitfuse/requests/{request}"

_route = functools.partial(Route, dialect=OPENAI)

ROUTES: tuple[Route, ...] = (
    *openai.ROUTES,
    *adapters.ROUTES,
    *engines.ROUTES,
    *pooling.ROUTES,
    *anthropic.ROUTES,
    *responses.ROUTES,
    *trace_stream.ROUTES,
    *console.ROUTES,
    _route("GET", _EXPLAIN, _explain, "Where the time of a finished request went", Explanation, errors=(404,)),
    _route("GET", "/health", _health, "Whether the process lives", Health, needs_key=False, is_logged=False),
    _route(
        *("GET", "/ready", _ready, "Whether requests are accepted", Readiness),
        errors=(503,),
        error=Readiness,
        needs_key=False,
        is_logged=False,
    ),
    _route("GET", "/metrics", _metrics, "Metrics for Prometheus", None, media_type="text/plain", is_logged=False),
    _route("GET", "/version", _version, "Version of the server", Version),
    _route("GET", "/openapi.json", _openapi, "This document", None),
)
"""Route table of the server: each dialect's routes, and its own."""

_UNKNOWN = _route("*", "unknown", _no_such_route, "Every other path", None)
_UNKNOWN_MESSAGES = dataclasses.replace(_UNKNOWN, dialect=ANTHROPIC)


# What holds for all of them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Endpoint:
    """Serves the routes of a path, one for each method, as an ASGI application: gives each request its context, checks
    its key, calls the handler, answers errors, writes the record.
    """

    routes: tuple[Route, ...]
    state: AppState
    keys: ApiKeys
    note_end: NoteEnd

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        route = next((each for each in self.routes if scope["method"] in each.methods), self.routes[0])
        context = RequestContext(scope, receive, send, dialect=route.dialect, unique_id=secrets.token_hex(16))
        failure: Exception | None = None
        try:
            if route.needs_key and self.keys.are_required:
                context.owner = self.keys.identify(route.dialect.key(context.headers))
            CLIENT.set(context.client)
            check_method(self.routes, scope["method"])
            body = () if route.body is None else (await self.state.read(context, route.body),)
            await route.handler(self.state, context, *body)
        except Exception as error:
            failure = error
            await self._answer_error(context, failure)
        finally:
            self.state.release(context)
            if failure is not None or route.is_logged:
                self._record(context, route, failure)
            failure = None  # it refers to this frame: left here, only the garbage collector would find them

    async def _answer_error(self, context: RequestContext, error: Exception) -> None:
        if isinstance(error, ClientGoneError):
            return
        answer = answer_to(error)
        answer.request_id = context.request_id
        if answer.is_bug:
            _logger.error("request %s failed", context.request_id, exc_info=error)
        elif answer.status == 500:
            _logger.error("request %s failed: %s", context.request_id, error)
        try:
            await context.fail(answer)
        except (OSError, TimeoutError):
            return  # the client no longer reads

    def _record(self, context: RequestContext, route: Route, error: Exception | None) -> None:
        is_refused = error is not None and not context.admitted and not isinstance(error, ClientGoneError)
        # One that is cancelled with its server has neither a status nor an error.
        status = CLIENT_GONE if isinstance(error, ClientGoneError) else context.status or CLIENT_GONE
        ended = time.monotonic()
        record = record_of(context, route=route.path, status=status, error=error, ended=ended)
        refused = answer_to(error).code if is_refused and error is not None else ""
        self.note_end(context, record, ended, refused=refused, is_logged=route.is_logged)


class NoteEnd(Protocol):
    """Notes how a request has ended that was answered, refused or given up."""

    def __call__(
        self, context: RequestContext, record: RequestRecord, ended: float, *, refused: str, is_logged: bool
    ) -> None:
        """`ended` is the time on the monotonic clock, `refused` the reason if it was refused before any work."""


def _note_end(
    state: AppState, context: RequestContext, record: RequestRecord, ended: float, *, refused: str, is_logged: bool
) -> None:
    """Note an end in this process; what its engine tells of it, as soon as that is known."""
    count_end(state, record, refused)
    write = functools.partial(state.log.write, prompt=context.prompt, text=context.text)

    def explain(engine: asyncio.Future[LatencyBreakdown]) -> None:
        breakdown = breakdown_of(context, engine.result(), ended=ended)
        explain_end(state, RequestEnd(context.unique_id, record, breakdown, ended, context))
        if record.slo_met is False:
            write(explained(record, breakdown))

    if (last := context.last) is not None:  # the engine tells where the time went within a step or two
        last.breakdown.add_done_callback(explain)
    else:
        explain_end(state, RequestEnd(context.unique_id, record, None, ended, context), is_logged=is_logged)
    if last is None or record.slo_met is not False:
        write(record)


def count_end(state: AppState, record: RequestRecord, refused: str) -> None:
    """Count a request that has ended, for what `refused` says if it was refused before any work."""
    if refused:
        state.metrics.request_refused(refused)
    state.metrics.request_ended(record)


def explain_end(state: AppState, end: RequestEnd, *, is_logged: bool = True) -> None:
    """Keep what explains a request that has ended, and publish it to subscribers of traces."""
    state.explanations.end(end.unique_id, None if end.breakdown is None else (end.record, end.breakdown))
    if is_logged:
        state.traces.publish(end)


def explained(record: RequestRecord, breakdown: LatencyBreakdown | None) -> RequestRecord:
    """Return a record with a sentence about its SLO if it has missed that."""
    if record.slo_met is not False or breakdown is None:
        return record
    return dataclasses.replace(record, slo_violation=why_missed(record, breakdown))


def record_of(
    context: RequestContext, *, route: str, status: int, error: Exception | None, ended: float
) -> RequestRecord:
    """Return the record of a request that ended at `ended`."""
    counts, timing, begun = context.num_tokens, timing_of(context), context.begun
    return RequestRecord(
        request_id=context.request_id,
        route=route,
        status=status,
        total_seconds=ended - context.arrival,
        key=context.owner.name,
        prompt_tokens=sum({g.index: len(g.request.token_ids) for g in begun}.values()),
        generated_tokens=counts.generated,
        cached_tokens=counts.cached,
        finish_reasons=Counter((g.finish_reason or FinishReason.ABORT).value for g in begun),
        error=error.code if isinstance(error, RefusedError) else None if error is None else type(error).__name__,
        queue_seconds=timing.queued,
        time_to_first_token_seconds=timing.first_token,
        inter_token_latency_seconds=tuple(sorted(timing.gaps)),
        steps=timing.steps,
        resumed=timing.resumed,
        on_loan=timing.on_loan,
        slo_met=timing.slo_met,
    )
