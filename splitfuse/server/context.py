"""Reads one HTTP request and sends its answer, on the raw ASGI interface.

It decides how much of a body is read and how an answer or a stream of events is sent, and notices when the client
disconnects. It also keeps the times of the request that explain.py divides into phases.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from splitfuse.core.request_output import FinishReason
from splitfuse.engine.stream import Stream
from splitfuse.server.auth import ANONYMOUS
from splitfuse.server.bodies import SLOWEST, BodyBudget
from splitfuse.server.connections import WRITE_CHUNK
from splitfuse.server.dialect import Dialect, encode_json, json_pieces
from splitfuse.server.errors import ClientGoneError, RefusedError
from splitfuse.server.listen import Receive, Scope, Send
from splitfuse.text.generation import Generation

_FAREWELL_SECONDS = 5.0
"""Time to send an error to a client that may not be reading."""
SILENCE_SECONDS = 15.0
"""Time after which a silent stream gets a comment; proxies cut one off after 60 s."""
STREAM_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of streams: nothing between keeps them, and no page of another origin gets one as a script or an image."""

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_Result = TypeVar("_Result")


class TokenCounts(NamedTuple):
    """Counts the tokens of a request. A prompt counts once, however many choices it has."""

    prompt: int
    generated: int
    cached: int
    """Tokens of the prompts which every choice found in the prefix cache."""
    reasoning: int | None = None
    """Tokens of thoughts, if the model's can be told apart."""


