"""Plans before deadlines: how long steps may be, how many prompt tokens they take, and which prompts are in time.

`DeadlinePolicy` asks it for each step, and admission (admission.py) for a request that may be rejected. It looks, and
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from splitfuse.core.request import Priority, Request
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.decode_load import DecodeLoad
from splitfuse.core.slo.fewest_late import ON_TIME_ONLY_SHARE, FewestLate
from splitfuse.core.slo.latency_predictor import LatencyPredictor

STEP_PER_TTFT = 1 / 16
"""Longest step, as a fraction of the median TTFT target: a new request waits for the step in flight."""
KEPT_THROUGHPUT = 0.9
"""Minimum prefill throughput to keep when steps are shortened to STEP_PER_TTFT, relative to full-budget steps."""
WHOLE_ITL_GAIN = 1.25
"""Minimum gain in prefill throughput for which a step takes a whole ITL target instead of half of it."""
MIN_THROUGHPUT = 1 / 4
"""Minimum prefill throughput which an ITL target must leave to shorten steps, relative to full-budget steps."""


class StepLimit(NamedTuple):
    """Limits how long a step may be, and says whose deadlines bound it."""

    seconds: float
    priority: Priority
    """Highest priority which has prefills; lower decodes do not bound steps."""
    shortest_itl: float = 0.0
    """Shortest ITL target that is met together with them; infinity if none can be."""

    def heeds(self, decode: Request) -> bool:
        """Return whether the deadline of a decode bounds the step: it is not late, not of a lower priority, and its
        ITL target can be met.
        """
        slo = decode.slo
        return not slo.missed and decode.priority <= self.priority and (slo.itl_target or 0.0) >= self.shortest_itl


class DeadlinePlanner:
    """Plans with predicted times. Decodes are running requests which need only their newest token; prefills need more,
    waiting ones included.
    """

    def __init__(self, predictor: LatencyPredictor, *, token_budget: int) -> None:
        self.predictor = predictor
        self._token_budget = token_budget

    def step_limit(
        self, decodes: Sequence[Request], prefills: Sequence[Request], *, arriving: Sequence[Request] = ()
    ) -> StepLimit:
        """Return how long a step may be. It is the shortest of:

        - half of the shortest ITL target of `decodes` and `arriving`, so that a decode left out of one step is in time
          with the next; or all of that target, if prefills gain WHOLE_ITL_GAIN by it;
        - what a step takes that uses the whole token budget;
        - about STEP_PER_TTFT of the median TTFT target, as far as prefills keep KEPT_THROUGHPUT.

        ITL targets that do not count: those of requests that have missed their SLO, or whose priority is below the
        highest of `prefills`; and those that would leave prefills less than MIN_THROUGHPUT, unless the request is
        `on_time_only`.
        """
        num_rows = len(decodes) + 1
        full_step = StepFeatures(self._token_budget, num_rows, 0, sum(r.num_tokens for r in decodes), num_rows)
        longest = self.predictor.seconds(full_step)
        priority = min((r.priority for r in prefills), default=Priority.LOW)
        any_itl = StepLimit(longest, priority)
        paced = [r for r in (*decodes, *arriving) if r.slo.itl_target and any_itl.heeds(r)]
        load = DecodeLoad(decodes)

        def throughput(seconds: float) -> float:
            return self.prefill_tokens(load, seconds) / seconds

        full_throughput = throughput(longest)
        ttft_targets = [r.slo.ttft_target for r in (*decodes, *prefills) if r.slo.ttft_target < math.inf]
        wanted = STEP_PER_TTFT * median(ttft_targets) if ttft_targets else math.inf
        while longest > wanted and 0 < KEPT_THROUGHPUT * full_throughput <= throughput(longest / 2):
            longest /= 2
        safety_factor = self.predictor.safety_factor
        for itl_target, can_yield in sorted({(r.slo.itl_target or math.inf, not r.on_time_only) for r in paced}):
            half, whole = (min(longest, safety_factor * itl_target / steps) for steps in (2, 1))
            best = whole if throughput(whole) >= WHOLE_ITL_GAIN * throughput(half) else half
            if not can_yield or throughput(best) >= MIN_THROUGHPUT * full_throughput:
                return StepLimit(best, priority, itl_target)
        return StepLimit(longest, priority, math.inf if paced else 0.0)

    def prefill_tokens(self, load: DecodeLoad, seconds: float) -> int:
        """Return the prompt tokens that fit a step of `seconds` together with the decodes that it must serve."""
        decodes = load.within(seconds, safety_factor=self.predictor.safety_factor)
        most = max(self._token_budget - decodes.tokens, 0)
        return self.predictor.tokens_within(seconds, decodes, start=0, most=most, rows=1)

    def feasible(
        self, prefills: Sequence[Request], load: DecodeLoad, *, seconds: float, now: float, share: float = 1.0
    ) -> set[Request]:
        """Return the prefills that can meet their deadlines, if steps take `seconds`, decodes meet their ITL targets,
        and prefills get a `share` of what is left.

        By the rule of Moore and Hodgson (Management Science, 1968), which leaves as few late as possible: take them in
        the order of their deadlines, and whenever one would be late drop the longest; among several owners', that of
        the owner that would have had most.
        """
        candidates = [r for r in prefills if now < r.slo.deadline < math.inf and not r.slo.missed]
        if not candidates:
            return set()
        per_step = share * self.prefill_tokens(load, seconds)
        found: set[Request] = set()
        tokens = {r: r.num_unscheduled for r in prefills}
        above = 0  # tokens of prefills of higher priorities, which come first in any case
        for priority in sorted({r.priority for r in prefills}):
            chosen = FewestLate()
            of_priority = (r for r in candidates if r.priority == priority)
            for request in sorted(of_priority, key=lambda r: r.slo.deadline):
                chosen.add(request, tokens[request])
                capacity = (request.slo.deadline - now) // seconds * per_step
                if request.on_time_only:
                    while chosen.num_yielding and above + chosen.work > ON_TIME_ONLY_SHARE * capacity:
                        chosen.drop()
                if above + chosen.work > capacity:
                    chosen.drop()
            found |= chosen.requests
            above += sum(count for r, count in tokens.items() if r.priority == priority)
        return found
