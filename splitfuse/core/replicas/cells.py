"""Chooses the cell for a request: a server with about a hundred replicas, of which it alone knows the caches and loads.

Hashing is consistent: prompts that begin alike have their own cell, and an order of the others behind it. What is there
to do bounds what a cell gets. Costs are in seconds: those that a cell has to do for each of its replicas, and those
that the request takes, without what a cell saves which has had the beginning of the prompt. A request goes to the
cheapest of its own cell, those which have had some of its prompt, and the next two. So a prompt has as many cells as it
needs, a conversation stays where its turns were, and cells that come or go change the place of few.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from splitfuse.errors import ConfigError, EngineUnavailableError

POINTS = 64
"""Number of places of a cell on the ring: the more, the more equal their parts."""
MOST_NAMES = 65_536
"""Number of prefixes, the newest, of which it is known which cells have had them."""


class Prefix(NamedTuple):
    """Describes a prefix of a prompt, which others may have too."""

    name: bytes
    """Name that stands for all tokens up to its end."""
    seconds: float
    """Seconds that a replica saves which has it cached."""


class Cells:
    """Places cells on a ring and knows what each has to do. Belongs to a gateway in front of several servers.

    All can be reached, have one replica, and nothing to do until `report` says otherwise. Raises ConfigError without
    any cell.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._sizes = dict.fromkeys(names, 1)
        if not self._sizes:
            raise ConfigError("there are no cells: give at least one")
        self._ring = sorted(
            (_place(f"{name}/{point}".encode()), name) for name in self._sizes for point in range(POINTS)
        )
        self._places = [place for place, _ in self._ring]
        self._loads = dict.fromkeys(self._sizes, 0.0)
        self._sent: OrderedDict[bytes, set[str]] = OrderedDict()

    def report(self, cell: str, seconds: float | None, *, replicas: int = 1) -> None:
        """Take note of what a cell says that it has to do, in seconds of one replica, and how many of these it has;
        None: it takes no requests now. Raises ConfigError for a cell without replicas.
        """
        if replicas < 1:
            raise ConfigError(f"a cell that takes requests has at least 1 replica, not {replicas}")
        if seconds is None:
            self._loads.pop(cell, None)
        else:
            self._sizes[cell], self._loads[cell] = replicas, seconds / replicas

    def choose(self, prefixes: Sequence[Prefix], seconds: float, *, without: Collection[str] = ()) -> str:
        """Return the cell, other than those of `without`, for a request that takes a replica so many seconds if nothing
        of it is cached, and count all of these there until the cell's next report, so that a popular prefix does not
        fill one cell meanwhile. `prefixes` are one or more of its prompt, the shortest first. Raises
        EngineUnavailableError if no cell is left.
        """
        loads = (
            self._loads if not without else {name: each for name, each in self._loads.items() if name not in without}
        )
        order = (name for name in self._order(prefixes[0].name) if name in loads)
        if (home := next(order, None)) is None:
            raise EngineUnavailableError("no cell takes requests")
        saved: dict[str, float] = {}
        for prefix in reversed(prefixes):
            for name in self._sent.get(prefix.name, ()):
                if name in loads:
                    saved.setdefault(name, prefix.seconds)
        # A prefix that no cell has had starts at home, where another gateway, or this one before a restart, sent it.
        saved = {home: saved.get(home, prefixes[0].seconds if saved else prefixes[-1].seconds), **saved}
        others = dict.fromkeys(islice((name for name in order if name not in saved), 2), 0.0)
        takes = {name: seconds - each for name, each in (*saved.items(), *others.items())}
        best = min(takes, key=lambda name: loads[name] + takes[name])
        for prefix in prefixes if seconds else ():  # what takes no time leaves nothing
            self._sent.setdefault(prefix.name, set()).add(best)
            self._sent.move_to_end(prefix.name)
        while len(self._sent) > MOST_NAMES:
            self._sent.popitem(last=False)
        self._loads[best] += seconds / self._sizes[best]
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
