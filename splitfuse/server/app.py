"""The routes of a server, and what holds for all of them: keys, request ids, errors, logs.

It decides which path does what, and who may. What a route says is decided elsewhere. Over any EngineClient.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from splitfuse.config import ServerConfig
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.limits import check_token_ids
from splitfuse.server.access_log import RequestLog, RequestRecord
from splitfuse.server.admission import Admission
from splitfuse.server.auth import ApiKeys
from splitfuse.server.context import App, Receive, RequestContext, Scope, Send
from splitfuse.server.errors import ClientGoneError, RefusedError, answer_to
from splitfuse.server.explain import RequestTimeline, sentence
from splitfuse.server.metrics import CONTENT_TYPE, Metrics
from splitfuse.server.openai.endpoints import AppState, chat, completions, record_of
from splitfuse.server.openai.protocol import DetokenizeRequest, TokenizeRequest
from splitfuse.server.openapi import (
    Detokenized,
    Health,
    Model,
    ModelList,
    Readiness,
    Tokenized,
    Version,
    document,
)
from splitfuse.text.service import TextService
from splitfuse.version import __version__

_OPEN = frozenset({"/health", "/ready"})  # no key, no line in the log
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499  # what servers write down where nobody was left to tell a status to

_logger = logging.getLogger("splitfuse.server")

Handler = Callable[[AppState, RequestContext], Awaitable[None]]


def make_app(
    service: TextService, config: ServerConfig, *, admission: Admission, metrics: Metrics, log: RequestLog
) -> Starlette:
    """The ASGI application. Raises ConfigError for an api_key_file that cannot be used.

    It starts and ends neither the client nor anything else. Telling `admission` and `metrics` of steps is the
    caller's.
    """
    state = AppState(service, config, admission, metrics, log, int(time.time()))
    middleware = [Middleware(_Middleware, state=state, keys=ApiKeys(config))]
    if config.allow_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.allow_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[Route(path, _Endpoint(handler, state), methods=[method]) for method, path, handler in ROUTES],
        middleware=middleware,
        exception_handlers={HTTPException: _step_on},
    )
    app.router.redirect_slashes = False
    return app


# Routes --------------------------------------------------------------------------------------------------------------


async def _health(_: AppState, context: RequestContext) -> None:
    await context.answer(Health())


async def _ready(state: AppState, context: RequestContext) -> None:
    stage, fraction = state.stage
    await context.answer(Readiness(stage, fraction), status=200 if stage == "ready" else 503)


async def _version(_: AppState, context: RequestContext) -> None:
    await context.answer(Version(__version__))


async def _metrics(state: AppState, context: RequestContext) -> None:
    await context.answer(state.metrics.render(), content_type=CONTENT_TYPE)


async def _models(state: AppState, context: RequestContext) -> None:
    await context.answer(ModelList([_describe(state)]))


async def _model(state: AppState, context: RequestContext) -> None:
    name: str = context.scope["path_params"]["model"]
    if name != state.model:
        raise RefusedError(
            404, f"there is no model {name!r:.200} here; this server has {state.model!r}", code="model_not_found"
        )
    await context.answer(_describe(state))


def _describe(state: AppState) -> Model:
    return Model(state.model, state.started, state.service.client.info.limits.max_model_len)


async def _tokenize(state: AppState, context: RequestContext) -> None:
    request = await state.read(context, TokenizeRequest)
    request.check()
    service, limit = state.service, state.service.client.info.limits.max_model_len
    if request.messages is not None:
        messages = [message.plain(index) for index, message in enumerate(request.messages)]
        adds = request.add_generation_prompt is not False
        work = service.encode_chat(messages, add_generation_prompt=adds, variables=request.chat_template_kwargs)
    else:
        text = request.prompt or ""
        if not text:
            await context.answer(Tokenized(0, limit, []))
            return
        work = service.encode(text, add_special_tokens=request.add_special_tokens is not False)
    prompt = await context.unless_gone(work, deadline=None)
    await context.answer(Tokenized(len(prompt.token_ids), limit, list(prompt.token_ids)))


async def _detokenize(state: AppState, context: RequestContext) -> None:
    request = await state.read(context, DetokenizeRequest)
    skip = request.skip_special_tokens is not False
    vocab_size, tokenizer = state.service.client.info.limits.vocab_size, state.service.tokenizer

    def decoded() -> str:
        check_token_ids("tokens", request.tokens, vocab_size, parameter="tokens")
        return tokenizer.decode(request.tokens, skip_special_tokens=skip)

    text = await context.unless_gone(state.service.off_loop(decoded), deadline=None)
    await context.answer(Detokenized(text))


async def _explain(state: AppState, context: RequestContext) -> None:
    wanted: str = context.scope["path_params"]["request"]
    await context.answer(await state.explanations.find(wanted, key=context.owner.name))


async def _openapi(state: AppState, context: RequestContext) -> None:
    await context.answer(document(state))


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{model:path}", _model),
    ("GET", "/v1/splitfuse/requests/{request}", _explain),
    ("POST", "/tokenize", _tokenize),
    ("POST", "/detokenize", _detokenize),
    ("GET", "/health", _health),
    ("GET", "/ready", _ready),
    ("GET", "/metrics", _metrics),
    ("GET", "/version", _version),
    ("GET", "/openapi.json", _openapi),
)
"""Method, path, and what it does."""

_QUIET = {"/health", "/ready", "/metrics"}  # asked for every few seconds: no line in the log while all is well


class _Endpoint:
    """A route as ASGI."""

    def __init__(self, handler: Handler, state: AppState) -> None:
        self._handler = handler
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called inside of _Middleware."""
        del receive, send  # the context has them
        await self._handler(self._state, scope["splitfuse.context"])


