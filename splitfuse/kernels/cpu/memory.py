"""Allocates memory for weights, keys and values, of one process or shared by several.

In huge pages where the system has them: a page of 2 MiB instead of 512 of 4 KiB spares the processor most of its
address translations. Memory costs nothing until it is written, or until `have` asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

import torch
from torch import Tensor

from splitfuse.kernels.sharing import WeightSharing

HUGE_PAGE = 2**21
CACHE_LINE = 64
OWN_CHUNK = 2**28
"""Bytes that OwnWeights allocates at once."""
_PROT_NONE, _MAP_FIXED, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 0, 0x10, 23, 25  # of Linux
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def allocate(num_bytes: int) -> Tensor:
    """Return bytes [num_bytes], zero, that begin on a huge page. Raises RuntimeError, as torch does, if there are none.

    >>> allocate(3)
    tensor([0, 0, 0], dtype=torch.uint8)
    """
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


def have(memory: Tensor) -> bool:
    """Ask for the pages of some memory that the system would give when they are first written. What they hold stays,
    and others may write to them meanwhile. Returns False if the system cannot do that.
    """
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    begin -= begin % mmap.PAGESIZE
    return not _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE)


class OwnWeights:
    """Allocates weights of this process alone, side by side: the many small ones of experts share huge pages."""

    filled = False

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return bytes [num_bytes], zero, that begin on a cache line. Raises RuntimeError as `allocate` does."""
        if num_bytes > len(self._free):
            self._free = allocate(max(num_bytes, OWN_CHUNK))  # what was left of the last costs nothing
        taken, self._free = self._free[:num_bytes], self._free[-(-num_bytes // CACHE_LINE) * CACHE_LINE :]
        return taken

    def finish(self) -> None:
        """Do nothing: these weights are complete as they are."""


class SharedWeights:
    """Maps weights of several processes, one of which packs them, in a memfd, freed when the last
    process unmaps it.

    The file has room for `num_bytes` of weights, each on a cache line of its own. Where `sharing.filled` says that
    another process has packed them, they are mapped for reading only. They stay mapped while the process lives. Raises
    RuntimeError if they cannot be mapped.
    """

    def __init__(self, sharing: WeightSharing, num_bytes: int) -> None:
        self.filled = sharing.filled
        self._taken = 0
        self._size = -(-(num_bytes + num_bytes // 8 + HUGE_PAGE) // HUGE_PAGE) * HUGE_PAGE  # unused bytes cost nothing
        if not self.filled:
            os.ftruncate(sharing.fd, 0)  # a process that failed while it loaded may have left some
            os.ftruncate(sharing.fd, self._size)
        # A huge page wants an address aligned like the offset in the file: reserve addresses, then map the file there.
        reserved = _map(None, self._size + HUGE_PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        begin = -(-reserved // HUGE_PAGE) * HUGE_PAGE
        access = mmap.PROT_READ if self.filled else mmap.PROT_READ | mmap.PROT_WRITE
        self._address = _map(begin, self._size, access, mmap.MAP_SHARED | _MAP_FIXED, sharing.fd)

    def take(self, num_bytes: int) -> Tensor:
        """Return the next bytes [num_bytes]: zero, or what the other process packed."""
        begin, self._taken = self._taken, self._taken + -(-num_bytes // CACHE_LINE) * CACHE_LINE
        assert self._taken <= self._size, "more weights than were planned"
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(self._address + begin), dtype=torch.uint8)

    def finish(self) -> None:
        """Gather the packed weights in huge pages, which the system does not give to files in memory by itself."""
        whole = self._taken // HUGE_PAGE * HUGE_PAGE
        if whole and not self.filled:
            # If it is refused they stay in small pages: slower, not wrong.
            _libc.madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(whole), _MADV_COLLAPSE)


def _map(address: int | None, num_bytes: int, access: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, num_bytes, access, flags, fd, 0)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        raise RuntimeError(f"no memory for {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    return int(mapped)
