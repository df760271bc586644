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

import splitfuse
from splitfuse.config import ServerConfig
from splitfuse.core.latency.ledger import LatencyPhase
from splitfuse.core.limits import check_token_ids
from splitfuse.server.access_log import RequestLog, RequestRecord
from splitfuse.server.admission import Admission
from splitfuse.server.auth import ApiKeys
from splitfuse.server.context import App, Receive, RequestContext, Scope, Send
from splitfuse.server.errors import ClientGoneError, RefusedError, answer_to
from splitfuse.server.explain import RequestTimeline, sentence
from splitfuse.server.metrics import CONTENT_TYPE, Metrics
from splitfuse.server.openai.endpoints import Server, chat, completions, record_of
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

_OPEN = frozenset({"/health", "/ready"})  # no key, no line in the log
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499  # what servers write down where nobody was left to tell a status to

_logger = logging.getLogger("splitfuse.server")

Handler = Callable[[Server, RequestContext], Awaitable[None]]


def make_app(
    service: TextService, config: ServerConfig, *, admission: Admission, metrics: Metrics, log: RequestLog
) -> Starlette:
    """The ASGI application. Raises ConfigError for an api_key_file that cannot be used.

    It starts and ends neither the client nor anything else. Telling `admission` and `metrics` of steps is the
    caller's.
    """
    server = Server(service, config, admission, metrics, log, int(time.time()))
    middleware = [Middleware(_Edge, server=server, keys=ApiKeys(config))]
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
        routes=[Route(path, _Endpoint(handler, server), methods=[method]) for method, path, handler in ROUTES],
        middleware=middleware,
        exception_handlers={HTTPException: _step_on},
    )
    app.router.redirect_slashes = False
    return app


# Routes --------------------------------------------------------------------------------------------------------------


async def _health(_: Server, exchange: RequestContext) -> None:
    await exchange.answer(Health())


async def _ready(server: Server, exchange: RequestContext) -> None:
    stage, fraction = server.stage
    await exchange.answer(Readiness(stage, fraction), status=200 if stage == "ready" else 503)


async def _version(_: Server, exchange: RequestContext) -> None:
    await exchange.answer(Version(splitfuse.__version__))


async def _metrics(server: Server, exchange: RequestContext) -> None:
    await exchange.answer(server.metrics.render(), content_type=CONTENT_TYPE)


async def _models(server: Server, exchange: RequestContext) -> None:
    await exchange.answer(ModelList([_describe(server)]))


async def _model(server: Server, exchange: RequestContext) -> None:
    name: str = exchange.scope["path_params"]["model"]
    if name != server.model:
        raise RefusedError(
            404, f"there is no model {name!r:.200} here; this server has {server.model!r}", code="model_not_found"
        )
    await exchange.answer(_describe(server))


def _describe(server: Server) -> Model:
    return Model(server.model, server.started, server.service.client.info.limits.max_model_len)


async def _tokenize(server: Server, exchange: RequestContext) -> None:
    request = await server.read(exchange, TokenizeRequest)
    request.check()
    service, limit = server.service, server.service.client.info.limits.max_model_len
    if request.messages is not None:
        messages = [message.plain(index) for index, message in enumerate(request.messages)]
        adds = request.add_generation_prompt is not False
        work = service.encode_chat(messages, add_generation_prompt=adds, variables=request.chat_template_kwargs)
    else:
        text = request.prompt or ""
        if not text:
            await exchange.answer(Tokenized(0, limit, []))
            return
        work = service.encode(text, add_special_tokens=request.add_special_tokens is not False)
    prompt = await exchange.unless_gone(work, deadline=None)
    await exchange.answer(Tokenized(len(prompt.token_ids), limit, list(prompt.token_ids)))


async def _detokenize(server: Server, exchange: RequestContext) -> None:
    request = await server.read(exchange, DetokenizeRequest)
    skip = request.skip_special_tokens is not False
    vocab_size, tokenizer = server.service.client.info.limits.vocab_size, server.service.tokenizer

    def decoded() -> str:
        check_token_ids("tokens", request.tokens, vocab_size, parameter="tokens")
        return tokenizer.decode(request.tokens, skip_special_tokens=skip)

    text = await exchange.unless_gone(server.service.off_loop(decoded), deadline=None)
    await exchange.answer(Detokenized(text))