async def _step_on(_: Request, error: Exception) -> Response:
    raise error


# What holds for all of them ------------------------------------------------------------------------------------------


class _Middleware:
    """Around all routes: gives each request its RequestContext, asks for the key, answers errors, writes the record."""

    def __init__(self, app: App, *, state: AppState, keys: ApiKeys) -> None:
        self._app = app
        self._state = state
        self._keys = keys
        self._late: set[asyncio.Task[None]] = set()  # lines of the log that wait for an engine's account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unique_id = secrets.token_hex(16)
        context = RequestContext(scope, receive, send, request_id=unique_id, unique_id=unique_id)
        wanted_id = context.headers.get(b"x-request-id", b"")
        if _SANE_ID.fullmatch(wanted_id):
            context.request_id = wanted_id.decode()
        failure: Exception | None = None
        try:
            if scope["path"] not in _OPEN:
                context.owner = self._keys.identify(context.headers.get(b"authorization"))
            scope["splitfuse.context"] = context
            await self._app(scope, receive, context.send)
        except Exception as error:
            failure = to_refused_error(error)
            await self._tell(context, failure)
        finally:
            self._record(context, failure)

    async def _tell(self, context: RequestContext, error: Exception) -> None:
        if isinstance(error, ClientGoneError):
            return
        answer = answer_to(error)
        if answer.is_bug:
            _logger.error("request %s failed", context.request_id, exc_info=error)
        elif answer.status == 500:
            _logger.error("request %s failed: %s", context.request_id, error)
        try:
            await context.fail(answer)
        except (OSError, TimeoutError):
            return  # nobody listens any more

    def _record(self, context: RequestContext, error: Exception | None) -> None:
        state, route = self._state, _declared(context.scope["path"])
        if error is not None and not context.admitted and not isinstance(error, ClientGoneError):
            state.metrics.request_refused(answer_to(error).detail.code or "error")
        if error is None and route in _QUIET:
            return
        # One that is cancelled with its server has neither a status nor an error.
        status = _CLIENT_GONE if isinstance(error, ClientGoneError) else context.status or _CLIENT_GONE
        context.enter_phase(LatencyPhase.DETOKENIZING)
        record = record_of(context, route=route, status=status, error=error)
        state.metrics.request_ended(record)
        course = RequestTimeline.of(context, record)
        state.explanations.end(context, course)
        write = functools.partial(state.log.write, prompt=context.prompt, text=context.text)
        if course is None or record.slo_met is not False:
            write(record)
        elif course.spent.done():
            write(dataclasses.replace(record, slo_violation=sentence(course)))
        else:
            self._write_later(write, record, course)

    def _write_later(
        self, write: Callable[[RequestRecord], None], record: RequestRecord, course: RequestTimeline
    ) -> None:
        """When the engine has said where the time went: within a step or two."""

        async def wait() -> None:
            await asyncio.shield(course.spent)
            write(dataclasses.replace(record, slo_violation=sentence(course)))

        task = asyncio.create_task(wait())
        self._late.add(task)
        task.add_done_callback(self._late.discard)


def _declared(path: str) -> str:
    """The route of a path as it is declared: what a client makes up must not become a label of a metric."""
    for _, route, _ in ROUTES:
        if path == route or ("{" in route and path.startswith(route.partition("{")[0])):
            return route
    return "unknown"


def to_refused_error(error: Exception) -> Exception:
    """Starlette's refusals in our words."""
    if not isinstance(error, HTTPException):
        return error
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return RefusedError(
            405, f"this route takes {allowed} only", code="method_not_allowed", headers={"allow": allowed}
        )
    return RefusedError(
        error.status_code,
        "there is no such route; OpenAI's are under /v1, and /openapi.json lists all",
        code="no_such_route",
    )
