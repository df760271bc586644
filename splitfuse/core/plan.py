"""Everything that crosses from deciding to doing and back: plain data, printable, recordable, comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitfuse.core.sampling_params import SamplingParams

PLACEHOLDER = -1
"""Stands in a chunk for the one token that an earlier plan, not yet read back, is choosing for the same request."""


@dataclass(frozen=True)
class Chunk:
    """A run of one request's tokens within one step.

    `token_ids[i]` has position `start + i`; its keys and values go to slot `block_table[p // block_size] * block_size +
    p % block_size`. `block_table` covers every position below `start + len(token_ids)`. Logits are computed for
    the last `num_logits` tokens of the chunk and for no others; `samples` says that the last one chooses a token.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    num_logits: int
    samples: bool

    @property
    def end(self) -> int:
        """One past the position of the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class NewRequest:
    """What the runner must know of a request before its first chunk."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]  # what min_tokens keeps from being chosen, with params.stop_token_ids
    seed: int
    choice: int  # which of params.n


@dataclass(frozen=True)
class StepPlan:
    """One forward step: the chunks in order, their tokens adding up to at most `token_budget`."""

    step: int
    token_budget: int
    chunks: tuple[Chunk, ...]
    new_requests: tuple[NewRequest, ...] = ()
    retired_requests: tuple[str, ...] = ()  # finished since the last plan: the runner forgets them

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of the token at one position, and of the most probable ones there, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChunkResult:
    """What one chunk gave: a token if it sampled, logprobs if they were asked for, or the reason why it failed."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class StepResult:
    """Request id -> what its chunk gave, for every chunk of the plan."""

    results: Mapping[str, ChunkResult] = field(default_factory=dict)
