"""Defines the routes of the console, and decides who may look: an administrator, or a client on this machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from splitfuse.errors import EngineUnavailableError
from splitfuse.server.auth import check_observer
from splitfuse.server.console.store import ConsoleStore
from splitfuse.server.console.stream import stream_frames
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route
from splitfuse.server.errors import RefusedError
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.paging import query_of
from splitfuse.server.state import AppState

FILES = {
    "console.html": "text/html; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Static files by name, with their types."""
MAX_CONSOLES = 256
"""Number of consoles that may be open."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Headers of the static files: the page takes nothing from elsewhere, and no other page may frame it."""


async def page(state: AppState, context: RequestContext) -> None:
    """Answer GET /console. The page holds nothing of the server: with keys, it asks for one itself."""
    await _answer_file(state, context, "console.html")


async def file(state: AppState, context: RequestContext) -> None:
    """Answer GET /console/{file}."""
    await _answer_file(state, context, context.scope["path_params"]["file"])


async def events(state: AppState, context: RequestContext) -> None:
    """Answer GET /console/events: a stream of server-sent events, a Start and then Frames."""
    store = _store_of(state)
    check_observer(context.owner, context.scope, "the requests of the console are shown")
    query_of(context, ())
    if context.scope["method"] == "HEAD":
        await context.answer(b"", content_type=context.dialect.stream_type)
        return
    if store.num_viewers >= MAX_CONSOLES:
        message = f"{MAX_CONSOLES} consoles are open, the most that this server feeds: close one"
        raise RefusedError(429, message, code="rate_limit_exceeded", headers={"retry-after": "10"})
    await stream_frames(state, store, context)


async def _answer_file(state: AppState, context: RequestContext, name: str) -> None:
    _store_of(state)
    if not (state.config.api_key or state.config.api_key_file):  # else the page asks for a key
        check_observer(context.owner, context.scope, "the requests of the console are shown", may_follow_link=True)
    if name not in FILES:
        raise RefusedError(404, f"there is no file {name!r:.200} of the console", code="no_such_route")
    await context.answer(read_file(name), content_type=FILES[name], headers=HEADERS)


@functools.cache
def read_file(name: str) -> bytes:
    """Return one of FILES."""
    return (Path(__file__).parent / "static" / name).read_bytes()


def describe_model(state: AppState) -> dict[str, Any]:
    """Return the facts of Start about the model."""
    try:
        model, generates = state.model, state.service.client.info.limits.generates
    except EngineUnavailableError:  # it has not been ready yet
        model, generates = state.config.served_model_name or "", True
    return {"model": model, "has_chat": state.service.tokenizer.chat_template is not None, "generates": generates}


def _store_of(state: AppState) -> ConsoleStore:
    if state.console is None:
        message = "this server has no console: start it with splitfuse serve --console"
        raise RefusedError(404, message, code="no_such_route")
    return state.console


_route = functools.partial(Route, dialect=OPENAI, is_logged=False, errors=(403, 404))

ROUTES = (
    _route("GET", "/console", page, "Live view of the engines", None, media_type="text/html", needs_key=False),
    _route(
        *("GET", "/console/events", events, "Events of that page: what the engines do, as it happens", None),
        media_type="text/event-stream",
        errors=(400, 403, 404, 429),
    ),
    _route(
        *("GET", "/console/{file}", file, "Files of that page", None),
        media_type="text/javascript",
        needs_key=False,
    ),
)
"""Route table of the console."""
