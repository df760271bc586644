"""Execute plans: chunks -> one ragged batch -> logits -> tokens. It decides nothing, and knows neither text nor which
request holds a block.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfuse.core.kv.fetching import Inbox
from splitfuse.core.plan import (
    PLACEHOLDER,
    Chunk,
    ChunkResult,
    Land,
    SamplingState,
    Save,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.runtime.batch import build_batch
from splitfuse.runtime.sampling.grammar import Grammars, Matcher
from splitfuse.runtime.sampling.pool import pool
from splitfuse.runtime.sampling.sampler import prompt_logprobs, sample

_logger = logging.getLogger(__name__)

HEAD_ROWS = 64
"""Number of rows that the output head is applied to at once: logits are [rows, vocabulary], never [tokens of a step,
vocabulary].
"""


@dataclass(eq=False)
class StepHandle:
    """Stands for a submitted plan until `Executor.collect` gives its result."""

    number: int
    plan: StepPlan
    before: StepHandle | None
    """Step that is computed before it, if its result was not collected when this one was submitted."""
    done: Future[StepResult] = field(default_factory=Future)
    progress: StepProgress | None = None
    """How far a thread has come with it; None: it is executed by `submit`."""


class StepProgress:
    """Tells other threads how far a step has come; at its end, or if it fails, all is set."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        """Set when its kernels run, and Python has time for other threads."""
        self.layers_done = threading.Event()
        """Set when what is left of the step is to choose tokens: the time to plan the next one."""


class BlockSink(Protocol):
    """Takes blocks that are copied out of the cache. Called by the thread that executes plans."""

    def buffer(self, name: bytes) -> npt.NDArray[np.uint8] | None:
        """Return where the block of that name is to be copied; None if it is not wanted."""

    def save(self, save: Save, data: npt.NDArray[np.uint8], *, at_once: bool = False) -> None:
        """Take the block that was copied into a buffer; with `at_once`, others can have it when this returns."""


class _Row(NamedTuple):
    """Describes a row of hidden states that chooses a token."""

    number: int
    state: SamplingState
    matcher: Matcher | None


class Executor:
    """Executes plans on one device, in the order in which they were scheduled.

    A plan may be submitted before the results of earlier ones are collected: chosen tokens are remembered, so that a
    plan made before they were read back can refer to them by PLACEHOLDER. If it `keeps_plans`, a thread executes them,
    and what is done with the results of one is done while the next one runs.

        handle = executor.submit(plan)
        outputs = scheduler.update(plan, executor.collect(handle))
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache, grammars: Grammars, *, keeps_plans: bool = False) -> None:
        self.keeps_plans = keeps_plans
        """Whether `submit` returns before the plan is executed: for kernels that leave a core free."""
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.adapters: dict[str, PackedAdapter] = {}
        """LoRA adapters by digest; requests may have those that are here as long as they run."""
        self.sink: BlockSink | None = None
        """Takes the blocks that plans save; without it they go nowhere."""
        self.inbox: Inbox | None = None
        """Has the blocks that plans land."""
        self._grammars = grammars
        self.num_forced = 0
        """Most tokens that a result says to be forced by the form of the answer."""
        self._matchers: dict[str, Matcher] = {}  # of the requests with structured_outputs
        self._states: dict[str, SamplingState] = {}
        self._num_submitted = 0
        self._last_collected = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="executor")
        self._newest: StepHandle | None = None  # that may still run
        self._running: StepProgress | None = None  # of the step that the thread executes

    def submit(self, plan: StepPlan) -> StepHandle:
        """Execute a plan once those submitted before it are done. Raises RuntimeError if no thread can be started."""
        self._num_submitted += 1
        handle = StepHandle(self._num_submitted, plan, before=self._newest)
        try:
            self._newest = handle
            if self.keeps_plans:
                handle.progress = StepProgress()
                self._thread.submit(self._run, handle)
            else:
                self._run(handle)
        except BaseException:  # Ctrl-C too: it may be queued all the same, or run, and is waited for if it does
            if handle.done.cancel():
                self._newest = handle.before
            raise
        return handle

    def wait_for_layers(self, handle: StepHandle) -> None:
        """Wait until what is left of a step is to choose tokens, or until it has failed."""
        if handle.progress is not None:
            handle.progress.layers_done.wait()

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a submitted plan, and return its result; handles are collected in the order of submission.

        A chunk with unusable logits has a result with `error`, and does not affect the others. A handle may be dropped
        instead, if the plan's requests are ended. Raises what the step has raised: those submitted behind it are not
        computed then, and their handles must be dropped.
        """
        assert handle.number > self._last_collected, "steps must be collected in the order in which they were submitted"
        self._last_collected = handle.number
        if self._newest is not None and self._newest.progress is not None:
            self._newest.progress.begun.wait()  # until then its thread needs Python, and is not to share it with this
        try:
            result = handle.done.result()
        except Exception:
            self._newest = None
            raise
        if handle is self._newest:
            self._newest = None
        return result

    def save(self, saves: Sequence[Save], *, at_once: bool = False) -> None:
        """Copy blocks out of the cache, while no step runs, or to which none that runs writes. What cannot be saved is
        left out. With `at_once`, others can have them when this returns.
        """
        if (sink := self.sink) is None:
            return
        for save in saves:
            try:
                if (buffer := sink.buffer(save.name)) is not None:
                    self.kv_cache.read_block(save.block, torch.from_numpy(buffer))
                    sink.save(save, buffer, at_once=at_once)
            except Exception:
                _logger.exception("a KV block was not saved")

    def land(self, lands: Sequence[Land]) -> None:
        """Copy blocks into the cache, while no step runs."""
        for land in lands:
            assert self.inbox is not None, "blocks land where an inbox has them"
            self.kv_cache.write_block(land.block, torch.from_numpy(self.inbox[land.number]))

    def drain(self) -> None:
        """Wait until nothing runs. Handles that were not collected must be dropped."""
        if self._newest is not None:
            wait((self._newest.done,))
            self._newest = None

    def _run(self, handle: StepHandle) -> None:
        """Execute a step, unless `submit` failed or the one that it was submitted behind has."""
        if not handle.done.set_running_or_notify_cancel():
            return
        before, handle.before = handle.before, None
        progress = self._running = handle.progress
        try:
            if before is not None and before.done.exception() is not None:
                raise RuntimeError("the step before it failed")
            handle.done.set_result(self._execute(handle.plan))
        except BaseException as error:
            handle.done.set_exception(error)
        self._running = None
        if progress is not None:
            progress.begun.set()
            progress.layers_done.set()

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run one forward step; return final hidden states [sum of num_logits, hidden], in the order of the chunks."""
        states = [self._states.get(chunk.request_id) for chunk in chunks] if self.adapters else []
        batch = build_batch(
            chunks,
            block_size=self.kv_cache.block_size,
            device=self.decoder.device,
            adapters=[self.adapters[state.adapter] if state and state.adapter else None for state in states],
        )
        if self._running is not None:
            if self.decoder.is_fused:
                batch.on_start = self._running.begun.set
            else:
                self._running.begun.set()
        return self.decoder.forward(batch, self.kv_cache)

    def _execute(self, plan: StepPlan) -> StepResult:
        self.save(plan.saves)
        self.land(plan.lands)
        for request_id in plan.retired_requests:
            self._states.pop(request_id, None)  # absent if its first step was broken off
            self._matchers.pop(request_id, None)
        for new in plan.new_requests:
            # A plan stays as it was made.
            state = self._states[new.request_id] = replace(new, output_token_ids=[], thought=new.params.thought())
            self._matchers.pop(new.request_id, None)  # of an earlier request of that id, which has not retired
            if (form := new.params.structured_outputs) is not None:
                self._matchers[new.request_id] = self._grammars.matcher(form, state)
            self._take_tokens(new.request_id, new.output_token_ids)  # those of a replay that begins in its midst
        results = self._compute([self._with_known_tokens(chunk) for chunk in plan.chunks])
        for request_id, result in results.items():  # at the end: a step that is broken off has chosen nothing
            taken, is_complete = self._take_tokens(request_id, result.token_ids)
            if is_complete:  # the drafts after it do not count
                logprobs = result.logprobs[:taken]
                result = replace(result, token_ids=result.token_ids[:taken], logprobs=logprobs, is_complete=True)
            elif self.num_forced and (matcher := self._heeded(request_id, self._states[request_id])) is not None:
                result = replace(result, forced=tuple(matcher.run[: self.num_forced]))
            results[request_id] = result
        return results

    def _take_tokens(self, request_id: str, token_ids: Sequence[int]) -> tuple[int, bool]:
        """Note tokens that a request was given, up to the one with which its answer has the form that was asked for.
        Returns how many there are, and whether it has.
        """
        state, matcher = self._states[request_id], self._matchers.get(request_id)
        for count, token in enumerate(token_ids, start=1):
            state.output_token_ids.append(token)
            is_answer = state.thought is None or state.thought.push(token)
            if is_answer and matcher is not None and matcher.settle([token]):
                return count, True
        return len(token_ids), False

    def _heeded(self, request_id: str, state: SamplingState) -> Matcher | None:
        """Return the matcher of a request if its next token is chosen by the form of its answer."""
        return self._matchers.get(request_id) if state.thought is None or state.thought.heeds_form else None

    def _compute(self, chunks: Sequence[Chunk]) -> dict[str, ChunkResult]:
        with torch.inference_mode():
            hidden = self.hidden(chunks)  # [rows of all chunks, hidden]
            if self._running is not None:
                self._running.layers_done.set()
            row_ends = list(accumulate(chunk.num_logits for chunk in chunks))
            last_rows = [(c, end - 1) for c, end in zip(chunks, row_ends, strict=True) if c.samples]
            sampling = [(c, row) for c, row in last_rows if self._states[c.request_id].pooling is None]
            results = self._sample(hidden, sampling)
            if len(sampling) < len(last_rows):
                results |= self._pool(hidden, [(c, row) for c, row in last_rows if c.request_id not in results])
            for chunk, end in zip(chunks, row_ends, strict=True):
                result = results.get(chunk.request_id, ChunkResult())
                if chunk.num_logits > chunk.num_choices and result.error is None:
                    rows = hidden[end - chunk.num_logits : end - chunk.num_choices]
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
        """Choose a token for each chunk, and more after drafts that are right, from its rows of `hidden`, of which the
        last one is given.
        """
        backend, rows = self.decoder.backend, list[_Row]()
        for chunk, last in sampling:
            if chunk.num_drafts:
                rows += self._rows(chunk, last)
            else:
                state = self._states[chunk.request_id]
                rows.append(_Row(last, state, self._heeded(chunk.request_id, state) if self._matchers else None))
        chosen: list[ChunkResult] = []
        for start in range(0, len(rows), HEAD_ROWS):
            numbers, states, matchers = zip(*rows[start : start + HEAD_ROWS], strict=True)
            logits = self.decoder.logits(hidden if len(numbers) == hidden.shape[0] else hidden[list(numbers)])
            with_form = matchers if self._matchers else ()
            chosen += sample(logits, states, topk=backend.topk, draw=backend.draw, matchers=with_form)
        if len(rows) == len(sampling):
            return {row.state.request_id: result for row, result in zip(rows, chosen, strict=True)}
        results: dict[str, list[ChunkResult]] = {}
        for row, result in zip(rows, chosen, strict=True):
            results.setdefault(row.state.request_id, []).append(result)
        return {chunk.request_id: _accepted(chunk.drafts, results[chunk.request_id]) for chunk, _ in sampling}

    def _rows(self, chunk: Chunk, last: int) -> Iterator[_Row]:
        """Yield the row of a chunk that chooses its next token, and of each draft, up to one that the form of the
        answer does not allow: its state is as if the drafts so far were right, and its token counts if they are.
        """
        state, matcher = self._states[chunk.request_id], self._matchers.get(chunk.request_id)
        first = last - chunk.num_drafts
        yield _Row(first, state, self._heeded(chunk.request_id, state))
        for number, draft in enumerate(chunk.drafts, start=first + 1):
            thought = copy(state.thought)
            is_answer = thought is None or thought.push(draft)
            state = replace(state, output_token_ids=[*state.output_token_ids, draft], thought=thought)
            if matcher is not None:
                matcher = matcher.after([draft] if is_answer else [], thought)
                if matcher is None:
                    return
            yield _Row(number, state, matcher if thought is None or thought.heeds_form else None)

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


def _accepted(drafts: Sequence[int], results: Sequence[ChunkResult]) -> ChunkResult:
    """Return the results of the rows of a chunk as one: up to the first token that is not what was drafted, or before
    the first error, which comes again in the next step.
    """
    kept = [results[0]]
    for draft, result in zip(drafts, results[1:], strict=False):
        if kept[-1].token_ids != (draft,) or result.error is not None:
            break
        kept.append(result)
    if len(kept) == 1:
        return kept[0]
    return ChunkResult(tuple(r.token_ids[0] for r in kept), tuple(entry for r in kept for entry in r.logprobs))
