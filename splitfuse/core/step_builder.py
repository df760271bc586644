"""A step that is being composed: who was granted what, and how much more it takes."""

from __future__ import annotations

import math

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import Features
from splitfuse.core.slo.latency_predictor import LatencyPredictor

ALIGNMENT = 16
"""Tokens: chunks that are cut evenly are multiples of it, as the tiles of kernels are."""


class StepBuilder:
    """Tokens granted so far, in the order of the claims, and what is left of two budgets: tokens, and with a forecast
    the seconds that a step may take.
    """

    def __init__(self, budget: int, forecast: LatencyPredictor | None = None, *, now: float = 0.0) -> None:
        self.left = budget
        self.seconds = math.inf
        self._now = now
        self.granted: dict[Request, int] = {}
        self._budget = budget
        self._forecast = forecast
        self._features = Features()
        self._kept_tokens = 0
        self._kept_share = 0.0

    def keep(self, share: float, *, most: int) -> None:
        """Hold back a share of both, `most` tokens at most and one at least, until `release`."""
        self._kept_share, self._kept_tokens = share, min(max(1, int(share * self._budget)), most)
        self.left -= self._kept_tokens

    def release(self) -> None:
        """Give back what was held."""
        self.left += self._kept_tokens
        self._kept_tokens, self._kept_share = 0, 0.0

    def takes(self, request: Request, *, at_least: int = 0) -> int:
        """How many tokens of a request the step takes, `at_least` of them whatever time they need."""
        most = min(request.num_wanted, max(self.left, 0))
        if self._forecast is None or self.seconds == math.inf:
            return most
        seconds, start = self.seconds * (1.0 - self._kept_share), request.num_scheduled
        fitting = self._forecast.tokens_within(seconds, self._features, start=start, most=most, rows=1)
        return min(most, max(self._evenly(request, fitting), at_least))

    def _evenly(self, request: Request, most: int) -> int:
        """A prompt that needs several steps of `most` tokens gets as many equal chunks instead, unless it would be
        late if one more were needed: their steps are shorter, and no crumb waits for the weights all alone.
        """
        if not 0 < most < request.num_wanted:
            return most
        steps = math.ceil(request.num_wanted / most)
        if self._now + (steps + 1) * self.seconds > request.due:
            return most
        return min(most, math.ceil(request.num_wanted / steps / ALIGNMENT) * ALIGNMENT)

    def grant(self, request: Request, count: int) -> None:
        self.granted[request] = count
        self.left -= count
        self._features = self._features.plus(start=request.num_scheduled, count=count, rows=1)

    @property
    def features(self) -> Features:
        """Of all that is granted."""
        return self._features

    def revoke(self, request: Request) -> None:
        self.left += self.granted.pop(request, 0)
        self._features = Features()
        for other, count in self.granted.items():
            self._features = self._features.plus(start=other.num_scheduled, count=count, rows=1)
