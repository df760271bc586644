"""Lets a request begin with keys and values that another machine has computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.request_kv import RequestKv


@dataclass  # without slots of its own, which would hide those of a compiled RequestKv
class LandedKv(RequestKv):
    """Holds the KV of a request whose first `num_landed` positions have come from elsewhere: they wait outside the
    cache, and are in blocks as soon as the request runs.

    After a preemption they are computed, as any others: what came has been given away.
    """

    num_landed: int = 0

    def reuse_prefix(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Take the cached blocks, and as many others for what has landed behind them as can be had."""
        RequestKv.reuse_prefix(self, allocator, token_ids, salt=salt)
        missing = allocator.blocks_for(self.num_landed) - len(self.blocks)
        if missing > 0:
            self.blocks += allocator.allocate(min(missing, allocator.num_available))
            self.num_computed = min(self.num_landed, len(self.blocks) * allocator.block_size)

    def note_preemption(self) -> None:
        """Record that the blocks are about to be taken, and what has landed with them."""
        RequestKv.note_preemption(self)
        self.num_landed = 0
