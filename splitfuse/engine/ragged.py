"""Offers the model without our scheduler, for callers that have their own: DeepSpeed-Inference v2's four verbs.

The caller decides what goes into a step; KV blocks, positions and the ragged batch are managed here. Nothing is shared
with an Engine: each has a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.request_kv import RequestKv, check_held
from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.limits import check_token_ids
from splitfuse.core.plan import Chunk
from splitfuse.engine.guard import Guard, check_process, guarded
from splitfuse.errors import ConfigError, InvalidRequestError, RequestTooLargeError
from splitfuse.runtime.loading import LoadedModel, load_model


class RaggedEngine:
    """Computes logits for sequences of tokens, which `put` extends in pieces of any length. Threads may share it.

    >>> engine = RaggedEngine.load(EngineConfig())
    >>> logits = engine.put([7], [[1, 15, 4]])  # a new sequence
    >>> logits = engine.put([7], [[int(logits.argmax())]])  # extended by its next token
    >>> engine.flush(7)
    """

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self._guard = Guard()
        self.config = config
        self.model = model
        plan = model.plan
        states = StateAllocator(plan.num_states, interval=None) if plan.num_states else None
        self._allocator = BlockAllocator(plan.num_blocks, plan.block_size, states=states)
        self._executor = model.make_executor()
        self._sequences: dict[int, RequestKv] = {}

    @classmethod
    def load(cls, config: EngineConfig, *, progress: bool = False) -> RaggedEngine:
        """Load the model that `config` names. Raises as `runtime.loading.load_model` does, and ConfigError for settings
        that are of no use without a prefix cache.
        """
        check_process()
        if config.cache.has_tiers:
            raise ConfigError("kv_memory_tier and kv_disk_tier need a prefix cache, which RaggedEngine has not")
        if config.cache.kv_loans:
            raise ConfigError("kv_loans needs other engines, which RaggedEngine has not: leave it out")
        if config.model.draft_model is not None:
            raise ConfigError("draft_model needs a scheduler, which RaggedEngine has not: leave it out")
        return cls(config, load_model(config, progress=progress))

    @property
    def num_free_blocks(self) -> int:
        """Return the number of KV blocks that sequences can still take."""
        return self._allocator.num_available

    @guarded
    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Run a forward step over `tokens[i]` appended to the sequence `uids[i]`; unknown uids begin new ones.

        Returns the logits after the last token of each, fp32 [len(uids), vocabulary]. Raises InvalidRequestError, and
        nothing is changed, if `can_schedule` would say no or a token is outside the vocabulary.
        """
        if reason := self._refusal(uids, [len(ids) for ids in tokens]):
            raise reason
        for uid, ids in zip(uids, tokens, strict=True):
            check_token_ids(f"sequence {uid}", ids, self.model.spec.vocab_size)
        before = {uid: self._sequences.get(uid, RequestKv()).num_computed for uid in uids}
        chunks = [self._append(uid, tuple(ids)) for uid, ids in zip(uids, tokens, strict=True)]
        decoder = self._executor.decoder
        try:
            with torch.inference_mode(), decoder.on_device():
                logits = decoder.logits(self._executor.hidden(chunks))
        except BaseException:  # Ctrl-C too: the tokens count as not put
            for uid, num_tokens in before.items():
                self._truncate(uid, num_tokens)
            raise
        for uid, chunk in zip(uids, chunks, strict=True):
            sequence = self._sequences[uid]
            if (state := sequence.state) is not None:
                state.advance(chunk)
                state.computed(chunk, sequence.block_names)
        return logits

    @guarded
    def query(self, uid: int, max_tokens: int, max_blocks: int) -> tuple[int, int]:
        """Return how many of `max_tokens` further tokens of a sequence fit `max_blocks` new blocks, and how many blocks
        they take.
        """
        sequence = self._sequences.get(uid, RequestKv())
        slots = (len(sequence.blocks) + max_blocks) * self._allocator.block_size
        count = min(max_tokens, slots - sequence.num_computed, self.model.plan.max_model_len - sequence.num_computed)
        return count, self._missing(sequence, count)

    @guarded
    def can_schedule(self, uids: Sequence[int], lengths: Sequence[int]) -> bool:
        """Return whether `put` would accept so many tokens of each."""
        return self._refusal(uids, lengths) is None

    @guarded
    def flush(self, uid: int) -> None:
        """Forget a sequence and free its blocks and state. Raises InvalidRequestError for an unknown id."""
        if uid not in self._sequences:
            raise InvalidRequestError(f"there is no sequence {uid} to flush")
        self._sequences.pop(uid).release(self._allocator)

    def check(self) -> None:
        """Assert that no block and no state slot is lost. For tests."""
        check_held(self._allocator, self._sequences.values())

    def _append(self, uid: int, token_ids: tuple[int, ...]) -> Chunk:
        sequence = self._sequences.get(uid)
        if sequence is None:
            sequence = self._sequences[uid] = RequestKv(repeatable=True)  # a failed put leaves the state before it
            sequence.start(self._allocator, len(token_ids))
        start, end = sequence.num_computed, sequence.num_computed + len(token_ids)
        sequence.grow(self._allocator, start, end)
        sequence.num_computed = end
        blocks, state = tuple(sequence.blocks), sequence.state_slots
        return Chunk(str(uid), start, token_ids, blocks, num_logits=1, samples=False, state=state)

    def _truncate(self, uid: int, num_tokens: int) -> None:
        sequence = self._sequences[uid]
        if num_tokens == 0:
            self._sequences.pop(uid).release(self._allocator)
            return
        kept = self._allocator.blocks_for(num_tokens)
        self._allocator.release(sequence.blocks[kept:])
        del sequence.blocks[kept:]
        sequence.num_computed = num_tokens
        if sequence.state is not None:
            sequence.state.cancel()

    def _missing(self, sequence: RequestKv, count: int) -> int:
        """Return the number of new blocks that `count` further tokens take."""
        return self._allocator.blocks_for(sequence.num_computed + count) - len(sequence.blocks)

    def _refusal(self, uids: Sequence[int], lengths: Sequence[int]) -> InvalidRequestError | None:
        if not uids or len(uids) != len(lengths):
            return InvalidRequestError(
                f"there are {len(uids)} ids and {len(lengths)} token lists: give at least one id, and tokens for each"
            )
        if len(set(uids)) != len(uids):
            return InvalidRequestError(f"the ids {list(uids)} repeat one: a sequence can be extended once in a step")
        need, budget = 0, self.model.plan.max_num_batched_tokens
        for uid, length in zip(uids, lengths, strict=True):
            sequence = self._sequences.get(uid, RequestKv())
            if length < 1:
                return InvalidRequestError(f"sequence {uid} gets {length} tokens: give at least one")
            if sequence.num_computed + length > self.model.plan.max_model_len:
                limit = self.model.plan.max_model_len
                return RequestTooLargeError(
                    f"sequence {uid}: {sequence.num_computed + length} tokens, the limit is {limit}"
                )
            need += self._missing(sequence, length)
        if sum(lengths) > budget:
            return InvalidRequestError(f"{sum(lengths)} tokens in one step, max_num_batched_tokens is {budget}")
        if need > self.num_free_blocks:
            return RequestTooLargeError(
                f"{need} KV blocks are needed, {self.num_free_blocks} are free: flush a sequence"
            )
        states = self._allocator.states
        if states is not None and len(uids) > states.num_available:
            return RequestTooLargeError(
                f"{len(uids)} slots for recurrent states are needed, {states.num_available} are free: flush a sequence"
            )
        return None
