"""Every error a user can meet, as one tree. Each class carries the HTTP status a server answers with.

    SplitfuseError
    ├── ConfigError                 a setting that cannot be honoured
    ├── CostModelError              a cost model that cannot be fitted, read or found
    ├── InvalidRequestError         a request that cannot be honoured; `parameter` names what was wrong
    │   ├── PromptTooLongError      longer than the model can read
    │   └── RequestTooLargeError    could never fit the KV cache, however long it waited
    ├── ModelError                  a model that cannot be loaded
    │   ├── ModelNotFoundError      no such folder or name, or no network to fetch it
    │   ├── UnsupportedModelError   an architecture or a feature of it that we do not know
    │   ├── WeightsError            a weight that is missing, surplus, misshapen, truncated or pickled
    │   └── TokenizerError          no tokenizer, or one that cannot be read
    ├── KernelError                 compiled kernels that are missing, or that this CPU cannot run
    ├── MemoryPlanError             the model does not fit; the message gives need, have and a value that fits
    ├── RequestFailedError          one request failed while it ran (NaN logits, for example); the others go on
    ├── OverloadedError             no room for the request now; `retry_after` says when there may be
    │   └── LateError               it wants to be on time or not at all, and cannot be now
    ├── EngineDiedError             no engine to compute the request, or no longer
    ├── DrainingError               the server is ending: it takes no new request
    └── ServerError                 a server that cannot be started, found or stopped

Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SplitfuseError(Exception):
    """Root of everything raised on purpose."""

    status: int = 500


class ConfigError(SplitfuseError):
    """A setting that cannot be honoured."""

    status = 400


class CostModelError(SplitfuseError):
    """Timings that no cost model can be fitted to, or a cost model that cannot be read or found."""


class InvalidRequestError(SplitfuseError):
    """A request that cannot be honoured. `parameter` is the name of the offending parameter, if it is one."""

    status = 400

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for a single generated token within the model's length."""


class RequestTooLargeError(InvalidRequestError):
    """The request needs more KV blocks than the whole cache has."""


class ModelError(SplitfuseError):
    """A model that cannot be loaded."""


class ModelNotFoundError(ModelError):
    """No such folder or Hub name, or no network to fetch it."""

    status = 404


class UnsupportedModelError(ModelError):
    """An architecture, or a feature of one, that we do not know."""


class WeightsError(ModelError):
    """A weight that is missing, surplus, misshapen, truncated or pickled."""


class TokenizerError(ModelError):
    """No tokenizer, or one that cannot be read."""


class KernelError(SplitfuseError):
    """Compiled kernels that are missing, or that this CPU cannot run."""


class MemoryPlanError(SplitfuseError):
    """The model and its KV cache do not fit into memory."""

    status = 507


class RequestFailedError(SplitfuseError):
    """One request failed while it ran. Its neighbours are untouched."""


class OverloadedError(SplitfuseError):
    """There is no room for the request now. `retry_after`: seconds until there may be."""

    status = 429

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LateError(OverloadedError):
    """The request is wanted on time or not at all, and cannot be on time now. It may be after `retry_after` seconds;
    infinity: never.
    """


class EngineDiedError(SplitfuseError):
    """No engine is there to compute the request, or it died on the way. Another attempt may succeed."""

    status = 503


class DrainingError(SplitfuseError):
    """The server is ending: what runs goes on, and no new request is taken."""

    status = 503


class ServerError(SplitfuseError):
    """A server that cannot be started, found or stopped."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'top_p'?"`, or the sorted list of what is known if nothing is near."""
    choices = sorted(known)
    return nearest(name, choices) or f"; known: {', '.join(choices)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'top_p'?"`, or nothing if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
