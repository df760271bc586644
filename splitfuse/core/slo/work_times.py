"""Says how many seconds the work of requests takes: by how much each makes a step longer.

Beyond the knee of the cost model a step takes a constant time and, in addition, its own time for every chunk. So the
work of requests adds up, whatever steps it is divided into.
"""

from __future__ import annotations

import math

from splitfuse.config.engine import MAX_TOKEN_BUDGET
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.latency_predictor import MIN_SECONDS, LatencyPredictor

EFFICIENCY, MIN_EFFICIENCY = 0.975, 0.75
"""Throughput of a step, relative to the highest, for which steps are as long as they are without deadlines to meet; and
the least that they are shortened to for TTFT targets, or come to beyond the knee."""


class WorkTimes:
    """Predicts the seconds of work, and of steps of some throughput."""

    def __init__(self, times: LatencyPredictor | StepTimes, *, token_budget: int = MAX_TOKEN_BUDGET) -> None:
        cost, (floor, beyond) = times.cost, times.factors
        self.floor = max(floor * cost.floor, MIN_SECONDS)
        """Seconds of a step of one decode."""
        full, knee = beyond * cost.per_token_beyond, cost.knee
        spread = min(full, self.floor / knee) if knee else full  # what a token of a full step takes of the floor
        self.at_knee = self.floor + beyond * cost.per_token * knee
        """Seconds of a step of as many tokens as the knee."""
        self.longest = self.at_knee if spread < MIN_EFFICIENCY * full else math.inf
        """Seconds of a step beyond which further tokens take longer than in a step of their own."""
        self._spread = spread
        self.overhead = max(self.floor - spread * knee, MIN_SECONDS)
        """Seconds of a full step that no token accounts for."""
        self._slope = beyond * cost.per_token
        self._per_token = max(self._slope + spread, MIN_SECONDS)
        self._token_budget = token_budget
        self._per_chunk = beyond * (cost.per_row + cost.per_request)
        self._per_pair, self._per_kv_token = beyond * cost.per_pair, beyond * cost.per_kv_token
        self._per_decode, self._per_position = self._per_token + self._per_chunk, self._per_pair + self._per_kv_token

    def efficient_step(self, efficiency: float) -> float:
        """Return the seconds of the shortest step whose tokens/s are that fraction of the most that steps can have."""
        share = efficiency * self._slope / self._per_token
        return max(self.overhead / (1.0 - efficiency), min(self.at_knee, self.floor / (1.0 - share)))

    def efficiency(self, seconds: float) -> float:
        """Return the tokens/s of a step of so many seconds, relative to the most that steps can have."""
        efficiency = 1.0 - self.overhead / seconds
        if seconds < self.at_knee and self._slope > 0.0:
            efficiency = min(efficiency, (1.0 - self.floor / seconds) * self._per_token / self._slope)
        return max(efficiency, 0.0)

    def seconds(self, request: Request) -> float:
        """Return how much longer a step becomes by all that a request needs."""
        start = max(request.num_scheduled, request.num_expected_cached)
        return self.seconds_of(start, request.num_tokens + request.num_output_placeholders - start)

    def seconds_of(self, start: int, count: int) -> float:
        """Return how much longer a step becomes by `count` tokens from position `start`."""
        return (
            self._per_token * count
            + self.overhead * ((count - 1) // self._token_budget)
            + self._per_chunk
            + self._per_pair * count * (start + (count + 1) / 2)
            + self._per_kv_token * (start + count)
        )

    def seconds_of_token(self, decode: Request) -> float:
        """Return how much longer a step becomes by the newest token of a request."""
        return self._per_decode + self._per_position * (decode.num_scheduled + 1)

    def with_floor(self, seconds: float) -> float:
        """Return the seconds of work, and what its last step takes longer if it has fewer tokens than the knee."""
        return seconds + max(self.floor - self.overhead - seconds * self._spread / self._per_token, 0.0)
