"""Describes loans: leading KV blocks of a request that another engine, its creditor, holds.

A request whose tokens exceed the cache of its engine keeps the newest of them there. As soon as leading blocks are
computed they are deposited with the creditor, in whole tiles of TILE tokens, and given back here; steps attend to them
over the loan (csrc/loans.h), with the bits of a cache that has them all. Which blocks the creditor gets is settled when
the request is added: those that the cache here could not hold at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfuse.core.plan import ChunkLoan, Deposit

TILE = 512
"""Number of tokens that attention takes together: it is that of kernels/loans.py."""
FEWEST_TILES = 2
"""Number of tiles that a cache needs for a request with a loan: one that is computed, and one that is deposited."""


@dataclass(slots=True)
class KvLoan:
    """Says how far the loan of a request is, in blocks of `block_size` tokens."""

    number: int
    num_blocks: int
    """Leading blocks which the creditor has room for: those of whole tiles."""
    block_size: int
    tile: int = TILE
    """Number of tokens that are deposited together."""
    num_sent: int = 0
    """Leading blocks that it holds once the plans in flight are back."""
    num_held: int = 0
    """Leading blocks that it holds."""

    @property
    def is_open(self) -> bool:
        """Return whether further blocks are to be deposited."""
        return self.num_held < self.num_blocks

    def due(self, num_scheduled: int) -> int:
        """Return how many leading blocks the creditor is to hold in a chunk that begins at position `num_scheduled`."""
        return min(num_scheduled // self.tile * (self.tile // self.block_size), self.num_blocks)

    def next_chunk(self, num_scheduled: int, blocks: list[int]) -> ChunkLoan | None:
        """Return the loan of a chunk that begins there, whose request has `blocks`; None while nothing is lent."""
        due = self.due(num_scheduled)
        if not due:
            return None
        deposits = tuple(Deposit(place, blocks[place - self.num_held]) for place in range(self.num_sent, due))
        return ChunkLoan(self.number, due * self.block_size, deposits)


def num_lent_blocks(need: int, num_blocks: int, block_size: int) -> int:
    """Return the fewest leading blocks, of whole tiles, that a creditor must hold of a request of `need` blocks, for a
    cache of `num_blocks`.

    >>> num_lent_blocks(100, 64, 32), num_lent_blocks(64, 64, 32)
    (48, 0)
    """
    tile = TILE // block_size
    return -(-max(need - num_blocks, 0) // tile) * tile
