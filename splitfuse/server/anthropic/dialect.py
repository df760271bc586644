"""Defines how Anthropic's API writes errors and events, and reads keys."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from splitfuse.server.dialect import Dialect, bearer_or_header_key, sse_event
from splitfuse.server.errors import RefusedError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Types of errors by status; others are an invalid_request_error below 500, and an api_error above."""


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    """Describes an error."""

    type: str
    message: str


class MessagesError(msgspec.Struct, frozen=True):
    """Wraps an error as the body of an answer, or as the last event of a stream that breaks off."""

    error: MessagesErrorDetail
    request_id: str
    type: Literal["error"] = "error"


def error_body(answer: RefusedError) -> MessagesError:
    """Return the body of an error."""
    kind = _TYPES.get(answer.status, "invalid_request_error" if answer.status < 500 else "api_error")
    return MessagesError(MessagesErrorDetail(kind, answer.message), answer.request_id)


def named_event(content: Any) -> bytes:
    """Return a server-sent event that is named by the type of its data."""
    return f"event: {content.type}\n".encode() + sse_event(content)


ANTHROPIC = Dialect(
    error=error_body,
    error_type=MessagesError,
    key=bearer_or_header_key,
    id_headers=(b"x-request-id", b"request-id"),
    event=named_event,
    end_description=", but for a ping while it is silent, and a MessagesError if it breaks off",
    comment=b'event: ping\ndata: {"type":"ping"}\n\n',
)
