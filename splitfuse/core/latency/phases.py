"""Names the phases that the latency of a request is divided into."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from splitfuse.core.slo.targets import SloViolation


class LatencyPhase(enum.StrEnum):
    """Names what a request spent time on, in the order of its life.

    The front end measures READING, TOKENIZING and the phases from FROM_ENGINE on, the engine those between, and both
    TO_ENGINE: the engine from the time at which the request was sent.

    >>> LatencyPhase("no_slot").meaning
    'queued: max_num_seqs reached'
    """

    meaning: str
    """Description for users."""

    def __new__(cls, value: str, meaning: str) -> LatencyPhase:
        phase = str.__new__(cls, value)
        phase._value_, phase.meaning = value, meaning
        return phase

    READING = "reading", "reading the request"
    """Receiving the body from the client."""
    TOKENIZING = "tokenizing", "checking and tokenizing"
    """Validating the body, applying the chat template, tokenizing."""
    TO_ENGINE = "to_engine", "to the engine"
    """Transit to the engine."""
    JOINING = "joining", "waiting for the step in flight"
    """Waiting for the end of the step which was in flight when it arrived."""
    FETCHING = "fetching", "fetching KV blocks"
    """Waiting for KV blocks that another engine, or this one before, has computed."""
    NO_SLOT = "no_slot", "queued: max_num_seqs reached"
    """Queued: `max_num_seqs` requests were running."""
    NO_BLOCKS = "no_blocks", "queued: no KV blocks"
    """Queued: no free KV blocks."""
    NO_BUDGET = "no_budget", "queued: steps were full"
    """Queued: requests with an earlier claim used the whole token budget."""
    OUTRANKED = "outranked", "queued: behind other requests' SLOs"
    """Queued: newer requests had a better claim, or steps were kept short, to meet SLOs."""
    PREFILL = "prefill", "prefill"
    """Computing chunks of its prompt."""
    DECODE = "decode", "decode"
    """Computing its newest tokens."""
    CO_SCHEDULED = "co_scheduled", "in steps with others' chunks"
    """Share of other requests' chunks in the steps which computed this request."""
    PACED = "paced", "paced: ahead of its SLO"
    """Left out of steps because it was ahead of its ITL target."""
    LEFT_OUT = "left_out", "left out: steps were full"
    """Left out of steps whose token budget was used up."""
    LEFT_OUT_NO_BLOCKS = "left_out_no_blocks", "left out: no KV blocks"
    """Left out of steps for lack of a KV block."""
    PREEMPTED = "preempted", "preempted"
    """Queued again after its blocks were taken."""
    RECOMPUTED = "recomputed", "recomputed"
    """Recomputing tokens whose KV was lost by a preemption, or with another engine."""
    BETWEEN_STEPS = "between_steps", "between steps"
    """Engine overhead between two steps."""
    BETWEEN_ENGINES = "between_engines", "between two engines"
    """Waiting to go on, after its engine had died or was drained."""
    FROM_ENGINE = "from_engine", "results from the engine"
    """Results in transit from the engine, and waiting for the front end."""
    DETOKENIZING = "detokenizing", "detokenizing, writing the answer"
    """Detokenizing, and building the response or its events."""
    CLIENT = "client", "sending to the client"
    """Sending the response to the client, which may read slowly."""
    FAILED = "failed", "in an engine that failed"
    """Time in an engine which died, or which rejected the request."""


COMPUTING = frozenset({LatencyPhase.PREFILL, LatencyPhase.DECODE, LatencyPhase.RECOMPUTED})
"""Phases in which a step computes tokens of the request; the rest of that step counts as CO_SCHEDULED."""


BEFORE_ENGINE = (LatencyPhase.READING, LatencyPhase.TOKENIZING)
"""Phases of the front end before a request is sent to its engine."""
AFTER_ENGINE = (LatencyPhase.FROM_ENGINE, LatencyPhase.DETOKENIZING, LatencyPhase.CLIENT)
"""Phases of the front end after the engine's."""


@dataclass(frozen=True)
class LatencyBreakdown:
    """Says where the time of one finished request went: the seconds of `phases` add up to `closed` - `opened`."""

    opened: float
    closed: float
    phases: dict[LatencyPhase, float] = field(default_factory=dict)
    co_scheduled: tuple[tuple[str, int], ...] = ()
    """Ids of the requests with the most prompt tokens in the same steps, and how many, largest first."""
    num_preemptions: int = 0
    slo_violation: SloViolation | None = None
    """Targets that were missed; None: every SLO target was met."""

    def seconds_in(self, phases: Iterable[LatencyPhase]) -> float:
        """Return the time that was spent in some phases."""
        return sum(self.phases.get(phase, 0.0) for phase in phases)
