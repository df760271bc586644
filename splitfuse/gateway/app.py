"""Passes requests on to cells, as an ASGI application: chooses the cell, tries another one where it does not answer,
and passes its answer on as it comes.

Requests and answers are passed on as they are, in all dialects; only what a request has to do with prompts and stored
answers is looked at, to choose its cell.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

import msgspec
from starlette.websockets import WebSocketClose

from splitfuse.clients.http_stream import Answer, exchange
from splitfuse.clients.wire import CHAT_PATH
from splitfuse.config.server import ServerConfig
from splitfuse.core.replicas.cells import Cells
from splitfuse.errors import EngineUnavailableError, RequestFailedError, ServerError
from splitfuse.gateway.cell import ANSWER_SECONDS, Cell
from splitfuse.gateway.metrics import GatewayMetrics
from splitfuse.gateway.prefixes import PromptPrefixes, prefixes_of
from splitfuse.server.admission import Admission
from splitfuse.server.anthropic.dialect import ANTHROPIC
from splitfuse.server.auth import ANONYMOUS, check_observer
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Dialect
from splitfuse.server.engines import EngineList, EngineStatus
from splitfuse.server.errors import ClientGoneError, RefusedError, answer_to
from splitfuse.server.listen import Receive, Scope, Send
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.responses.endpoints import RESPONSES
from splitfuse.server.responses.items import answer_id_of
from splitfuse.version import __version__

MOST_KEPT = 65_536
"""Number of stored answers, the newest, of which the cell is known without asking all."""
MOST_CELLS = 3
"""Number of cells that a request is sent to at most: one that they did not answer may be what kills their engines, and
where three have no room, asking a hundred would load all of them with what they refuse."""
EXPLAIN_SECONDS = 6.0
"""Seconds that a cell has to say whether it knows a request: it waits for the end of one that runs."""
LARGE_BODY = 2**16
"""Bytes from which on a body is looked at off the event loop."""
VIA = b"1.1 splitfuse-gateway"
"""Header `via` of what is passed on: cells do not take it for a request of their own machine."""

_CONNECTION = {
    *(b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    *(b"proxy-connection", b"proxy-authorization", b"proxy-authenticate"),
}
"""Headers that are about one connection, besides those that its header `connection` names."""
_NOT_ASKED = _CONNECTION | {b"host", b"content-length", b"expect", b"x-request-id"}
_NOT_ANSWERED = _CONNECTION | {b"date", b"server", b"x-request-id", b"request-id"}
_STORED = re.compile(r"/v1/(?:responses|chat/completions)/((?:resp_|chatcmpl-)[^/]+)")
"""Paths of a stored answer."""
_EXPLAINED = re.compile(r"/v1/splitfuse/requests/[^/]+")
"""Paths of what only the cell knows that answered a request."""
_ANSWER_ID = re.compile(rb'"id":"((?:resp_|chatcmpl-)[0-9a-f]{32})"')
_OF_ONE_SERVER = re.compile(
    r"/(?:scale|drain|console(?:/.*)?|v1/(?:load_lora_adapter|unload_lora_adapter|splitfuse/trace))"
)
"""Paths of what is done to one server, or seen of it."""

_logger = logging.getLogger(__name__)


class StreamError(msgspec.Struct, frozen=True):
    """Ends a stream of the Responses API that breaks off."""

    message: str
    code: str
    sequence_number: int = 0
    param: None = None
    type: Literal["error"] = "error"


class _Body:
    """Holds what is sent to a cell, for as long as it may have to be sent to another."""

    may_be_stored = False
    """Flag of a request whose answer the cell may keep."""

    def __init__(self, content: bytes) -> None:
        self.content = content


class _Refusal(NamedTuple):
    """Holds an answer by which a cell refuses a request that another one may accept."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def retry_after(self) -> float:
        """Return the seconds until the cell may accept it."""
        found = dict(self.headers).get(b"retry-after", b"1")
        return float(found) if found.isdigit() else 1.0


class _LostError(Exception):
    """Raised when a cell cannot be reached, or breaks an answer off, having been sent the request."""

    def __init__(self, why: str, *, was_sent: bool) -> None:
        super().__init__(why)
        self.was_sent = was_sent


