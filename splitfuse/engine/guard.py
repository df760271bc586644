"""Makes objects with an engine safe to use from several threads, and refuses their use after a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from splitfuse.errors import EngineUnavailableError

FORKED = (
    "this process is a fork of the one that loaded the model, and has none of its threads: load a model here, in a "
    "process started by multiprocessing's 'spawn', or fork before loading"
)
"""Message of the error after a fork."""

_P = ParamSpec("_P")
_Result = TypeVar("_Result")
_loaded_in: int | None = None  # process that made the last guard


def check_process(pid: int | None = None) -> None:
    """Raise EngineUnavailableError in a fork of process `pid`, or of that with an engine: it lacks the threads."""
    if (pid or _loaded_in) not in (None, os.getpid()):
        raise EngineUnavailableError(FORKED)


def guarded(method: Callable[Concatenate[Any, _P], _Result]) -> Callable[Concatenate[Any, _P], _Result]:
    """Run a method inside its object's `_guard`."""

    @wraps(method)
    def call(self: Any, /, *arguments: _P.args, **keywords: _P.kwargs) -> _Result:
        with self._guard:
            return method(self, *arguments, **keywords)

    return call


class Guard:
    """Lets one thread at a time into `with guard`, in the order in which they come, and the same thread repeatedly.

    Raises EngineUnavailableError in a process that was forked since.
    """

    def __init__(self) -> None:
        global _loaded_in
        check_process()
        self._pid = _loaded_in = os.getpid()
        self._queue, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        check_process(self._pid)
        this = threading.get_ident()
        if self._owner != this:
            with self._queue:  # a thread that comes back at once does not overtake those which wait
                self._lock.acquire()
            self._owner = this
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
