"""A cost model that follows the machine: what passes take today, by what they took just now.

A cost model is fitted in a quiet minute; memory changes its speed, neighbours come and go. One factor over the whole
model is corrected after each pass, by a small part of what it was off, on a logarithmic scale: a lasting change is
followed within some dozens of passes, a single disturbed pass moves it by little, and it cannot swing.
"""

from __future__ import annotations

import math

from splitfuse.core.cost_model import CostModel, Features

GAIN = 1 / 16
"""Of the miss, that a pass corrects."""
MOST = math.log(1.5)
"""A single miss counts as no larger: a pass that the system held up says little about the next."""
BOUND = math.log(32.0)
"""The factor and its inverse stay within this: beyond it the model is of another machine."""


class Forecast:
    """Predicted seconds, corrected as it goes."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._log_factor = 0.0

    @property
    def factor(self) -> float:
        """How many times longer passes take than the cost model says."""
        return math.exp(self._log_factor)

    def seconds(self, features: Features) -> float:
        """The time of a pass."""
        return self.cost.seconds(features) * self.factor

    def tokens_within(self, seconds: float, features: Features, *, start: int, most: int, rows: int = 0) -> int:
        """See CostModel."""
        return self.cost.tokens_within(seconds / self.factor, features, start=start, most=most, rows=rows)

    def observe(self, features: Features, seconds: float) -> None:
        """A pass has taken so long."""
        predicted = self.seconds(features)
        if seconds > 0.0 and predicted > 0.0:
            miss = math.log(seconds / predicted)
            moved = self._log_factor + GAIN * max(-MOST, min(MOST, miss))
            self._log_factor = max(-BOUND, min(BOUND, moved))
