"""Asks the system for the memory of a KV cache before its blocks are used.

A system gives memory when it is first written, a huge page at a time, and that takes milliseconds. Blocks are used in
their order, and the pages of all layers begin at about the same block: without this, one step in a hundred would wait
for as many pages as there are layers. docs/decisions/0057 has the figures.
"""

from __future__ import annotations

import sys
import threading
import time

from splitfuse.models.kv_cache import KVCache

AHEAD_BYTES = 2**24
"""Bytes of blocks, of all layers, whose memory is asked for beyond the last one in use."""
SHARE = 1 / 8
"""Fraction of the time of steps that this may take between them, as long as half of these bytes are there; with less,
one piece after each step is allowed, too.
"""


class MemoryAhead:
    """Asks for memory after each step. Threads may share it."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._kv_cache = kv_cache
        self._ahead = max(AHEAD_BYTES // max(kv_cache.block_bytes, 1), 1)  # in blocks
        self._last_used = 0
        self._seconds = 0.0  # that steps have allowed, less those that were taken
        self._pieces = kv_cache.pieces()
        self._next = next(self._pieces, None)
        self._lock = threading.Lock()  # of the pieces

    def num_ready(self, *, reserve: bool = False) -> int:
        """Return how many blocks beyond the last one in use have memory; very many if none is left to be asked for.
        With `reserve`, half of what is asked for ahead does not count: it is for running requests.
        """
        if (piece := self._next) is None:
            return sys.maxsize
        num_blocks = piece.first - 1 - self._last_used
        if reserve:
            num_blocks -= self._reserved
        return max(num_blocks, 0)

    def use(self, last_block: int) -> None:
        """Note that blocks up to this one are used; -1: none."""
        self._last_used = max(self._last_used, last_block)

    def follow(self, seconds: float) -> None:
        """Ask for more memory after a step of so many seconds."""
        if self._next is None:
            return
        self._seconds = min(self._seconds, 0.0) + SHARE * seconds
        while self._lacks(self._ahead) and (self._seconds > 0.0 or self._lacks(self._reserved)):
            taken = self.have_next()
            self._seconds = max(self._seconds - taken, -taken)  # pieces that were needed at once are not owed
            if self._seconds <= 0.0:
                return

    def have_some(self) -> None:
        """Ask for a piece, while no request runs: twice as much as steps ask for, which then need not for a while."""
        if self._lacks(2 * self._ahead):
            self.have_next()

    def have_next(self) -> float:
        """Ask for a piece, and return how long that took."""
        began = time.monotonic()
        with self._lock:
            if self._next is not None:
                is_given = self._kv_cache.have(self._next)
                self._next = next(self._pieces, None) if is_given else None
        return time.monotonic() - began

    @property
    def _reserved(self) -> int:
        return self._ahead // 2

    def _lacks(self, num_blocks: int) -> bool:
        """Return whether the memory of some of so many blocks beyond the last one in use is to be asked for."""
        return self._next is not None and self._next.first <= self._last_used + num_blocks
