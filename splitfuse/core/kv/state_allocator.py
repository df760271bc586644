"""Owns the slots of recurrent states: which requests hold them, and which snapshots are kept for prefix reuse.

A layer with a recurrence has one state per request, of a fixed size: what all tokens so far have left, which cannot be
cut into blocks. A slot holds the states of all such layers at one position of one request. Like a block, a slot is
*held*, *cached* (a snapshot that no request holds; the least recently used goes first) or *free*.

A snapshot is a slot that is not overwritten any more, named like the block which ends at its position (names.py). The
allocator knows ids and names. It does not know how large a state is, nor where it lies in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, KeysView, Sequence

from splitfuse.core.plan import ZERO_STATE


class StateAllocator:
    """Hands out `num_slots` slots. Not thread-safe.

    In a step a running request may read a snapshot and write another slot: two slots for each always suffice while
    only one step is in flight. With two steps, the slot that the first writes and the second reads would be a third.
    """

    def __init__(self, num_slots: int, *, interval: int | None, num_reserved: int = 0) -> None:
        """`interval` is how many tokens of a prompt lie between snapshots at most; None: no snapshots are taken.
        `num_reserved` slots must stay available when one is kept on the way through a chunk: those that running
        requests may need to write before it is back.
        """
        self.num_slots = num_slots
        self.interval = interval
        self._num_reserved = num_reserved
        self._references = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._names: dict[int, bytes] = {}  # slot of a snapshot -> its name
        self._index: dict[bytes, int] = {}  # name -> slot of the snapshot

    @property
    def num_available(self) -> int:
        """Return how many slots `allocate` can give: free ones, and those of cached snapshots."""
        return len(self._free) + len(self._cached)

    @property
    def has_spare(self) -> bool:
        """Return whether a slot is available beyond those reserved."""
        return self.num_available > self._num_reserved

    @property
    def num_held(self) -> int:
        """Return how many slots are held."""
        return self.num_slots - self.num_available

    @property
    def names(self) -> KeysView[bytes]:
        """Return the names of all snapshots, held or cached."""
        return self._index.keys()

    def allocate(self) -> int:
        """Return a slot with one reference and no known content: a free one, or that of the oldest cached snapshot."""
        assert self.num_available, f"all {self.num_slots} state slots are held"
        if not self._free:
            slot, _ = self._cached.popitem(last=False)
            del self._index[self._names.pop(slot)]
            self._free.append(slot)
        slot = self._free.pop()
        self._references[slot] = 1
        return slot

    def release(self, slot: int) -> None:
        """Give back one reference of a slot."""
        assert self._references[slot] > 0, f"state slot {slot} released too often"
        self._references[slot] -= 1
        if self._references[slot] == 0:
            if slot in self._names:
                self._cached[slot] = None
            else:
                self._free.append(slot)

    def is_overwritable(self, slot: int) -> bool:
        """Return whether the only holder of a slot may overwrite it: it is no snapshot."""
        return slot not in self._names and self._references[slot] == 1

    def match(self, names: Sequence[bytes]) -> tuple[int, int]:
        """Return how many leading blocks of these names end in a snapshot, as many as possible, and its slot, with one
        reference taken; 0 and ZERO_STATE if there is none.
        """
        for count in range(len(names), 0, -1):
            slot = self._index.get(names[count - 1])
            if slot is not None:
                self._cached.pop(slot, None)
                self._references[slot] += 1
                return count, slot
        return 0, ZERO_STATE

    def publish(self, slot: int, name: bytes) -> bool:
        """Make a held slot a snapshot. Returns False, and changes nothing, if there is one of that name."""
        if name in self._index:
            return False
        self._names[slot] = name
        self._index[name] = slot
        return True

    def forget(self, name: bytes) -> None:
        """Drop a snapshot, if there is one of that name. Requests that hold its slot keep it."""
        slot = self._index.pop(name, None)
        if slot is None:
            return
        del self._names[slot]
        if slot in self._cached:
            del self._cached[slot]
            self._free.append(slot)

    def check(self, held: Iterable[int]) -> None:
        """Assert that every slot is in exactly one state, and that `held` has each slot once for each reference."""
        references = [0] * self.num_slots
        for slot in held:
            references[slot] += 1
        assert references == self._references, f"references {self._references}, holders {references}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not free & cached, "a state slot twice among the free"
        assert {s for s in range(self.num_slots) if not references[s]} == free | cached, "a state slot is lost"
        assert cached <= self._names.keys() and not free & self._names.keys(), "a snapshot in the wrong state"
        assert self._index == {name: slot for slot, name in self._names.items()}, "index of snapshots is stale"
