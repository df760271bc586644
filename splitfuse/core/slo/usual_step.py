"""Chooses how long steps are where no deadline says it: by the goodput of the requests that arrive meanwhile.

A request that arrives during a step waits for its end. It is in time if what it waits is at most its *margin*: its TTFT
target, less what its own prompt takes and those in time before it. So the step could have been longer, or should have
been shorter, by as many times as its margin is longer or shorter than its wait. Each of the newest requests says how
long its step could have been; the longer steps are, the fewer of such requests are in time, and the more are served.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable

from splitfuse.core.slo.work_times import EFFICIENCY, MIN_EFFICIENCY, WorkTimes

MOST_LOOKED_AT = 32
"""Number of requests that a plan goes by at most: of the newest that came, of the newest that ended, and of the prompts
of a priority those with the first deadlines, since those of later ones come nearer."""


class Arrivals:
    """Holds, for each of the newest requests, how long the step that it waited for could have been."""

    def __init__(self) -> None:
        self.longest_steps: deque[float] = deque(maxlen=MOST_LOOKED_AT)
        """Lengths in seconds; infinity for a request that waited for no step, or has no TTFT target."""
        self._waiting: list[tuple[float, float]] = []  # when they came, and their margins
        self._planned_at = 0.0

    def accept(self, *, arrival_time: float, margin: float) -> None:
        """Take note of a new request, which can wait `margin` seconds: it waits for the next plan. It counts even if it
        is ended before that: others come as it did.
        """
        self._waiting.append((arrival_time, margin))

    def plan(self, now: float) -> None:
        """Take note of a plan, which has all new requests: the step before it lasted since the plan before it."""
        length = now - self._planned_at
        for arrival_time, margin in self._waiting:
            waited = min(now - arrival_time, length)
            longest = max(margin, 0.0)
            self.longest_steps.append(longest * length / waited if waited > 0.0 else math.inf if longest else 0.0)
        self._waiting.clear()
        self._planned_at = now


def usual_step(work_times: WorkTimes, longest_steps: Iterable[float]) -> float:
    """Return the seconds of a step without deadlines to meet: of its bounds and `longest_steps` between them, that with
    the highest goodput, the longest of those that are equally good.
    """
    ordered = sorted(longest_steps)
    least, most = work_times.efficient_step(MIN_EFFICIENCY), work_times.efficient_step(EFFICIENCY)
    between = ordered[bisect_right(ordered, least) : bisect_left(ordered, most)]
    best, goodput = most, 0.0
    for seconds in (least, *between, most):
        in_time = len(ordered) - bisect_left(ordered, seconds)
        if (its_goodput := work_times.efficiency(seconds) * in_time) >= goodput:
            best, goodput = seconds, its_goodput
    return best
