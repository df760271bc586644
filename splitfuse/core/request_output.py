"""Says what a step, or an end from outside, has changed for a request."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.plan import DraftKind, Logprobs


class FinishReason(enum.StrEnum):
    """Says why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    MOVED = "moved"
    """It goes on at another engine: no client sees this."""
    ERROR = "error"


@dataclass(slots=True)
class RequestOutput:
    """Says what one step, or an abort, changed for one request: tokens are new since the last output."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    values: tuple[float, ...] = ()  # what PoolingParams ask for, with the last output
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_computed: int = 0  # leading positions whose keys and values are written
    num_drafted: int = 0  # tokens that were guessed; all of `token_ids` but the last were
    draft_kind: DraftKind = DraftKind.LOOKUP  # where these come from
    slo_met: bool | None = None  # so far; None: it has no SLO
    error: str | None = None
    retry_after: float | None = None  # rejected; retry after this many seconds (inf: never)
    latency_breakdown: LatencyBreakdown | None = None  # with the last output
