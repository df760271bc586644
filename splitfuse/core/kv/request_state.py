"""Holds the recurrent state of one running request: the slots that its chunks read and write, and where it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.plan import ZERO_STATE, Chunk, StateSlots


@dataclass(slots=True)
class RequestState:
    """Holds the state slots of a request while it runs.

    A chunk reads the state that the one before has left, and overwrites it. If that is a snapshot, it writes to another
    slot instead: so a snapshot is taken, and loaded, without a copy. Where the state is to be kept, the scheduler ends
    a chunk: at the end of the prompt, rounded down to a block; every `interval` tokens before; where the blocks of an
    earlier request end that it has in common; and at each block of the answer, whose end is not known beforehand.
    There a snapshot takes the place of the one before.
    """

    allocator: StateAllocator
    block_size: int
    last_kept: int
    """Last position to keep of the tokens known at the start."""
    repeatable: bool = False
    """True if no chunk overwrites the state that it reads, so that each can be computed again."""
    shared_until: int = 0
    """End of the cached blocks that it begins with."""
    newest: int = ZERO_STATE
    """Slot of the state after all chunks scheduled."""
    is_lost: bool = False
    """True if a failed step has left `newest` half written."""
    _next: int | None = None  # slot that the next chunk writes, once one is granted
    _read: list[int] = field(default_factory=list)  # slots that chunks in flight read and do not overwrite
    _to_keep: dict[int, int] = field(default_factory=dict)  # position -> slot, of chunks in flight
    _newest_of_answer: bytes | None = None  # name of the snapshot that the next one of the answer takes the place of

    @property
    def held(self) -> list[int]:
        """Return the slots that it holds a reference of."""
        own = {self.newest, self.newest if self._next is None else self._next} - {ZERO_STATE}
        return [*own, *self._read]

    def load(self, names: Sequence[bytes]) -> int:
        """Begin with the longest prefix of the blocks of these names that has a snapshot. Returns how many it has."""
        self.release()
        count, self.newest = self.allocator.match(names)
        return count

    def next_kept(self, position: int) -> int | None:
        """Return the first position after `position` at which the state is kept: a chunk ends there, or before."""
        if (interval := self.allocator.interval) is None:
            return None
        step = interval if position < self.last_kept else self.block_size
        places = (self.shared_until, self.last_kept, (position // step + 1) * step)
        return min(place for place in places if place > position)

    def reserve(self) -> None:
        """Choose the slot for the next chunk to write."""
        if self._next is not None:
            return
        in_place = (
            self.newest != ZERO_STATE
            and not self.repeatable
            and self.newest not in self._to_keep.values()
            and self.allocator.is_overwritable(self.newest)
        )
        self._next = self.newest if in_place else self.allocator.allocate()

    @property
    def slots(self) -> StateSlots:
        """Return the slots of the next chunk."""
        assert self._next is not None, "a chunk without a slot for its state"
        return StateSlots(self.newest, self._next)

    def cancel(self) -> None:
        """Give back the slot for the next chunk, which is not computed after all."""
        if self._next not in (None, self.newest):
            self.allocator.release(self._next)
        self._next = None

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk is in flight. It holds the slot that it reads until it is back."""
        assert chunk.state == self.slots
        read, write = self.slots
        if read not in (ZERO_STATE, write):
            self._read.append(read)
        self.newest, self._next = write, None
        if chunk.end == self.next_kept(chunk.start):
            self._to_keep[chunk.end] = write

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk is back."""
        assert chunk.state is not None
        read, write = chunk.state
        if read not in (ZERO_STATE, write):
            self._read.remove(read)
            self.allocator.release(read)

    def publish(self, position: int, names: Sequence[bytes]) -> None:
        """Make the state at `position`, which is computed, a snapshot if it is to be kept. `names` are those of the
        blocks up to there.
        """
        slot = self._to_keep.pop(position, None)
        if slot is None or not self.allocator.publish(slot, name := names[position // self.block_size - 1]):
            return
        if self._newest_of_answer is not None:
            self.allocator.forget(self._newest_of_answer)
        assert self.allocator.interval is not None
        stays = position <= self.last_kept or position % self.allocator.interval == 0
        self._newest_of_answer = None if stays else name

    def release(self) -> None:
        """Give all slots back. What follows is `load`, or nothing."""
        for slot in self.held:
            self.allocator.release(slot)
