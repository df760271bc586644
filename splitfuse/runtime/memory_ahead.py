"""Asks the system for the memory of a KV cache before its blocks are used.

A system gives memory when it is first written, a huge page at a time, and that takes milliseconds. Blocks are used in
their order, and the pages of all layers begin at about the same block: without this, one step in a hundred would wait
for as many pages as there are layers. docs/decisions/0057 has the figures.
"""

from __future__ import annotations

import time

from splitfuse.models.kv_cache import KVCache

AHEAD_BYTES = 2**24
"""Bytes of blocks, of all layers, whose memory is asked for beyond the last one in use."""
SHARE = 1 / 8
"""Fraction of the time of a step that this may take after it; one piece is always allowed."""


class MemoryAhead:
    """Asks for memory after each step. Belongs to the thread that executes steps."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._kv_cache = kv_cache
        self._ahead = max(AHEAD_BYTES // max(kv_cache.block_bytes, 1), 1)  # in blocks
        self._last_used = 0
        self._pieces = kv_cache.pieces()
        self._next = next(self._pieces, None)

    def follow(self, last_block: int, seconds: float) -> None:
        """Ask for more memory after a step of so many seconds, which used blocks up to this one; -1: none."""
        if self._next is None:
            return
        self._last_used = max(self._last_used, last_block)
        until = time.monotonic() + SHARE * seconds
        while self._next is not None and self._next.first <= self._last_used + self._ahead:
            is_given = self._kv_cache.have(self._next)
            self._next = next(self._pieces, None) if is_given else None
            if time.monotonic() >= until:
                return
