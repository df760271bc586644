"""Keeps both sides of loans in an engine: blocks that it holds for requests of others, and its own requests' channels.

A creditor holds blocks of its cache as long as the loan lives, and a thread for each loan, which attends to them for
the debtor beside the steps of the engine. It is asked by the front, and refuses where its own requests might need the
blocks: so what it has accepted finishes whatever it has lent. See core/kv/loans.py for the debtor's side of a step.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.loans import FEWEST_TILES
from splitfuse.engine.messages import Add, Loan
from splitfuse.kernels.loans import GRANTED, OPEN, REFUSED, TILE, Channel
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache

GRANT_SECONDS = 10.0
"""Longest time that a request waits for its creditor to say whether it lends, in seconds."""

logger = logging.getLogger(__name__)


def open_channel(loan: Loan) -> Channel:
    """Return the channel of a loan. Raises OSError or ValueError if there is none."""
    fd = os.open(loan.path, os.O_RDWR)
    try:
        return Channel(fd, loan.number)
    finally:
        os.close(fd)


def close_channel(channels: dict[int, Channel], number: int) -> None:
    """Close the channel of a loan and forget it, if it is among those."""
    if (channel := channels.pop(number, None)) is not None:
        channel.close()


@dataclass(frozen=True)
class _Lent:
    channel: Channel
    blocks: list[int]
    thread: threading.Thread


class Lender:
    """Holds what an engine has lent."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, allocator: BlockAllocator) -> None:
        self.on_ended: Callable[[int], object] = lambda _: None
        """Listener that is called with the number of a loan that has ended, by a thread: the engine is to call
        `take_back` with it.
        """
        self._decoder, self._kv_cache, self._allocator = decoder, kv_cache, allocator
        self._lent: dict[int, _Lent] = {}

    def lend(self, loan: Loan, *, needed: int) -> bool:
        """Lend blocks, unless fewer than `needed`, or than the smallest cache, would be left. Returns whether it did;
        the debtor is told so through the channel.
        """
        try:
            channel = open_channel(loan)
        except (OSError, ValueError):
            logger.exception("the channel of loan %d cannot be used", loan.number)
            return False
        for number, lent in list(self._lent.items()):
            if lent.channel.is_closed:  # its thread has not said so yet
                self.take_back(number)
        allocator = self._allocator
        left = max(needed, FEWEST_TILES * TILE // allocator.block_size)
        if loan.num_blocks > min(allocator.num_available, allocator.capacity - left):
            channel.state = REFUSED
            channel.close()
            return False
        blocks = allocator.lend(loan.num_blocks)
        thread = threading.Thread(
            target=self._serve, args=(loan.number, channel, blocks), name=f"loan-{loan.number}", daemon=True
        )
        self._lent[loan.number] = _Lent(channel, blocks, thread)
        channel.state = GRANTED
        thread.start()
        return True

    def _serve(self, number: int, channel: Channel, blocks: list[int]) -> None:
        try:
            self._decoder.lend(self._kv_cache, channel, blocks)
        except Exception:
            logger.exception("loan %d ends", number)
        channel.close()
        self.on_ended(number)

    def take_back(self, number: int) -> None:
        """Let the engine have the blocks of a loan that has ended, unless it has them."""
        if (lent := self._lent.pop(number, None)) is not None:
            lent.thread.join()
            self._allocator.take_back(lent.blocks)

    @property
    def held(self) -> list[list[int]]:
        """Return the blocks of each loan."""
        return [lent.blocks for lent in self._lent.values()]

    def close(self) -> None:
        """End all loans."""
        for lent in self._lent.values():
            lent.channel.close()
        for number in list(self._lent):
            self.take_back(number)


@dataclass(frozen=True)
class AwaitedLoan:
    """Holds a request whose creditor has not said yet whether it lends."""

    request: Add
    channel: Channel | None
    """None: it cannot be used."""
    until: float

    @classmethod
    def of(cls, request: Add) -> AwaitedLoan:
        """Return the wait of a request that has just come."""
        assert request.loan is not None
        try:
            channel = open_channel(request.loan)
        except (OSError, ValueError):
            logger.exception("the channel of loan %d cannot be used", request.loan.number)
            channel = None
        return cls(request, channel, time.monotonic() + GRANT_SECONDS)

    @property
    def is_granted(self) -> bool | None:
        """Return whether the creditor lends; None while that is not known."""
        if self.channel is None:
            return False
        state = self.channel.state
        if state == OPEN and not self.channel.is_closed and time.monotonic() < self.until:
            return None
        return state == GRANTED and not self.channel.is_closed
