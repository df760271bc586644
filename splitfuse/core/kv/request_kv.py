"""Holds the KV cache state of one request: its blocks, and the positions computed in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitfuse.core.kv.block_allocator import BlockAllocator


@dataclass(slots=True)
class RequestKv:
    """Holds the block table of one request. Every block in `blocks` is a reference held at the allocator."""

    blocks: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)
    """Names of its leading blocks, held or not, as far as they are known."""
    num_cached_blocks: int = 0
    """Leading blocks which the prefix cache knows."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    num_computed: int = 0
    """Leading positions whose keys and values are written."""
    num_lost: int = 0
    """Leading positions which had been computed when the request was preempted, and must be recomputed."""
    num_preemptions: int = 0
    preempt_on_return: bool = False
    """True if its blocks are to be taken when its last plan in flight is back."""

    def reuse_prefix(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Take the cached blocks which hold the longest known prefix of `token_ids`."""
        self.blocks = allocator.match(token_ids, self.block_names, salt=salt)
        self.num_cached_blocks = len(self.blocks)
        self.num_computed = len(self.blocks) * allocator.block_size

    def drop_last_block(self, allocator: BlockAllocator) -> None:
        """Give the last block back, whose tokens are then computed again."""
        allocator.release([self.blocks.pop()])
        self.num_cached_blocks = len(self.blocks)
        self.num_computed = len(self.blocks) * allocator.block_size

    def grow(self, allocator: BlockAllocator, num_tokens: int) -> None:
        """Allocate blocks until `num_tokens` positions are covered."""
        self.blocks += allocator.allocate(allocator.blocks_for(num_tokens) - len(self.blocks))

    def publish(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Make the full blocks of `token_ids`, which have been computed, known to the prefix cache."""
        self.num_cached_blocks = allocator.publish(
            self.blocks, token_ids, self.block_names, first=self.num_cached_blocks, salt=salt
        )

    def release(self, allocator: BlockAllocator) -> None:
        """Give all blocks back."""
        allocator.release(self.blocks)
        self.blocks = []
        self.num_cached_blocks = self.num_computed = 0
        self.preempt_on_return = False

    def note_preemption(self) -> None:
        """Record that the blocks are about to be taken."""
        self.num_preemptions += 1
        self.num_lost = max(self.num_lost, self.num_computed)
