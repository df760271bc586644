"""Brings KV blocks into the prefix cache for requests that will come: a fetch without a request.

A request moves to another engine while its old one still computes it: what it has of blocks goes ahead, in portions
that the inbox has room for. They land with steps that are planned anyway, in blocks that no request needs, and are
cached like those of a request that has ended. So nothing waits for them, and they are the last to be forgotten; where
there is no room, or the answer does not come, they are computed by the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import LONGEST_FETCH, Fetch, Fetching, Frame
from splitfuse.core.plan import Land

PORTION = 1 / 4
"""Largest fraction of the inbox that blocks take which are fetched ahead: requests that wait have the rest."""


class _Block(NamedTuple):
    name: bytes
    token_ids: tuple[int, ...]
    number: int  # in the inbox


@dataclass(eq=False)
class _Prefetch:
    """Holds the blocks that are wanted for one request."""

    request_id: str
    names: tuple[bytes, ...]
    token_ids: tuple[tuple[int, ...], ...]
    sources: tuple[str, ...]
    num_present: int = -1  # leading blocks that the cache had when the last portion was asked for
    fetch: Fetch | None = None
    arrived: tuple[_Block, ...] = ()  # no plan has these
    num_landing: int = 0
    is_last: bool = False  # no portion follows


class Prefetching:
    """Decides what is fetched ahead, and into which blocks it lands. Belongs to the scheduler."""

    def __init__(self, allocator: BlockAllocator, fetching: Fetching) -> None:
        self.most_at_once = max(int(PORTION * fetching.inbox.capacity), 1)
        """Number of blocks that may be on their way, in all."""
        self._allocator, self._fetching = allocator, fetching
        self._wanted: dict[str, _Prefetch] = {}
        self._awaited: dict[int, _Prefetch] = {}  # by the number of the fetch
        self._landing: dict[int, tuple[int, _Block, _Prefetch]] = {}  # number in the inbox -> block, what lands there
        self._distrusted: set[int] = set()  # numbers of what perhaps does not land
        self._ended: list[tuple[str, int]] = []

    @property
    def is_busy(self) -> bool:
        """Return whether anything is awaited, or is to land."""
        return bool(self._wanted or self._landing)

    @property
    def blocks(self) -> list[int]:
        """Return the blocks into which something lands with the plans in flight."""
        return [block for block, _, _ in self._landing.values()]

    def add(
        self,
        request_id: str,
        names: Sequence[bytes],
        token_ids: Sequence[tuple[int, ...]],
        sources: tuple[str, ...] = (),
    ) -> None:
        """Want blocks, all full, of which each continues the one before, for a request; what was wanted for it before
        is not any more.
        """
        self.drop(request_id)
        self._wanted[request_id] = _Prefetch(request_id, tuple(names), tuple(token_ids), sources)

    def drop(self, request_id: str) -> None:
        """Want nothing more for a request."""
        if (each := self._wanted.get(request_id)) is not None:
            self._end(each)

    def take_fetches(self) -> list[Fetch]:
        """Return what is to be asked for now, of the first ones first. Each is to be answered by `arrived`, within its
        seconds.
        """
        fetches: list[Fetch] = []
        wanted = list(self._wanted.values())
        most = min(self.most_at_once, max(int(PORTION * self._fetching.inbox.capacity), 1))
        most -= sum(len(each.arrived) + len(each.fetch.names if each.fetch else ()) for each in wanted)
        for each in wanted:
            if each.fetch is None and not each.arrived and not each.num_landing:
                fetch = self._ask(each, min(most, self._fetching.inbox.num_free))
                if fetch is not None:
                    fetches.append(fetch)
                    most -= len(fetch.names)
        return fetches

    def arrived(self, number: int, frames: Iterable[Frame]) -> bool:
        """Take in the answer to a fetch: the leading blocks that were found. Returns False if it is not awaited."""
        each = self._awaited.pop(number, None)
        if each is None:
            return False
        assert each.fetch is not None
        fetch, each.fetch = each.fetch, None
        numbers = self._fetching.inbox.put(fetch.matching(frames), reserved=len(fetch.names))
        each.arrived = tuple(map(_Block, fetch.names, fetch.token_ids, numbers))
        each.is_last = len(numbers) < len(fetch.names)
        if not numbers:
            self._end(each)
        return True

    def take_lands(self, most: int) -> tuple[Land, ...]:
        """Return the copies into at most `most` blocks, which are held until `landed`. What has no room is dropped."""
        lands: list[Land] = []
        for each in list(self._wanted.values()):
            if not each.arrived:
                continue
            count = max(min(len(each.arrived), most - len(lands)), 0)
            taken, left, each.arrived = each.arrived[:count], each.arrived[count:], ()
            if left:
                self._fetching.inbox.discard(block.number for block in left)
                each.is_last = True
            for number, block in zip(self._allocator.allocate(count), taken, strict=True):
                lands.append(Land(block.number, number))
                self._landing[block.number] = number, block, each
            each.num_landing = count
            if not count:
                self._end(each)
        return tuple(lands)

    def distrust(self, lands: Sequence[Land]) -> None:
        """Note that a plan with these was perhaps not executed."""
        self._distrusted.update(land.number for land in lands)

    def landed(self, lands: Sequence[Land], *, is_there: bool) -> None:
        """Let the cache have what has landed, unless it is not certain that it is there."""
        for land in reversed(lands):  # the first of them are the last to be forgotten
            block, content, each = self._landing.pop(land.number)
            self._fetching.inbox.discard((land.number,))
            is_usable = is_there and land.number not in self._distrusted
            self._distrusted.discard(land.number)
            if is_usable:
                self._allocator.adopt(block, content.name, content.token_ids)
            self._allocator.release((block,))
            each.num_landing -= 1
            each.is_last |= not is_usable
            if not each.num_landing and each.is_last:
                self._end(each)

    def take_ended(self) -> list[tuple[str, int]]:
        """Return the requests for which all has been done since the last call, and how many leading blocks of what was
        wanted the cache has.
        """
        ended, self._ended = self._ended, []
        return ended

    def _ask(self, each: _Prefetch, most: int) -> Fetch | None:
        """Return what is to be asked for next, at most so many blocks; None if there is nothing now, or never more."""
        first = self._allocator.count_known(each.names, each.token_ids)
        if first == len(each.names) or first <= each.num_present:  # all is there, or is forgotten as it comes
            self._end(each)
            return None
        if most <= 0:
            return None
        names = each.names[first : first + most]
        num_found = self._fetching.source.find(names, each.sources).num_blocks
        if num_found <= 0:
            self._end(each)
            return None
        each.num_present = first
        tokens = each.token_ids[first : first + num_found]
        each.fetch = self._fetching.reserve(
            each.request_id, first, names[:num_found], tokens, LONGEST_FETCH, each.sources
        )
        self._awaited[each.fetch.number] = each
        return each.fetch

    def _end(self, each: _Prefetch) -> None:
        """Want no more of it, and say so. What lands already does."""
        if self._wanted.get(each.request_id) is not each:
            return
        del self._wanted[each.request_id]
        if each.fetch is not None:
            del self._awaited[each.fetch.number]
            self._fetching.source.forget(each.fetch.number)
            self._fetching.inbox.num_free += len(each.fetch.names)
            each.fetch = None
        self._fetching.inbox.discard(block.number for block in each.arrived)
        each.arrived = ()
        self._ended.append((each.request_id, self._allocator.count_known(each.names, each.token_ids)))
