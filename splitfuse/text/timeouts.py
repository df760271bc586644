"""Work that takes as long as somebody else's code makes it, with an end: chat templates come from anybody.

The deadline works on any thread and in any loop: the work runs on a thread of its own, and when time is up an exception
is raised there, between two of its instructions. It must not know what the work is.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

_AGAIN_AFTER = 0.1  # seconds

_Result = TypeVar("_Result")


class _TimeIsUpError(BaseException):
    """No Exception, so that nothing on the way out takes it for an error of the work's own."""


def within(deadline: float, work: Callable[[], _Result], name: str) -> _Result:
    """The result of `work`, or what it raised. Raises TimeoutError if it takes longer than `deadline` seconds.

    `name` is what the work's thread is called. What spends for ever inside one instruction is left, but not ended.
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
    """Raise in `thread`, until that counts: raised in a callback of the garbage collector it is swallowed there."""
    while thread.is_alive() and not outcome:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeIsUpError))
        thread.join(_AGAIN_AFTER)
