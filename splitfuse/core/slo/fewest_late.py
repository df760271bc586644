"""Chooses the prefills that can meet their deadlines, by the rule of Moore and Hodgson (Management Science, 1968)."""

from __future__ import annotations

import heapq
import math

from splitfuse.core.request import Request

ON_TIME_ONLY_SHARE = 7 / 8
"""Fraction of the prefill capacity left before its deadline within which an `on_time_only` prompt must finish, as long
as others can yield to it: the rest is for requests which arrive, or start to decode, meanwhile.
"""


class _Owner:
    """Holds what is chosen of one owner: a heap, the first to drop first."""

    __slots__ = ("first_key", "heap", "name", "num_changes", "service")

    def __init__(self, name: str) -> None:
        self.name = name
        self.heap: list[tuple[bool, float, int, Request]] = []
        self.first_key = math.inf
        self.service = 0.0
        self.num_changes = 0


class FewestLate:
    """Holds the prefills of one priority that can meet their deadlines so far."""

    def __init__(self) -> None:
        self.work = 0.0
        """Sum of their work, in any unit: seconds, or tokens."""
        self.num_yielding = 0
        """Number of requests which are not `on_time_only`."""
        self._new: list[tuple[Request, float]] = []  # since one was dropped: most often none is
        self._owners: dict[str, _Owner] = {}
        self._next: list[tuple[bool, float, int, str]] = []
        """A heap of owners, the one that loses a prefill first; entries are outdated if their owner changed since."""

    @property
    def requests(self) -> set[Request]:
        in_heaps = {request for owner in self._owners.values() for *_, request in owner.heap}
        return in_heaps.union([request for request, _ in self._new])

    def add(self, request: Request, work: float) -> None:
        self.work += work
        self.num_yielding += not request.on_time_only
        self._new.append((request, work))

    def drop(self) -> None:
        """Drop the longest prefill of the owner that would have had most; an `on_time_only` one only if there is no
        other.
        """
        for request, work in self._new:
            owner = self._owners.get(request.owner)
            if owner is None:
                owner = self._owners[request.owner] = _Owner(request.owner)
            heapq.heappush(owner.heap, (request.on_time_only, -work, -request.sequence_number, request))
            owner.first_key = min(owner.first_key, request.fair_share_key)
            self._change(owner, _service(request))
        self._new.clear()
        while True:
            *_, num_changes, name = heapq.heappop(self._next)
            owner = self._owners[name]
            if num_changes == owner.num_changes:
                break
        _, negative, _, request = heapq.heappop(owner.heap)
        self.work += negative
        self.num_yielding -= not request.on_time_only
        self._change(owner, -_service(request))

    def _change(self, owner: _Owner, service: float) -> None:
        owner.service += service
        owner.num_changes += 1
        if owner.heap:
            would_have = owner.first_key + owner.service
            heapq.heappush(self._next, (owner.heap[0][0], -would_have, owner.num_changes, owner.name))


def _service(request: Request) -> float:
    return request.num_unscheduled / request.scheduling.weight
