"""Runs untrusted code, such as a chat template, with a timeout.

The timeout works on any thread and in any loop: the work runs on a thread of its own, and when time is up an exception
is raised there, between two of its instructions.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

_RETRY_SECONDS = 0.1

_Result = TypeVar("_Result")


class _TimeIsUpError(BaseException):
    """Ends the work. It is no Exception, so that the work's own handlers do not catch it."""


def within(deadline: float, work: Callable[[], _Result], name: str) -> _Result:
    """Return the result of `work`, or raise its error. Raises TimeoutError after `deadline` seconds.

    `name` is that of the work's thread. Code stuck in one C call is abandoned, not stopped.

    >>> within(5.0, lambda: template.render(arguments), "chat template")
    """
    outcome: list[_Result | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(deadline)
    if not outcome:
        threading.Thread(target=_end, args=(thread, outcome), name=f"{name}: time is up", daemon=True).start()
        raise TimeoutError(f"stopped: it ran for more than {deadline:g} s")
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _end(thread: threading.Thread, outcome: list[_Result | BaseException]) -> None:
    """Raise in `thread` until it ends: a callback of the garbage collector swallows what is raised there."""
    while thread.is_alive() and not outcome:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeIsUpError))
        thread.join(_RETRY_SECONDS)