async def _explain(server: Server, exchange: RequestContext) -> None:
    wanted: str = exchange.scope["path_params"]["request"]
    await exchange.answer(await server.explanations.find(wanted, key=exchange.owner.name))


async def _openapi(server: Server, exchange: RequestContext) -> None:
    await exchange.answer(document(server))


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

    def __init__(self, handler: Handler, server: Server) -> None:
        self._handler = handler
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called inside of _Edge."""
        del receive, send  # the exchange has them
        await self._handler(self._server, scope["splitfuse.exchange"])


async def _step_on(_: Request, error: Exception) -> Response:
    raise error


# What holds for all of them ------------------------------------------------------------------------------------------


class _Edge:
    """Around all routes: gives each request its Exchange, asks for the key, answers errors, writes the record."""

    def __init__(self, app: App, *, server: Server, keys: ApiKeys) -> None:
        self._app = app
        self._server = server
        self._keys = keys
        self._late: set[asyncio.Task[None]] = set()  # lines of the log that wait for an engine's account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unique_id = secrets.token_hex(16)
        exchange = RequestContext(scope, receive, send, request_id=unique_id, unique_id=unique_id)
        wanted_id = exchange.headers.get(b"x-request-id", b"")
        if _SANE_ID.fullmatch(wanted_id):
            exchange.request_id = wanted_id.decode()
        failure: Exception | None = None
        try:
            if scope["path"] not in _OPEN:
                exchange.owner = self._keys.identify(exchange.headers.get(b"authorization"))
            scope["splitfuse.exchange"] = exchange
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            failure = _as_ours(error)
            await self._tell(exchange, failure)
        finally:
            self._record(exchange, failure)

    async def _tell(self, exchange: RequestContext, error: Exception) -> None:
        if isinstance(error, ClientGoneError):
            return
        answer = answer_to(error)
        if answer.is_bug:
            _logger.error("request %s failed", exchange.request_id, exc_info=error)
        elif answer.status == 500:
            _logger.error("request %s failed: %s", exchange.request_id, error)
        try:
            await exchange.fail(answer)
        except (OSError, TimeoutError):
            return  # nobody listens any more

    def _record(self, exchange: RequestContext, error: Exception | None) -> None:
        server, route = self._server, _declared(exchange.scope["path"])
        if error is not None and not exchange.admitted and not isinstance(error, ClientGoneError):
            server.metrics.request_refused(answer_to(error).detail.code or "error")
        if error is None and route in _QUIET:
            return
        # One that is cancelled with its server has neither a status nor an error.
        status = _CLIENT_GONE if isinstance(error, ClientGoneError) else exchange.status or _CLIENT_GONE
        exchange.turn(LatencyPhase.DETOKENIZING)
        record = record_of(exchange, route=route, status=status, error=error)
        server.metrics.request_ended(record)
        course = RequestTimeline.of(exchange, record)
        server.explanations.end(exchange, course)
        write = functools.partial(server.log.write, prompt=exchange.prompt, text=exchange.text)
        if course is None or record.on_time is not False:
            write(record)
        elif course.spent.done():
            write(dataclasses.replace(record, why_late=sentence(course)))
        else:
            self._write_later(write, record, course)

    def _write_later(
        self, write: Callable[[RequestRecord], None], record: RequestRecord, course: RequestTimeline
    ) -> None:
        """When the engine has said where the time went: within a step or two."""

        async def wait() -> None:
            await asyncio.shield(course.spent)
            write(dataclasses.replace(record, why_late=sentence(course)))

        task = asyncio.create_task(wait())
        self._late.add(task)
        task.add_done_callback(self._late.discard)


def _declared(path: str) -> str:
    """The route of a path as it is declared: what a client makes up must not become a label of a metric."""
    for _, route, _ in ROUTES:
        if path == route or ("{" in route and path.startswith(route.partition("{")[0])):
            return route
    return "unknown"


def _as_ours(error: Exception) -> Exception:
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
