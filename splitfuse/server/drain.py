"""Defines the route by which an administrator drains and restarts engines, one after the other, without an error."""

from __future__ import annotations

import functools
import logging
from typing import Annotated

import msgspec
from msgspec import Meta

from splitfuse.errors import InvalidRequestError
from splitfuse.server.auth import check_observer
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.state import AppState
from splitfuse.server.validation import Body

_logger = logging.getLogger(__name__)


class DrainRequest(Body, kw_only=True, frozen=True):
    """Asks to drain an engine: POST /drain. Its requests go on at others, without an error."""

    engine: (
        Annotated[int, Meta(ge=0, le=4095, description="Number from 0 on; a restart without it is of all")] | None
    ) = None
    restart: Annotated[bool, Meta(description="Restarts the engine, or each, and lets it take requests again")] = False
    undo: Annotated[bool, Meta(description="Lets a drained engine take requests again")] = False


class DrainedEngines(msgspec.Struct, frozen=True):
    """Says how many requests went on elsewhere, and which engines take no requests now."""

    moved: int
    drained: list[int]


async def drain(state: AppState, context: RequestContext, body: DrainRequest) -> None:
    """Answer POST /drain, once it is done."""
    check_observer(context.owner, context.scope, "engines are drained")
    if body.restart and body.undo:
        raise InvalidRequestError("restart and undo exclude each other: a restart ends with it", parameter="undo")
    if body.engine is None and not body.restart:
        raise InvalidRequestError("engine is missing: give the number of one, 0 is the first", parameter="engine")
    client, moved = state.service.client, 0
    engines = range(len(client.engines)) if body.engine is None else (body.engine,)
    for index in engines:
        if body.undo:
            client.undrain_engine(index)
            _logger.info("engine %d takes requests again", index)
        else:
            count = await (client.restart_engine(index) if body.restart else client.drain_engine(index))
            _logger.info("engine %d is %s: %d requests went on elsewhere", index, _done(body), count)
            moved += count
    drained = [index for index, engine in enumerate(client.engines) if engine.is_drained]
    await context.answer(DrainedEngines(moved, drained))


def _done(body: DrainRequest) -> str:
    return "restarted" if body.restart else "drained"


ROUTES = (
    functools.partial(Route, dialect=OPENAI)(
        *("POST", "/drain", drain, "Drain or restart an engine", DrainedEngines, DrainRequest),
        errors=(403,),
    ),
)
"""Route table of draining."""
