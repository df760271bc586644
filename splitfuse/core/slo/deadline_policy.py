"""Who claims tokens of the next step, in which order, and how long that step may be.

Two rules with one answer, `ClaimOrder`. `Fcfs` knows no time: generations first, then prompts, each oldest first.
`DeadlinePolicy` keeps promises. A stream that was promised a token every 250 ms needs none earlier: the time that it
lends
lets prompts be on time, and what is left over goes back to the streams. Where nobody was promised anything, both give
the same order. In both, classes of priority come one after the other, and where requests have owners, turns take the
place of age (shares.py).

They look, and change nothing. What a claim gets is the scheduler's business.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from statistics import median
from typing import NamedTuple, Protocol

from splitfuse.config import TAIL_SHARE, SchedulerConfig
from splitfuse.core.request import Priority, Request
from splitfuse.core.slo.cost_model import CostModel, Features
from splitfuse.core.slo.decode_load import DecodeLoad
from splitfuse.core.slo.latency_predictor import LatencyPredictor

PATIENCE = 32
"""Passes after which a stream gets its token whatever else is urgent."""
PART_OF_ALLOWANCE = 1 / 16
"""Of the time to a first token that is usually promised, that a step takes: who comes meanwhile waits for its end."""
KEPT_PACE = 0.9
"""Of the prompt tokens a second of the longest steps, that they keep if they are made shorter for that."""
SHARE_OF_THE_TAKEN = 7 / 8
"""Of what is left for prompts, that is enough for those that were taken on time or not at all, as long as others can
give way to them: requests that come and stream meanwhile take the rest.
"""
WORTH = 1.25
"""Times the prompt tokens a second of steps that take half of an interval, for which they take all of it."""
LEAST_PACE = 1 / 4
"""Of the prompt tokens a second in steps of any length, that short steps must leave."""

_by_class = attrgetter("priority")
_by_place = attrgetter("place")


@dataclass(frozen=True)
class ClaimOrder:
    """`urgent` claims are bound by the token budget alone; `others` come after them, and get what keeps the step within
    `seconds`. The share `kept` of the step waits for the turn of the oldest request.
    """

    urgent: Sequence[Request]
    others: Sequence[Request]
    seconds: float = math.inf
    kept: float = 0.0


class Rank(IntEnum):
    """Of a claim that is not urgent, first to last within its class. Streams need only their newest token; prompts
    more.
    """

    FEASIBLE = 1
    """A prompt that can be on time."""
    STREAM = 2
    """One that was promised no interval."""
    PROMPT = 3
    """One that was promised no first token, and is not late."""
    AHEAD = 4
    """A stream that is ahead of its promise."""
    LATE_STREAM = 5
    LATE_PROMPT = 6


class StepLimit(NamedTuple):
    """How long a step may be, and whose due times bound it."""

    seconds: float
    first: Priority
    """The highest class that has prompts."""
    shortest: float = 0.0
    """Interval that is kept beside them; infinity if of those that were promised none can be."""

    def heeds(self, stream: Request) -> bool:
        """Neither one that is late, nor one of a class below, nor one that asks for more than there is."""
        return not stream.missed_slo and stream.priority <= self.first and (stream.interval or 0.0) >= self.shortest


class SchedulingPolicy(Protocol):
    """Both lists of requests are in order of arrival; those that are running want at least one token."""

    @property
    def forecast(self) -> LatencyPredictor | None:
        """What steps are predicted by, if they are."""

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """The claims for the next step."""

    def preemption_victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """Who loses its blocks to `than`; None if nobody has to. Never the oldest of all."""


class Fcfs:
    """Requests that need only their newest token, then those with more, then those that wait; each oldest first."""

    forecast: LatencyPredictor | None = None

    def __init__(self, *, tail_share: float = TAIL_SHARE) -> None:
        """`tail_share`, of a step, is kept for the oldest request once others come before it."""
        self.tail_share = tail_share

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See Rule."""
        del now
        streams, prompts = _divided(running)
        claims = [each for part in (streams, prompts, waiting) for each in sorted(part, key=_by_place)]
        claims.sort(key=_by_class)
        return ClaimOrder([], claims, kept=self.tail_share if _is_overtaken(running, claims) else 0.0)

    def preemption_victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """The newest of the lowest class, if it comes after `than`; the oldest of all takes from anybody."""
        first = _first_arrival(running, than)
        after = (r for r in running if r.arrival != first and (than.arrival == first or _age(r) > _age(than)))
        return max(after, key=_age, default=None)


