"""Tells at once that a process has ended: its socket is closed only when the system has taken back its memory.

That takes a tenth of a second for each gigabyte or so, and requests wait for it to go on elsewhere. Before it, the
system gives up the robust mutexes (POSIX) of each thread that ends. The process holds one from its start to its end, in
memory that it shares with the one that started it, where a thread waits for it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_SIZE = 256
"""Number of bytes that a mutex, and its attributes, have at most."""
_libc = ctypes.CDLL(None)
_held: list[Lifeline] = []  # by this process, which must keep their memory


def can_be_had() -> bool:
    """Return whether the system has what is needed."""
    return hasattr(os, "memfd_create") and hasattr(_libc, "pthread_mutexattr_setrobust")


class Lifeline:
    """Holds a mutex in the memory behind `fd`, which is made if it is left out, for one life of one process."""

    def __init__(self, fd: int | None = None) -> None:
        """Raises OSError if there is no memory or descriptor for it."""
        self.fd = os.memfd_create("splitfuse-lifeline") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._mutex = (ctypes.c_char * _SIZE).from_buffer(self._memory)
        if fd is None:
            kind = ctypes.create_string_buffer(_SIZE)
            _check(_libc.pthread_mutexattr_init(kind))
            _check(_libc.pthread_mutexattr_setpshared(kind, _SHARED))
            _check(_libc.pthread_mutexattr_setrobust(kind, _ROBUST))
            _check(_libc.pthread_mutex_init(self._mutex, kind))

    def hold(self) -> None:
        """Let this thread hold it as long as it lives, which is to be as long as the process does."""
        _check(_libc.pthread_mutex_lock(self._mutex))
        _held.append(self)

    def follow(self, on_end: Callable[[], object]) -> None:
        """Call `on_end` in a thread once the process that holds it has ended."""

        def wait() -> None:
            code = _libc.pthread_mutex_lock(self._mutex)
            _libc.pthread_mutex_unlock(self._mutex)
            if code == errno.EOWNERDEAD:
                on_end()

        threading.Thread(target=wait, name="lifeline", daemon=True).start()

    def close(self) -> None:
        """Close the descriptor, which the process has inherited: the memory stays."""
        os.close(self.fd)


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
