"""States the SLO of a request, and how it is judged: by DeepSpeed-FastGen's measure (arXiv 2401.08671, section 4.2),
which forgives a long gap after shorter ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from splitfuse.config import MAX_TARGET, MIN_TARGET, PER_TOKEN, parse_seconds
from splitfuse.errors import InvalidRequestError, brief

SPAN = 16
"""Span of the moving average of gaps, in tokens, as in the paper."""


@dataclass(frozen=True)
class SloTargets:
    """States the latency targets of a request, in seconds; None is no target. They are met if the first token comes in
    time, and if at each token after it the MovingAverage of the gaps is at most `itl`.

        SloTargets(ttft=1.0, itl=0.1)

    Raises InvalidRequestError for a target which is not a number from MIN_TARGET to MAX_TARGET.
    """

    ttft: float | None = None
    """Time from arrival to the first token."""
    itl: float | None = None
    """Time from each token to the next. Steps are planned for every gap."""
    ttft_per_token: float | None = None
    """Time to the first token for each token of the prompt; added to `ttft` if both are given."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and MIN_TARGET <= value <= MAX_TARGET):
                raise InvalidRequestError(
                    f"{field.name} must be a number of seconds from {MIN_TARGET:g} to {MAX_TARGET:.0f}, such as 0.25, "
                    f"not {brief(value)}",
                    parameter=field.name,
                )

    @classmethod
    def parse(cls, ttft: str | None, itl: str | None) -> SloTargets:
        """Parse targets as settings write them: `1s` or `2ms/token`, and `250ms`. Raises ConfigError."""
        itl_seconds = None if itl is None else parse_seconds("itl", itl)
        if ttft is None:
            return cls(itl=itl_seconds)
        seconds = parse_seconds("ttft", ttft.removesuffix(PER_TOKEN))
        if ttft.endswith(PER_TOKEN):
            return cls(itl=itl_seconds, ttft_per_token=seconds)
        return cls(seconds, itl_seconds)

    def ttft_target(self, num_prompt: int) -> float:
        """Return the seconds from arrival to the first token of a prompt of that length; infinity without a target."""
        if self.ttft is None and self.ttft_per_token is None:
            return math.inf
        return (self.ttft or 0.0) + (self.ttft_per_token or 0.0) * num_prompt


NO_SLO = SloTargets()
SLO_DISABLED = "SLO scheduling is disabled: start the engine with ttft, itl or enable_slo (--ttft, --itl, --enable-slo)"


@dataclass(frozen=True)
class SloViolation:
    """Holds the targets that a request missed, with what was measured, in seconds."""

    ttft: float | None = None
    """Time to first token; None if that target was met."""
    ttft_target: float | None = None
    average_gap: float | None = None
    """Largest moving average of the gaps between tokens; None if the ITL target was met."""
    longest_gap: float = 0.0
    """Longest single gap when the average last exceeded the target."""
    itl_target: float | None = None


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
