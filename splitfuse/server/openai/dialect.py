"""Defines how OpenAI's API writes errors and ends a stream."""

from __future__ import annotations

import msgspec

from splitfuse.server.dialect import Dialect, bearer_or_header_key
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


OPENAI = Dialect(
    error=error_body,
    error_type=ErrorBody,
    key=bearer_or_header_key,
    end=b"data: [DONE]\n\n",
    end_description=", then [DONE], or an ErrorBody if it breaks off",
)
