"""Defines the errors that users can meet, as one tree. `status` is the HTTP status that a server answers with.

A message names the offending value, says what is wrong with it, and gives a valid one where there is one. A request
that fails ends alone; one that kills its engine fails that engine's requests too, twice at most, and is then refused
for ten minutes.

    SplitfuseError
    ├── ConfigError                 a setting has an invalid value
    ├── CostModelError              a cost model cannot be fitted, read or found
    ├── InvalidRequestError         a request is invalid; `parameter` names the parameter at fault
    │   ├── PromptTooLongError      the prompt is longer than the model can read
    │   ├── RequestTooLargeError    the request does not fit the KV cache even alone
    │   └── RequestQuarantinedError it was in the step in flight at two deaths of an engine
    ├── ModelError                  a model cannot be loaded
    │   ├── ModelNotFoundError      no folder or Hub model has that name, or the Hub is unreachable
    │   ├── UnsupportedModelError   its architecture, or a feature of it, is not supported
    │   ├── WeightsError            a weight is missing, surplus, misshapen, truncated or pickled
    │   ├── AdapterError            an adapter cannot be read, or does not fit the model
    │   └── TokenizerError          its tokenizer is missing or unreadable
    ├── KernelError                 compiled kernels are missing, or this CPU cannot run them
    ├── MemoryPlanError             the model does not fit into memory; the message says what would
    ├── RequestFailedError          a request failed while it ran (NaN logits, for example); others continue
    ├── OverloadedError             the server is at capacity; `retry_after` says when to try again
    │   └── SloUnattainableError    it has on_time_only, and cannot meet its SLO now
    ├── RecordingError              a recording cannot be read, or cannot be replayed here
    ├── RankLostError               a rank of a tensor-parallel group has ended: its engine ends too
    ├── EngineUnavailableError      no engine is there to compute the request, or it died
    ├── DrainingError               the server is shutting down and accepts no new requests
    └── ServerError                 a server cannot be started, found or stopped
        └── RegistryError           the list of deployments cannot be read or written

Standard library only.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any


class SplitfuseError(Exception):
    """Raised on purpose: the root of all errors of splitfuse."""

    status: int = 500
    """HTTP status by which a server answers it."""
    code: str = "internal_error"
    """Code of that answer, by which a client finds the class again."""


class ConfigError(SplitfuseError):
    """Raised when a setting has an invalid value."""


class CostModelError(SplitfuseError):
    """Raised when no cost model fits the timings, or when one cannot be read or found."""


class InvalidRequestError(SplitfuseError):
    """Raised when a request is invalid. `parameter` is the name of the parameter at fault, if it is one."""

    status = 400
    code = "invalid_value"

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLongError(InvalidRequestError):
    """Raised when the prompt leaves no room for the tokens to generate within the model's length."""

    code = "context_length_exceeded"


class RequestTooLargeError(InvalidRequestError):
    """Raised when a request needs more KV blocks than the whole cache has."""

    code = "request_too_large"


class RequestQuarantinedError(InvalidRequestError):
    """Raised when a request was in the step in flight at two deaths of an engine: it may be what kills them."""

    status = 422
    code = "request_quarantined"


class ModelError(SplitfuseError):
    """Raised when a model cannot be loaded."""


class ModelNotFoundError(ModelError):
    """Raised when no folder or Hub model has the name, or when the Hub cannot be reached."""

    code = "model_not_found"


class UnsupportedModelError(ModelError):
    """Raised when an architecture, or a feature of it, is not supported."""


class WeightsError(ModelError):
    """Raised when a weight is missing, surplus, misshapen, truncated or pickled."""


class AdapterError(ModelError):
    """Raised when an adapter cannot be read, asks for what is not supported, or does not fit the model."""

    status = 400
    code = "invalid_adapter"


class TokenizerError(ModelError):
    """Raised when a tokenizer is missing or cannot be read."""


class KernelError(SplitfuseError):
    """Raised when compiled kernels are missing, or when this CPU cannot run them."""


class MemoryPlanError(SplitfuseError):
    """Raised when the model and its KV cache do not fit into memory."""


class RequestFailedError(SplitfuseError):
    """Raised when one request fails while it runs. The others continue."""

    code = "request_failed"


class OverloadedError(SplitfuseError):
    """Raised when the server is at capacity. `retry_after` is the number of seconds until a retry may succeed."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SloUnattainableError(OverloadedError):
    """Raised when a request with `on_time_only` cannot meet its SLO now. It may after `retry_after` seconds; infinity
    means never.
    """


class RecordingError(SplitfuseError):
    """Raised when a recording cannot be read, or cannot be replayed with this model on this machine."""


class RankLostError(SplitfuseError):
    """Raised when a rank of a tensor-parallel group has ended or does not answer: its engine cannot go on."""


class EngineUnavailableError(SplitfuseError):
    """Raised when no engine is there to compute a request, or when it died meanwhile. A retry may succeed."""

    status = 503
    code = "engine_unavailable"


class DrainingError(SplitfuseError):
    """Raised when the server is shutting down: running requests continue, new ones are refused."""

    status = 503
    code = "draining"


class ServerError(SplitfuseError):
    """Raised when a server cannot be started, found or stopped."""


class RegistryError(ServerError):
    """Raised when the list of deployments cannot be read or written. A server runs without it."""


MAX_WAIT = 3600
"""Longest wait that a client is told, in seconds."""


def whole_seconds(wait: float) -> int:
    """Return a wait as `Retry-After` and sentences tell it, so that they agree: rounded up, at least 1."""
    return math.ceil(min(max(wait, 1), MAX_WAIT))


def unreadable(error: OSError | ValueError) -> str:
    """Return why a file cannot be read, without the number of the error and the path, which the caller names."""
    return getattr(error, "strerror", None) or str(error)


def brief(value: object) -> str:
    """Return how an error shows a value: in 80 characters at most, however long or deep the value is."""
    try:
        return f"{_REPR.repr(value):.80}"
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """Return a text from outside as one line, with escapes for the characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class _JsonRepr(reprlib.Repr):
    """Shows true, null and "text" as JSON writes them."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, str):
            x = x[: self.maxstring]
            return json.dumps(x, ensure_ascii=not x.isprintable())
        return json.dumps(x) if x is None or isinstance(x, bool) else super().repr1(x, level)


_JSON_REPR = _JsonRepr()
_JSON_REPR.maxother = _JSON_REPR.maxlong = _JSON_REPR.maxstring = 80


def brief_json(value: object) -> str:
    """Return how an error shows a value that came as JSON, as `brief` does.

    >>> brief_json([None, "a", True])
    '[null, "a", true]'
    """
    try:
        return f"{_JSON_REPR.repr(value):.80}"
    except ValueError:
        return brief(value)


def entry(place: str, key: str) -> str:
    """Return how an error names the value of a key: `metadata[a]`, or `metadata["a]b"]` for a key that is no word."""
    shown = f"{key:.80}"
    return f"{place}[{shown}]" if re.fullmatch(r"[\w.-]+", shown) else f"{place}[{json.dumps(shown)}]"


def any_of(words: Iterable[str]) -> str:
    """Return how an error lists alternatives: `a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'top_p'?"`, or the sorted list of known names if none is near."""
    choices = sorted(known)
    return nearest(name, choices) or f"; known: {', '.join(choices)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'top_p'?"`, or an empty text if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
