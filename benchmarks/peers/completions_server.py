"""An HTTP server with OpenAI's completions for engines without one: token ids in, token ids out, streamed.

Standard library only, one thread: it runs in the engines' own environments. A parameter is honoured or refused by its
name. Answers carry no text: nothing is detokenized. Knows no engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeAlias

MODEL = "model"
TAKEN = ("model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos", "return_token_ids")
EVENTS = "text/event-stream"
JSON = "application/json"

Tokens: TypeAlias = list[int]


class TokenEngine(Protocol):
    """An engine to be served."""

    facts: Mapping[str, Any]
    """Versions and effective settings, for the report."""
    room: int
    """Maximum tokens of a prompt and its answer together."""

    def generate(self, prompt: Tokens, max_tokens: int, *, ignore_eos: bool) -> AsyncGenerator[Tokens, None]:
        """Yield new tokens, chosen greedily. Closing it aborts the request. Raises RuntimeError if it fails."""
        ...

    async def run(self) -> None:
        """Run the engine until cancelled. Called once, in the server's event loop."""
        ...


class RefusedError(Exception):
    """A rejected request, with status and message."""

    def __init__(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A valid request."""

    prompt: Tokens
    max_tokens: int
    ignore_eos: bool
    return_token_ids: bool

    @classmethod
    def parse(cls, body: bytes, room: int) -> Completion:
        """Parse a request. Raises RefusedError."""
        try:
            asked = json.loads(body)
        except ValueError as error:
            raise RefusedError(f"the body is no JSON: {error}") from None
        if not isinstance(asked, dict):
            raise RefusedError("the body should be a JSON object")
        for name in asked:
            if name not in TAKEN:
                raise RefusedError(f"{name!r} is not served here; what is: {', '.join(TAKEN)}")
        prompt, max_tokens = asked.get("prompt"), asked.get("max_tokens", 16)
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int and token >= 0 for token in prompt):
            raise RefusedError("prompt should be a list of token ids")
        if type(max_tokens) is not int or max_tokens < 1:
            raise RefusedError(f"max_tokens should be at least 1, not {max_tokens!r}")
        if len(prompt) + max_tokens > room:
            raise RefusedError(
                f"prompt and max_tokens, {len(prompt)} + {max_tokens}, are over the room of {room} tokens"
            )
        if asked.get("temperature") != 0:
            raise RefusedError("temperature should be 0: answers are greedy")
        if asked.get("stream") is not True:
            raise RefusedError("stream should be true")
        if asked.get("stream_options", {"include_usage": True}) != {"include_usage": True}:
            raise RefusedError("stream_options may have include_usage, true, and nothing else")
        return cls(prompt, max_tokens, bool(asked.get("ignore_eos")), bool(asked.get("return_token_ids")))


async def serve(engine: TokenEngine, host: str, port: int) -> None:
    """Run the engine and the server until cancelled, or until the engine raises."""
    server = await asyncio.start_server(Front(engine).answer, host, port, backlog=1024)
    async with server, asyncio.TaskGroup() as group:
        group.create_task(engine.run())
        group.create_task(server.serve_forever())


class Front:
    """A server with one request per connection."""

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await self._route(reader, writer)
            except RefusedError as refusal:
                writer.write(whole(refusal.status, {"error": {"message": str(refusal)}}))
            await writer.drain()
        writer.close()

    async def _route(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, body = await read_request(reader)
        match method, path:
            case "GET", "/health":
                writer.write(whole(HTTPStatus.OK, self._engine.facts))
            case "GET", "/v1/models":
                entry = {"id": MODEL, "object": "model", "max_model_len": self._engine.room}
                writer.write(whole(HTTPStatus.OK, {"object": "list", "data": [entry]}))
            case "POST", "/v1/completions":
                request = Completion.parse(body, self._engine.room)
                leaving = asyncio.create_task(reader.read())  # a client has nothing more to say
                streaming = asyncio.create_task(self._stream(request, writer))
                await asyncio.wait((leaving, streaming), return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
                if not streaming.done():
                    streaming.cancel()
                with suppress(asyncio.CancelledError):
                    await streaming
            case _:
                raise RefusedError(f"there is no {method} {path} here", HTTPStatus.NOT_FOUND)

    async def _stream(self, request: Completion, writer: asyncio.StreamWriter) -> None:
        writer.write(head(HTTPStatus.OK, EVENTS))
        count = 0
        pieces = self._engine.generate(request.prompt, request.max_tokens, ignore_eos=request.ignore_eos)
        try:
            async with aclosing(pieces):
                async for tokens in pieces:
                    count += len(tokens)
                    writer.write(event(choice(tokens if request.return_token_ids else None)))
                    await writer.drain()
        except RuntimeError as error:
            writer.write(event({"error": {"message": str(error)}}))
            return
        last = choice(None, "length" if count == request.max_tokens else "stop")
        length = len(request.prompt)
        usage = {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}
        writer.write(event({**last, "usage": usage}) + b"data: [DONE]\n\n")


def choice(token_ids: Tokens | None, finish_reason: str | None = None) -> dict[str, Any]:
    """Return the fields of an event."""
    answer = {"index": 0, "text": "", "token_ids": token_ids, "finish_reason": finish_reason}
    return {"object": "text_completion", "model": MODEL, "choices": [answer]}


def event(data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def head(status: HTTPStatus, content_type: str, length: int | None = None) -> bytes:
    """Return the head of an answer; without a length it ends with the connection."""
    size = "" if length is None else f"content-length: {length}\r\n"
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {content_type}\r\n{size}connection: close\r\n\r\n"
    ).encode()


def whole(status: HTTPStatus, data: Mapping[str, Any]) -> bytes:
    """Return an answer that is not streamed."""
    body = json.dumps(dict(data)).encode()
    return head(status, JSON, len(body)) + body


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Read method, path and body. Raises RefusedError for invalid HTTP, IncompleteReadError if it breaks off."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        raise RefusedError(f"{first[:80]!r} is no request of HTTP")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = fields.get("content-length", "0")
    if not length.isdigit():
        raise RefusedError(f"content-length should be a number, not {length!r}")
    return words[0], words[1], await reader.readexactly(int(length))
