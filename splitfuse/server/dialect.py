"""Says what an API such as OpenAI's consists of.

A dialect is a package with its types of bodies, whose `to_generation()` returns a `GenerationRequest`; a `Responder`,
which writes an answer whole or in events (both in generate.py); a `Dialect`; and a tuple of `Route`s, which is added to
`ROUTES` in app.py.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar, cast

import msgspec

from splitfuse.server.errors import RefusedError
from splitfuse.server.validation import Body

PIECE_BYTES = 2**16
"""Size of the pieces in which a large answer is sent."""

_Item = TypeVar("_Item")

_encode = msgspec.json.Encoder().encode


class LazyList:
    """Stands for a list in an answer, whose items are made as they are written: there may be millions."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[bytes]:
        """Yield the list as JSON, item by item."""
        before = b"["
        for item in self._items:
            yield before + _encode(item)
            before = b","
        yield b"]" if before == b"," else b"[]"


def lazy_list(items: Iterable[_Item]) -> list[_Item]:
    """Return a LazyList in place of a list, which its type in the OpenAPI document is."""
    return cast(list[_Item], LazyList(items))


def _joined(value: Any) -> msgspec.Raw:
    assert isinstance(value, LazyList), f"{type(value)} cannot be written as JSON"
    return msgspec.Raw(b"".join(value))


encode_json = msgspec.json.Encoder(enc_hook=_joined).encode
"""Function that returns an object as JSON."""


def json_pieces(content: Any) -> Iterator[bytes]:
    """Yield the JSON of an object in pieces of some PIECE_BYTES: at no time are all items of its LazyLists there."""
    lists: list[LazyList] = []

    def mark(value: LazyList) -> msgspec.Raw:
        lists.append(value)
        return msgspec.Raw(b"\0")  # which JSON never has in it

    first, *others = msgspec.json.Encoder(enc_hook=mark).encode(content).split(b"\0")
    piece = bytearray(first)
    for each, after in zip(lists, others, strict=True):
        for item in each:
            piece += item
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
        piece += after
    yield bytes(piece)


def sse_event(content: Any) -> bytes:
    """Return a server-sent event whose data is JSON."""
    return b"data: " + encode_json(content) + b"\n\n"


def bearer_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the API key in an Authorization header, or nothing."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def bearer_or_header_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the API key of an Authorization or an X-Api-Key header, or nothing. Raises RefusedError (401) if both have
    one and they differ: a proxy may have checked the other.
    """
    bearer, plain = bearer_key(headers), headers.get(b"x-api-key", b"").strip()
    if bearer and plain and not hmac.compare_digest(bearer, plain):
        message = "Authorization and X-Api-Key have different API keys: send one of them"
        raise RefusedError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return bearer or plain


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Tells how an API reads keys, and writes errors and the events of a stream."""

    error: Callable[[RefusedError], msgspec.Struct]
    """Function that returns the body of an error, which is also the last event of a stream that breaks off, unless
    RequestContext.stream_error says otherwise."""
    error_type: type[msgspec.Struct]
    """Type of that body."""
    key: Callable[[Mapping[bytes, bytes]], bytes] = bearer_key
    """Function that returns the API key in the headers, or nothing."""
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    """Headers of answers that name the request."""
    event: Callable[[Any], bytes] = sse_event
    """Function that returns the bytes of an event."""
    comment: bytes = b": keep-alive\n\n"
    """Bytes that clients skip, for a stream that is silent."""
    end: bytes = b""
    """Bytes after the last event."""
    end_description: str = ""
    """Words about other events for the OpenAPI document, such as `, then [DONE]`."""
    stream_type: str = "text/event-stream; charset=utf-8"
    """Content type of a stream."""


@dataclass(frozen=True)
class Route:
    """Describes one route, for routing requests and for the OpenAPI document.

    `handler` gets the state, the context and, where there is a `body`, the decoded body. `answer` is the type of its
    answer (None where it is no JSON of a type), `event` that of the events of a stream. `errors` are its statuses
    besides those that all routes with a body, a stream or a key have, and `error` the type of their answers where it is
    not the dialect's.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[None]]
    summary: str
    answer: type[msgspec.Struct] | None
    body: type[Body] | None = None
    event: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    error: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    _: KW_ONLY
    dialect: Dialect
    needs_key: bool = True
    is_supported: bool = True
    """Flag of a route that may answer with 200; another one says why it never does."""
    is_logged: bool = True
    """Flag of a route whose requests are logged; one that is called every few seconds is logged only if it fails."""
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Parameters that it takes behind `?`, with their JSON schemas."""

    @property
    def all_errors(self) -> list[int]:
        """Return every status of an error."""
        errors = {
            *self.errors,
            *((401,) if self.needs_key else ()),
            *((422,) if self.event is not None else ()),
        }
        if self.body is not None:
            errors |= {400, 404, 408, 413, 415, 429, 500, 503}
            if "splitfuse_priority" in self.body.__struct_fields__:
                errors.add(403)  # for one above the key's
        return sorted(errors)

    @property
    def template(self) -> str:
        """Return the path as OpenAPI writes it: `/v1/models/{model}`."""
        return self.path.replace(":path}", "}")

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the methods that it takes. HEAD is a GET without a body."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


def check_method(routes: Sequence[Route], method: str) -> None:
    """Raise RefusedError (405) for a method that none of the routes of a path takes, `*` being any."""
    methods = [each for route in routes for each in route.methods]
    if method not in methods and methods != ["*"]:
        allowed = ", ".join(methods)
        raise RefusedError(
            405, f"this route takes {allowed} only", code="method_not_allowed", headers={"allow": allowed}
        )
