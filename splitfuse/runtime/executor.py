"""Does what a plan says: chunks -> one ragged batch -> logits -> tokens. Decides nothing, knows neither text nor
blocks' owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from splitfuse.core.plan import PLACEHOLDER, Chunk, ChunkResult, NewRequest, StepPlan, StepResult, TokenLogprob
from splitfuse.errors import RequestFailedError
from splitfuse.models import ragged_batch
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.ragged_batch import RaggedBatch
from splitfuse.runtime.sampling.sampler import SamplingRow, prompt_logprobs, sample

HEAD_ROWS = 64
"""Rows that the output head is applied to at once: logits are [rows, vocabulary], never [tokens of a step,
vocabulary].
"""


@dataclass
class _RequestState:
    """What the runner remembers of a request from its first chunk on; preemption does not change it."""

    new: NewRequest
    output_token_ids: list[int] = field(default_factory=list)


class ModelRunner:
    """Runs plans in the order they were scheduled, on one device. Remembers the tokens that it has chosen, so that a
    plan made before they were read back can refer to them by PLACEHOLDER.
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self._states: dict[str, _RequestState] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one plan. A chunk whose logits are unusable gets a result with `error`; the others are not
        touched.
        """
        for request_id in plan.retired_requests:
            self._states.pop(request_id, None)  # absent if its first step was broken off
        for new in plan.new_requests:
            self._states[new.request_id] = _RequestState(new)
        chunks = [self._with_known_tokens(chunk) for chunk in plan.chunks]
        with torch.inference_mode():
            hidden = self.hidden(chunks)  # [rows of all chunks, hidden]
            row_ends = list(accumulate(chunk.num_logits for chunk in chunks))
            results = self._sample(hidden, [(c, end - 1) for c, end in zip(chunks, row_ends, strict=True) if c.samples])
            for chunk, end in zip(chunks, row_ends, strict=True):
                result = results.get(chunk.request_id, ChunkResult())
                if chunk.num_logits > chunk.samples and result.error is None:
                    rows = hidden[end - chunk.num_logits : end - chunk.samples]
                    result = self._with_prompt_logprobs(result, chunk, rows)
                results[chunk.request_id] = result
        return StepResult(results)

    def hidden(self, chunks: Sequence[ragged_batch.Chunk]) -> Tensor:
        """One forward step: final hidden states [sum of num_logits, hidden], in the order of the chunks."""
        batch = RaggedBatch.build(chunks, block_size=self.kv_cache.block_size, device=self.decoder.device)
        return self.decoder.forward(batch, self.kv_cache)

    def _with_known_tokens(self, chunk: Chunk) -> Chunk:
        if PLACEHOLDER not in chunk.token_ids:
            return chunk
        chosen = self._states[chunk.request_id].output_token_ids
        # A request whose last step failed has chosen nothing; what this one makes of it is dropped.
        newest = chosen[-1] if chosen else 0
        return replace(chunk, token_ids=tuple(newest if token == PLACEHOLDER else token for token in chunk.token_ids))

    def _sample(self, hidden: Tensor, sampling: Sequence[tuple[Chunk, int]]) -> dict[str, ChunkResult]:
        """Choose a token for each of the chunks at its row of `hidden`."""
        results: dict[str, ChunkResult] = {}
        for start in range(0, len(sampling), HEAD_ROWS):
            part = sampling[start : start + HEAD_ROWS]
            rows = [row for _, row in part]
            logits = self.decoder.logits(hidden if len(rows) == len(hidden) else hidden[rows])
            states = [self._states[chunk.request_id] for chunk, _ in part]
            wanted = [SamplingRow(state.new, state.output_token_ids) for state in states]
            chosen = sample(logits, wanted, argmax=self.decoder.kernels.argmax)
            for state, result in zip(states, chosen, strict=True):
                results[state.new.request_id] = result
                if result.token_id is not None:
                    state.output_token_ids.append(result.token_id)
        return results

    def _with_prompt_logprobs(self, result: ChunkResult, chunk: Chunk, hidden: Tensor) -> ChunkResult:
        """The result with the logprobs of the prompt tokens that follow the rows of `hidden`."""
        new = self._states[chunk.request_id].new
        first = chunk.end - chunk.num_logits + 1
        targets = new.prompt_token_ids[first : first + len(hidden)]
        try:
            logprobs = tuple(self._prompt_logprobs(hidden, targets, new.params.prompt_logprobs or 0))
        except RequestFailedError as error:
            return ChunkResult(error=str(error))
        return replace(result, prompt_logprobs=logprobs)

    def _prompt_logprobs(self, hidden: Tensor, targets: Sequence[int], count: int) -> Iterator[TokenLogprob]:
        for start in range(0, len(targets), HEAD_ROWS):
            logits = self.decoder.logits(hidden[start : start + HEAD_ROWS])
            yield from prompt_logprobs(logits, targets[start : start + HEAD_ROWS], count)
