"""Chooses the cell for a request: a server with about a hundred replicas, of which it alone knows the caches and loads.

Hashing is consistent: requests with the same key, such as the name of their first block, have their own cell, and an
order of the others behind it. What each cell has to do bounds what it gets: a key goes to the least loaded of the cells
that have had it, or, once those have so much more to do that computing it anew is sooner, to the less loaded of the
next two. So a key has as many cells as it needs, and cells that come or go change the place of few.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import islice

from splitfuse.errors import ConfigError, EngineUnavailableError

POINTS = 64
"""Number of places of a cell on the ring: the more, the more equal their parts."""
MOST_KEYS = 65_536
"""Number of keys, the newest, of which it is known which cells have had them."""


class Cells:
    """Places cells on a ring and knows what each has to do. Belongs to a gateway in front of several servers.

    `sizes` are the numbers of replicas, by the names of the cells. Raises ConfigError without any cell, and for one
    without replicas.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ConfigError(f"cells need at least one replica each, such as {{'a': 100}}, not {dict(sizes)}")
        self._ring = sorted((_place(f"{name}/{point}".encode()), name) for name in sizes for point in range(POINTS))
        self._places = [place for place, _ in self._ring]
        self._sizes = dict(sizes)
        self._loads = dict.fromkeys(sizes, 0.0)
        self._sent: OrderedDict[bytes, set[str]] = OrderedDict()

    def report(self, cell: str, seconds: float | None) -> None:
        """Take note of what a cell says that it has to do, in seconds of one replica; None: it cannot be reached."""
        if seconds is None:
            self._loads.pop(cell, None)
        else:
            self._loads[cell] = seconds / self._sizes[cell]

    def choose(self, key: bytes, seconds: float) -> str:
        """Return the cell for a request that takes a replica so many seconds, and count it there until the cell's next
        report. Raises EngineUnavailableError if no cell can be reached.
        """
        loads = self._loads
        order = (name for name in self._order(key) if name in loads)
        if (home := next(order, None)) is None:
            raise EngineUnavailableError("no cell can be reached")
        sent = self._sent.setdefault(key, set())
        self._sent.move_to_end(key)
        if len(self._sent) > MOST_KEYS:
            self._sent.popitem(last=False)
        best = min([home, *(name for name in sent if name in loads)], key=loads.__getitem__)
        others = islice((name for name in order if name not in sent), 2)
        other = min(others, key=loads.__getitem__, default=best)
        if loads[other] + seconds < loads[best]:
            best = other
        sent.add(best)
        loads[best] += seconds / self._sizes[best]
        return best

    def _order(self, key: bytes) -> Iterator[str]:
        """Yield the cells in the order of a key."""
        start, seen = bisect(self._places, _place(key)), set[str]()
        for at in range(len(self._ring)):
            name = self._ring[(start + at) % len(self._ring)][1]
            if name not in seen:
                seen.add(name)
                yield name
            if len(seen) == len(self._sizes):
                return


def _place(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
