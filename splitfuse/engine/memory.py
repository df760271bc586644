"""Returns freed memory to the system, of which the GNU C library keeps much: of large texts, of weights unpacked."""

from __future__ import annotations

import ctypes
import functools
from contextlib import suppress

_MMAP_THRESHOLD = -3  # of mallopt
_LARGE_BLOCK = 2**20


def return_large_blocks() -> None:
    """Let this process return each block of a MiB as it is freed; by default the C library learns to keep them."""
    with suppress(OSError, AttributeError):
        _c_library().mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def give_back_memory() -> None:
    """Return what was freed in smaller blocks."""
    with suppress(OSError, AttributeError):
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