class Gateway:
    """Implements the ASGI application over some cells. `config` says how it meets its clients."""

    def __init__(self, cells: Sequence[Cell], config: ServerConfig) -> None:
        self.cells = {each.url: each for each in cells}
        self.admission = Admission(config)
        self.metrics = GatewayMetrics(cells)
        self._config = config
        self._ring = Cells(self.cells)
        self._kept: OrderedDict[str, Cell] = OrderedDict()
        self._is_ending = False
        for each in cells:
            each.on_change = self._note
            self._note(each)

    async def watch(self) -> None:
        """Follow all cells, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for each in self.cells.values():
                group.create_task(each.watch())

    def end(self) -> None:
        """End all open requests, with an error that says so."""
        self._is_ending = True
        for each in self.cells.values():
            each.give_up()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        path = scope["path"]
        context = RequestContext(scope, receive, send, dialect=_dialect_of(path), unique_id=secrets.token_hex(16))
        if context.dialect is RESPONSES:
            context.stream_error = lambda error: [StreamError(error.message, error.code)]
        failure: Exception | None = None
        try:
            await self._answer(context, path)
        except Exception as error:
            failure = error
            await self._answer_error(context, failure)
        finally:
            self.admission.bodies.release(context.held)
            failure = None  # it refers to this frame

    async def _answer(self, context: RequestContext, path: str) -> None:
        match path:
            case "/health":
                await context.answer({"status": "ok"})
            case "/ready":
                stage = self._stage
                await context.answer({"stage": stage, "fraction": 1.0}, status=200 if stage == "ready" else 503)
            case "/version":
                await context.answer({"version": __version__})
            case "/metrics":
                await context.answer(self.metrics.render(), content_type="text/plain; version=0.0.4; charset=utf-8")
            case "/engines":
                check_observer(ANONYMOUS, context.scope, "cells are shown")
                await context.answer(EngineList(0, [_status_of(each) for each in self.cells.values()]))
            case _:
                await self._pass_on(context, path)

    @property
    def _stage(self) -> str:
        if self.admission.draining:
            return "draining"
        return "ready" if any(each.is_ready for each in self.cells.values()) else "no cell takes requests"

    def _note(self, cell: Cell) -> None:
        """Let the ring know of what a cell has to do."""
        if cell.is_ready:
            self._ring.report(cell.url, cell.load, replicas=max(cell.num_ready_engines, 1))
        else:
            self._ring.report(cell.url, None)

    async def _answer_error(self, context: RequestContext, error: Exception) -> None:
        if isinstance(error, ClientGoneError):
            return
        answer = answer_to(error)
        answer.request_id = context.request_id
        if context.status is None:
            self.metrics.refused[(answer.code,)] += 1
        if answer.is_bug:
            _logger.error("request %s failed", context.request_id, exc_info=error)
        try:
            await context.fail(answer)
        except (OSError, TimeoutError):
            return  # the client no longer reads

    # Passing on ------------------------------------------------------------------------------------------------------

    async def _pass_on(self, context: RequestContext, path: str) -> None:
        if _OF_ONE_SERVER.fullmatch(path):
            message = f"{path:.200} is about one server: call it at that server's own address, not at a gateway's"
            raise RefusedError(400, message, code="unsupported_route")
        if any(VIA in each for name, each in context.scope["headers"] if name == b"via"):
            message = "a gateway has passed this request on already: its cells must be servers, not gateways"
            raise RefusedError(400, message, code="unsupported_route")
        with self.admission.admit(0):
            pass  # before its body is read, which may take a while
        limit = int(self._config.max_body_mib * 2**20)
        body = _Body(await context.body(limit, self.admission.bodies, timeout=self._config.client_timeout))
        with self.admission.admit(0):
            await context.unless_gone(self._try_cells(context, path, body), deadline=None)

    async def _try_cells(self, context: RequestContext, path: str, body: _Body) -> None:
        """Pass a request on to its cell, and if that does not answer it to others, each once."""
        salt = b"\0".join(context.headers.get(name, b"") for name in (b"authorization", b"x-api-key"))
        if not body.content:
            salt += path.encode()
        if len(body.content) < LARGE_BODY:
            prompt = prefixes_of(body.content, salt=salt)
        else:
            prompt = await asyncio.to_thread(prefixes_of, body.content, salt=salt)
        body.may_be_stored = context.scope["method"] == "POST" and (
            (path == "/v1/responses" and prompt.store is not False) or (path == CHAT_PATH and bool(prompt.store))
        )
        keeper = await self._keeper(context, prompt)
        tried: list[str] = []
        refusal: _Refusal | None = None
        num_sent = 0
        while num_sent < MOST_CELLS and (keeper is None or not tried):
            cell = keeper or self._choose(prompt, tried)
            if cell is None:
                break
            if tried:
                _logger.info("request %s: cell %d is tried", context.request_id, cell.number)
            tried.append(cell.url)
            try:
                refused = await self._try(context, cell, body)
            except _LostError as error:
                if self._is_ending:
                    raise EngineUnavailableError("the gateway is ending: send the request again") from error
                if context.status is not None:
                    self.metrics.broken[(str(cell.number),)] += 1
                    cell.look_soon()
                    message = f"cell {cell.number} was lost in the midst of the answer: send the request again"
                    raise EngineUnavailableError(message) from error
                num_sent += error.was_sent
                self.metrics.retries[str(cell.number), "lost"] += 1
                cell.doubt(f"lost: {error}")
                continue
            if refused is None:
                return
            num_sent += 1
            if refused.status != 429:
                cell.look_soon()
            elif not prompt.on_time_only:
                cell.note_full(refused.retry_after)
            self.metrics.retries[str(cell.number), "full" if refused.status == 429 else "unavailable"] += 1
            if refusal is None or (-refused.status, refused.retry_after) < (-refusal.status, refusal.retry_after):
                refusal = refused
        if refusal is not None:
            await self._answer_whole(context, refusal.status, refusal.headers, refusal.body)
            return
        self._refuse(keeper)

    def _refuse(self, keeper: Cell | None) -> None:
        """Raise the error of a request that no cell has answered."""
        if keeper is not None:
            raise EngineUnavailableError(
                f"the answer that the request goes on from, or asks for, is in cell {keeper.number}, which takes no "
                "requests now: send it again"
            )
        num_ready = sum(each.is_ready for each in self.cells.values())
        raise EngineUnavailableError(
            f"of {len(self.cells)} cells {num_ready} take requests, and none of them has answered: send the request "
            "again"
        )

    def _choose(self, prompt: PromptPrefixes, tried: Sequence[str]) -> Cell | None:
        """Return the cell for a request that has been tried at some; None if none is left. One that had no room a
        moment ago is asked only if none has: another request may have been too large for it, and this one is not.
        """
        ready = [each for each in self.cells.values() if each.is_ready]
        full = [each.url for each in ready if each.is_full]
        if not tried and len(full) == len(ready):
            full = []
        token_seconds = max((each.token_seconds for each in ready), default=0.0)
        seconds = prompt.num_tokens * token_seconds
        if prompt.num_tokens:
            seconds += max((each.request_seconds for each in ready), default=0.0)
        try:
            chosen = self._ring.choose(prompt.in_seconds(token_seconds), seconds, without=[*tried, *full])
        except EngineUnavailableError:
            return None
        return self.cells[chosen]

    async def _try(self, context: RequestContext, cell: Cell, body: _Body) -> _Refusal | None:
        """Pass a request on to a cell, and its answer to the client, unless that is a refusal, which is returned.
        Raises _LostError if it cannot be reached, or breaks off.
        """
        try:
            with cell.lent() as limit:
                head = _head(context, cell, context.scope["method"], _target(context), len(body.content))
                async with (
                    limit,
                    exchange(cell.address, head, body.content, timeout=None) as answer,
                    aclosing(answer.pieces),
                ):
                    self.metrics.answers[str(cell.number), str(answer.status)] += 1
                    if answer.status in (429, 503):
                        pieces = [piece async for piece in answer.pieces]
                        return _Refusal(answer.status, answer.headers, b"".join(pieces))
                    await self._relay(context, cell, body, answer)
        except ServerError as error:
            raise _LostError(str(error), was_sent=False) from error
        except RequestFailedError as error:
            raise _LostError(str(error), was_sent=True) from error
        except TimeoutError as error:
            raise _LostError("it has been silent for too long", was_sent=True) from error
        return None

    async def _relay(self, context: RequestContext, cell: Cell, body: _Body, answer: Answer) -> None:
        """Pass an answer on as it comes: of a stream of events whole ones only, so that an error may follow them."""
        headers = [*_passed(answer.headers), (b"x-splitfuse-cell", str(cell.number).encode())]
        learns = body.may_be_stored and answer.status == 200
        is_stream = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
        held = b""

        async def send(data: bytes, *, more: bool) -> None:
            try:
                if context.status is None:
                    body.content = b""  # from here on it is sent to no other cell
                    self.admission.bodies.release(context.held)
                    context.held, context.is_stream = 0, is_stream
                    await context.send({"type": "http.response.start", "status": answer.status, "headers": headers})
                await context.send({"type": "http.response.body", "body": data, "more_body": more})
            except OSError as error:
                raise ClientGoneError from error

        if context.scope["method"] != "HEAD":
            async for piece in answer.pieces:
                cell.hear()
                if learns:
                    learns = False
                    self._learn(piece, cell)
                data = held + piece
                if is_stream:
                    whole, end, held = data.rpartition(b"\n\n")
                    data = whole + end
                if data:
                    await send(data, more=True)
        await send(held, more=False)

    async def _answer_whole(
        self, context: RequestContext, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> None:
        await context.send({"type": "http.response.start", "status": status, "headers": _passed(headers)})
        await context.send({"type": "http.response.body", "body": body})

    # What one cell alone has ------------------------------------------------------------------------------------------

    def _learn(self, piece: bytes, cell: Cell) -> None:
        """Remember the cell of an answer that may be stored there, by the id at its beginning."""
        if (found := _ANSWER_ID.search(piece)) is not None:
            self._keep(found[1].decode(), cell)

    def _keep(self, answer_id: str, cell: Cell) -> None:
        self._kept[answer_id] = cell
        self._kept.move_to_end(answer_id)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    async def _keeper(self, context: RequestContext, prompt: PromptPrefixes) -> Cell | None:
        """Return the cell that has what a request asks for, or goes on from; None if it needs none of it, or if no cell
        has it. Raises EngineUnavailableError if none has it of those that can be asked, and not all can.
        """
        path = context.scope["raw_path"].decode("latin-1")  # as it was sent, with what is escaped
        if (found := _STORED.match(path)) is not None:
            answer_id, where = found[1], found[0]
        elif _EXPLAINED.fullmatch(path):
            answer_id, where = None, path
        elif prompt.follows is not None and path.startswith("/v1/responses"):
            answer_id = answer_id_of(prompt.follows)
            if answer_id is None:  # the cell says what is wrong with it
                return None
            where = f"/v1/responses/{answer_id}"
        else:
            return None
        if answer_id is not None and (kept := self._kept.get(answer_id)) is not None:
            if kept.is_ready:
                return kept
            self._refuse(kept)
        ready = [each for each in self.cells.values() if each.is_ready]
        seconds = EXPLAIN_SECONDS if answer_id is None else ANSWER_SECONDS
        has = await asyncio.gather(*(self._has(context, each, where, seconds) for each in ready))
        for cell, has_it in zip(ready, has, strict=True):
            if has_it:
                if answer_id is not None:
                    self._keep(answer_id, cell)
                return cell
        if len(ready) < len(self.cells) or None in has:
            raise EngineUnavailableError("what the request asks for is in no cell that can be asked now: send it again")
        return None

    async def _has(self, context: RequestContext, cell: Cell, where: str, seconds: float) -> bool | None:
        """Return whether a cell has what is at a path, for this client; None: it does not say."""
        head = _head(context, cell, "HEAD", where.encode("latin-1"), 0)
        try:
            async with asyncio.timeout(seconds), exchange(cell.address, head, timeout=seconds) as answer:
                return answer.status == 200
        except (ServerError, RequestFailedError, TimeoutError):
            return None


def _dialect_of(path: str) -> Dialect:
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return RESPONSES if path.startswith("/v1/responses") else OPENAI


def _status_of(cell: Cell) -> EngineStatus:
    return EngineStatus(
        engine=cell.number,
        state=cell.state,
        address=cell.url,
        role="cell",
        running=cell.num_running,
        waiting=cell.num_waiting,
        kv_usage=cell.kv_usage,
        requests_per_second=cell.requests_per_second,
    )


def _passed(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a cell's answer that its client gets."""
    return _without(headers, _NOT_ANSWERED)


def _without(headers: Iterable[tuple[bytes, bytes]], names: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Return headers but for those of some names, and those that `connection` names."""
    listed = list(headers)
    named = {each.strip().lower() for name, value in listed if name == b"connection" for each in value.split(b",")}
    return [(name, value) for name, value in listed if name not in names and name not in named]


def _target(context: RequestContext) -> bytes:
    """Return the path of a request as its client has sent it."""
    path: bytes = context.scope["raw_path"]
    query: bytes = context.scope["query_string"]
    return path + b"?" + query if query else path


def _head(context: RequestContext, cell: Cell, method: str, path: bytes, length: int) -> bytes:
    """Return the head of a request to a cell, with the headers of its client."""
    lines = [
        method.encode() + b" " + path + b" HTTP/1.1",
        b"host: " + cell.address.authority.encode(),
        b"connection: close",
        b"x-request-id: " + context.request_id.encode(),
        *(name + b": " + value for name, value in _without(context.scope["headers"], _NOT_ASKED)),
        b"via: " + VIA,
    ]
    if length or method not in ("GET", "HEAD"):
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"
