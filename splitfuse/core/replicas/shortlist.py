"""Picks the few of many replicas that are worth the test of routing.py, so that a choice among ten thousand takes
no longer than one among a dozen.

They are those which have most of the prompt in their prefix cache, the least loaded, and a few at random: fronts that
know the same would otherwise all choose the same one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import islice
from random import Random
from typing import Protocol

from splitfuse.core.replicas.prefix_index import PrefixIndex, PrefixMemory

NUM_HOLDERS = 8
"""Number of replicas that are picked for what they have of a prompt."""
NUM_LEAST_LOADED = 2
NUM_RANDOM = 2
MOST_TRIES = 6
"""Number of replicas looked at, of the least loaded and of the random ones, to find those which accept."""
LATER = 1.0
"""Seconds after which a replica that accepts nothing is looked at again."""
ALL_ARE_PICKED = 16
"""Number of replicas up to which a shortlist would save no time."""


class Loaded(Protocol):
    """Describes what a shortlist needs to know of a replica."""

    memory: PrefixMemory

    def load(self, now: float) -> float:
        """Return the seconds before it would begin with a new prompt."""


class Shortlist:
    """Knows the replicas by number: which of them has which block, and when each will have done what it has."""

    def __init__(self, *, seed: int | None = None) -> None:
        """`seed` fixes the random picks; left out, those of two fronts differ."""
        self._random = Random(seed)
        self.index = PrefixIndex()
        self._views: list[Loaded | None] = []
        self._heap: list[tuple[float, int]] = []
        """Time at which each replica will have done what it had when it was last looked at: it may have more now."""
        self._in_heap: set[int] = set()

    def sync(self, views: Sequence[Loaded | None]) -> None:
        """Follow the replicas that there are: one with another view than before has an empty cache."""
        for number, view in enumerate(views):
            if number == len(self._views):
                self._views.append(None)
            if view is not self._views[number]:
                self._replace(number, view)
        for number in range(len(views), len(self._views)):
            self._replace(number, None)
        del self._views[len(views) :]

    def _replace(self, number: int, view: Loaded | None) -> None:
        if (before := self._views[number]) is not None:
            before.memory.leave()
        self._views[number] = view
        if view is not None:
            view.memory.join(self.index, number)
            if number not in self._in_heap:
                self._push(number, 0.0)

    def pick(self, names: Sequence[bytes], accepts: Callable[[int], bool], now: float) -> dict[int, int]:
        """Return the numbers of about a dozen replicas that accept a prompt whose blocks have these names, and how many
        of these each has; fewer, or none, if few accept.
        """
        if not self._views:
            return {}
        found: dict[int, int] = {}
        for number, count in islice(self.index.holders(names), NUM_HOLDERS + MOST_TRIES):
            if accepts(number):
                found[number] = count
                if len(found) == NUM_HOLDERS:
                    break
        others = [number for number in self._least_loaded(accepts, now) if number not in found]
        tries = (self._random.randrange(len(self._views)) for _ in range(MOST_TRIES))
        fresh = (number for number in tries if number not in found and number not in others and accepts(number))
        for number in (*others, *islice(fresh, NUM_RANDOM)):
            view = self._views[number]
            found[number] = 0 if view is None else view.memory.cached_blocks(names)
        return found

    def _least_loaded(self, accepts: Callable[[int], bool], now: float) -> list[int]:
        """Return the least loaded that accept, of those at the top of the heap, and correct the places of all."""
        looked_at: dict[int, float] = {}
        while self._heap and len(looked_at) < MOST_TRIES:
            _, number = heapq.heappop(self._heap)
            self._in_heap.remove(number)
            if number < len(self._views) and (view := self._views[number]) is not None:
                looked_at[number] = now + view.load(now)
        found: list[int] = []
        for number in sorted(looked_at, key=looked_at.__getitem__):
            if len(found) < NUM_LEAST_LOADED:
                if accepts(number):
                    found.append(number)
                else:
                    looked_at[number] += LATER
            self._push(number, looked_at[number])
        return found

    def _push(self, number: int, done_at: float) -> None:
        self._in_heap.add(number)
        heapq.heappush(self._heap, (done_at, number))
