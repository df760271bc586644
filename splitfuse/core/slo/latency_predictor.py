"""Predicts what steps take today: a cost model that follows the machine by the steps just measured.

A cost model is estimated in a moment at the start, or fitted in a quiet minute; memory changes its speed, neighbours
come and go, and some use memory, others arithmetic. So there are two factors, one for the floor of a step, where it
waits for the weights, and one for all that it takes beyond. After each step both are corrected by a small part of the
error, on a logarithmic scale, each by its share of the step.

The correction is a normalized LMS filter (Widrow and Hoff, 1960; Nagumo and Noda, 1967) on the logarithm: the error of
the next step of the same kind is 1 - GAIN of this one's. So a lasting change is followed within some dozens of steps, a
single disturbed step moves little, and nothing oscillates.

What remains of the error is chance. How large it is decides how close to a deadline a step may be planned:
`safety_factor` follows the quantile IN_TIME of the errors, a step down for each one beyond it, a small step up for each
one within (Robbins and Monro, 1951).
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

from splitfuse.core.slo.cost_model import MAX_COEFFICIENT, CostModel, StepCounts, StepFeatures, StepTimes

GAIN = 1 / 16
"""Fraction of the error which one step corrects."""
IN_TIME = 0.99
"""Fraction of the steps which are to end within the time they were planned for."""
MAX_SAFETY_FACTOR, MIN_SAFETY_FACTOR = 0.97, 0.7
"""Bounds of `LatencyPredictor.safety_factor`. With more noise than the lower one allows for, missing
a deadline now and then is better than making all steps still shorter.
"""
MAX_ERROR = -math.log(MIN_SAFETY_FACTOR)
"""Bound on the logarithm of a single error, which is what plans allow for at most: a step that was held up for longer
says little about the next.
"""
SAFETY_GAIN = 1 / 64
"""Decrease of the logarithm of the safety factor by a step which took longer than allowed. One which did not moves it
back by a hundredth of that: some 1,600 steps from the smallest factor to the largest.
"""

MAX_FACTOR = math.log(MAX_COEFFICIENT)
"""Bound on the logarithms of the factors: those of a cost model whose steps take no time would grow for ever."""
MIN_SECONDS = 1e-9
"""Shortest time that is predicted of a step: plans divide by it, and a cost model may say that a step takes none."""


class LatencyPredictor:
    """Predicts the seconds of steps, and corrects itself by their measured times."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.num_observed = 0
        """Number of steps that it was corrected by."""
        self._log_floor = self._log_beyond = 0.0
        self.factors = 1.0, 1.0
        """How many times longer than the cost model says the floor of a step takes, and the rest of it."""
        self._log_over = _within_bounds(NormalDist().inv_cdf(IN_TIME) * cost.noise)  # how much longer than predicted

    @property
    def corrected(self) -> CostModel:
        """Return the cost model with both factors in it."""
        floor, beyond = self.factors
        return replace(self.cost.slower(beyond), floor=floor * self.cost.floor)

    @property
    def times(self) -> StepTimes:
        """Return what it predicts by now."""
        return StepTimes(self.cost, self.factors, self.safety_factor)

    @property
    def safety_factor(self) -> float:
        """Return the fraction of the time until a deadline which a step may be predicted to take."""
        return math.exp(-self._log_over)

    def seconds(self, features: StepFeatures) -> float:
        """Return the predicted time of a step."""
        floor, beyond = self.factors
        seconds = floor * self.cost.floor + beyond * (self.cost.seconds(features) - self.cost.floor)
        return max(seconds, MIN_SECONDS)

    def tokens_within(self, seconds: float, step: StepCounts, start: int, most: int) -> int:
        """See CostModel."""
        floor, beyond = self.factors
        calibrated = self.cost.floor + (seconds - floor * self.cost.floor) / beyond
        return self.cost.tokens_within(calibrated, step, start, most)

    def observe(self, features: StepFeatures, seconds: float) -> float:
        """Correct the factors by the measured time of a step. Returns what was predicted of it before."""
        predicted = self.seconds(features)
        if seconds <= 0.0:
            return predicted
        self.num_observed += 1
        error = math.log(seconds / predicted)
        floor = self.factors[0] * self.cost.floor / predicted  # its share
        beyond = 1.0 - floor
        gain = GAIN * _clamped(error, -MAX_ERROR, MAX_ERROR) / (floor * floor + beyond * beyond)
        self._log_floor = _clamped(self._log_floor + gain * floor, -MAX_FACTOR, MAX_FACTOR)
        self._log_beyond = _clamped(self._log_beyond + gain * beyond, -MAX_FACTOR, MAX_FACTOR)
        self.factors = math.exp(self._log_floor), math.exp(self._log_beyond)
        # Steps of little but the floor are short, and planned far from any deadline.
        change = SAFETY_GAIN * beyond * (IN_TIME if error > self._log_over else IN_TIME - 1.0)
        self._log_over = _within_bounds(self._log_over + change)
        return predicted


def _within_bounds(log_over: float) -> float:
    return _clamped(log_over, -math.log(MAX_SAFETY_FACTOR), -math.log(MIN_SAFETY_FACTOR))


def _clamped(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))
