"""A cost model that follows the machine: what steps take today, by what they took just now.

A cost model is fitted in a quiet minute; memory changes its speed, neighbours come and go, and some take memory, others
arithmetic. So there are two factors, one for the floor of a step, where it waits for the weights, and one for all that
it takes beyond. After each step both are corrected by a small part of what it was off, on a logarithmic scale, each by
its share in the step and a little of the other's: what is learned of short steps is mostly, not only, theirs.

The correction is a normalized LMS filter (Widrow and Hoff, 1960; Nagumo and Noda, 1967) on the logarithm: the next step
of the same kind is off by 1 - GAIN of what this one was. So a lasting change is followed within some dozens of steps,
a single disturbed pass moves little, and nothing swings.

What is left of a miss is chance. How much of it there is decides how near to a due time a step may be planned:
`margin` follows the quantile IN_TIME of the misses, a step up for each step beyond it, a small one down for each within
(Robbins and Monro, 1951).
"""

from __future__ import annotations

import math
from statistics import NormalDist

from splitfuse.core.slo.cost_model import CostModel, Features

GAIN = 1 / 16
"""Of the miss, that a step corrects."""
COMMON = 1 / 4
"""What both factors move together, beside their shares in the step."""
MOST = math.log(1.5)
"""A single miss counts as no larger: a step that the system held up says little about the next."""
BOUND = math.log(32.0)
"""The factors and their inverses stay within this: beyond it the model is of another machine."""
IN_TIME = 0.99
"""Of the steps, that are to end within the time they were planned for."""
LARGEST_MARGIN, SMALLEST_MARGIN = 0.9, 0.7
"""Bounds of `LatencyPredictor.margin`. Where passes scatter more than the lower one allows, it is better to break a
promise now and then than to make all steps still shorter.
"""
MARGIN_GAIN = 1 / 64
"""How far a step that took longer than allowed moves the margin, on a logarithmic scale. One that did not moves it back
by a hundredth of that: some 1,600 passes from the smallest margin to the largest. A machine that has become slower
counts too, until the correction has followed.
"""


class LatencyPredictor:
    """Predicted seconds, corrected as it goes."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._log_floor = self._log_beyond = 0.0
        self._log_over = _within_margins(NormalDist().inv_cdf(IN_TIME) * cost.noise)  # longer than predicted

    @property
    def factors(self) -> tuple[float, float]:
        """How many times longer the floor of a step takes than the cost model says, and what it takes beyond."""
        return math.exp(self._log_floor), math.exp(self._log_beyond)

    @property
    def margin(self) -> float:
        """Of the time until a step must have ended, the part that it may be predicted to take."""
        return math.exp(-self._log_over)

    def seconds(self, features: Features) -> float:
        """The time of a step."""
        floor, beyond = self.factors
        return floor * self.cost.floor + beyond * (self.cost.seconds(features) - self.cost.floor)

    def tokens_within(self, seconds: float, features: Features, *, start: int, most: int, rows: int = 0) -> int:
        """See CostModel."""
        floor, beyond = self.factors
        calibrated = self.cost.floor + (seconds - floor * self.cost.floor) / beyond
        return self.cost.tokens_within(calibrated, features, start=start, most=most, rows=rows)

    def observe(self, features: Features, seconds: float) -> float:
        """A step has taken so long. What was predicted of it, before it was known."""
        predicted = self.seconds(features)
        if seconds <= 0.0 or predicted <= 0.0:
            return predicted
        miss = math.log(seconds / predicted)
        floor = self.factors[0] * self.cost.floor / predicted  # its share
        beyond = 1.0 - floor
        step = GAIN * _clamped(miss, -MOST, MOST) / (floor * (floor + COMMON) + beyond * (beyond + COMMON))
        self._log_floor = _clamped(self._log_floor + step * (floor + COMMON), -BOUND, BOUND)
        self._log_beyond = _clamped(self._log_beyond + step * (beyond + COMMON), -BOUND, BOUND)
        # Passes of little but the floor are short, and planned far from any due time.
        change = MARGIN_GAIN * beyond * (IN_TIME if miss > self._log_over else IN_TIME - 1.0)
        self._log_over = _within_margins(self._log_over + change)
        return predicted


def _within_margins(log_over: float) -> float:
    return _clamped(log_over, -math.log(LARGEST_MARGIN), -math.log(SMALLEST_MARGIN))


def _clamped(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))
