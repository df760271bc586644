"""Defines the records of a trace: what each step of an engine was made of, and what became of each request.

They are for a console, a trace file or a recorder, in another thread or process: see tracer.py. Requests have numbers
in them: those of one engine, in the order in which it accepted them. All times are seconds on the machine's monotonic
clock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import StateSlots, TokenLogprob
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.targets import SloTargets, SloViolation

PART_TOKENS = 2**20
"""Number of tokens of prompts after which the records of one step go on in another message."""


class TraceLevel(enum.IntEnum):
    """Says how much is traced."""

    OFF = 0
    REQUESTS = 1
    """When requests come, are preempted and end: RequestTrace, PreemptTrace, FinishTrace."""
    STEPS = 2
    """What steps were made of, how long they took, and the phases of requests. No token ids but those generated."""
    PLANS = 3
    """All that is needed to run the steps again: prompts, parameters, blocks, log-probabilities."""


class RequestDetail(msgspec.Struct, frozen=True, array_like=True):
    """Holds what decides the tokens of a request, all settled: the seed is one, and so is the end."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    scheduling: SchedulingOptions
    adapter: str
    pooling: PoolingParams | None
    output_token_ids: tuple[int, ...]
    """Tokens that it had when tracing began, or when it came from another engine."""


class RequestTrace(msgspec.Struct, frozen=True, array_like=True, tag="request"):
    """Records that the engine has accepted a request, or had it when tracing began."""

    number: int
    request_id: str
    sent_time: float
    """Time at which its sender handed it over."""
    time: float
    num_prompt_tokens: int
    max_tokens: int
    choice: int
    priority: int
    targets: SloTargets | None
    """Its SLO; None: it has none."""
    detail: RequestDetail | None = None
    """From TraceLevel.PLANS on."""
    arrival_time: float | None = None
    """Time from which its TTFT counts: when the front began to read it."""

    @property
    def arrival(self) -> float:
        """Return the time from which its TTFT counts."""
        return self.sent_time if self.arrival_time is None else min(self.arrival_time, self.sent_time)


class PhaseTrace(msgspec.Struct, frozen=True, array_like=True, tag="phase"):
    """Records that requests, by number, have entered a phase each."""

    time: float
    phases: tuple[tuple[int, LatencyPhase], ...]


class ChunkDetail(msgspec.Struct, frozen=True, array_like=True):
    """Holds what a chunk and its result have besides: see core/plan.py."""

    num_logits: int
    samples: bool
    first_block: int
    """Index in the block table from which `blocks` go on; those before are as in the request's chunk before. Without
    blocks, the whole table is.
    """
    blocks: tuple[int, ...]
    state: StateSlots | None
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    values: tuple[float, ...]
    is_complete: bool
    state_lost: bool = False
    drafts: tuple[int, ...] = ()
    """Its last tokens, which were guesses."""


PLAIN = ChunkDetail(1, True, 0, (), None, (), (), (), False)
"""Detail of most chunks: a decode that gave a token and nothing else, with the blocks that its request had."""


class ChunkTrace(msgspec.Struct, frozen=True, array_like=True):
    """Records the chunk of a request in a step: `num_tokens` tokens from position `start`, and what they gave."""

    number: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    """Tokens that it chose."""
    error: str | None = None
    detail: ChunkDetail | None = None
    """From TraceLevel.PLANS on; None there: it is PLAIN."""
    num_drafts: int = 0
    """How many of its tokens were guesses, each of which is among `token_ids` if it was right."""

    def is_decode(self, num_prompt_tokens: int) -> bool:
        """Return whether it computed the newest token of a request with so long a prompt, and chose the next.

        Others are a part of the prompt, or compute again what a preemption lost.
        """
        return self.start >= num_prompt_tokens and self.num_tokens == 1 + self.num_drafts and bool(self.token_ids)


class StepTrace(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Records a step whose results are back."""

    step: int
    token_budget: int
    start_time: float
    end_time: float
    predicted_seconds: float
    """Time that it was predicted to take; 0: nothing predicts steps."""
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    """Blocks which no request holds, with content that may be used again."""
    chunks: tuple[ChunkTrace, ...]


class PreemptTrace(msgspec.Struct, frozen=True, array_like=True, tag="preempt"):
    """Records that a request loses its blocks and waits again."""

    number: int
    time: float


class FinishTrace(msgspec.Struct, frozen=True, array_like=True, tag="finish"):
    """Records that a request has ended. `time` is when the engine knew, `wanted_until` when its caller gave it up."""

    number: int
    time: float
    reason: FinishReason
    num_output_tokens: int
    slo_met: bool | None
    violation: SloViolation | None
    wanted_until: float | None = None


class BlockMap(msgspec.Struct, frozen=True, array_like=True, tag="blocks"):
    """Maps the KV blocks, every `stride`-th of them: 0 is free, 1 cached, 2 held by one request, 3 shared by more."""

    time: float
    stride: int
    states: bytes


TraceRecord: TypeAlias = RequestTrace | PhaseTrace | StepTrace | PreemptTrace | FinishTrace | BlockMap


def in_parts(records: Sequence[TraceRecord]) -> Iterator[tuple[TraceRecord, ...]]:
    """Yield the records in runs with about PART_TOKENS tokens of prompts at most: a message to the front has a bound,
    and each choice has its whole prompt.
    """
    part: list[TraceRecord] = []
    num_tokens = 0
    for record in records:
        part.append(record)
        if isinstance(record, RequestTrace) and record.detail is not None:
            num_tokens += record.num_prompt_tokens + len(record.detail.output_token_ids)
            if num_tokens >= PART_TOKENS:
                yield tuple(part)
                part, num_tokens = [], 0
    if part:
        yield tuple(part)
