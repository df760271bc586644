"""Defines how OpenAI's API writes errors and ends a stream."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

import msgspec

from splitfuse.server.dialect import Dialect, bearer_key
from splitfuse.server.errors import RefusedError


class ErrorDetail(msgspec.Struct, frozen=True):
    """Describes an error. `param` is the parameter that caused it, if one did."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Wraps an error as the body of an answer, or as the last event of a stream that breaks off."""

    error: ErrorDetail


def error_body(answer: RefusedError) -> ErrorBody:
    """Return the body of an error."""
    return ErrorBody(ErrorDetail(answer.message, answer.type, answer.parameter, answer.code))


def api_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the API key of an Authorization or an X-Api-Key header, or nothing. Raises RefusedError (401) if both have
    one and they differ: a proxy may have checked the other.
    """
    bearer, plain = bearer_key(headers), headers.get(b"x-api-key", b"").strip()
    if bearer and plain and not hmac.compare_digest(bearer, plain):
        message = "Authorization and X-Api-Key have different API keys: send one of them"
        raise RefusedError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return bearer or plain


OPENAI = Dialect(
    error=error_body,
    error_type=ErrorBody,
    key=api_key,
    end=b"data: [DONE]\n\n",
    end_description=", and [DONE] at the end",
)
