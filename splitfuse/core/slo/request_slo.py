"""Tracks the SLO of one request: its targets, its next deadline, and how well it has been met so far."""

from __future__ import annotations

import math
from dataclasses import replace

from splitfuse.core.slo.targets import NO_SLO, MovingAverage, SloTargets, SloViolation

MISSED_ITL_FACTOR = 2.0
"""Factor by which the ITL target of a request is relaxed once it has missed its SLO."""


class RequestSlo:
    """Tracks the SLO of one request. All times are on the scheduler's clock.

    >>> slo = RequestSlo(SloTargets(ttft=1.0, itl=0.1), arrival_time=10.0, num_prompt_tokens=512)
    >>> slo.deadline  # the first token's
    11.0
    >>> slo.observe_token(10.8)
    >>> slo.deadline  # the second token's
    10.9
    """

    def __init__(self, targets: SloTargets = NO_SLO, *, arrival_time: float = 0.0, num_prompt_tokens: int) -> None:
        self.targets = targets
        self.arrival_time = arrival_time
        self.ttft_target = targets.ttft_target(num_prompt_tokens)
        """Seconds from arrival to the first token; infinity without a TTFT target."""
        self.deadline = arrival_time + self.ttft_target
        """Time at which its next token is due; infinity without a target for it."""
        self.missed = False
        """True once any target has been missed."""
        self.violation: SloViolation | None = None
        """Targets that were missed, and by how much."""
        self.steps_skipped = 0
        """Steps since the last one that computed tokens of the request."""
        self._newest_token_time: float | None = None
        self._average_gap = MovingAverage()
        self._longest_gap = 0.0

    @property
    def exists(self) -> bool:
        """Return whether the request has any target."""
        return self.targets != NO_SLO

    @property
    def met(self) -> bool | None:
        """Return whether every target has been met so far; None without a target."""
        return not self.missed if self.exists else None

    @property
    def itl_target(self) -> float | None:
        """Return the seconds between tokens to aim at, relaxed once the SLO is missed; None without an ITL target."""
        if self.targets.itl is None:
            return None
        return self.targets.itl * (MISSED_ITL_FACTOR if self.missed else 1.0)

    def observe_token(self, now: float) -> None:
        """Record that a token has been generated: compare it with its target, and set the deadline of the next one."""
        if self._newest_token_time is None:
            if now > self.deadline:
                self.violation = SloViolation(now - self.arrival_time, self.ttft_target)
        elif self.targets.itl is not None:
            self._observe_gap(now - self._newest_token_time, self.targets.itl)
        self.missed = self.violation is not None
        self._newest_token_time = now
        self.deadline = math.inf if self.itl_target is None else now + self.itl_target

    def _observe_gap(self, gap: float, itl: float) -> None:
        self._longest_gap = max(gap, self._longest_gap)
        average = self._average_gap.add(gap)
        if average > itl:
            before = self.violation or SloViolation()
            largest = max(average, before.average_gap or 0.0)
            self.violation = replace(before, average_gap=largest, longest_gap=self._longest_gap, itl_target=itl)
