"""Defines the routes by which an administrator sees engines, drains and restarts them, and changes their number."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Annotated

import msgspec
from msgspec import Meta

from splitfuse.engine.client import EngineClient, EngineState, LocalClient
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, SplitfuseError
from splitfuse.server.auth import check_observer
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.state import AppState
from splitfuse.server.validation import Body

WINDOW_SECONDS = 60.0
"""Seconds whose answers count for goodput."""

_logger = logging.getLogger(__name__)


# What there is -------------------------------------------------------------------------------------------------------


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Describes an engine: its place, its load, and what it did in the last minute."""

    engine: int
    state: str
    address: str = ""
    """Where it runs, if that is another machine."""
    role: str
    running: int
    waiting: int
    kv_usage: float
    """Fraction of its KV blocks that requests hold."""
    requests_per_second: float
    goodput: float | None = None
    """Requests a second whose SLO was met; None: none that had one ended."""
    slo_attainment: float | None = None
    """Fraction of the requests with an SLO for which it was met."""


class EngineList(msgspec.Struct, frozen=True):
    """Lists the engines that run, and how many `replicas` of them there are, whose number POST /scale changes."""

    replicas: int
    engines: list[EngineStatus]


async def show(state: AppState, context: RequestContext) -> None:
    """Answer GET /engines."""
    check_observer(context.owner, context.scope, "engines are shown")
    client, now = state.service.client, time.monotonic()
    running = [each for each in enumerate(client.engines) if each[1].state is not EngineState.STOPPED]
    found = [status_of(number, engine, now=now) for number, engine in running]
    await context.answer(EngineList(client.num_replicas, found))


def status_of(number: int, engine: LocalClient, *, now: float) -> EngineStatus:
    """Return what an engine does; of its answers those of the last minute count, or since it came if that is less."""
    seconds = WINDOW_SECONDS if engine.came_at is None else min(WINDOW_SECONDS, max(now - engine.came_at, 1.0))
    stats, info = engine.stats[0], engine.known_info
    blocks = info.limits.num_blocks if info is not None and stats.num_steps else 0
    ends = [met for at, met in engine.ends if now - at <= seconds]
    judged = [met for met in ends if met is not None]
    return EngineStatus(
        engine=number,
        state="drained" if engine.is_drained and engine.state is EngineState.READY else engine.state.value,
        address=engine.address,
        role=engine.role.value,
        running=stats.num_running,
        waiting=stats.num_waiting,
        kv_usage=1.0 - stats.num_available_blocks / blocks if blocks else 0.0,
        requests_per_second=len(ends) / seconds,
        goodput=sum(judged) / seconds if judged else None,
        slo_attainment=sum(judged) / len(judged) if judged else None,
    )


# How many there are --------------------------------------------------------------------------------------------------


class ScaleRequest(Body, kw_only=True, frozen=True):
    """Asks for a number of replicas: POST /scale. Requests of those that end go on at others, without an error."""

    replicas: Annotated[int, Meta(ge=1, le=4096, description="Number of replicas to have")]


class Scaled(msgspec.Struct, frozen=True):
    """Says how many replicas there are, and how many requests went on at others."""

    replicas: int
    moved: int


async def scale(state: AppState, context: RequestContext, body: ScaleRequest) -> None:
    """Answer POST /scale, once it is done. It is done, too, if its client leaves meanwhile."""
    check_observer(context.owner, context.scope, "engines are started and ended")
    if state.config.autoscale is not None:
        bounds = state.config.autoscale
        message = f"the number of replicas follows the load (autoscale {bounds}): restart without that to set it"
        raise InvalidRequestError(message, parameter="replicas")
    client, before = state.service.client, state.service.client.num_replicas
    moved = await asyncio.shield(asyncio.ensure_future(_scale(client, body.replicas)))
    _logger.info("replicas: %d, not %d; %d requests went on elsewhere", client.num_replicas, before, moved)
    await context.answer(Scaled(client.num_replicas, moved))


async def _scale(client: EngineClient, count: int) -> int:
    """Have so many replicas. Raises EngineUnavailableError, too, for what a replica raises that does not start: that is
    no mistake of this request, nor a bug.
    """
    try:
        return await client.scale(count)
    except (InvalidRequestError, EngineUnavailableError):
        raise
    except SplitfuseError as error:
        _logger.warning("a replica cannot be started: %s", error)
        lines = str(error).splitlines()  # of a memory plan the last one says what would fit
        raise EngineUnavailableError(f"a replica cannot be started: {'; '.join(lines[:1] + lines[1:][-1:])}") from error


# Whether they take requests ------------------------------------------------------------------------------------------


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
        raise InvalidRequestError("restart and undo are mutually exclusive: leave one of them out", parameter="undo")
    if body.engine is None and not body.restart:
        raise InvalidRequestError("engine is missing: give the number of one, 0 is the first", parameter="engine")
    client, moved = state.service.client, 0
    running = [index for index, each in enumerate(client.engines) if each.state is not EngineState.STOPPED]
    for index in running if body.engine is None else (body.engine,):
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


_route = functools.partial(Route, dialect=OPENAI, errors=(403,))

ROUTES = (
    _route("GET", "/engines", show, "Engines, and their load", EngineList),
    _route("POST", "/scale", scale, "Change the number of replicas", Scaled, ScaleRequest),
    _route("POST", "/drain", drain, "Drain or restart an engine", DrainedEngines, DrainRequest),
)
"""Route table of engines."""
