"""Turns errors into what a client sees: an HTTP status, a type, a code, and a message that may leave the machine.

A client's mistake is reported in full, a failure of ours by its kind, without paths, addresses or tracebacks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitfuse.errors import (
    DrainingError,
    EngineDiedError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    RequestTooLargeError,
    SplitfuseError,
)


class RefusedError(SplitfuseError):
    """Refuses a request before an engine sees it: with an HTTP `status`, and OpenAI's `type`, `code` and `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's word
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code, self.parameter = status, type, code, parameter
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client has disconnected: there is no one to answer."""


@dataclass(frozen=True)
class ErrorAnswer:
    """Holds the answer to an error, which a dialect writes. `is_bug` says that its traceback belongs in the log."""

    status: int
    message: str
    type: str
    code: str
    parameter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_bug: bool = False


def answer_to(error: Exception) -> ErrorAnswer:
    """Return the answer to an error."""
    match error:
        case RefusedError():
            return ErrorAnswer(error.status, str(error), error.type, error.code, error.parameter, error.headers)
        case InvalidRequestError():
            code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "invalid_value")
            return ErrorAnswer(error.status, str(error), "invalid_request_error", code, error.parameter)
        case OverloadedError():
            headers = {"retry-after": str(max(math.ceil(error.retry_after), 1))}
            return ErrorAnswer(error.status, str(error), "rate_limit_error", "rate_limit_exceeded", headers=headers)
        case EngineDiedError() | DrainingError():
            code = "draining" if isinstance(error, DrainingError) else "engine_unavailable"
            headers = {"retry-after": "1"}
            return ErrorAnswer(error.status, without_secrets(str(error)), "server_error", code, headers=headers)
        case RequestFailedError():
            return ErrorAnswer(error.status, without_secrets(str(error)), "server_error", "request_failed")
        case _:
            message = "internal error; the server's log has its traceback under the request's id"
            return ErrorAnswer(500, message, "server_error", "internal_error", is_bug=True)


_CODES = {PromptTooLongError: "context_length_exceeded", RequestTooLargeError: "request_too_large"}

_SECRETS = re.compile(
    r"""0x[0-9a-fA-F]+                  # a memory address
    | (?<![\w.])/[^\s'"(),:;/]+/[^\s'"(),:]*   # a path from the root, of two parts at least: one part may be a route
    | [\w+.-]+(?:/[^\s/'"(),:]+){2,}    # any other path
    | (?:\d{1,3}\.){3}\d{1,3}(?::\d+)?  # an IP address
    """,
    re.VERBOSE,
)


def without_secrets(message: str) -> str:
    """Return the first line of a failure's message without paths and addresses."""
    return _SECRETS.sub("...", re.split(r"\n|\\n", message, maxsplit=1)[0])
