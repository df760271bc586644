"""Turns errors into what a client sees: an HTTP status, a type, a code, and a message that may leave the machine.

A client's mistake is reported in full, a failure of ours by its kind, without paths, addresses or tracebacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from splitfuse.errors import (
    AdapterError,
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    SplitfuseError,
    whole_seconds,
)

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
"""Types of errors by status, in OpenAI's words; others are a client's fault below 500, and the server's above."""


class RefusedError(SplitfuseError):
    """Refuses a request with an HTTP answer, which a dialect writes: status, type, code, message and headers.

    `parameter` names the parameter at fault, if it is one; `request_id` the request, once the error is its answer.
    """

    request_id = ""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.parameter = status, message, code, parameter
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def is_bug(self) -> bool:
        """Return whether the traceback of what it answers belongs in the log."""
        return self.code == SplitfuseError.code


class ClientGoneError(Exception):
    """Raised when the client has disconnected: no answer can be sent."""


def answer_to(error: Exception) -> RefusedError:
    """Return the answer to an error."""
    match error:
        case RefusedError():
            return error
        case InvalidRequestError():
            return RefusedError(error.status, str(error), code=error.code, parameter=error.parameter)
        case AdapterError():
            return RefusedError(error.status, str(error), code=error.code, parameter="lora_path")
        case OverloadedError():
            headers = {"retry-after": str(whole_seconds(error.retry_after))}
            return RefusedError(error.status, str(error), code=error.code, headers=headers)
        case EngineUnavailableError() | DrainingError() | RequestFailedError():
            headers = {"retry-after": "1"} if error.status == 503 else {}
            return RefusedError(error.status, without_secrets(str(error)), code=error.code, headers=headers)
        case _:
            message = "internal error; the server's log has its traceback under the request's id"
            return RefusedError(500, message, code="internal_error")


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
