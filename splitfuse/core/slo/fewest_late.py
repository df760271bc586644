"""Chooses the prefills that can meet their deadlines, by the rule of Moore and Hodgson (Management Science, 1968)."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict

from splitfuse.core.request import Request

ON_TIME_ONLY_SHARE = 7 / 8
"""Fraction of the prefill capacity left before its deadline within which an `on_time_only` prompt must finish, as long
as others can yield to it: the rest is for requests which arrive, or start to decode, meanwhile.
"""


class FewestLate:
    """Holds the prefills of one priority that can meet their deadlines so far. Each owner's are a heap, the
    longest first.
    """

    def __init__(self) -> None:
        self.work = 0.0
        """Sum of their work, in any unit: seconds, or tokens."""
        self.num_yielding = 0
        """Number of requests which are not `on_time_only`."""
        self._heaps: defaultdict[str, list[tuple[bool, float, int, Request]]] = defaultdict(list)
        self._first_key: defaultdict[str, float] = defaultdict(lambda: math.inf)
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._owners: list[tuple[bool, float, int, str]] = []  # a heap, the first to drop first; with outdated entries
        self._versions: dict[str, int] = {}  # of each owner's valid entry

    @property
    def requests(self) -> set[Request]:
        return {request for heap in self._heaps.values() for *_, request in heap}

    def add(self, request: Request, work: float) -> None:
        owner, on_time_only = request.owner, request.on_time_only
        self.num_yielding += not on_time_only
        heapq.heappush(self._heaps[owner], (on_time_only, -work, -request.sequence_number, request))
        self._first_key[owner] = min(self._first_key[owner], request.fair_share_key)
        self._change(owner, work, request.num_unscheduled / request.scheduling.weight)

    def drop(self) -> None:
        """Drop the longest prefill of the owner that would have had most; an `on_time_only` one only if there is no
        other.
        """
        while True:
            *_, version, owner = heapq.heappop(self._owners)
            if self._versions[owner] == version:
                break
        _, negative, _, request = heapq.heappop(self._heaps[owner])
        self.num_yielding -= not request.on_time_only
        self._change(owner, negative, -request.num_unscheduled / request.scheduling.weight)

    def _change(self, owner: str, work: float, service: float) -> None:
        self.work += work
        self._shares[owner] += service
        self._versions[owner] = self._versions.get(owner, 0) + 1
        if heap := self._heaps[owner]:
            would_have = self._first_key[owner] + self._shares[owner]
            heapq.heappush(self._owners, (heap[0][0], -would_have, self._versions[owner], owner))
