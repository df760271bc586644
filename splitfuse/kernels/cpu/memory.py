"""Memory for what is kept: weights, keys and values. In huge pages where the system has them.

A page of 2 MiB instead of 512 of 4 KiB spares the processor most of its address translations. Memory costs nothing
until it is written.
"""

from __future__ import annotations

import contextlib
import mmap

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
