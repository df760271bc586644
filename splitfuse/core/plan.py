"""Describes steps and their results: plain data between scheduler and executor, printable, recordable, comparable."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from struct import Struct, unpack_from
from typing import NamedTuple, TypeAlias

from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.reasoning import Thought
from splitfuse.core.sampling_params import SamplingParams

PLACEHOLDER = -1
"""Token id in a chunk for the one token that an earlier plan, not yet read back, is choosing for the same request."""

ZERO_STATE = -1
"""Slot of the recurrent state before the first token, which is zero."""


class DraftKind(enum.StrEnum):
    """Says where drafts come from."""

    LOOKUP = "lookup"
    """Tokens that followed where the request's newest ones occurred before."""
    FORM = "form"
    """Tokens that the grammar of the answer leaves no choice of."""
    MODEL = "model"
    """Guesses of a draft model."""


class StateSlots(NamedTuple):
    """Names the slots of a chunk in a network with recurrent states: the state before its first token is read from slot
    `read`, the one after its last token written to slot `write`. On the way, the state at each position of `kept`, in
    ascending order, is written to its slot too.

    Several chunks of a step may read a slot; one that is written is neither read nor written by any other chunk.
    """

    read: int
    write: int
    kept: tuple[tuple[int, int], ...] = ()


class Save(NamedTuple):
    """Copies a block, whose name and tokens are these, out of the cache, before anything is written there. The plan may
    write to the block, and after that it must not be saved again.
    """

    block: int
    name: bytes
    token_ids: tuple[int, ...]
    before: bytes = b""
    """Name of the block before it in its text; empty: it is the first."""


class Land(NamedTuple):
    """Copies bytes that have arrived, which the inbox holds under `number`, into a block, before it is read."""

    number: int
    block: int


class Deposit(NamedTuple):
    """Copies a full block of a request to its creditor, as block `place` of the loan."""

    place: int
    block: int


class ChunkLoan(NamedTuple):
    """Says which leading positions of a chunk's request another engine holds, once it has been given the blocks of
    `deposits`: in `block_table` they have a 0, which is never read.
    """

    number: int
    num_tokens: int
    deposits: tuple[Deposit, ...] = ()


_ID, _VALUE = Struct("i"), Struct("d")


@dataclass(slots=True)
class Chunk:
    """Describes a run of one request's tokens within one step.

    `token_ids[i]` has position `start + i`; its keys and values go to slot `block_table[p // block_size] * block_size +
    p % block_size`. `block_table` covers every position below `start + len(token_ids)`. Logits are computed for
    the last `num_logits` tokens of the chunk and for no others. If `samples`, the last token's choose the next one, or
    give the numbers that PoolingParams ask for.

    The last `num_drafts` tokens are guesses of what is chosen: the logits of the token before each choose in its place,
    and as long as that is what was guessed, the next ones choose too.

        Chunk("a", start=8, token_ids=(7, 7, 5), block_table=(3, 0, 9), num_logits=1, samples=True)
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    num_logits: int
    samples: bool
    state: StateSlots | None = None  # None: the network has no recurrent states
    num_drafts: int = 0
    draft_kind: DraftKind = DraftKind.LOOKUP
    """Source of its drafts, if it has any."""
    lands: tuple[Land, ...] = ()
    """Blocks of its `block_table` before `start` that have arrived from elsewhere."""
    loan: ChunkLoan | None = None
    """Leading positions that another engine holds; None: none."""

    @property
    def drafts(self) -> tuple[int, ...]:
        """Return the tokens that are guesses."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_choices(self) -> int:
        """Return how many of its tokens, the last ones, have logits that choose a token."""
        return self.samples + self.num_drafts

    @property
    def is_repeatable(self) -> bool:
        """Return whether it gives the same if it is computed again: it does not overwrite the state that it reads."""
        return self.state is None or self.state.read != self.state.write

    @property
    def end(self) -> int:
        """Return one past the position of the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SamplingState:
    """Holds what choosing tokens needs of a request. The executor is sent it with the request's first chunk, and keeps
    it until the request retires, with the tokens that were chosen; preemption does not change it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]  # with params.stop_token_ids, the tokens that min_tokens forbids
    seed: int
    choice: int  # which of params.n
    output_token_ids: list[int] = field(default_factory=list)  # of another engine, or of a replay: it has them already
    pooling: PoolingParams | None = None
    thought: Thought | None = None  # which these tokens are in; kept by the executor if the request has `reasoning`
    adapter: str = ""  # digest of the LoRA adapter that it is computed with; empty: none

    @property
    def num_tokens(self) -> int:
        """Return how many tokens it has, the prompt included: the position of the next one."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(frozen=True)
class StepPlan:
    """Describes one forward step: chunks in order. Dynamic SplitFuse keeps their tokens within `token_budget`.

    First the blocks of `saves` are copied out of the cache, then those of `lands` into it, then deposits to creditors,
    then chunks are computed.
    """

    step: int
    token_budget: int
    chunks: tuple[Chunk, ...]
    new_requests: tuple[SamplingState, ...] = ()
    retired_requests: tuple[str, ...] = ()  # finished since the last plan: the executor forgets them
    saves: tuple[Save, ...] = ()  # blocks that have been published since the last plan, or are asked for elsewhere
    prefetched: tuple[Land, ...] = ()  # blocks for requests that will come: see core/kv/prefetching.py

    @cached_property
    def num_tokens(self) -> int:
        """Return how many tokens the step computes."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @cached_property
    def request_ids(self) -> list[str]:
        """Return the ids of the requests of its chunks, in their order."""
        return [chunk.request_id for chunk in self.chunks]

    @cached_property
    def lands(self) -> tuple[Land, ...]:
        """Return the copies into the cache: what is prefetched, and those of all chunks."""
        return (*self.prefetched, *(land for chunk in self.chunks for land in chunk.lands))


