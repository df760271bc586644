"""Keeps garbage collection away from requests, which a full collection pauses for tens of milliseconds: exempts loaded
objects, and lets an engine be freed without one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakMethod

P = ParamSpec("P")
T = TypeVar("T")

YOUNG_OBJECTS = 20_000
"""Number of objects more than at the last collection that bring the next one. A step of 32 requests makes some
hundreds, which are gone with the next step: with the default of 700 every few steps look at them in vain.
"""


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing meanwhile. While PyTorch is imported, whose objects all stay, a full collection takes 0.1 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Collect once, then exempt every object that is left from later collections, which are rare from then on."""
    gc.unfreeze()  # what an earlier call has frozen, and is gone since
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def unowned(method: Callable[P, T]) -> Callable[P, T]:
    """Return a method that does not keep its object alive. What an object owns may call it back by that, and both are
    freed once nothing else refers to the object, without a collection.

        self._pending = PendingRequests(unowned(self._schedule_request))
    """
    reference = WeakMethod(method)

    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        found = reference()
        assert found is not None, "its owner is gone"
        return found(*args, **kwargs)

    return called
