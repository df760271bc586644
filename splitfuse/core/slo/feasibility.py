"""Says which prompts can have their first token in time, given what the running decodes need until then.

The order of claims (deadline_policy.py) follows it. It looks, and changes nothing. Admission still asks the older test
of deadline_planner.py, in steps of one length.

Beyond the knee of the cost model a step takes a constant time and, in addition, its own time for every chunk. So the
work of requests adds up, in seconds, and before a deadline there is room for

    deadline - now - steps x constant - tokens that decodes must have before the deadline x their own times

A decode must have a token at the end of its slack, and from then on one in each ITL target; as many steps are needed.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from typing import NamedTuple

from splitfuse.core.request import Priority, Request
from splitfuse.core.slo.fewest_late import ON_TIME_ONLY_SHARE, FewestLate
from splitfuse.core.slo.latency_predictor import LatencyPredictor

MIN_SECONDS = 1e-9
"""Shortest time of a step: a cost model may say that it takes none."""

_by_priority = attrgetter("priority")
_by_deadline = attrgetter("slo.deadline")


class Prefill(NamedTuple):
    """Is a prompt that can have its first token in time."""

    request: Request
    work: float
    """Seconds that a step becomes longer by all of it."""
    room: float
    """Seconds for it and what is in time before it."""


class Feasibility:
    """Counts the time that is left for prompts before any deadline.

    `decodes` are the running requests that need their next token; deadlines of those whose priority is below `priority`
    count no more than late ones'.
    """

    def __init__(
        self,
        predictor: LatencyPredictor,
        decodes: Iterable[Request],
        *,
        now: float,
        priority: Priority = Priority.LOW,
    ) -> None:
        cost, (floor, beyond) = predictor.cost, predictor.factors
        self.now = now
        self.safety_factor = predictor.safety_factor
        self.floor = max(floor * cost.floor, MIN_SECONDS)
        """Seconds of a step of one decode."""
        full, knee = beyond * cost.per_token_beyond, cost.knee
        spread = min(full, self.floor / knee) if knee else full  # what a token of a full step takes of the floor
        self.at_knee = self.floor + beyond * cost.per_token * knee
        """Seconds of a step of as many tokens as the knee."""
        self.longest = self.at_knee if spread < full else math.inf
        """Seconds of a step beyond which further tokens take longer than in a step of their own."""
        self._spread = spread
        self.overhead = max(self.floor - spread * knee, MIN_SECONDS)
        """Seconds of a full step that no token accounts for."""
        self._slope = beyond * cost.per_token
        self._per_token = max(self._slope + spread, MIN_SECONDS)
        self._per_chunk = beyond * (cost.per_row + cost.per_request)
        self._per_pair, self._per_kv_token = beyond * cost.per_pair, beyond * cost.per_kv_token
        self._per_decode, self._per_position = self._per_token + self._per_chunk, self._per_pair + self._per_kv_token
        self.decode_seconds = 0.0
        """Seconds that a token of every decode adds to a step."""
        due: list[tuple[float, float, float]] = []  # deadline, seconds of a token, tokens/s from then on
        soonest = now + self.floor
        for decode in decodes:
            seconds = self.seconds_of_token(decode)
            self.decode_seconds += seconds
            slo = decode.slo
            if not slo.missed and soonest <= slo.deadline < math.inf and decode.priority <= priority and slo.itl_target:
                due.append((slo.deadline, seconds, 1.0 / slo.itl_target))
        due.sort()
        self._deadlines = [deadline for deadline, _, _ in due]
        self._seconds = [0.0, *accumulate(seconds for _, seconds, _ in due)]
        self._rates = [0.0, *accumulate(seconds * rate for _, seconds, rate in due)]
        self._begun = [0.0, *accumulate(seconds * rate * deadline for deadline, seconds, rate in due)]
        first = {rate: deadline for deadline, _, rate in reversed(due)}  # of the decodes with that target
        self._first = [(deadline, rate) for rate, deadline in first.items()]

    def efficient_step(self, efficiency: float) -> float:
        """Return the seconds of the shortest step whose tokens/s are that fraction of the most that steps can have."""
        share = efficiency * self._slope / self._per_token
        return max(self.overhead / (1.0 - efficiency), min(self.at_knee, self.floor / (1.0 - share)))

    @property
    def slack(self) -> float:
        """Return the seconds until the first deadline of a decode, less the safety factor; infinity without any."""
        return self.time_until(self._deadlines[0]) if self._deadlines else math.inf

    def time_until(self, deadline: float) -> float:
        """Return the seconds until a deadline, less the safety factor."""
        return self.safety_factor * (deadline - self.now)

    def seconds(self, request: Request) -> float:
        """Return how much longer a step becomes by all that a request needs."""
        start, end = max(request.num_scheduled, request.num_expected_cached), request.num_tokens
        count = end + request.num_output_placeholders - start
        return (
            self._per_token * count
            + self._per_chunk
            + self._per_pair * count * (start + (count + 1) / 2)
            + self._per_kv_token * (start + count)
        )

    def seconds_of_token(self, decode: Request) -> float:
        """Return how much longer a step becomes by the newest token of a request."""
        return self._per_decode + self._per_position * (decode.num_scheduled + 1)

    def room(self, deadline: float) -> float:
        """Return the seconds that prompts may take before a deadline, if decodes get what they must have by then."""
        index = bisect_left(self._deadlines, deadline)
        decodes = self._seconds[index] + deadline * self._rates[index] - self._begun[index]
        steps = 1.0
        for first, rate in self._first:
            if (its_steps := (deadline - first) * rate + 1.0) > steps:
                steps = its_steps
        return self.safety_factor * (deadline - self.now) - decodes - steps * self.overhead

    def with_floor(self, seconds: float) -> float:
        """Return the seconds of work, and what its last step takes longer if it has fewer tokens than the knee."""
        return seconds + max(self.floor - self.overhead - seconds * self._spread / self._per_token, 0.0)

    def feasible(self, prefills: Sequence[Request], *, share: float = 1.0, at_most: int = sys.maxsize) -> list[Prefill]:
        """Return the prefills that can meet their deadlines, by priority and deadline, if they get a `share` of the
        room. It looks at the first `at_most` deadlines, and at those that are `on_time_only`.

        By the rule of Moore and Hodgson (Management Science, 1968), which leaves as few late as possible: take them in
        the order of their deadlines, and whenever one would be late drop the longest; among several owners', that of
        the owner that would have had most.
        """
        candidates = [r for r in prefills if self.now < r.slo.deadline < math.inf and not r.slo.missed]
        candidates.sort(key=_by_deadline)
        candidates[at_most:] = [request for request in candidates[at_most:] if request.on_time_only]
        candidates.sort(key=_by_priority)
        found: list[Prefill] = []
        for priority, of_priority in groupby(candidates, key=_by_priority):
            above = sum(self.seconds(r) for r in prefills if r.priority < priority)  # they come first in any case
            chosen, looked_at = FewestLate(), []
            for request in of_priority:
                work, room = self.seconds(request), share * self.room(request.slo.deadline) - above
                if self.with_floor(work) > room:
                    continue
                looked_at.append(Prefill(request, work, room))
                chosen.add(request, work)
                if request.on_time_only:
                    while chosen.num_yielding and self.with_floor(chosen.work) > ON_TIME_ONLY_SHARE * room:
                        chosen.drop()
                while self.with_floor(chosen.work) > room:
                    chosen.drop()
            kept = chosen.requests
            found += (prefill for prefill in looked_at if prefill.request in kept)
        return found