@dataclass(frozen=True)
class TokenLogprob:
    """Holds the log-probability of the token at one position, and of the most probable tokens there, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Logprobs:
    """Keeps TokenLogprobs in two buffers: a request may have millions of numbers, too many for objects.

    Every entry has `width` tokens: its own, and as many of the most probable ones as the others.
    """

    width: int = 1
    token_ids: bytearray = field(default_factory=bytearray)
    values: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, entries: Sequence[TokenLogprob]) -> Logprobs | None:
        """Return what keeps `entries`; None if there are none."""
        if not entries:
            return None
        pairs = [pair for each in entries for pair in ((each.token_id, each.logprob), *each.top)]
        token_ids, values = zip(*pairs, strict=True)
        return cls(len(pairs) // len(entries), bytearray(array("i", token_ids)), bytearray(array("d", values)))

    def __len__(self) -> int:
        return len(self.values) // (_VALUE.size * self.width)

    def __getitem__(self, index: int) -> TokenLogprob:
        width, first = self.width, index * self.width
        token_ids = unpack_from(f"{width}i", self.token_ids, first * _ID.size)
        values = unpack_from(f"{width}d", self.values, first * _VALUE.size)
        return TokenLogprob(token_ids[0], values[0], tuple(zip(token_ids[1:], values[1:], strict=True)))

    def __iter__(self) -> Iterator[TokenLogprob]:
        return (self[index] for index in range(len(self)))

    def chosen(self, index: int) -> tuple[int, float]:
        """Return the token of an entry and its log-probability."""
        first = index * self.width
        token_id: int = _ID.unpack_from(self.token_ids, first * _ID.size)[0]
        value: float = _VALUE.unpack_from(self.values, first * _VALUE.size)[0]
        return token_id, value

    def extend(self, others: Logprobs) -> None:
        """Add entries, as wide as those that there are."""
        assert self.width == others.width or not self.values, "entries of different widths"
        self.width = others.width
        self.token_ids += others.token_ids
        self.values += others.values

    def truncate(self, count: int) -> None:
        """Keep the first `count` entries."""
        del self.token_ids[count * self.width * _ID.size :]
        del self.values[count * self.width * _VALUE.size :]


@dataclass(slots=True)
class ChunkResult:
    """Holds the result of one chunk: the chosen tokens if it sampled, or why it failed.

    `token_ids` has one token if the chunk sampled, and one more for each of its drafts that was right, up to the first
    that was not. `logprobs` has one entry for each of them if the request asked for logprobs; `prompt_logprobs` one for
    each prompt token whose logits the chunk computed, if it asked for those.
    `values` are what PoolingParams ask for. `forced` are the tokens that the form of the answer lets follow, no others.
    `is_complete` says that the answer has the form which the request asked for, and that nothing can follow.
    `state_lost` says that a failed step has left the request's recurrent state half written, and that there is nothing
    else: it is recomputed. `loan_lost` says that there is nothing else, since the request's creditor did not answer.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    values: tuple[float, ...] = ()
    forced: tuple[int, ...] = ()
    error: str | None = None
    is_complete: bool = False
    state_lost: bool = False
    loan_lost: bool = False


StepResult: TypeAlias = dict[str, ChunkResult]
"""Results of the chunks of a plan, by request id."""
