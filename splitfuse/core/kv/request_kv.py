"""Holds the KV cache state of one request: its blocks, the positions computed in them, and its recurrent state."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from splitfuse.core.compiling import mypyc_attr
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Arrived, Fetch
from splitfuse.core.kv.loans import KvLoan
from splitfuse.core.kv.request_state import RequestState
from splitfuse.core.plan import ChunkLoan, Land, Save, StateSlots

logger = logging.getLogger(__name__)


@mypyc_attr(allow_interpreted_subclasses=True)
@dataclass(slots=True)
class RequestKv:
    """Holds the block table of one request. Every block in `blocks` is a reference held at the allocator; they begin
    behind what a creditor holds.
    """

    blocks: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)
    """Names of its leading blocks, held or not, as far as they are known."""
    num_cached_blocks: int = 0
    """Leading blocks which the prefix cache knows."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    num_computed: int = 0
    """Leading positions whose keys and values are written: in steps that are back, or found in the prefix cache."""
    num_lost: int = 0
    """Leading positions which had been computed when the request was preempted, or lost or left its engine, and must be
    recomputed.
    """
    num_preemptions: int = 0
    num_saved_blocks: int = 0
    """Leading blocks that were saved since it is to go on at another engine."""
    preempt_on_return: bool = False
    """True if its blocks, and its state, are to be taken when its last plan in flight is back."""
    state: RequestState | None = None
    """Its recurrent state while it runs, in a network that has them."""
    fetch: Fetch | None = None
    """Blocks that it waits for."""
    arrived: tuple[Arrived, ...] = ()
    """Blocks that have arrived for it, in their order, which no plan has taken in."""
    landing: tuple[Land, ...] = ()
    """Those of them that have blocks, the last ones of `blocks`; its next chunk brings them there."""
    loan: KvLoan | None = None
    """Leading blocks that another engine holds, or will hold: such a request shares none with others."""
    repeatable: bool = False
    """True if its chunks are to be such that each can be computed again: see RequestState."""

    @property
    def state_slots(self) -> StateSlots | None:
        """Return the state slots of its next chunk; None in a network without recurrent states."""
        return None if self.state is None else self.state.slots

    @property
    def num_lent(self) -> int:
        """Return the number of leading blocks that a creditor holds."""
        return 0 if self.loan is None else self.loan.num_held

    @property
    def num_blocks(self) -> int:
        """Return the number of its blocks, held here or by a creditor."""
        return self.num_lent + len(self.blocks)

    def start(self, allocator: BlockAllocator, num_tokens: int) -> None:
        """Begin to run with `num_tokens` known tokens."""
        if allocator.states is not None:
            size = allocator.block_size
            last_kept = (num_tokens - 1) // size * size  # a token is left, as `match` leaves one
            self.state = RequestState(allocator.states, size, last_kept, repeatable=self.repeatable)

    def reuse_prefix(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Take the cached blocks which hold the longest known prefix of `token_ids`, with states the longest that ends
        in a snapshot.
        """
        self.blocks = allocator.match(token_ids, self.block_names, salt=salt)
        if self.state is not None:
            self.state.shared_until = len(self.blocks) * allocator.block_size
        self._begin_with_blocks(allocator)

    def land(self, allocator: BlockAllocator, *, spare: int) -> int:
        """Go on with blocks that have arrived, where they continue those of the cache, and leave `spare` blocks.
        Returns how many tokens they hold, which count as computed once the next chunk, that brings them there, is back.
        """
        first = len(self.blocks)
        usable = [each for each in self.arrived if each.place >= first]
        count = min(len(usable), allocator.num_available - spare)
        if count <= 0 or usable[0].place > first:  # the cache has forgotten what they continue
            return 0
        blocks = allocator.allocate(count)
        self.landing = tuple(each.into(block) for each, block in zip(usable, blocks, strict=False))
        self.blocks += blocks
        return sum(each.num_tokens for each in usable[:count])

    def drop_last_block(self, allocator: BlockAllocator) -> None:
        """Give the last block back, whose tokens are then computed again; with states, all after the next snapshot."""
        assert not self.landing, "blocks that land leave room"
        allocator.release([self.blocks.pop()])
        self._begin_with_blocks(allocator)

    def _begin_with_blocks(self, allocator: BlockAllocator) -> None:
        if self.state is not None:
            count = self.state.load(self.block_names[: len(self.blocks)])
            allocator.release(self.blocks[count:])
            del self.blocks[count:]
        self.num_cached_blocks = len(self.blocks)
        self.num_computed = len(self.blocks) * allocator.block_size

    def grow(self, allocator: BlockAllocator, start: int, end: int) -> None:
        """Allocate what a chunk from position `start` to `end` needs: blocks, and slots for the state."""
        if num_missing := allocator.blocks_for(end) - self.num_blocks:
            self.blocks += allocator.allocate(num_missing)
        if self.state is not None:
            self.state.reserve(start, end)

    def truncate(self, allocator: BlockAllocator, num_computed: int) -> None:
        """Keep the first `num_computed` positions, and give back the blocks that hold none of them."""
        self.num_computed = num_computed
        kept = allocator.blocks_for(num_computed) - self.num_lent
        allocator.release(self.blocks[kept:])
        del self.blocks[kept:]

    def publish(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Make the full blocks of `token_ids`, which have been computed, known to the prefix cache."""
        assert self.loan is None, "its blocks are not where their names say"
        self.num_cached_blocks = allocator.publish(
            self.blocks, token_ids, self.block_names, first=self.num_cached_blocks, salt=salt
        )

    def settle_deposits(self, allocator: BlockAllocator, loan: ChunkLoan) -> None:
        """Give back the blocks that the creditor has now, after the deposits of a chunk."""
        assert self.loan is not None
        held = loan.num_tokens // allocator.block_size
        count = held - self.loan.num_held
        allocator.release(self.blocks[:count])
        del self.blocks[:count]
        self.loan.num_held = held

    def save(
        self, allocator: BlockAllocator, token_ids: Sequence[int], *, part: bool = False, salt: str
    ) -> tuple[Save, ...]:
        """Return the saves of the blocks which hold `token_ids`, which have been computed, but of those that were saved
        before: see BlockAllocator.saves_of. A recurrent state is not saved, nor are blocks without it, or behind those
        that a creditor holds.
        """
        if self.state is not None or self.loan is not None:
            return ()
        first = self.num_saved_blocks
        self.num_saved_blocks = max(first, len(token_ids) // allocator.block_size)
        return allocator.saves_of(self.blocks, token_ids, self.block_names, first=first, part=part, salt=salt)

    def save_end(self, allocator: BlockAllocator, token_ids: Sequence[int], *, salt: str) -> None:
        """Have the last block of a request that ends saved, if it is not full: the next turn of a conversation begins
        in it. Those before it were saved when they were published. `token_ids` have been computed.
        """
        num_full = len(token_ids) // allocator.block_size
        if num_full and self.state is None and self.loan is None:
            allocator.save(
                allocator.saves_of(self.blocks, token_ids, self.block_names, first=num_full, part=True, salt=salt)
            )

    def release(self, allocator: BlockAllocator) -> None:
        """Give all blocks and state slots back. A fault there loses those that were not given back yet, no more."""
        blocks, state = self.blocks, self.state
        self.blocks, self.state = [], None
        self.num_cached_blocks = self.num_computed = 0
        if self.loan is not None:
            self.loan.num_sent = self.loan.num_held
        self.preempt_on_return = False
        self.landing = ()
        try:
            if state is not None:
                state.release()
            allocator.release(blocks)
        except Exception:
            logger.exception("some of the %d KV blocks of a request are lost until a restart", len(blocks))

    def note_preemption(self) -> None:
        """Record that the blocks are about to be taken."""
        self.num_preemptions += 1
        self.num_lost = max(self.num_lost, self.num_computed)


def check_held(allocator: BlockAllocator, requests: Collection[RequestKv], landing: Sequence[int] = ()) -> None:
    """Assert that these requests, and blocks that are `landing` for none, hold all blocks and state slots that are held
    at an allocator. For tests.
    """
    allocator.check([*(kv.blocks for kv in requests), landing])
    if allocator.states is not None:
        allocator.states.check(slot for kv in requests if kv.state is not None for slot in kv.state.held)
