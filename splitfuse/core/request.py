"""Represents a request by two counters: tokens known, and tokens scheduled.

No mode says whether it is a prefill or a decode: it is a prefill while more than one known token is unscheduled.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from splitfuse.core.kv.request_kv import RequestKv
from splitfuse.core.plan import PLACEHOLDER, SamplingState
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import DEFAULT_SCHEDULING, SchedulingOptions
from splitfuse.core.slo.request_slo import RequestSlo
from splitfuse.core.slo.targets import NO_SLO
from splitfuse.core.speculation.request_drafts import RequestDrafts


class RequestStatus(enum.StrEnum):
    """Follows WAITING -> RUNNING -> FINISHED; a preemption leads back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """Holds one request, owned by the scheduler. `max_tokens` and `seed` are resolved: no longer optional.

    A request is two counters, tokens known (`num_tokens`) and tokens scheduled. Positions below `kv.num_computed` have
    their keys and values written; those below `num_scheduled` will have when the plans in flight are back.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    choice: int = 0
    scheduling: SchedulingOptions = DEFAULT_SCHEDULING
    adapter: str = ""
    """Digest of the LoRA adapter that it is computed with; empty: none. What depends on it is salted with it."""
    pooling: PoolingParams | None = None
    """Numbers that its last step gives in place of a token; `max_tokens` is 1 then."""
    block_sources: tuple[str, ...] = ()
    """Addresses, the best first, where blocks of it may be that its engine lacks."""
    most_here: int = -1
    """Number of generated tokens after which it leaves this engine; -1: it stays until it ends."""

    sequence_number: int = -1
    """Order of acceptance, given by the scheduler."""
    fair_share_key: float = 0.0
    """Tokens over weight that its owner had used when the request was accepted (core/slo/fair_share.py)."""
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    """Prompt logprobs given out so far; a preemption does not repeat them."""
    num_scheduled: int = 0
    num_expected_cached: int = 0
    """Leading tokens that the prefix cache had when it was last looked up for a waiting request; 0 once it runs."""
    turn: float = 0.0
    """Work that may be done before it, late or not: see core/slo/turns.py."""
    num_output_placeholders: int = 0
    """Tokens being chosen by plans in flight."""
    num_plans_in_flight: int = 0
    sent_to_executor: bool = False
    is_new: bool = True
    """False if another engine has begun it, which died or was drained."""
    kv: RequestKv = field(default_factory=RequestKv)
    drafts: RequestDrafts = field(default_factory=RequestDrafts)
    slo: RequestSlo = field(init=False)
    priority: int = field(init=False)
    """A Priority: as a number it is compared in no time."""
    owner: str = field(init=False)
    on_time_only: bool = field(init=False)
    weight: float = field(init=False)

    def __post_init__(self) -> None:
        options = self.scheduling
        self.slo = RequestSlo(
            options.targets or NO_SLO,
            arrival_time=options.arrival_time or 0.0,
            num_prompt_tokens=len(self.prompt_token_ids),
        )
        self.priority, self.owner, self.on_time_only = options.priority, options.owner, options.on_time_only
        self.weight = options.weight

    def resume(self, token_ids: Sequence[int], times: Sequence[float], *, num_prompt_logprobs: int) -> None:
        """Let a new request go on behind the tokens that another engine has generated, which its client has had since
        `times`, and behind prompt logprobs given out. They are computed like a prompt, as after a preemption.
        """
        assert not self.output_token_ids and len(times) == len(token_ids) < self.max_tokens
        self.is_new = False
        self.output_token_ids += token_ids
        self.num_prompt_logprobs = num_prompt_logprobs
        if token_ids:
            self.kv.num_lost = self.num_tokens
        for each in times:
            self.slo.observe_token(each)

    @property
    def is_leaving(self) -> bool:
        """Return whether it goes on elsewhere once no plan of it is in flight."""
        return 0 <= self.most_here <= len(self.output_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are known: the prompt, and the generated ones that have been read back."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_unscheduled(self) -> int:
        """Return how many tokens are known or being chosen, and not yet scheduled; 0 if the plans in flight bring its
        last token here, or if it is about to lose its blocks.
        """
        generated = len(self.output_token_ids) + self.num_output_placeholders
        if self.kv.preempt_on_return or generated >= self.max_tokens or 0 <= self.most_here <= generated:
            return 0
        return len(self.prompt_token_ids) + generated - self.num_scheduled

    @property
    def reason_to_finish(self) -> FinishReason | None:
        """Return why its newest token is its last; None if it goes on. An EOS token within the first `min_tokens` does
        not count.
        """
        newest, count = self.output_token_ids[-1], len(self.output_token_ids)
        if count > self.params.min_tokens and (newest in self.eos_token_ids or newest in self.params.stop_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_tokens else None

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Return the token ids at positions start to end - 1; PLACEHOLDER where one has not been read back yet."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            tokens = tuple(self.output_token_ids[start - num_prompt : end - num_prompt])
        else:
            tokens = tuple(self.output_token_ids[: max(end - num_prompt, 0)])
            tokens = self.prompt_token_ids[start:end] + tokens
        missing = end - start - len(tokens)
        return tokens + (PLACEHOLDER,) * missing if missing else tokens

    def sampling_state(self) -> SamplingState:
        """Return what the executor must know of it before its first chunk."""
        return SamplingState(
            *(self.request_id, self.prompt_token_ids, self.params, self.eos_token_ids, self.seed, self.choice),
            output_token_ids=list(self.output_token_ids),
            pooling=self.pooling,
            adapter=self.adapter,
        )


def by_queue_key(request: Request) -> tuple[int, bool, float, int]:
    """Return the position of a request among all unfinished ones: by priority, by fair share, by age."""
    return request.priority, request.is_new, request.fair_share_key, request.sequence_number
