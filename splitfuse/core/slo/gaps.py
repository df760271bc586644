"""Judges the gaps between the tokens of a request, and says how long the next one may be.

A gap that was shorter than its target leaves slack: a later one may be longer, and a step may use that. How much
depends on the measure:

    moving average    at every token, the average of the gaps so far, recent ones weighing more, is at most the target.
                      DeepSpeed-FastGen's measure (arXiv 2401.08671, section 4.2).
    percentile        of all gaps of the answer, at least so many of a hundred are at most the target.
    mean              of all gaps of the answer: the time per output token of DistServe and Splitwise.

A moving average above its target has missed it for good. A percentile or a mean may be behind, and recover before the
answer ends: what can be made up for counts as slack, as far as the answer probably goes on (answers.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

from splitfuse.core.slo.targets import SloTargets, SloViolation

SPAN = 16
"""Span of the moving average of gaps, in tokens, as in the paper."""

ROUNDING = 1.0 + 1e-9
"""Factor by which a sum of gaps may exceed a target: a step may be planned to end exactly at a deadline."""


class MovingAverage:
    """Computes the exponential average of values that are added one by one, as pandas' `ewm(span=span).mean()`. The
    weight of a value falls by `1 - 2 / (span + 1)` with each one after it, and weights are normalized (`adjust=True`).
    """

    __slots__ = ("_keep", "_total", "_weight")

    def __init__(self, span: int = SPAN) -> None:
        self._keep = 1.0 - 2.0 / (span + 1.0)
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """Add a value. Returns the average with it."""
        self._total = self._total * self._keep + value
        self._weight = self._weight * self._keep + 1.0
        return self._total / self._weight

    def largest_next(self, average: float) -> float:
        """Return the value whose addition would make the average `average`."""
        return average * (self._weight * self._keep + 1.0) - self._total * self._keep


class GapTarget(ABC):
    """Judges the gaps of one request by one target."""

    def __init__(self, target: float) -> None:
        self.target = target
        """Seconds from each token to the next."""
        self.is_missed = False
        """True while the gaps so far miss the target, and for good once nothing can mend that."""
        self._num_expected, self._mean_expected = 0, math.inf

    @property
    def is_lost(self) -> bool:
        """Return whether the target is missed for good."""
        return False

    def expect(self, num_gaps: int, mean: float) -> None:
        """Assume that the answer has at least `num_gaps` gaps, of `mean` seconds on average."""
        self._num_expected, self._mean_expected = num_gaps, mean

    @abstractmethod
    def add(self, gap: float) -> None:
        """Take in the next gap, in seconds."""

    @abstractmethod
    def longest_next(self) -> float:
        """Return the seconds that the next gap may take for the target to be met with it, or with those that are
        expected after it. If it is behind and can only catch up over further ones this may be negative.
        """

    @abstractmethod
    def violation(self, before: SloViolation) -> SloViolation:
        """Return `before` with what was measured of this target, which is missed."""


class MovingAverageTarget(GapTarget):
    """Demands that the moving average of the gaps is at most the target at every token."""

    def __init__(self, target: float) -> None:
        super().__init__(target)
        self._average = MovingAverage()
        self._longest = self._largest_average = self._longest_when_missed = 0.0

    @property
    def is_lost(self) -> bool:
        return self.is_missed

    def add(self, gap: float) -> None:
        self._longest = max(self._longest, gap)
        average = self._average.add(gap)
        if average > self.target * ROUNDING:
            self.is_missed = True
            self._largest_average = max(self._largest_average, average)
            self._longest_when_missed = self._longest

    def longest_next(self) -> float:
        return self._average.largest_next(self.target)

    def violation(self, before: SloViolation) -> SloViolation:
        return replace(
            before,
            average_gap=self._largest_average,
            longest_gap=self._longest_when_missed,
            itl_target=self.target,
        )


class PercentileTarget(GapTarget):
    """Demands that `percentile` of a hundred gaps are at most the target, over the whole answer."""

    def __init__(self, target: float, percentile: float) -> None:
        super().__init__(target)
        self._percentile = percentile
        self._num_gaps = self._num_late = 0
        self._longest = 0.0

    def add(self, gap: float) -> None:
        self._num_gaps += 1
        self._num_late += gap > self.target
        self._longest = max(self._longest, gap)
        self.is_missed = self._num_late > self._num_allowed(self._num_gaps)

    def longest_next(self) -> float:
        num_gaps = max(self._num_gaps + 1, self._num_expected)
        return math.inf if self._num_late + 1 <= self._num_allowed(num_gaps) else self.target

    def violation(self, before: SloViolation) -> SloViolation:
        in_time = 100.0 * (1.0 - self._num_late / self._num_gaps)
        return replace(
            before,
            longest_gap=self._longest,
            itl_target=self.target,
            percent_in_time=in_time,
            itl_percentile=self._percentile,
        )

    def _num_allowed(self, num_gaps: int) -> int:
        return int(num_gaps * (100.0 - self._percentile) / 100.0 + 1e-9)


class MeanTarget(GapTarget):
    """Demands that the mean of the gaps is at most the target, over the whole answer."""

    def __init__(self, target: float) -> None:
        super().__init__(target)
        self._num_gaps = 0
        self._total = 0.0

    def add(self, gap: float) -> None:
        self._num_gaps += 1
        self._total += gap
        self.is_missed = self._total > self.target * self._num_gaps * ROUNDING

    def longest_next(self) -> float:
        later = max(self._num_expected - self._num_gaps - 1, 0) * max(self.target - self._mean_expected, 0.0)
        return self.target * (self._num_gaps + 1) - self._total + later

    def violation(self, before: SloViolation) -> SloViolation:
        return replace(before, mean_gap=self._total / self._num_gaps, tpot_target=self.target)


def gap_targets(targets: SloTargets) -> list[GapTarget]:
    """Return what judges the gaps of a request with these targets."""
    found: list[GapTarget] = []
    if targets.itl is not None and targets.itl_percentile is None:
        found.append(MovingAverageTarget(targets.itl))
    elif targets.itl is not None and targets.itl_percentile is not None:
        found.append(PercentileTarget(targets.itl, targets.itl_percentile))
    if targets.tpot is not None:
        found.append(MeanTarget(targets.tpot))
    return found
