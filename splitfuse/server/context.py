"""One HTTP request and its answer, on the raw ASGI interface.

It decides how much of a body is read, how an answer or a stream of events is sent, and notices when the client goes. It
must not know what is asked.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

import msgspec

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request import FinishReason
from splitfuse.server.auth import ANONYMOUS
from splitfuse.server.errors import ClientGoneError, ErrorAnswer, RefusedError
from splitfuse.text.service import ServedGeneration

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_FAREWELL_SECONDS = 5.0  # to get an error to a client that may not be reading

_Result = TypeVar("_Result")

encode_json = msgspec.json.Encoder().encode


class RequestContext:
    """One request: who asks, what came, and how far its answer is. One task at a time sends."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str, unique_id: str) -> None:
        self.scope = scope
        self.request_id = request_id  # as the client calls it, if it does
        self.unique_id = unique_id
        self.arrival = time.monotonic()
        self.owner = ANONYMOUS  # of the key it brought
        self.status: int | None = None  # of the answer, once it has begun
        self.generations: list[ServedGeneration] = []
        self.admitted = False
        self.shows_output = True  # False: what is generated is dropped
        self.prompt: Any = None  # for the log
        self.phases: dict[LatencyPhase, float] = {}
        """Where its time went in this process: while no engine had it, see `enter_phase`."""
        self.handed_over = math.inf  # when the engine's time began
        self.since = self.arrival  # the last `enter_phase`
        self._doing = LatencyPhase.READING
        self._num_left, self._left = 0, 0.0
        self._receive = receive
        self._send = send
        self._is_stream = False

    @property
    def headers(self) -> dict[bytes, bytes]:
        """By name in small letters; of several with one name, the last."""
        return dict(self.scope["headers"])

    @property
    def text(self) -> list[str]:
        """Of each choice, as far as it has come: for the log."""
        return [generation.text for generation in self.generations if self.shows_output]

    # Where the time goes ---------------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """When the last choice came back from its engine; infinity until then."""
        while self._num_left < len(self.generations) and self.generations[self._num_left].left < math.inf:
            self._left = max(self._left, self.generations[self._num_left].left)
            self._num_left += 1
        return self._left if 0 < len(self.generations) == self._num_left else math.inf

    @property
    def last(self) -> ServedGeneration | None:
        """Of the choices that an engine has had, the one that all waited for."""
        return max((g for g in self.generations if g.stream is not None), key=lambda g: g.left, default=None)

    def enter_phase(self, part: LatencyPhase) -> None:
        """From now on its time goes into `part`. What has passed counts for the one before, unless an engine had it."""
        now = time.monotonic()
        since = self.since if self.handed_over == math.inf else max(self.since, self.left)
        if now > since:
            self.phases[self._doing] = self.phases.get(self._doing, 0.0) + now - since
        self._doing, self.since = part, now

    def hand_over(self) -> None:
        """To the engine: its own account says where the time goes until all choices are back."""
        self.enter_phase(LatencyPhase.FROM_ENGINE)
        self.handed_over = self.since

    # The body --------------------------------------------------------------------------------------------------------

    async def body(self, limit: int) -> bytes:
        """All of the body, at most `limit` bytes. Raises RefusedError (413) if it is larger, ClientGoneError."""
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise _too_large(limit)
        pieces, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)

    async def unless_gone(self, work: Coroutine[Any, Any, _Result], *, deadline: float | None) -> _Result:
        """The result of `work`, which is cancelled when the client goes (ClientGoneError) or when `deadline` seconds
        have passed since the request arrived (RefusedError, 408). The body must have been read.
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
                type="timeout_error",
                parameter="splitfuse_deadline",
                headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
            )
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The answer ------------------------------------------------------------------------------------------------------

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send an ASGI message, with the request's id among the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def answer(
        self,
        content: Any,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """The whole answer: bytes, or what becomes JSON."""
        body = content if isinstance(content, bytes) else encode_json(content)
        await self._begin(status, content_type, {"content-length": str(len(body)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": body})

    async def event(self, content: Any) -> None:
        """One server-sent event; the first one begins the answer."""
        await self._write_event(encode_json(content))

    async def end_events(self) -> None:
        """The events are complete."""
        await self._write_event(b"[DONE]")
        await self.send({"type": "http.response.body", "body": b""})

    async def fail(self, answer: ErrorAnswer) -> None:
        """Tell of an error: as the answer, or as the last event if the answer has begun."""
        if self.status is None:
            await self.answer(answer.body, status=answer.status, headers=answer.headers)
        elif self._is_stream:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self.event(answer.body)
                await self.send({"type": "http.response.body", "body": b""})

    async def _write_event(self, data: bytes) -> None:
        if self.status is None:
            self._is_stream = True
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            await self._begin(200, "text/event-stream; charset=utf-8", headers)
        await self.send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _begin(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        named = {"content-type": content_type, **headers}
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            }
        )

    # What it took ----------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> list[ServedGeneration]:
        """The choices that an engine has heard of."""
        return [g for g in self.generations if g.first_step is not None or g.finish_reason is FinishReason.ERROR]


def _too_large(limit: int) -> RefusedError:
    return RefusedError(
        413, f"the body is larger than {limit} bytes, the most this server reads", code="body_too_large"
    )
