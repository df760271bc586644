"""Advises which engine lends to which, for requests that the cache of none can hold alone.

The front keeps this book. It looks for the two engines with most room: the debtor computes the request and keeps its
newest tokens, the creditor holds the leading ones. Each is told, and the creditor may refuse. They talk through the
memory of a channel, which the front has made; when either is gone, it ends the loan for the other.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from itertools import count

from splitfuse.core.kv.loans import FEWEST_TILES, num_lent_blocks
from splitfuse.core.limits import EngineLimits, blocks_needed
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.messages import Add, EngineInfo, Lend, Loan
from splitfuse.errors import EngineUnavailableError
from splitfuse.kernels.loans import TILE, close_channel, make_channel


@dataclass(frozen=True)
class PlannedLoan:
    """Holds a loan that `LoanBook.begin` can begin. Its channel is closed with it."""

    loan: Loan
    debtor: LocalClient
    creditor: LocalClient
    file: FileIO


class LoanBook:
    """Knows the loans between `engines`. Belongs to the event loop's thread."""

    def __init__(self, engines: Sequence[LocalClient]) -> None:
        self._engines = engines
        self._numbers = count(1)
        self._loans: dict[tuple[LocalClient, str], PlannedLoan] = {}
        for engine in engines:
            engine.on_ended = self.end
            engine.on_death = self.end_lent

    def __len__(self) -> int:
        return len(self._loans)

    def limits(self, info: EngineInfo) -> EngineLimits:
        """Return the limits of a request that may have a loan, of engines of which this is one: those of the two whose
        caches hold most together, dead or not.
        """
        infos = [known for engine in self._engines if (known := engine.known_info) is not None]
        sizes = sorted((each.limits.num_blocks for each in infos if each.channel_bytes), reverse=True)[:2]
        if len(sizes) < 2:
            return info.limits
        most = sizes[1] + _most_lent(sizes[0], info.limits.block_size)
        return replace(info.limits, lent_blocks=max(most - info.limits.num_blocks, 0))

    def plan(self, request: Add, debtors: Collection[LocalClient]) -> PlannedLoan | None:
        """Return the loan with which one of some engines can hold a request; None if there is no room for one now.

        Raises EngineUnavailableError if its channel cannot be made.
        """
        best: tuple[int, LocalClient, LocalClient, int] | None = None
        for debtor in debtors:
            for creditor in self._engines:
                if debtor is creditor or not _can_lend(debtor, creditor):
                    continue
                num_blocks = self._num_lent(request, debtor, creditor)
                room = min(self._room(debtor), self._room(creditor) - num_blocks)
                if num_blocks and (best is None or room > best[0]):
                    best = room, debtor, creditor, num_blocks
        if best is None:
            return None
        _, debtor, creditor, num_blocks = best
        number = next(self._numbers)
        try:
            file = FileIO(make_channel(number, debtor.info.channel_bytes), "r+")
        except OSError as error:
            raise EngineUnavailableError(f"no memory for a loan: {error.strerror}") from error
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        return PlannedLoan(Loan(number, path, num_blocks), debtor, creditor, file)

    def begin(self, request_id: str, planned: PlannedLoan) -> None:
        """Ask the creditor for a loan, whose debtor has been sent the request."""
        self._loans[planned.debtor, request_id] = planned
        planned.creditor.send(Lend(planned.loan))

    def end(self, debtor: LocalClient, request_id: str) -> None:
        """End the loan of a request that has left its engine, if it has one."""
        if (planned := self._loans.pop((debtor, request_id), None)) is not None:
            close_channel(planned.file.fileno())
            planned.file.close()

    def end_lent(self, creditor: LocalClient) -> None:
        """End what an engine has lent: it is gone, or will be."""
        for planned in self._loans.values():
            if planned.creditor is creditor:
                close_channel(planned.file.fileno())

    def _num_lent(self, request: Add, debtor: LocalClient, creditor: LocalClient) -> int:
        """Return how many blocks one engine lends to another for a request, by the room that both have; 0 if there is
        too little.
        """
        limits, lender = debtor.info.limits, creditor.info.limits
        num_prompt, size = len(request.prompt_token_ids), limits.block_size
        need = blocks_needed(num_prompt, limits.max_new_tokens(num_prompt, request.params), size)
        least = num_lent_blocks(need, limits.num_blocks, size)
        tile = TILE // size
        room, own = self._room(creditor), self._room(debtor)
        free = lender.num_blocks - self._promised(creditor) - max(self._needed(creditor), FEWEST_TILES * tile)
        most = min(room // tile * tile, free // tile * tile, need // tile * tile)
        fair = -(-need * room // max(room + own, 1) // tile) * tile
        return min(max(least, fair), most) if 0 < least <= most else 0

    def _room(self, engine: LocalClient) -> int:
        """Return how many blocks an engine has for others, as far as the front knows."""
        stats, total = engine.stats[0], engine.info.limits.num_blocks
        return min(stats.num_available_blocks if stats.num_steps else total, total - self._promised(engine))

    def _needed(self, engine: LocalClient) -> int:
        """Return how many blocks the largest request of an engine may need of its own."""
        limits, needed = engine.info.limits, 0
        for request in engine.open_requests:
            num_prompt, planned = len(request.prompt_token_ids), self._loans.get((engine, request.request_id))
            need = blocks_needed(num_prompt, limits.max_new_tokens(num_prompt, request.params), limits.block_size)
            needed = max(needed, need - (0 if planned is None else planned.loan.num_blocks))
        return needed

    def _promised(self, creditor: LocalClient) -> int:
        """Return how many blocks an engine lends, or has been asked for."""
        return sum(each.loan.num_blocks for each in self._loans.values() if each.creditor is creditor)


def _most_lent(num_blocks: int, block_size: int) -> int:
    """Return the most blocks that an engine with that many lends: whole tiles, and it keeps the smallest cache."""
    tile = TILE // block_size
    return max(num_blocks // tile - FEWEST_TILES, 0) * tile


def _can_lend(debtor: LocalClient, creditor: LocalClient) -> bool:
    """Return whether an engine is ready to lend to another, and has the same model."""
    if any(each.state is not EngineState.READY or each.is_drained or each.silent for each in (debtor, creditor)):
        return False
    same = debtor.info.kv_fingerprint == creditor.info.kv_fingerprint
    return same and 0 < debtor.info.channel_bytes == creditor.info.channel_bytes
