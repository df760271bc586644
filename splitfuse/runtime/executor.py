"""Execute plans: chunks -> one ragged batch -> logits -> tokens. It decides nothing, and knows neither text nor which
request holds a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from splitfuse.core.plan import PLACEHOLDER, Chunk, ChunkResult, SamplingState, StepPlan, StepResult, TokenLogprob
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.runtime.batch import build_batch
from splitfuse.runtime.sampling.grammar import Grammars, Matcher
from splitfuse.runtime.sampling.pool import pool
from splitfuse.runtime.sampling.sampler import prompt_logprobs, sample

HEAD_ROWS = 64
"""Number of rows that the output head is applied to at once: logits are [rows, vocabulary], never [tokens of a step,
vocabulary].
"""


@dataclass(frozen=True)
class StepHandle:
    """Stands for a submitted plan until `Executor.collect` gives its result."""

    number: int
    result: StepResult


class Executor:
    """Executes plans on one device, in the order in which they were scheduled.

    A plan may be submitted before the results of earlier ones are collected: chosen tokens are remembered, so that a
    plan made before they were read back can refer to them by PLACEHOLDER. The engine collects each before the next.

        handle = executor.submit(plan)
        outputs = scheduler.update(plan, executor.collect(handle))
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache, grammars: Grammars) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.adapters: dict[str, PackedAdapter] = {}
        """LoRA adapters by digest; requests may have those that are here as long as they run."""
        self._grammars = grammars
        self._matchers: dict[str, Matcher] = {}  # of the requests with structured_outputs
        self._states: dict[str, SamplingState] = {}
        self._num_submitted = 0
        self._last_collected = 0

    def submit(self, plan: StepPlan) -> StepHandle:
        """Execute a plan. Its tokens are known when this returns: nothing overlaps yet."""
        self._num_submitted += 1
        return StepHandle(self._num_submitted, self._execute(plan))

    def collect(self, handle: StepHandle) -> StepResult:
        """Return the result of a submitted plan; handles are collected in the order of submission.

        A chunk with unusable logits has a result with `error`, and does not affect the others. A handle may be dropped
        instead, if the plan's requests are ended.
        """
        assert handle.number > self._last_collected, "steps must be collected in the order in which they were submitted"
        self._last_collected = handle.number
        return handle.result

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run one forward step; return final hidden states [sum of num_logits, hidden], in the order of the chunks."""
        states = [self._states.get(chunk.request_id) for chunk in chunks] if self.adapters else []
        batch = build_batch(
            chunks,
            block_size=self.kv_cache.block_size,
            device=self.decoder.device,
            adapters=[self.adapters[state.adapter] if state and state.adapter else None for state in states],
        )
        return self.decoder.forward(batch, self.kv_cache)

    def _execute(self, plan: StepPlan) -> StepResult:
        for request_id in plan.retired_requests:
            self._states.pop(request_id, None)  # absent if its first step was broken off
            self._matchers.pop(request_id, None)
        for new in plan.new_requests:
            # A plan stays as it was made.
            state = self._states[new.request_id] = replace(new, output_token_ids=[], thought=new.params.thought())
            if (form := new.params.structured_outputs) is not None:
                self._matchers[new.request_id] = self._grammars.matcher(form, state)
            self._take_tokens(new.request_id, new.output_token_ids)  # those of a replay that begins in its midst
        results = self._compute([self._with_known_tokens(chunk) for chunk in plan.chunks])
        for request_id, result in results.items():  # at the end: a step that is broken off has chosen nothing
            if self._take_tokens(request_id, result.token_ids):
                results[request_id] = replace(result, is_complete=True)
        return results

    def _take_tokens(self, request_id: str, token_ids: Sequence[int]) -> bool:
        """Note tokens that a request was given. Returns whether its answer has the form that was asked for."""
        state, answer = self._states[request_id], list(token_ids)
        state.output_token_ids.extend(answer)
        if (thought := state.thought) is not None:
            answer = [token for token in answer if thought.push(token)]
        matcher = self._matchers.get(request_id)
        return bool(answer) and matcher is not None and matcher.settle(answer)

    def _matcher(self, state: SamplingState) -> Matcher | None:
        """Return the matcher of a request if its next token is chosen by the form of its answer."""
        return self._matchers.get(state.request_id) if state.thought is None or state.thought.heeds_form else None

    def _compute(self, chunks: Sequence[Chunk]) -> dict[str, ChunkResult]:
        with torch.inference_mode():
            hidden = self.hidden(chunks)  # [rows of all chunks, hidden]
            row_ends = list(accumulate(chunk.num_logits for chunk in chunks))
            last_rows = [(c, end - 1) for c, end in zip(chunks, row_ends, strict=True) if c.samples]
            sampling = [(c, row) for c, row in last_rows if self._states[c.request_id].pooling is None]
            results = self._sample(hidden, sampling)
            if len(sampling) < len(last_rows):
                results |= self._pool(hidden, [(c, row) for c, row in last_rows if c.request_id not in results])
            for chunk, end in zip(chunks, row_ends, strict=True):
                result = results.get(chunk.request_id, ChunkResult())
                if chunk.num_logits > chunk.samples and result.error is None:
                    rows = hidden[end - chunk.num_logits : end - chunk.samples]
                    result = self._with_prompt_logprobs(result, chunk, rows)
                results[chunk.request_id] = result
        return results

    def _with_known_tokens(self, chunk: Chunk) -> Chunk:
        if PLACEHOLDER not in chunk.token_ids:
            return chunk
        chosen = self._states[chunk.request_id].output_token_ids
        # A request whose last step failed has chosen nothing; the scheduler drops the result of this one.
        newest = chosen[-1] if chosen else 0
        return replace(chunk, token_ids=tuple(newest if token == PLACEHOLDER else token for token in chunk.token_ids))

    def _sample(self, hidden: Tensor, sampling: Sequence[tuple[Chunk, int]]) -> dict[str, ChunkResult]:
        """Choose a token for each chunk, from its row of `hidden`."""
        results: dict[str, ChunkResult] = {}
        backend = self.decoder.backend
        for start in range(0, len(sampling), HEAD_ROWS):
            part = sampling[start : start + HEAD_ROWS]
            rows = [row for _, row in part]
            logits = self.decoder.logits(hidden if len(rows) == hidden.shape[0] else hidden[rows])
            states = [self._states[chunk.request_id] for chunk, _ in part]
            matchers = [self._matcher(state) for state in states] if self._matchers else []
            chosen = sample(logits, states, topk=backend.topk, draw=backend.draw, matchers=matchers)
            results |= {chunk.request_id: result for (chunk, _), result in zip(part, chosen, strict=True)}
        return results

    def _pool(self, hidden: Tensor, pooling: Sequence[tuple[Chunk, int]]) -> dict[str, ChunkResult]:
        """Return the numbers that PoolingParams ask for, of each chunk from its row of `hidden`."""
        results: dict[str, ChunkResult] = {}
        for start in range(0, len(pooling), HEAD_ROWS):
            part = pooling[start : start + HEAD_ROWS]
            names = [chunk.request_id for chunk, _ in part]
            wanted = [self._states[name].pooling or PoolingParams() for name in names]
            results |= zip(names, pool(hidden[[row for _, row in part]], wanted, self.decoder.logits), strict=True)
        return results

    def _with_prompt_logprobs(self, result: ChunkResult, chunk: Chunk, hidden: Tensor) -> ChunkResult:
        """Return `result` with the logprobs of the prompt tokens that follow the rows of `hidden`."""
        state = self._states[chunk.request_id]
        first = chunk.end - chunk.num_logits + 1
        targets = state.prompt_token_ids[first : first + len(hidden)]
        try:
            logprobs = tuple(self._prompt_logprobs(hidden, targets, state.params.prompt_logprobs or 0))
        except RequestFailedError as error:
            return ChunkResult(error=str(error))
        return replace(result, prompt_logprobs=logprobs)

    def _prompt_logprobs(self, hidden: Tensor, targets: Sequence[int], count: int) -> Iterator[TokenLogprob]:
        for start in range(0, len(targets), HEAD_ROWS):
            logits = self.decoder.logits(hidden[start : start + HEAD_ROWS])
            yield from prompt_logprobs(logits, targets[start : start + HEAD_ROWS], count)
