"""Who claims tokens of the next pass, in which order, and how long that pass may be.

Two rules with one answer, `Order`. `ByArrival` knows no time: generations first, then prompts, each oldest first.
`ByPromise` keeps promises. A stream that was promised a token every 250 ms needs none earlier: the time that it lends
lets prompts be on time, and what is left over goes back to the streams. Where nobody was promised anything, both give
the same order.

They look, and change nothing. What a claim gets is the scheduler's business.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from splitfuse.core.cost_model import Features
from splitfuse.core.forecast import Forecast
from splitfuse.core.request import Request

MARGIN = 0.9
"""Of a promised interval, that is planned with: the rest is for predictions that are off."""
PATIENCE = 32
"""Passes after which a stream gets its token whatever else is urgent."""
SHARE_OF_THE_LATE = 1 / 8
"""Of a pass, that is kept for the oldest request once it cannot be on time any more."""


@dataclass(frozen=True)
class Order:
    """`urgent` claims are bound by the token budget alone; `others` come after them, and get what keeps the pass within
    `seconds`. The share `kept` of the pass waits for the turn of the oldest request.
    """

    urgent: Sequence[Request]
    others: Sequence[Request]
    seconds: float = math.inf
    kept: float = 0.0


class Rank(IntEnum):
    """Of a claim that is not urgent, first to last. Streams need only their newest token; prompts more."""

    HOPEFUL = 1
    """A prompt that can be on time."""
    STREAM = 2
    """One that was promised nothing."""
    PROMPT = 3
    AHEAD = 4
    """A stream that is ahead of its promise."""
    LATE_STREAM = 5
    LATE_PROMPT = 6


class Rule(Protocol):
    """Both lists of requests are in order of arrival; those that are running want at least one token."""

    @property
    def forecast(self) -> Forecast | None:
        """What passes are predicted by, if they are."""

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> Order:
        """The claims for the next pass."""

    def victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """Who loses its blocks to `than`; None if nobody has to. Never the oldest of all."""


class ByArrival:
    """Requests that need only their newest token, then those with more, then those that wait; each oldest first."""

    forecast: Forecast | None = None

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> Order:
        """See Rule."""
        del now
        streams, prompts = _divided(running)
        return Order(streams, [*prompts, *waiting])

    def victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """The newest, if it is newer."""
        newest = running[-1] if running else than
        return newest if newest.arrival > than.arrival else None


class ByPromise(ByArrival):
    """As many requests on time as can be; the others when there is time.

    Urgent are streams whose token is due before the end of the pass after this one. Then come those of each `Rank`, by
    when they are due or, where nothing is, oldest first. Which prompts can be on time is decided by the rule of Moore
    and Hodgson (Management Science, 1968), which leaves as few late as possible: in the order of their due times, and
    whenever one would be late the longest is given up.
    """

    def __init__(self, forecast: Forecast, *, budget: int) -> None:
        self.forecast: Forecast = forecast
        self._budget = budget

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> Order:
        """See Rule."""
        if not any(request.has_promise for request in (*running, *waiting)):
            return super().order(running, waiting, now=now)
        streams, prompts = _divided(running)
        prompts += waiting
        seconds = self._seconds(streams, prompts)
        urgent = [r for r in streams if r.due <= now + 2 * seconds or r.num_passed_over >= PATIENCE]
        hopeful = self._hopeful(prompts, streams, seconds, now)
        spare = set(streams).difference(urgent)

        def rank(request: Request) -> tuple[int, float]:
            if request in hopeful:
                return Rank.HOPEFUL, request.due
            if request in spare:
                if request.is_late:
                    return Rank.LATE_STREAM, request.arrival
                return (Rank.AHEAD, request.due) if request.due < math.inf else (Rank.STREAM, request.arrival)
            return (Rank.LATE_PROMPT if request.has_promise else Rank.PROMPT), request.arrival

        others = sorted((*spare, *prompts), key=rank)
        is_last = bool(running) and running[0] not in urgent and rank(running[0])[0] >= Rank.LATE_STREAM
        coming = min((r.due for r in urgent if r.due > now), default=math.inf)
        urgent.sort(key=lambda r: (r.due, r.arrival))
        return Order(urgent, others, min(seconds, coming - now), SHARE_OF_THE_LATE if is_last else 0.0)

    def victim(self, running: Sequence[Request], *, than: Request) -> Request | None:
        """Of those that are late, who has the least to lose; if nobody is, the newest. One that is late itself takes
        from such alone that came after it, unless it is the oldest of all.
        """
        first = min(than.arrival, running[0].arrival) if running else than.arrival
        late = [r for r in running if r.is_late and r is not than and r.arrival != first]
        if than.is_late and than.arrival != first:
            late = [r for r in late if r.arrival > than.arrival]
        elif not late:
            return super().victim(running, than=than)
        return min(late, key=lambda r: (r.num_computed, -r.arrival), default=None)

    def _seconds(self, streams: Sequence[Request], prompts: Sequence[Request]) -> float:
        """How long a pass may be: half of the shortest interval that anybody was promised, so that a stream left out of
        one pass is in time with the next; at most what the token budget takes.
        """
        everybody = (*streams, *prompts)
        shortest = min((r.targets.itl or math.inf for r in everybody if not r.is_late), default=math.inf)
        whole = Features(self._budget, len(streams) + 1, 0, sum(r.num_known for r in streams), len(streams) + 1)
        return min(self.forecast.seconds(whole), MARGIN * shortest / 2)

    def _hopeful(
        self, prompts: Sequence[Request], streams: Sequence[Request], seconds: float, now: float
    ) -> set[Request]:
        """The prompts that can be on time, if passes take `seconds` and the streams get what they were promised."""
        promised = [r for r in prompts if now < r.due < math.inf and not r.is_late]
        if not promised:
            return set()
        per_pass = self._prompt_tokens(streams, seconds)
        kept: list[tuple[int, int, Request]] = []  # a heap: the longest first
        work = 0
        for request in sorted(promised, key=lambda r: r.due):
            heapq.heappush(kept, (-request.num_wanted, -request.arrival, request))
            work += request.num_wanted
            if per_pass == 0 or now + math.ceil(work / per_pass) * seconds > request.due:
                work += heapq.heappop(kept)[0]
        return {request for _, _, request in kept}

    def _prompt_tokens(self, streams: Sequence[Request], seconds: float) -> int:
        """Prompt tokens in a pass of `seconds`, beside the streams that it must serve."""
        shares = [min(1.0, seconds / (MARGIN * r.interval)) if r.interval else 0.0 for r in streams]
        served = math.ceil(sum(shares))
        read = int(sum(share * r.num_known for share, r in zip(shares, streams, strict=True)))
        beside = Features(served, served, read, read, served)
        return self.forecast.tokens_within(seconds, beside, start=0, most=max(self._budget - served, 0), rows=1)


def _divided(running: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Those that need only their newest token, and those that need more."""
    return [r for r in running if r.num_wanted == 1], [r for r in running if r.num_wanted > 1]
