"""Tracks the SLO of one request: its targets, its next deadline, and how well it has been met so far."""

from __future__ import annotations

import math

from splitfuse.core.slo.gaps import gap_targets
from splitfuse.core.slo.targets import NO_SLO, SloTargets, SloViolation

MISSED_ITL_FACTOR = 2.0
"""Factor by which the gap to aim at is relaxed once a request has missed its SLO."""


class RequestSlo:
    """Tracks the SLO of one request. All times are on the scheduler's clock.

    >>> slo = RequestSlo(SloTargets(ttft=1.0, tpot=0.1), arrival_time=10.0, num_prompt_tokens=512)
    >>> slo.deadline  # the first token's
    11.0
    >>> slo.observe_token(10.5)
    >>> slo.observe_token(10.54)
    >>> slo.deadline  # the third token's: the second came 0.06 s early
    10.7
    """

    __slots__ = (
        *("targets", "exists", "arrival_time", "ttft_target", "deadline", "missed", "steps_skipped", "itl_target"),
        *("num_gaps", "gap_seconds", "_gaps", "_newest_token_time", "_ttft_violation"),
    )

    def __init__(self, targets: SloTargets = NO_SLO, *, arrival_time: float = 0.0, num_prompt_tokens: int) -> None:
        self.targets = targets
        self.exists = targets != NO_SLO
        """True if the request has any target."""
        self.arrival_time = arrival_time
        self.ttft_target = targets.ttft_target(num_prompt_tokens)
        """Seconds from arrival to the first token; infinity without a TTFT target."""
        self.deadline = arrival_time + self.ttft_target
        """Time by which its next token keeps the SLO; infinity if any time does."""
        self.missed = False
        """True once a target has been missed for good."""
        self.steps_skipped = 0
        """Steps since the last one that computed tokens of the request."""
        self.itl_target = min((each for each in (targets.itl, targets.tpot) if each is not None), default=None)
        """Seconds from token to token to aim at; None without a target for them."""
        self._gaps = gap_targets(targets)
        self.num_gaps = 0
        """Number of gaps between tokens so far."""
        self.gap_seconds = 0.0
        """Sum of these gaps in seconds."""
        self._newest_token_time: float | None = None
        self._ttft_violation: SloViolation | None = None

    @property
    def met(self) -> bool | None:
        """Return whether every target is met with the tokens so far; None without a target."""
        if not self.exists:
            return None
        return not self.missed and not any(gap.is_missed for gap in self._gaps)

    @property
    def violation(self) -> SloViolation | None:
        """Return the targets that are missed with the tokens so far, and by how much; None if none is."""
        if not self.missed and self.met is not False:
            return None
        found = self._ttft_violation or SloViolation()
        for gap in self._gaps:
            if gap.is_missed:
                found = gap.violation(found)
        return found

    def expect(self, num_gaps: int, mean: float) -> None:
        """Assume that the answer has at least `num_gaps` gaps, of `mean` seconds on average."""
        for gap in self._gaps:
            gap.expect(num_gaps, mean)

    def observe_tokens(self, now: float, count: int) -> None:
        """Record that tokens have been generated at once: from each to the next it takes no time."""
        for _ in range(count if self.exists else 0):
            self.observe_token(now)

    def observe_token(self, now: float) -> None:
        """Record that a token has been generated: compare it with its target, and set the deadline of the next one."""
        if self._newest_token_time is None:
            if now > self.deadline:
                self._ttft_violation = SloViolation(now - self.arrival_time, self.ttft_target)
                self.missed = True
        else:
            seconds = now - self._newest_token_time
            self.num_gaps += 1
            self.gap_seconds += seconds
            for gap in self._gaps:
                gap.add(seconds)
                self.missed |= gap.is_lost
        self._newest_token_time = now
        if self.itl_target is None:
            self.deadline = math.inf
        elif self.missed:
            self.deadline = now + MISSED_ITL_FACTOR * self.itl_target
        else:
            self.deadline = now + min(gap.longest_next() for gap in self._gaps)
