"""Remembers which replica was sent which blocks, by their names: of one replica (PrefixMemory), and of many at once
(PrefixIndex).

A memory forgets in the order of an engine's prefix cache, of a prompt its end first. So a replica that has a block has
all those before it, and what it has of a prompt is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence


class PrefixMemory:
    """Remembers the names of the last `num_blocks` blocks of `block_size` tokens that one replica was sent."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._index: tuple[PrefixIndex, int] | None = None

    def cached_tokens(self, names: Sequence[bytes]) -> int:
        """Return how many leading tokens of a prompt whose blocks have these names were sent before."""
        return self.cached_blocks(names) * self.block_size

    def cached_blocks(self, names: Sequence[bytes]) -> int:
        """Return how many leading blocks were sent before, of a prompt whose blocks have these names."""
        return _num_leading(names, self._known)

    def add(self, names: Sequence[bytes]) -> None:
        """Remember a prompt whose blocks have these names; the blocks sent longest ago are forgotten first."""
        known, index = self._known, self._index
        for name in reversed(names):
            known[name] = None
            known.move_to_end(name)
            if index is not None:
                index[0].note(name, index[1])
        while len(known) > self._num_blocks:
            name, _ = known.popitem(last=False)
            if index is not None:
                index[0].forget(name, index[1])

    def join(self, index: PrefixIndex, number: int) -> None:
        """Report to an index what is known, and what will be, under the number of this replica."""
        self._index = index, number
        for name in self._known:
            index.note(name, number)

    def leave(self) -> None:
        """Remove what is known from the index."""
        if self._index is not None:
            index, number = self._index
            for name in self._known:
                index.forget(name, number)
            self._index = None


class PrefixIndex:
    """Finds the replicas that have the beginning of a prompt, however many have not. Replicas have numbers."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int | dict[int, None]] = {}  # a number alone is its only holder

    def note(self, name: bytes, number: int) -> None:
        """Take note that a replica was sent a block now."""
        holders = self._holders.get(name)
        if holders is None:
            self._holders[name] = number
        elif isinstance(holders, dict):
            holders.pop(number, None)
            holders[number] = None
        elif holders != number:
            self._holders[name] = {holders: None, number: None}

    def forget(self, name: bytes, number: int) -> None:
        """Take note that a replica which had a block has it no longer."""
        holders = self._holders[name]
        if isinstance(holders, dict):
            del holders[number]
            if len(holders) == 1:
                (self._holders[name],) = holders
        else:
            assert holders == number
            del self._holders[name]

    def holders(self, names: Sequence[bytes]) -> Iterator[tuple[int, int]]:
        """Yield the replicas that have blocks of a prompt, and how many: the longest runs first, and of equal ones that
        of the replica to which it was sent longest ago, so that those which share a prompt take turns.
        """
        seen: set[int] = set()
        for count in range(_num_leading(names, self._holders), 0, -1):
            holders = self._holders[names[count - 1]]
            for number in holders if isinstance(holders, dict) else (holders,):
                if number not in seen:
                    seen.add(number)
                    yield number, count

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._holders)


def _num_leading(names: Sequence[bytes], known: Container[bytes]) -> int:
    """Return how many leading names are known: all before one that is."""
    if not names or names[0] not in known:
        return 0
    return bisect_left(range(len(names)), True, lo=1, key=lambda at: names[at] not in known)
