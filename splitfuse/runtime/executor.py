"""Executes plans: chunks -> one ragged batch -> logits -> tokens. It decides nothing, and knows neither text nor which
request holds a block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfuse.core.kv.fetching import Inbox
from splitfuse.core.plan import PLACEHOLDER, Chunk, ChunkResult, Deposit, Land, Save, StepPlan, StepResult
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.loans import Channel, RequestLoan
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.memory_ahead import MemoryAhead
from splitfuse.runtime.results import draws_of, plain_results, plain_rows, results_of
from splitfuse.runtime.sampling.grammar import Grammars
from splitfuse.runtime.sampling.request import RequestSampling
from splitfuse.runtime.step_graphs import StepGraphs

_logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class StepHandle:
    """Stands for a submitted plan until `Executor.collect` gives its result."""

    number: int
    plan: StepPlan
    before: StepHandle | None = None
    """Step that is computed before it, if its result was not collected when this one was submitted."""
    progress: StepProgress | None = None
    """How far a thread has come with it; None: it is executed by `submit`."""
    result: StepResult | None = None
    error: BaseException | None = None
    """What the step has raised."""

    def taken(self) -> StepResult:
        """Return the result of a step that has ended, or raise what it has raised."""
        if self.error is not None:
            raise self.error
        assert self.result is not None, "it has ended"
        return self.result


class StepProgress:
    """Tells other threads how far a step has come; at its end, or if it fails, all is set."""

    def __init__(self) -> None:
        self.claim = threading.Lock()
        """Taken for good by the thread that executes the step, or by one that takes it back."""
        self.begun = threading.Event()
        """Set when its kernels run, and Python has time for other threads."""
        self.layers_done = threading.Event()
        """Set when what is left of the step is to choose tokens: the time to plan the next one."""
        self.ended = threading.Event()


class BlockSink(Protocol):
    """Takes blocks that are copied out of the cache. Called by the thread that executes plans."""

    def buffer(self, name: bytes) -> npt.NDArray[np.uint8] | None:
        """Return where the block of that name is to be copied; None if it is not wanted."""

    def save(self, save: Save, data: npt.NDArray[np.uint8], *, at_once: bool = False) -> None:
        """Take the block that was copied into a buffer; with `at_once`, others can have it when this returns."""


class Executor:
    """Executes plans on one device, in the order in which they were scheduled.

    A plan may be submitted before the results of earlier ones are collected: chosen tokens are remembered, so that a
    plan made before they were read back can refer to them by PLACEHOLDER. If it `keeps_plans`, a thread executes them,
    and what is done with the results of one is done while the next one runs.

        handle = executor.submit(plan)
        outputs = scheduler.update(plan, executor.collect(handle))
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        grammars: Grammars,
        *,
        keeps_plans: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.keeps_plans = keeps_plans
        """Whether `submit` returns before the plan is executed: for kernels that leave a core free."""
        self.decoder = decoder
        self._graphs = StepGraphs(decoder, kv_cache) if cuda_graphs else None
        self.kv_cache = kv_cache
        self.adapters: dict[str, PackedAdapter] = {}
        """LoRA adapters by digest; requests may have those that are here as long as they run."""
        self.sink: BlockSink | None = None
        """Sink of the blocks that plans save; without one they go nowhere."""
        self.inbox: Inbox | None = None
        """Inbox of the blocks that plans land."""
        self.channels: dict[int, Channel] = {}
        """Channels to the creditors of requests, by the number of the loan."""
        self._grammars = grammars
        self.num_forced = 0
        """Most tokens that a result says to be forced by the form of the answer."""
        self.requests: dict[str, RequestSampling] = {}
        """Requests from their first step until they retire, by id."""
        self._batches = BatchBuilder(kv_cache.block_size, decoder.device)
        self._borrowed: dict[int, Channel] = {}  # of the loans in this step, which may end meanwhile
        self._num_submitted = 0
        self._last_collected = 0
        self._ahead = MemoryAhead(kv_cache)
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
            if handle.progress is not None and handle.progress.claim.acquire(blocking=False):
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
        if handle.progress is not None:
            handle.progress.ended.wait()
        try:
            result = handle.taken()
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
        self._ahead.use(max((land.block for land in lands), default=-1))

    def num_ready(self, *, reserve: bool = False) -> int:
        """Return how many blocks beyond those in use have memory; less what running requests may need if it is to be
        reserved.
        """
        return self._ahead.num_ready(reserve=reserve)

    def have_memory(self) -> None:
        """Ask for some more memory, while no step runs, unless there is as much as is asked for ahead."""
        self._ahead.have_some()

    def _deposit(self, chunks: Sequence[Chunk]) -> set[str]:
        """Give creditors the blocks that they are to hold. Returns the ids of the requests whose loan is lost."""
        lost = set[str]()
        self._borrowed = {}
        for chunk in chunks:
            if (loan := chunk.loan) is None:
                continue
            channel = self.channels.get(loan.number)
            if channel is None or not all(self._deposit_block(channel, each) for each in loan.deposits):
                lost.add(chunk.request_id)
            else:
                self._borrowed[loan.number] = channel
        return lost

    def _deposit_block(self, channel: Channel, deposit: Deposit) -> bool:
        data = torch.empty(self.kv_cache.block_bytes, dtype=torch.uint8)
        self.kv_cache.read_block(deposit.block, data)
        return self.decoder.backend.deposit(channel, deposit.place, data)

    def drain(self) -> None:
        """Wait until nothing runs. Handles that were not collected must be dropped."""
        if self._newest is not None and self._newest.progress is not None:
            self._newest.progress.ended.wait()
        self._newest = None

    def _run(self, handle: StepHandle) -> None:
        """Execute a step, unless `submit` failed or the one that it was submitted behind has."""
        progress, began = handle.progress, time.monotonic()
        if progress is not None and not progress.claim.acquire(blocking=False):
            return
        before, handle.before = handle.before, None
        self._running = progress
        try:
            if before is not None and before.error is not None:
                raise RuntimeError("the step before it failed")
            with self.decoder.on_device():
                handle.result = self._execute(handle.plan)
        except BaseException as error:
            handle.error = error
        self._running = None
        if progress is not None:
            for each in (progress.begun, progress.layers_done, progress.ended):
                each.set()
        tables = [chunk.block_table for chunk in handle.plan.chunks if chunk.block_table]
        self._ahead.use(max((table[-1] for table in tables), default=-1))
        self._ahead.follow(time.monotonic() - began)

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run one forward step; return final hidden states [sum of num_logits, hidden], in the order of the chunks."""
        with self.decoder.on_device():
            return self._forward(self._batch(chunks))

    def _forward(self, batch: RaggedBatch) -> Tensor:
        graphs = self._graphs
        return self.decoder.forward(batch, self.kv_cache) if graphs is None else graphs.forward(batch)

    def _batch(self, chunks: Sequence[Chunk]) -> RaggedBatch:
        """Return the batch of a step."""
        adapters: Sequence[PackedAdapter | None] = ()
        if self.adapters:
            adapters = [self._adapter_of(chunk.request_id) for chunk in chunks]
        batch = self._batches.build(chunks, adapters)
        if self._running is not None:
            if self.decoder.is_fused:
                batch.on_start = self._running.begun.set
            elif self.decoder.device.type == "cpu":  # another device is waited for once all is launched
                self._running.begun.set()
        if self._borrowed:
            batch.loans = [
                RequestLoan(place, chunk.loan.num_tokens, self._borrowed[chunk.loan.number])
                for place, chunk in enumerate(chunks)
                if chunk.loan is not None
            ]
        return batch

    def _adapter_of(self, request_id: str) -> PackedAdapter | None:
        request = self.requests.get(request_id)
        return self.adapters[request.state.adapter] if request is not None and request.state.adapter else None

    def _execute(self, plan: StepPlan) -> StepResult:
        if plan.saves:
            self.save(plan.saves)
        if plan.lands:
            self.land(plan.lands)
        requests = self.requests
        for request_id in plan.retired_requests:
            requests.pop(request_id, None)  # absent if its first step was broken off
        for new in plan.new_requests:
            # A plan stays as it was made.
            state = replace(new, output_token_ids=[], thought=new.params.thought())
            form = new.params.structured_outputs
            matcher = None if form is None else self._grammars.matcher(form, state)
            request = requests[new.request_id] = RequestSampling(state, matcher)
            request.take(new.output_token_ids)  # those of a replay that begins in its midst
        lost, chunks = self._deposit(plan.chunks), plan.chunks
        if lost:
            chunks = tuple(chunk for chunk in chunks if chunk.request_id not in lost)
        known = [c if PLACEHOLDER not in c.token_ids else self._with_newest(c) for c in chunks]
        results = self._compute(known) if known else {}
        results |= {request_id: ChunkResult(loan_lost=True) for request_id in lost}
        for request_id, result in results.items():  # at the end: a step that is broken off has chosen nothing
            request = requests[request_id]
            taken, is_complete = request.take(result.token_ids)
            if is_complete:  # the drafts after it do not count
                logprobs = result.logprobs[:taken]
                results[request_id] = replace(
                    result, token_ids=result.token_ids[:taken], logprobs=logprobs, is_complete=True
                )
            elif self.num_forced and (matcher := request.heeded) is not None:
                results[request_id] = replace(result, forced=tuple(matcher.run[: self.num_forced]))
        return results

    def _compute(self, chunks: Sequence[Chunk]) -> dict[str, ChunkResult]:
        batch = self._batch(chunks)
        rows = plain_rows(chunks, self.requests) if self.decoder.chooses_at_once and self._running is None else None
        if rows is not None and len(rows) <= self.decoder.backend.capabilities.head_rows:
            results = plain_results(chunks, *self.decoder.forward_and_choose(batch, self.kv_cache, *draws_of(rows)))
        else:
            with torch.inference_mode():
                hidden = self._forward(batch)
                if self._running is not None:  # the time to plan the next step, before tokens are chosen
                    self._running.begun.set()
                    self._running.layers_done.set()
                results = results_of(chunks, hidden, self.requests, self.decoder)
        self.decoder.check_complete()
        for loan in batch.loans:
            if loan.is_lost:
                results[chunks[loan.request].request_id] = ChunkResult(loan_lost=True)
        return results

    def _with_newest(self, chunk: Chunk) -> Chunk:
        """Return a chunk with the token that the step before has chosen."""
        chosen = self.requests[chunk.request_id].state.output_token_ids
        # A request whose last step failed has chosen nothing; the scheduler drops the result of this one.
        newest = chosen[-1] if chosen else 0
        return replace(chunk, token_ids=tuple(newest if token == PLACEHOLDER else token for token in chunk.token_ids))