class RequestContext:
    """Follows one request from its headers to the end of its answer. Tasks send one after the other. `send_now`, which
    runs outside the tasks of the request, sends only while none of them does.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, dialect: Dialect, unique_id: str) -> None:
        self.scope = scope
        wanted = self.headers.get(b"x-request-id", b"")
        self.request_id = wanted.decode() if _SANE_ID.fullmatch(wanted) else unique_id
        """Name that the client gave it, or ours."""
        self.unique_id = unique_id
        self.dialect = dialect
        self.arrival = self.read_at = time.monotonic()
        """Times at which its headers and the whole of its body were there."""
        self.client_seconds = 0.0
        """Seconds in which the answer was sent, from the engine's end on."""
        self.owner = ANONYMOUS
        """Owner of the key that it brought."""
        self.status: int | None = None
        """HTTP status of the answer, once that has begun."""
        self.generations: list[Generation] = []
        self.admitted = False
        self.shows_output = True
        """Flag of an answer that has the generated text in it."""
        self.held = 0
        """Bytes that its body holds of the budget."""
        self.prompt: Any = None
        """Prompt for the log."""
        self.stream_error: Callable[[RefusedError], Iterable[Any]] = lambda error: [dialect.error(error)]
        """Function that returns the last events of a stream that breaks off."""
        self.adapter = ""
        """Digest of the LoRA adapter that its model stands for; empty: none."""
        self._receive = receive
        self._send = send
        self.is_stream = False
        """Flag of an answer that has begun as a stream of events."""
        self._last: Stream | None = None
        self._write_chunk: Callable[[bytes], bool] = scope.get("extensions", {}).get(WRITE_CHUNK, lambda _: False)
        self._writing = asyncio.Lock()
        self._written_at = self.arrival

    @cached_property
    def headers(self) -> dict[bytes, bytes]:
        """Return the headers by lower-case name. Several of one name are joined by commas, as HTTP says: so two keys
        are none, whichever of them a proxy has checked.
        """
        joined: dict[bytes, bytes] = {}
        for name, value in self.scope["headers"]:
            joined[name] = joined[name] + b", " + value if name in joined else value
        return joined

    @property
    def client(self) -> str:
        """Return the name of the key that it brought, or the address that it came from: clients take turns."""
        host, _ = self.scope.get("client") or ("", 0)  # none on a Unix socket
        return self.owner.name or host

    @property
    def text(self) -> list[str]:
        """Return the text of each choice so far, for the log."""
        return [generation.text for generation in self.generations if self.shows_output]

    @property
    def begun(self) -> list[Generation]:
        """Return the choices that an engine has begun."""
        return [g for g in self.generations if g.first_step is not None or g.finish_reason is FinishReason.ERROR]

    @property
    def num_tokens(self) -> TokenCounts:
        """Return the numbers of tokens so far."""
        cached: dict[int, int] = {}
        for g in self.generations:
            cached[g.index] = min(g.num_cached_tokens, cached.get(g.index, g.num_cached_tokens))
        thinking = [g for g in self.generations if g.request.params.reasoning is not None]
        return TokenCounts(
            prompt=sum(len(g.request.token_ids) for g in self.generations if g.choice == 0),
            generated=sum(g.num_computed_tokens for g in self.generations) if self.shows_output else 0,
            cached=sum(cached.values()),
            reasoning=sum(g.num_reasoning_tokens for g in thinking) if thinking else None,
        )

    @property
    def last(self) -> Stream | None:
        """Return the stream of the choice that ended last, or has not ended; None if no engine had any."""
        if self._last is None or self._last.ended_at < math.inf:  # else another end changes nothing
            streams = (g.stream for g in self.generations if g.stream is not None)
            self._last = max(streams, key=attrgetter("ended_at"), default=None)
        return self._last

    # The body --------------------------------------------------------------------------------------------------------

    async def body(self, limit: int, budget: BodyBudget, *, timeout: float) -> bytes:
        """Return the whole body, at most `limit` bytes, as `budget` has room for them.

        Raises RefusedError (413) if it is larger, or (408) if it takes longer than `timeout` seconds and the time of
        its bytes at the slowest rate, OverloadedError, ClientGoneError.
        """
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise _too_large(limit)
        pieces, size = [], 0
        while True:
            left = self.arrival + timeout + size / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except TimeoutError:
                raise RefusedError(
                    408,
                    f"the body did not come: only {size} bytes in {timeout + size / SLOWEST:.0f} s (--client-timeout)",
                    code="body_timeout",
                    headers={"connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            self.held = budget.hold(size, held=self.held)
            pieces.append(piece)
            if not message.get("more_body", False):
                self.read_at = time.monotonic()
                return b"".join(pieces)

    async def unless_gone(self, work: Coroutine[Any, Any, _Result], *, deadline: float | None) -> _Result:
        """Return the result of `work`, which is cancelled when the client disconnects (ClientGoneError) or `deadline`
        seconds after the request arrived (RefusedError, 408). The body must have been read.
        """
        timeout = None if deadline is None else max(self.arrival + deadline - time.monotonic(), 0)
        task, gone = asyncio.create_task(work), asyncio.create_task(self._gone())
        try:
            await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGoneError
            raise RefusedError(
                408,
                f"splitfuse_deadline: {deadline:g} s have passed",
                code="deadline_exceeded",
                parameter="splitfuse_deadline",
                headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
            )
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            del task, gone  # an error refers to this frame, and its task to the error

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The answer ------------------------------------------------------------------------------------------------------

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send an ASGI message, with the request's id among the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            ids = [(name, self.request_id.encode()) for name in self.dialect.id_headers]
            message["headers"] = [*message.get("headers", ()), *ids]
        began = time.monotonic()
        try:
            await self._send(message)
        finally:
            if (last := self.last) is not None:
                self.client_seconds += max(time.monotonic() - max(began, last.ended_at), 0.0)

    async def answer(
        self,
        content: Any,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """Send the whole answer: bytes, or an object for JSON."""
        body = content if isinstance(content, bytes) else encode_json(content)
        await self._begin(status, content_type, {"content-length": str(len(body)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": body})

    async def answer_in_pieces(self, content: Any, off_loop: Callable[[Callable[[], bytes]], Awaitable[bytes]]) -> None:
        """Send a whole answer of JSON in pieces, which `off_loop` makes: see json_pieces."""
        pieces = json_pieces(content)

        def next_piece() -> bytes:
            return next(pieces, b"")

        piece = await off_loop(next_piece)  # before the head: an error may take its place
        await self._begin(200, "application/json", {})
        while piece:
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await off_loop(next_piece)
        await self.send({"type": "http.response.body", "body": b""})

    async def send_events(self, events: Iterable[Any]) -> None:
        """Send events of a stream: bytes, or objects that the dialect writes. The first one begins the answer."""
        for event in events:
            await self._write(event if isinstance(event, bytes) else self.dialect.event(event))

    def send_now(self, events: Sequence[bytes]) -> Callable[[], Awaitable[None]] | None:
        """Send events of a stream if nothing has to be waited for; otherwise return a function that sends them."""
        if not events:
            return None
        is_between = self.is_stream and not self._writing.locked()
        if is_between and self._write_chunk(b"".join(events)):
            self._written_at = time.monotonic()
            return None
        return partial(self.send_events, events)

    async def end_events(self) -> None:
        """End the stream: all events are sent."""
        await self._write(self.dialect.end, more=False)

    async def keep_alive(self) -> None:
        """Send a comment whenever the stream has been silent, until cancelled. The first one begins the answer."""
        with suppress(OSError):  # whatever waits for the client notices too
            while True:
                silent = time.monotonic() - self._written_at
                if silent >= SILENCE_SECONDS:
                    await self._write(self.dialect.comment)
                else:
                    await asyncio.sleep(SILENCE_SECONDS - silent)

    async def fail(self, answer: RefusedError) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun."""
        if self.status is None:
            await self.answer(self.dialect.error(answer), status=answer.status, headers=answer.headers)
        elif self.is_stream:
            events = b"".join(map(self.dialect.event, self.stream_error(answer)))
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._write(events, more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        async with self._writing:
            self._written_at = time.monotonic()
            if self.status is None:
                self.is_stream = True
                await self._begin(200, self.dialect.stream_type, STREAM_HEADERS)
            await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _begin(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        named = {"content-type": content_type, **headers}
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            }
        )


def _too_large(limit: int) -> RefusedError:
    return RefusedError(
        413, f"the body is larger than {limit} bytes, the most this server reads", code="body_too_large"
    )
