"""Says which prompts can have their first token in time, given what the running decodes need until then.

The order of claims (deadline_policy.py) and admission (admission.py) follow it. It looks, and changes nothing.

Work adds up, in seconds (work_times.py), and before a deadline there is room for

    deadline - now - steps x constant - tokens that decodes must have before the deadline x their own times

A decode must have a token at the end of its slack, and from then on one in each ITL target; as many steps are needed.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from splitfuse.config.engine import MAX_TOKEN_BUDGET
from splitfuse.config.values import MAX_TARGET
from splitfuse.core.request import Request
from splitfuse.core.scheduling_options import Priority
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.fewest_late import ON_TIME_ONLY_SHARE, FewestLate
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.work_times import WorkTimes


def _by_deadline(request: Request) -> float:
    return request.slo.deadline


@dataclass(slots=True)
class Prefill:
    """Describes a prompt that can have its first token in time."""

    request: Request
    work: float
    """Seconds that a step becomes longer by all of it."""
    room: float
    """Seconds for it and what is in time before it."""


class Feasibility(WorkTimes):
    """Counts the time that is left for prompts before any deadline.

    `decodes` are the running requests that need their next token; deadlines of those whose priority is below `priority`
    count no more than late ones'.
    """

    def __init__(
        self,
        times: LatencyPredictor | StepTimes,
        decodes: Iterable[Request],
        *,
        soon: Iterable[Request] = (),
        now: float,
        priority: int = Priority.LOW,
        token_budget: int = MAX_TOKEN_BUDGET,
    ) -> None:
        """`soon` are prompts that are computed one after the other, and decode from then on."""
        super().__init__(times, token_budget=token_budget)
        self.now = now
        self.safety_factor = times.safety_factor
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
        first_token = now + self.overhead
        for request in soon:
            first_token += self.seconds(request)
            if (itl_target := request.slo.itl_target) is not None and request.max_tokens > 1:
                seconds = self._per_decode + self._per_position * request.num_tokens
                due.append((first_token + itl_target, seconds, 1.0 / itl_target))
        due.sort()
        self._due = due
        self._deadlines = [deadline for deadline, _, _ in due]
        sum_of_seconds = sum_of_rates = sum_of_begun = 0.0
        self._seconds, self._rates, self._begun = [0.0], [0.0], [0.0]
        first: dict[float, float] = {}  # of the decodes with that target
        for deadline, seconds, rate in due:
            sum_of_seconds += seconds
            sum_of_rates += seconds * rate
            sum_of_begun += seconds * rate * deadline
            self._seconds.append(sum_of_seconds)
            self._rates.append(sum_of_rates)
            self._begun.append(sum_of_begun)
            first.setdefault(rate, deadline)
        self._first = [(deadline, rate) for rate, deadline in first.items()]

    @property
    def is_sustainable(self) -> bool:
        """Return whether all decodes together can keep their targets, if there are no prompts."""
        highest = max([rate for _, rate in self._first], default=0.0)  # so many steps/s
        floors = highest * self.floor - self._spread * sum([rate for *_, rate in self._due])  # which decodes fill first
        return self._rates[-1] + max(floors, highest * self.overhead) <= self.safety_factor

    @property
    def step_of_decodes(self) -> float:
        """Return the seconds of a step with a token of every decode."""
        return self.overhead + self.with_floor(self.decode_seconds)

    @property
    def slack(self) -> float:
        """Return the seconds until the first deadline of a decode, less the safety factor and the token that the oldest
        request gets in any step; infinity without any.
        """
        return self.time_until(self._deadlines[0]) - self._per_decode if self._deadlines else math.inf

    def time_until(self, deadline: float) -> float:
        """Return the seconds until a deadline, less the safety factor."""
        return self.safety_factor * (deadline - self.now)

    def room(self, deadline: float) -> float:
        """Return the seconds that prompts may take before a deadline, if decodes get what they must have by then."""
        index = bisect_left(self._deadlines, deadline)
        decodes = self._seconds[index] + deadline * self._rates[index] - self._begun[index]
        steps = 1.0
        for first, rate in self._first:
            if (its_steps := (deadline - first) * rate + 1.0) > steps:
                steps = its_steps
        return self.safety_factor * (deadline - self.now) - decodes - steps * self.overhead

    def surely_fit(
        self, prompts: Collection[Request], *, num_decodes: int, num_positions: int, itl_target: float, now: float
    ) -> bool:
        """Return True only if all prompts whose deadline is to come can meet it, and if all can decode beside
        `num_decodes` requests with so many tokens, each of which needs one now and then one in every `itl_target`, or
        none if that is infinity. What takes long to count is counted as if all had the tightest target.
        """
        work = later = 0.0
        for request in prompts:
            work += self.seconds(request)
            if (own := request.slo.itl_target) is not None:
                itl_target = min(itl_target, own)
                later += self._per_decode + self._per_position * request.num_tokens
        rate, decodes = 1.0 / itl_target, 0.0
        if rate:
            decodes = self._per_decode * num_decodes + self._per_position * (num_positions + num_decodes)
        if rate * (decodes + later + self.floor) > self.safety_factor:
            return False
        work = self.with_floor(work)
        for request in prompts:
            seconds = request.slo.deadline - now
            if 0.0 < seconds < math.inf:
                room = self.safety_factor * seconds - (1.0 + rate * seconds) * (decodes + self.overhead)
                if work > ON_TIME_ONLY_SHARE * room:
                    return False
        return True

    def spare(self, deadline: float, work: float, num_steps: int) -> float:
        """Return the seconds that are left before a deadline by prompts of so many seconds, in so many steps besides
        those which the deadlines of decodes end.
        """
        index = bisect_left(self._deadlines, deadline)
        tokens = sum([(deadline - its_deadline) * rate + 1.0 for its_deadline, _, rate in self._due[:index]])
        for_decodes = (int((deadline - first) * rate) + 1 for first, rate in self._first if first <= deadline)
        num_steps += max(for_decodes, default=0)
        decodes = self._seconds[index] + deadline * self._rates[index] - self._begun[index]
        unfilled = num_steps * (self.floor - self.overhead) - self._spread * (tokens + work / self._per_token)
        return self.time_until(deadline) - work - decodes - num_steps * self.overhead - max(unfilled, 0.0)

    def time_for(self, work: float) -> float:
        """Return the time by which prompts of so many seconds are done; infinity if decodes leave too little for it."""
        work = self.with_floor(work)
        short, long = 0.0, self.overhead + work
        while self.room(self.now + long) < work:
            if long > MAX_TARGET:
                return math.inf
            short, long = long, 2.0 * long
        for _ in range(20):
            middle = (short + long) / 2.0
            short, long = (short, middle) if self.room(self.now + middle) >= work else (middle, long)
        return self.now + long

    def feasible(self, prefills: Sequence[Request], *, share: float = 1.0, at_most: int = sys.maxsize) -> list[Prefill]:
        """Return the prefills that can meet their deadlines, by priority and deadline, if they get a `share` of the
        room. It looks at the first `at_most` deadlines of each priority, and at those that are `on_time_only`.

        By the rule of Moore and Hodgson (Management Science, 1968), which leaves as few late as possible: take them in
        the order of their deadlines, and whenever one would be late drop the longest; among several owners', that of
        the owner that would have had most.
        """
        candidates: list[list[Request]] = [[] for _ in Priority]
        for request in prefills:
            if self.now < request.slo.deadline < math.inf and not request.slo.missed:
                candidates[request.priority].append(request)
        found: list[Prefill] = []
        for priority, of_priority in enumerate(candidates):
            if not of_priority:
                continue
            of_priority.sort(key=_by_deadline)
            of_priority[at_most:] = [request for request in of_priority[at_most:] if request.on_time_only]
            # Those above come first in any case.
            above: float = sum([self.seconds(r) for r in prefills if r.priority < priority])
            chosen, looked_at = FewestLate(), []
            for request in of_priority:
                work, room = self.seconds(request), share * self.room(request.slo.deadline) - above
                if self.with_floor(work) > room:
                    continue
                kept = ON_TIME_ONLY_SHARE * room if request.on_time_only else room
                looked_at.append(Prefill(request, work, kept))
                chosen.add(request, work)
                if request.on_time_only:
                    while chosen.num_yielding and self.with_floor(chosen.work) > ON_TIME_ONLY_SHARE * room:
                        chosen.drop()
                while self.with_floor(chosen.work) > room:
                    chosen.drop()
            in_time = chosen.requests
            found += [prefill for prefill in looked_at if prefill.request in in_time]
        return found