class DeadlinePolicy(Fcfs):
    """As many requests on time as can be; the others when there is time.

    Urgent are streams whose token is due before the end of the step after this one. Then come those of each `Rank`, by
    when they are due or, where nothing is, by turn and age. Which prompts can be on time is decided by the rule of
    Moore and Hodgson (Management Science, 1968), which leaves as few late as possible: in the order of their due times,
    and whenever one would be late the longest is given up; of several owners' that of the one who would have most.
    """

    def __init__(self, forecast: LatencyPredictor, *, budget: int, tail_share: float = TAIL_SHARE) -> None:
        super().__init__(tail_share=tail_share)
        self.forecast: LatencyPredictor = forecast
        self._budget = budget

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See Rule."""
        if not any(request.has_slo for request in (*running, *waiting)):
            return super().order(running, waiting, now=now)
        streams, prompts = _divided(running)
        prompts += waiting
        length = self.length(streams, prompts)
        seconds = length.seconds
        urgent = [r for r in streams if r.due <= now + 2 * seconds or r.steps_skipped >= PATIENCE]
        feasible = self.feasible(prompts, DecodeLoad(streams), seconds=seconds, now=now)
        spare = set(streams).difference(urgent)

        def rank(request: Request) -> tuple[int, Rank, float, int]:
            at, before = Rank.PROMPT, request.turn
            if request in feasible:
                at, before = Rank.FEASIBLE, request.due
            elif request in spare:
                at = Rank.LATE_STREAM if request.missed_slo else Rank.STREAM
                if not request.missed_slo and request.due < math.inf:
                    at, before = Rank.AHEAD, request.due
            elif request.missed_slo or request.due < math.inf:
                at = Rank.LATE_PROMPT
            return request.priority, at, before, request.arrival

        others = sorted((*spare, *prompts), key=rank)
        is_last = bool(running) and running[0] not in urgent and rank(running[0])[1] >= Rank.LATE_STREAM
        kept = self.tail_share if is_last or _is_overtaken(running, (*urgent, *others)) else 0.0
        coming = min((r.due for r in urgent if length.heeds(r) and r.due > now), default=math.inf)
        urgent.sort(key=lambda r: (r.priority, r.due, r.arrival))
        return ClaimOrder(urgent, others, min(seconds, self.forecast.margin * (coming - now)), kept)

    def preemption_victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """Of those of the lowest class that has any that are late, who has the least to lose; if nobody is, the newest.
        One that is late itself takes from such alone that came after it, unless it is the oldest of all.
        """
        first = _first_arrival(running, than)
        late = [r for r in running if r.missed_slo and r is not than and r.arrival != first]
        if than.arrival != first:
            late = [r for r in late if r.priority >= than.priority]
        if than.missed_slo and than.arrival != first:
            late = [r for r in late if _age(r) > _age(than)]
        elif not late:
            return super().preemption_victim(running, than=than)
        return min(late, key=lambda r: (-r.priority, r.num_computed, -r.arrival), default=None)

    def length(
        self, streams: Sequence[Request], prompts: Sequence[Request], *, coming: Sequence[Request] = ()
    ) -> StepLimit:
        """How long a step may be: half of the shortest interval that a stream was promised, or one that is `coming`, so
        that a stream left out of one step is in time with the next; all of it if that is better for prompts; at most
        what the token budget takes, and about a sixteenth of the time to a first token that is usually promised, as far
        as prompts keep KEPT_PACE of their pace.

        Streams of a class below the highest of `prompts` do not count, nor do those that are late, nor an interval that
        would leave prompts less than LEAST_PACE of their pace, unless its request was taken on time or not at all.
        """
        whole = Features(self._budget, len(streams) + 1, 0, sum(r.num_known for r in streams), len(streams) + 1)
        longest = self.forecast.seconds(whole)
        first = min((r.priority for r in prompts), default=Priority.LOW)
        whatever_asked = StepLimit(longest, first)
        paced = [r for r in (*streams, *coming) if r.interval and whatever_asked.heeds(r)]
        demand = DecodeLoad(streams)

        def pace(seconds: float) -> float:
            return self.prompt_tokens(demand, seconds) / seconds

        whole_pace = pace(longest)
        allowances = [r.ttft_target for r in (*streams, *prompts) if r.ttft_target < math.inf]
        wanted = PART_OF_ALLOWANCE * median(allowances) if allowances else math.inf
        while longest > wanted and 0 < KEPT_PACE * whole_pace <= pace(longest / 2):
            longest /= 2
        margin = self.forecast.margin
        for interval, gives_way in sorted({(r.interval or math.inf, not r.scheduling.on_time_only) for r in paced}):
            half, all_of_it = (min(longest, margin * interval / steps) for steps in (2, 1))
            best = all_of_it if pace(all_of_it) >= WORTH * pace(half) else half
            if not gives_way or pace(best) >= LEAST_PACE * whole_pace:
                return StepLimit(best, first, interval)
        return StepLimit(longest, first, math.inf if paced else 0.0)

    def feasible(
        self,
        prompts: Sequence[Request],
        demand: DecodeLoad,
        *,
        seconds: float,
        now: float,
        share: float = 1.0,
    ) -> set[Request]:
        """The prompts that can be on time, if steps take `seconds`, the streams get what they were promised, and
        prompts a `share` of what is left.
        """
        promised = [r for r in prompts if now < r.due < math.inf and not r.missed_slo]
        if not promised:
            return set()
        per_step = share * self.prompt_tokens(demand, seconds)
        kept: set[Request] = set()
        wanted = {r: r.num_wanted for r in prompts}
        above = 0  # tokens of prompts of higher classes, which come first in any case
        for priority in sorted({r.priority for r in prompts}):
            chosen = _Chosen()
            for request in sorted((r for r in promised if r.priority == priority), key=lambda r: r.due):
                chosen.add(request, wanted[request])
                most = (request.due - now) // seconds * per_step  # tokens until it is due
                if request.scheduling.on_time_only:
                    while chosen.num_others and above + chosen.work > SHARE_OF_THE_TAKEN * most:
                        chosen.give_up()
                if above + chosen.work > most:
                    chosen.give_up()
            kept |= chosen.requests
            above += sum(count for r, count in wanted.items() if r.priority == priority)
        return kept

    def prompt_tokens(self, demand: DecodeLoad, seconds: float) -> int:
        """Prompt tokens in a step of `seconds`, beside the streams that it must serve."""
        beside = demand.within(seconds, margin=self.forecast.margin)
        most = max(self._budget - beside.tokens, 0)
        return self.forecast.tokens_within(seconds, beside, start=0, most=most, rows=1)


def make_policy(config: SchedulerConfig, cost: CostModel | None = None) -> SchedulingPolicy:
    """By promise, if there is a cost model to predict steps with."""
    if cost is None:
        return Fcfs(tail_share=config.tail_share)
    return DeadlinePolicy(LatencyPredictor(cost), budget=config.max_num_batched_tokens, tail_share=config.tail_share)


class _Chosen:
    """Prompts of one class that can be on time so far; those of each owner as a heap, the longest first."""

    def __init__(self) -> None:
        self.work = 0
        """Tokens of all."""
        self.num_others = 0
        """Those that were not taken on time or not at all."""
        self._heaps: defaultdict[str, list[tuple[bool, int, int, Request]]] = defaultdict(list)
        self._first: defaultdict[str, float] = defaultdict(lambda: math.inf)
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._owners: list[tuple[bool, float, int, str]] = []  # who gives up first; as they were, too
        self._numbers: dict[str, int] = {}  # of each owner's entry that is true today

    @property
    def requests(self) -> set[Request]:
        return {request for heap in self._heaps.values() for *_, request in heap}

    def add(self, request: Request, wanted: int) -> None:
        owner = request.owner
        self.num_others += not request.scheduling.on_time_only
        heapq.heappush(self._heaps[owner], (request.scheduling.on_time_only, -wanted, -request.arrival, request))
        self._first[owner] = min(self._first[owner], request.turn)
        self._change(owner, wanted, request.scheduling.weight)

    def give_up(self) -> None:
        """The longest of the owner who would have had most; one that was taken on time or not at all only if there is
        no other.
        """
        while True:
            *_, number, owner = heapq.heappop(self._owners)
            if self._numbers[owner] == number:
                break
        _, negative, _, request = heapq.heappop(self._heaps[owner])
        self.num_others -= not request.scheduling.on_time_only
        self._change(owner, negative, request.scheduling.weight)

    def _change(self, owner: str, tokens: int, weight: float) -> None:
        self.work += tokens
        self._shares[owner] += tokens / weight
        self._numbers[owner] = self._numbers.get(owner, 0) + 1
        if heap := self._heaps[owner]:
            would_have = self._first[owner] + self._shares[owner]
            heapq.heappush(self._owners, (heap[0][0], -would_have, self._numbers[owner], owner))


def _divided(running: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Those that need only their newest token, and those that need more."""
    return [r for r in running if r.num_wanted == 1], [r for r in running if r.num_wanted > 1]


def _is_overtaken(running: Sequence[Request], claims: Iterable[Request]) -> bool:
    """Whether somebody comes before the oldest, who is running, by class or by turn."""
    return bool(running) and min(claims, key=_by_place, default=running[0]).place < running[0].place


def _first_arrival(running: Sequence[Request], than: Request) -> int:
    return min(than.arrival, running[0].arrival) if running else than.arrival


def _age(request: Request) -> tuple[int, int]:
    """The larger, the sooner it gives way."""
    return request.priority, request.arrival
