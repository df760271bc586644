"""Memory for what is kept: weights, keys and values, of one process or shared by several.

In huge pages where the system has them.

A page of 2 MiB instead of 512 of 4 KiB spares the processor most of its address translations. Memory costs nothing
until it is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

import torch
from torch import Tensor

HUGE_PAGE = 2**21


def allocate(num_bytes: int) -> Tensor:
    """Bytes [num_bytes], zero, that begin on a huge page. Raises RuntimeError, as torch does, if there are none."""
    try:
        mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"no memory for {num_bytes} bytes: {error}") from error
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    in_whole_pages = num_bytes // HUGE_PAGE * HUGE_PAGE  # a huge page behind the end would be filled for nothing
    if in_whole_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages: slower, not wrong
            mapping.madvise(mmap.MADV_HUGEPAGE, begin, in_whole_pages)
    return whole[begin : begin + num_bytes]


class OwnWeights:
    """Weights of this process alone, side by side: the many small ones of experts share huge pages."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Bytes [num_bytes], zero, that begin on a cache line. Raises RuntimeError as `allocate` does."""
        if num_bytes > len(self._room):
            self._room = allocate(max(num_bytes, AT_ONCE))  # what was left of the last costs nothing
        taken, self._room = self._room[:num_bytes], self._room[-(-num_bytes // CACHE_LINE) * CACHE_LINE :]
        return taken


class SharedWeights:
    """Weights that several processes map and one has packed: a file in memory, which is gone with the last of them.

    `fd` is its descriptor, inherited; `filled` says that another process has packed them all, in the order in which
    they are asked for here. They are mapped for reading only then, and stay mapped while the process lives.
    `num_sharers` processes divide what memory there is besides.
    """

    def __init__(self, fd: int, *, filled: bool, num_sharers: int = 1) -> None:
        self.filled = filled
        self.num_sharers = num_sharers
        self._fd = fd
        self._address = self._taken = self._size = 0

    def begin(self, num_bytes: int) -> None:
        """Make room for `num_bytes`; what is not used costs nothing. Raises RuntimeError if that cannot be."""
        self._size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        if not self.filled:
            os.ftruncate(self._fd, 0)  # what somebody left who did not come to the end
            os.ftruncate(self._fd, self._size)
        # A huge page wants an address that ends like the place in the file: room first, then the file into it.
        room = _map(None, self._size + HUGE_PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        begin = -(-room // HUGE_PAGE) * HUGE_PAGE
        access = mmap.PROT_READ if self.filled else mmap.PROT_READ | mmap.PROT_WRITE
        self._address, self._taken = _map(begin, self._size, access, mmap.MAP_SHARED | _MAP_FIXED, self._fd), 0

    def take(self, num_bytes: int) -> Tensor:
        """The next bytes [num_bytes]: zero, or what the other process packed."""
        begin, self._taken = self._taken, self._taken + -(-num_bytes // CACHE_LINE) * CACHE_LINE
        assert self._taken <= self._size, "more weights than were planned"
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(self._address + begin), dtype=torch.uint8)

    def finish(self) -> None:
        """All are packed: gather them in huge pages, which files in memory are not given by themselves."""
        whole = self._taken // HUGE_PAGE * HUGE_PAGE
        if whole and not self.filled:
            # If it is refused they stay in small pages: slower, not wrong.
            _libc.madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(whole), _MADV_COLLAPSE)


CACHE_LINE = 64
AT_ONCE = 2**28
_PROT_NONE, _MAP_FIXED, _MADV_COLLAPSE = 0, 0x10, 25  # of Linux
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def _map(address: int | None, num_bytes: int, access: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, num_bytes, access, flags, fd, 0)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        raise RuntimeError(f"no memory for {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    return int(mapped)
