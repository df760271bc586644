"""Chooses the cell for a request: a server with about a hundred replicas, of which it alone knows the caches and loads.

By consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018): requests with the same key, as
the name of their first block, go to the same cell until that has more than its part of the work. Then they go to the
less loaded of the two that follow in the key's own order, then of the next two. So a key has as many cells as it needs,
always the same ones, and cells that come or go change the place of few.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import islice

from splitfuse.errors import ConfigError, EngineUnavailableError

POINTS = 64
"""Number of places of a cell on the ring: the more, the more equal their parts."""
BOUND = 1.1
"""Factor of the mean load, to which a request's own seconds are added: a cell that has more to do takes no request from
which it could save less than that by its caches.
"""


class Cells:
    """Places cells on a ring and knows what each has to do. Belongs to whoever sends requests to them.

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
        if (cell := next(order, None)) is None:
            raise EngineUnavailableError("no cell can be reached")
        most = BOUND * sum(loads.values()) / len(loads) + seconds
        best = cell
        while loads[cell] > most and (pair := list(islice(order, 2))):
            cell = min(pair, key=loads.__getitem__)
            best = min(best, cell, key=loads.__getitem__)
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
