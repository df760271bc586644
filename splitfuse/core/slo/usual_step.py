"""Chooses how long steps are where no deadline says it: as the most of the requests that arrive meanwhile are in time.

A request that arrives during a step waits for its end. It is in time if what is left of the step is at most its
*margin*: its TTFT target, less what its own prompt takes. Of the requests with one margin that arrive at any moment of
a step of s seconds, min(1, margin / s) are; and the longer steps are, the more of them are served. The product is
goodput.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from splitfuse.core.slo.feasibility import Feasibility

EFFICIENCY, MIN_EFFICIENCY = 0.975, 0.75
"""Throughput of a step, relative to the highest, for which steps are as long as they are without deadlines to meet; and
the least that they are shortened to for TTFT targets."""


def usual_step(outlook: Feasibility, margins: Sequence[float]) -> float:
    """Return the seconds of a step without deadlines to meet, for requests that arrive with these margins: the best of
    the margins and of the bounds, and the longest of those that are equally good.
    """
    ordered = sorted(max(margin, 0.0) for margin in margins)
    sums = [0.0, *accumulate(ordered)]
    least, most = outlook.efficient_step(MIN_EFFICIENCY), outlook.efficient_step(EFFICIENCY)
    between = ordered[bisect_right(ordered, least) : bisect_right(ordered, most)]
    best, goodput = most, 0.0
    for seconds in (least, *between, most):
        index = bisect_right(ordered, seconds)
        in_time = sums[index] / seconds + (len(ordered) - index)
        if (its_goodput := outlook.efficiency(seconds) * in_time) >= goodput:
            best, goodput = seconds, its_goodput
    return best
