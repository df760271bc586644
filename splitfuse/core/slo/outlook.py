"""Looks ahead: which prompts can meet their deadlines, given what running decodes need until then."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

from splitfuse.core.request import Request
from splitfuse.core.slo.latency_predictor import LatencyPredictor


class Outlook:
    """Counts the seconds that steps need before any time, with the decodes that run `now`.

    All is linear beyond the knee of the cost model: a step takes `base` seconds, and its own time for each decode and
    each prompt. A decode needs a step by its deadline, and then one for each of its targets.
    """

    def __init__(self, predictor: LatencyPredictor, decodes: Iterable[Request], *, now: float) -> None:
        cost, (floor, beyond) = predictor.cost, predictor.factors
        self.now = now
        self.safety = predictor.safety_factor
        self.floor = floor * cost.floor
        self.base = max(self.floor - beyond * cost.per_token_beyond * cost.knee, 1e-9)
        self._token = beyond * (cost.per_token + cost.per_token_beyond)
        self._chunk = beyond * (cost.per_row + cost.per_request)
        self._pair, self._kv = beyond * cost.per_pair, beyond * cost.per_kv_token
        self.rows = 0.0
        live: list[tuple[float, float, float]] = []  # deadline, seconds of a token, tokens a second
        self.live: list[Request] = []
        for decode in decodes:
            row = self.seconds(decode)
            self.rows += row
            slo = decode.slo
            if slo.itl_target is not None and not slo.missed and now + self.floor <= slo.deadline < math.inf:
                live.append((slo.deadline, row, 1.0 / slo.itl_target))
                self.live.append(decode)
        live.sort()
        self._deadlines = [deadline for deadline, _, _ in live]
        self._row = [0.0, *accumulate(row for _, row, _ in live)]
        self._rate = [0.0, *accumulate(row * rate for _, row, rate in live)]
        self._offset = [0.0, *accumulate(row * rate * deadline for deadline, row, rate in live)]
        firsts: dict[float, float] = {}
        for deadline, _, rate in live:
            firsts.setdefault(rate, deadline)
        self._firsts = list(firsts.items())

    @property
    def slack(self) -> float:
        return self._deadlines[0] - self.now if self._deadlines else math.inf

    def seconds(self, request: Request) -> float:
        """Return what the rest of a request's tokens adds to a step."""
        start, count = request.num_scheduled, request.num_unscheduled
        return (
            self._token * count
            + self._chunk
            + self._pair * count * (start + (count + 1) / 2)
            + self._kv * (start + count)
        )

    def room(self, deadline: float) -> float:
        """Return the seconds for prompts before a deadline, after decodes that must be served and the steps' base."""
        index = bisect_left(self._deadlines, deadline)
        needed = self._row[index] + deadline * self._rate[index] - self._offset[index]
        steps = 1.0
        for rate, first in self._firsts:
            steps = max(steps, (deadline - first) * rate + 1.0)
        return (deadline - self.now) * self.safety - needed - steps * self.base

    def feasible(self, prefills: Sequence[Request], share: float = 1.0) -> list[Request]:
        """Return the prefills that can meet their deadlines, by deadline."""
        now = self.now
        candidates = [r for r in prefills if now < r.slo.deadline < math.inf and not r.slo.missed]
        if not candidates:
            return []
        own = {r: self.seconds(r) for r in prefills}
        found: list[Request] = []
        above = 0.0
        for priority in sorted({r.priority for r in prefills}):
            chosen = Chosen()
            of_priority = sorted((r for r in candidates if r.priority == priority), key=lambda r: r.slo.deadline)
            for request in of_priority:
                chosen.add(request, own[request])
                room = share * self.room(request.slo.deadline) - above
                if request.on_time_only:
                    while chosen.num_yielding and chosen.seconds > 7 / 8 * room:
                        chosen.drop()
                while chosen.requests_left and chosen.seconds > room:
                    chosen.drop()
            kept = chosen.requests
            found += (r for r in of_priority if r in kept)
            above += sum(own[r] for r in prefills if r.priority == priority)
        return found


class Chosen:
    """Holds the prefills of one priority that can meet their deadlines so far. Each owner's are a heap, the
    longest first.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_yielding = 0
        """Number of requests which are not `on_time_only`."""
        self.requests_left = 0
        self._heaps: defaultdict[str, list[tuple[bool, float, int, Request]]] = defaultdict(list)
        self._first_key: defaultdict[str, float] = defaultdict(lambda: math.inf)
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._owners: list[tuple[bool, float, int, str]] = []  # a heap, the first to drop first; with outdated entries
        self._versions: dict[str, int] = {}  # of each owner's valid entry

    @property
    def requests(self) -> set[Request]:
        return {request for heap in self._heaps.values() for *_, request in heap}

    def add(self, request: Request, count: float) -> None:
        owner, on_time_only = request.owner, request.on_time_only
        self.num_yielding += not on_time_only
        self.requests_left += 1
        heapq.heappush(self._heaps[owner], (on_time_only, -count, -request.sequence_number, request))
        self._first_key[owner] = min(self._first_key[owner], request.fair_share_key)
        self._change(owner, count, request.scheduling.weight)

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
        self.requests_left -= 1
        self._change(owner, negative, request.scheduling.weight)

    def _change(self, owner: str, count: float, weight: float) -> None:
        self.seconds += count
        self._shares[owner] += count / weight
        self._versions[owner] = self._versions.get(owner, 0) + 1
        if heap := self._heaps[owner]:
            would_have = self._first_key[owner] + self._shares[owner]
            heapq.heappush(self._owners, (heap[0][0], -would_have, self._versions[owner], owner))
