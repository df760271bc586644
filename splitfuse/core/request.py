"""A request: the tokens known, and how many of them are computed. There are no phases."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace

from splitfuse.core.latency.ledger import RequestLatency
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.plan import PLACEHOLDER, NewRequest, TokenLogprob
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.targets import NO_SLO, MovingAverage, SloTargets, SloViolation

MISSED_ITL_FACTOR = 2.0
"""Times their interval, that streams are given which are late already."""


class RequestStatus(enum.StrEnum):
    """WAITING -> RUNNING -> FINISHED; preemption is a step back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Priority(enum.IntEnum):
    """A class comes before all those with larger numbers."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SchedulingOptions:
    """How one request is scheduled: its SLO, its share of the machine and its isolation. One value from the HTTP edge
    to the scheduler.

        SchedulingOptions(targets=SloTargets(ttft=1.0, itl=0.1), priority=Priority.HIGH)
    """

    cache_salt: str = ""
    """Cached blocks are shared only among requests with the same salt."""
    targets: SloTargets | None = None
    """None: the engine's default SLO."""
    arrival_time: float | None = None
    """Time of arrival on the engine's monotonic clock, from which the TTFT target counts; None: when it is added."""
    on_time_only: bool = False
    """Whether to reject the request when it is added unless its SLO can be met."""
    owner: str = ""
    """Tenant whose fair share the request uses."""
    weight: float = 1.0
    """Weight of the owner's fair share, relative to other owners."""
    priority: Priority = Priority.NORMAL


DEFAULT_SCHEDULING = SchedulingOptions()
"""Options of a request which asks for nothing special."""


@dataclass(eq=False)
class Request:
    """One request, owned by the scheduler. `max_tokens` and `seed` are resolved: no longer optional.

    Positions below `num_computed` have their KV written; those below `num_scheduled` will have when the plans in
    flight come back. A request that is not in flight has both equal.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    choice: int = 0
    scheduling: SchedulingOptions = DEFAULT_SCHEDULING
    sent: float | None = None  # when whoever took it in gave it to the engine

    arrival: int = -1  # order of acceptance, given by the scheduler, as is
    turn: float = 0.0  # what its owner had had by then (shares.py)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0  # given out so far, which a preemption does not repeat

    blocks: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)  # of leading blocks, held or not, as far as computed
    num_cached_blocks: int = 0  # leading blocks that the prefix cache knows
    num_computed: int = 0
    num_scheduled: int = 0
    num_output_placeholders: int = 0  # tokens being chosen by plans in flight
    num_plans_in_flight: int = 0
    preempt_on_return: bool = False
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    sent_to_runner: bool = False
    due: float = math.inf  # when its next token must be there; infinity: nothing was promised
    ttft_target: float = math.inf  # seconds that were promised from its arrival to its first token
    missed_slo: bool = False  # a promise was broken
    newest_at: float | None = None  # when its newest token was read back
    average_gap: MovingAverage = field(default_factory=MovingAverage)
    longest_gap: float = 0.0  # seconds
    num_lost: int = 0  # tokens from the first that were computed before its blocks were taken
    steps_skipped: int = 0  # passes since it was last in one, while it could have been

    account: RequestLatency = field(default_factory=RequestLatency)

    def __post_init__(self) -> None:
        self.account.name = self.request_id
        self.ttft_target = self.targets.ttft_target(self.num_prompt)
        self.due = self.arrival_time + self.ttft_target

    @property
    def targets(self) -> SloTargets:
        """Its SLO; NO_SLO if it has none."""
        return self.scheduling.targets or NO_SLO

    @property
    def arrival_time(self) -> float:
        """When it arrived, on the caller's clock; its TTFT target counts from here."""
        return self.scheduling.arrival_time or 0.0

    @property
    def priority(self) -> Priority:
        return self.scheduling.priority

    @property
    def owner(self) -> str:
        return self.scheduling.owner

    @property
    def place(self) -> tuple[int, float, int]:
        """Among all that are unfinished: by class, by turn, by age."""
        return self.priority, self.turn, self.arrival

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens read back so far, prompt included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_wanted(self) -> int:
        """Tokens that are known or being chosen, and not yet scheduled; none if those in flight already bring its last,
        or if it is to lose its blocks.
        """
        chosen = len(self.output_token_ids) + self.num_output_placeholders
        if self.preempt_on_return or chosen >= self.max_tokens:
            return 0
        return len(self.prompt_token_ids) + chosen - self.num_scheduled

    def note_token(self, now: float) -> None:
        """A token has been read back: in time or not, the next one is due. The late are given more time."""
        self._note_if_missed(now)
        self.newest_at = now
        interval = self.interval
        self.due = math.inf if interval is None else now + interval

    def _note_if_missed(self, now: float) -> None:
        missed, itl = self.account.missed, self.targets.itl
        if self.newest_at is None:
            if now > self.due:
                missed = SloViolation(now - self.arrival_time, self.ttft_target)
        elif itl is not None:
            gap = now - self.newest_at
            self.longest_gap = max(gap, self.longest_gap)
            average = self.average_gap.add(gap)
            if average > itl:
                before = missed or SloViolation()
                average = max(average, before.average_gap or 0.0)
                missed = replace(before, average_gap=average, longest_gap=self.longest_gap, itl_target=itl)
        self.account.missed = missed
        self.missed_slo = missed is not None

    @property
    def interval(self) -> float | None:
        """Seconds between its tokens that are aimed at."""
        if self.targets.itl is None:
            return None
        return self.targets.itl * (MISSED_ITL_FACTOR if self.missed_slo else 1.0)

    @property
    def has_slo(self) -> bool:
        """Whether it was promised anything."""
        return self.targets != NO_SLO

    @property
    def slo_met(self) -> bool | None:
        """Whether every target has been met so far; None without an SLO."""
        return not self.missed_slo if self.has_slo else None

    def note_preemption(self) -> None:
        """Its blocks are about to be taken."""
        self.account.num_preemptions += 1
        self.num_lost = max(self.num_lost, self.num_computed)

    @property
    def num_preemptions(self) -> int:
        return self.account.num_preemptions

    @property
    def reason_to_finish(self) -> FinishReason | None:
        """Whether its newest token is its last. An end token within the first `min_tokens` does not count."""
        newest, count = self.output_token_ids[-1], len(self.output_token_ids)
        if count > self.params.min_tokens and (newest in self.eos_token_ids or newest in self.params.stop_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_tokens else None

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids at positions start to end - 1; PLACEHOLDER where one has not been read back yet."""
        prompt_part = self.prompt_token_ids[start:end]
        first = max(start - self.num_prompt, 0)
        output_part = self.output_token_ids[first : max(end - self.num_prompt, 0)]
        missing = end - start - len(prompt_part) - len(output_part)
        return (*prompt_part, *output_part, *(PLACEHOLDER,) * missing)

    def introduction(self) -> NewRequest:
        """What the runner hears of it first."""
        return NewRequest(
            self.request_id, self.prompt_token_ids, self.params, self.eos_token_ids, self.seed, self.choice
        )


@dataclass(frozen=True)
class RequestOutput:
    """What one step, or an abort, changed for one request: tokens are new since the last output."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    retry_after: float | None = None  # it was not taken: seconds after which it may be, infinity for never
    num_cached_tokens: int = 0
    slo_met: bool | None = None  # so far; None: it has no SLO
    latency_breakdown: LatencyBreakdown | None = None  # with the last output
