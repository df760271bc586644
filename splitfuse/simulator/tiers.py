"""Simulates KV tiers on the virtual clock: which blocks they have, and when what was asked for has come.

What is fetched, and what is done with it, is decided by the engine's own code (core/kv/fetching.py, scheduler.py). Here
is what engine/tiers.py and block_file.py do: each engine reads one block after the other and writes one after the
other, finds what all engines have written, and writes to a part of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from splitfuse.core.kv.fetching import LATENCY, Fetch, Found, Frame, places
from splitfuse.core.plan import Save

RECENT = 1.0
"""Seconds within which a use of a block is as good as now: that of block_file.py."""

ROUNDING = 1e-9
"""Seconds by which the virtual clock may be early."""


class TierStore:
    """Holds the names of the blocks of a tier, which all engines share.

    Each of `num_parts` engines writes to its share of the slots, the least recently used first. A use of a block counts
    for those before it in its text.
    """

    def __init__(self, num_slots: int, *, num_parts: int, seconds_per_block: float) -> None:
        self.num_slots = num_slots
        self.seconds_per_block = seconds_per_block
        self._shares = [len(range(part, num_slots, num_parts)) for part in range(num_parts)]
        self._used: list[OrderedDict[bytes, float]] = [OrderedDict() for _ in range(num_parts)]
        self._before: dict[bytes, bytes] = {}
        self._part: dict[bytes, int] = {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._part

    def __len__(self) -> int:
        return len(self._part)

    def write(self, name: bytes, before: bytes, *, part: int, now: float) -> None:
        """Take a block in, in the place of the one of this part that was used least recently, if all have one."""
        if name in self._part:
            return
        used = self._used[part]
        if len(used) == self._shares[part]:
            forgotten, _ = used.popitem(last=False)
            del self._part[forgotten], self._before[forgotten]
        used[name] = -math.inf
        self._part[name], self._before[name] = part, before
        self.touch(name, now)

    def touch(self, name: bytes, now: float) -> None:
        """Note that a block is used, and those before it in the same text."""
        while (part := self._part.get(name)) is not None:
            used = self._used[part]
            if now - used[name] < RECENT:
                return
            used[name] = now
            used.move_to_end(name)
            name = self._before[name]


class _Answer(NamedTuple):
    at: float
    fetch: Fetch
    num_blocks: int


class _Staged(NamedTuple):
    written_at: float
    save: Save


class SharedTiers:
    """Holds the tiers that engines share, the fastest first, and what each of them is writing there."""

    def __init__(self, stores: Sequence[TierStore], num_engines: int) -> None:
        self.stores = stores
        self.staged: list[deque[_Staged]] = [deque() for _ in range(num_engines)]

    @property
    def num_slots(self) -> int:
        """Return how many blocks the largest tier can have."""
        return max(store.num_slots for store in self.stores)

    def write(self, now: float) -> None:
        """Take note of what has been written by now."""
        for part, staged in enumerate(self.staged):
            while staged and staged[0].written_at <= now:
                written_at, save = staged.popleft()
                for store in self.stores:
                    store.write(save.name, save.before, part=part, now=written_at)


class SimulatedTiers:
    """Implements the BlockSource of one engine, number `part` of those that share the tiers. `clock` returns the time.

    It begins now: what an engine before it had not written yet is lost.
    """

    def __init__(
        self, shared: SharedTiers, *, part: int, block_bytes: float, staged_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._shared, self._stores, self._clock = shared, shared.stores, clock
        self._most_staged = places(staged_bytes, block_bytes)
        self._staged = shared.staged[part]
        if self._staged:
            shared.write(clock())
            self._staged.clear()
        self._answers: dict[int, _Answer] = {}
        self._read_until = self._write_until = 0.0
        self.num_unsaved = 0
        """Number of blocks that were not written: too many were to be written at once."""

    def save(self, saves: Sequence[Save]) -> int:
        """Write blocks, some time. Returns how many are copied out of the cache for it."""
        if not saves:
            return 0
        now, count = self._clock(), 0
        self._shared.write(now)
        names = {save.name for _, save in self._staged}
        for save in saves:
            lacking = [store for store in self._stores if save.name not in store]
            if save.name in names or not lacking:
                continue
            if len(self._staged) >= self._most_staged:
                self.num_unsaved += 1
                continue
            seconds = sum(store.seconds_per_block for store in lacking)
            self._write_until = max(self._write_until, now) + seconds
            self._staged.append(_Staged(self._write_until, save))
            names.add(save.name)
            count += 1
        return count

    def find(self, names: Sequence[bytes], _: Sequence[str] = ()) -> Found:
        """See BlockSource."""
        self._shared.write(self._clock())
        return self._find(names)

    def _find(self, names: Sequence[bytes]) -> Found:
        count, seconds = 0, LATENCY
        for name in names:
            store = next((store for store in self._stores if name in store), None)
            if store is None:
                break
            count, seconds = count + 1, seconds + store.seconds_per_block
        return Found(count, seconds)

    def find_one(self, names: Iterable[bytes]) -> tuple[bytes, float] | None:
        """See BlockSource."""
        found = ((name, store.seconds_per_block) for name in names for store in self._stores if name in store)
        return next(found, None)

    def ask(self, fetch: Fetch) -> None:
        """Answer a fetch after those before it, within its seconds."""
        now = self._clock()
        found = self._find(fetch.names)
        for store in self._stores:
            last = next((name for name in reversed(fetch.names[: found.num_blocks]) if name in store), None)
            if last is not None:
                store.touch(last, now)
        done_at = max(now, self._read_until) + found.seconds
        if done_at <= now + fetch.seconds:
            self._read_until, answer = done_at, _Answer(done_at, fetch, found.num_blocks)
        else:  # it is given up, and no more of it is read
            answer = _Answer(now + fetch.seconds, fetch, 0)
            self._read_until = max(self._read_until, answer.at)
        self._answers[fetch.number] = answer

    def answers(self) -> list[tuple[int, list[Frame]]]:
        """Return the answers that have come, by the number of the fetch."""
        now = self._clock()
        found = [answer for answer in self._answers.values() if answer.at <= now + ROUNDING]
        for answer in found:
            del self._answers[answer.fetch.number]
        return [(fetch.number, _frames(fetch, count)) for _, fetch, count in sorted(found, key=lambda each: each.at)]

    @property
    def next_answer(self) -> float:
        """Return when the next answer comes; infinity if nothing was asked for."""
        return min((answer.at for answer in self._answers.values()), default=math.inf)

    def forget(self, number: int) -> None:
        """See BlockSource."""
        self._answers.pop(number, None)


def _frames(fetch: Fetch, count: int) -> list[Frame]:
    """Return the leading blocks of a fetch, which have no bytes here."""
    return [Frame(name, tokens, b"", 0) for name, tokens in zip(fetch.names[:count], fetch.token_ids, strict=False)]
