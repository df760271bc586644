"""States the SLO of a request. How the gaps between its tokens are judged is in core/slo/gaps.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from splitfuse.config.values import MAX_TARGET, MIN_TARGET, PER_TOKEN, parse_itl, parse_seconds
from splitfuse.errors import InvalidRequestError, brief


@dataclass(frozen=True)
class SloTargets:
    """States the latency targets of a request, in seconds; None is no target. They are met if the first token comes in
    time, and if the gaps between tokens keep `itl` and `tpot`, each by its own measure.

        SloTargets(ttft=1.0, itl=0.1)                      # at each token, the moving average of the gaps
        SloTargets(ttft=1.0, itl=0.1, itl_percentile=99)   # 99 of 100 gaps of the answer
        SloTargets(ttft=1.0, tpot=0.05)                    # the mean of the gaps of the answer

    Raises InvalidRequestError for a target which is not a number from MIN_TARGET to MAX_TARGET, and for a percentile
    without `itl` or not between 0 and 100.
    """

    ttft: float | None = None
    """Time from arrival to the first token."""
    itl: float | None = None
    """Time from each token to the next."""
    ttft_per_token: float | None = None
    """Time to the first token for each token of the prompt; added to `ttft` if both are given."""
    tpot: float | None = None
    """Time per output token after the first: the mean over the whole answer."""
    itl_percentile: float | None = None
    """Percentage of the gaps of an answer that must be at most `itl`; None judges their moving average instead."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "itl_percentile":
                continue
            if not (_is_number(value) and MIN_TARGET <= value <= MAX_TARGET):
                raise InvalidRequestError(
                    f"{field.name} must be a number of seconds from {MIN_TARGET:g} to {MAX_TARGET:.0f}, such as 0.25, "
                    f"not {brief(value)}",
                    parameter=field.name,
                )
        percentile = self.itl_percentile
        if percentile is not None and not (_is_number(percentile) and 0 < percentile < 100):
            raise InvalidRequestError(
                f"itl_percentile must be a number between 0 and 100, such as 99, not {brief(percentile)}",
                parameter="itl_percentile",
            )
        if percentile is not None and self.itl is None:
            raise InvalidRequestError(
                "itl_percentile says how the gaps are compared with itl, which is not given: give both",
                parameter="itl_percentile",
            )

    @classmethod
    def parse(cls, ttft: str | None = None, itl: str | None = None, tpot: str | None = None) -> SloTargets:
        """Parse targets as settings write them: `1s` or `2ms/token`, `250ms` or `250ms/p99`, and `100ms`. Raises
        ConfigError.
        """
        first = None if ttft is None else parse_seconds("ttft", ttft.removesuffix(PER_TOKEN))
        is_per_token = ttft is not None and ttft.endswith(PER_TOKEN)
        gap, percentile = (None, None) if itl is None else parse_itl(itl)
        return cls(
            ttft=None if is_per_token else first,
            itl=gap,
            ttft_per_token=first if is_per_token else None,
            tpot=None if tpot is None else parse_seconds("tpot", tpot),
            itl_percentile=percentile,
        )

    def ttft_target(self, num_prompt: int) -> float:
        """Return the seconds from arrival to the first token of a prompt of that length; infinity without a target."""
        if self.ttft is None and self.ttft_per_token is None:
            return math.inf
        return (self.ttft or 0.0) + (self.ttft_per_token or 0.0) * num_prompt


NO_SLO = SloTargets()
SLO_DISABLED = (
    "SLO scheduling is disabled: start the engine with ttft, itl, tpot or enable_slo (--ttft, --itl, --tpot, "
    "--enable-slo)"
)


@dataclass(frozen=True)
class SloViolation:
    """Holds the targets that a request missed, with what was measured, in seconds."""

    ttft: float | None = None
    """Time to first token; None if that target was met."""
    ttft_target: float | None = None
    average_gap: float | None = None
    """Largest moving average of the gaps between tokens; None if no ITL target was missed by it."""
    longest_gap: float = 0.0
    """Longest single gap until then."""
    itl_target: float | None = None
    percent_in_time: float | None = None
    """Percentage of the gaps which were at most `itl_target`; None if no percentile of them was missed."""
    itl_percentile: float | None = None
    mean_gap: float | None = None
    """Mean of the gaps; None if the TPOT target was met."""
    tpot_target: float | None = None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
