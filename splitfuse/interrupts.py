"""Says what Ctrl-C and SIGTERM do while programs start: a terminal and systemd send them to all processes at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit status of a command that Ctrl-C has ended."""


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back from the processes that this thread starts meanwhile, until they call `ignore`."""
    own = set(SIGNALS) - signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, own)


def ignore() -> None:
    """Ignore the signals, now and those held back: the process that has started this one decides when it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def ending_at_ctrl_c() -> Iterator[None]:
    """End the process at Ctrl-C with one line while the context lasts: an exception could be lost in what is imported
    or parses flags, or be shown with all its calls. Where Ctrl-C is ignored, as in the background of a shell, it stays
    so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def raising_at_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt while the context lasts, within `ending_at_ctrl_c`."""
    if signal.getsignal(signal.SIGINT) is not _end or not _is_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _is_main_thread() -> bool:
    """Return whether this is the thread that may change what signals do."""
    return threading.current_thread() is threading.main_thread()


def _end(*_: Any) -> None:
    with suppress(OSError):  # nothing may read that
        os.write(2, b"splitfuse: interrupted\n")
    os._exit(INTERRUPTED)
