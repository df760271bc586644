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
    slot instead: so a snapshot is loaded, and left, without a copy. On its way the state is kept at the end of the
    prompt, rounded down to a block; every `interval` tokens before; where the blocks of an earlier request end that it
    has in common; and at each block of the answer, whose end is not known beforehand. There a snapshot takes the place
    of the one before.
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
    _next: StateSlots | None = None  # slots of the next chunk, once one is granted
    _busy: list[int] = field(default_factory=list)  # slots that chunks in flight read or keep states in, but `newest`
    _unpublished: list[int] = field(default_factory=list)  # slots that chunks in flight write and leave
    _newest_of_answer: bytes | None = None  # name of the snapshot that the next one of the answer takes the place of

    @property
    def held(self) -> list[int]:
        """Return the slots that it holds a reference of."""
        reserved = [] if self._next is None else [slot for _, slot in self._next.kept]
        own = {self.newest, self.newest if self._next is None else self._next.write} - {ZERO_STATE}
        return [*own, *reserved, *self._busy]

    def load(self, names: Sequence[bytes]) -> int:
        """Begin with the longest prefix of the blocks of these names that has a snapshot. Returns how many it has."""
        self.release()
        count, self.newest = self.allocator.match(names)
        return count

    def is_kept(self, position: int) -> bool:
        """Return whether the state is kept at a position."""
        interval = self.allocator.interval
        if interval is None or position % self.block_size:
            return False
        return position in (self.shared_until, self.last_kept) or position > self.last_kept or position % interval == 0

    def reserve(self, start: int, end: int) -> None:
        """Choose the slots of the next chunk, from position `start` to `end`."""
        self.cancel()
        in_place = (
            self.newest != ZERO_STATE
            and not self.repeatable
            and self.newest not in self._unpublished
            and self.allocator.is_overwritable(self.newest)
        )
        write = self.newest if in_place else self.allocator.allocate()
        ends = range((start // self.block_size + 1) * self.block_size, end, self.block_size)
        kept = [(p, self.allocator.allocate()) for p in ends if self.is_kept(p) and self.allocator.has_spare]
        self._next = StateSlots(self.newest, write, tuple(kept))

    def cancel(self) -> None:
        """Give back the slots of the next chunk, which is not computed after all."""
        if self._next is not None:
            for slot in {self._next.write, *(slot for _, slot in self._next.kept)} - {self.newest}:
                self.allocator.release(slot)
            self._next = None

    @property
    def slots(self) -> StateSlots:
        """Return the slots of the next chunk."""
        assert self._next is not None, "a chunk without a slot for its state"
        return self._next

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk is in flight. It holds its slots until it is back."""
        read, write, kept = self.slots
        self._busy += [slot for _, slot in kept]
        if read not in (ZERO_STATE, write):
            self._busy.append(read)
        if self.is_kept(chunk.end):
            self._unpublished.append(write)
        self.newest, self._next = write, None

    def computed(self, chunk: Chunk, names: Sequence[bytes]) -> None:
        """Note that a chunk is back: the states to keep become snapshots. `names` are those of all blocks so far."""
        assert chunk.state is not None
        read, write, kept = chunk.state
        if read not in (ZERO_STATE, write):
            self._give_back(read)
        for position, slot in kept:
            self._publish(slot, position, names)
            self._give_back(slot)
        if self.is_kept(chunk.end):
            self._publish(write, chunk.end, names)
            self._unpublished.remove(write)

    def release(self) -> None:
        """Give all slots back. What follows is `load`, or nothing."""
        for slot in self.held:
            self.allocator.release(slot)

    def _publish(self, slot: int, position: int, names: Sequence[bytes]) -> None:
        name = names[position // self.block_size - 1]
        if not self.allocator.publish(slot, name):
            return
        if self._newest_of_answer is not None:
            self.allocator.forget(self._newest_of_answer)
        assert self.allocator.interval is not None
        stays = position <= self.last_kept or position % self.allocator.interval == 0
        self._newest_of_answer = None if stays else name

    def _give_back(self, slot: int) -> None:
        self._busy.remove(slot)
        self.allocator.release(slot)
