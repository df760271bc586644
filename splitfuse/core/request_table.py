"""Holds the requests of a scheduler by id, from their acceptance until the executor can forget them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from splitfuse.core.advance import advance, output_of
from splitfuse.core.events import EngineEvents, RequestAdded, RequestFinished
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetch_queue import FetchQueue
from splitfuse.core.plan import Chunk, ChunkResult, Save, StepPlan, StepResult
from splitfuse.core.policy import SchedulingPolicy
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.step_builder import RequestQueue

LOAN_LOST = "the engine that held a part of its keys and values did not answer"
"""Reason why a request cannot go on without its creditor."""

logger = logging.getLogger(__name__)


class RequestTable:
    """Leads each request through its life: accepted, moved on by the results of its chunks, finished, and settled once
    none of its plans is in flight. Then its blocks are free, and the next plan retires it from the executor.
    """

    def __init__(
        self,
        queue: RequestQueue,
        allocator: BlockAllocator,
        events: EngineEvents,
        policy: SchedulingPolicy,
        fetches: FetchQueue | None,
    ) -> None:
        self.by_id: dict[str, Request] = {}
        """Requests that are unfinished, or finished and still in flight."""
        self.retired: list[str] = []
        """Ids of the requests that the next plan retires."""
        self._departing: list[Save] = []
        self._going_ahead: list[Save] = []
        self._unsettled: list[Request] = []  # that a plan which is back has ended, or has to preempt
        self.fair_share = FairShare()
        self.num_accepted = 0
        self._queue = queue
        self._allocator = allocator
        self._events = events
        events.subscribe(RequestFinished, lambda event: policy.finish(event.request))
        self._fetches = fetches

    def is_unfinished(self, request_id: str) -> bool:
        """Return whether a request of that id is waiting or running."""
        request = self.by_id.get(request_id)
        return request is not None and not request.is_finished

    def accept(self, request: Request, *, sent_time: float, now: float) -> None:
        """Let a new request wait, behind what its owner has used."""
        queue = self._queue
        request.sequence_number = self.num_accepted
        self.num_accepted += 1
        waiting = [*queue.waiting, *queue.fetching] if queue.fetching else queue.waiting
        request.fair_share_key = self.fair_share.key(request, running=queue.running, waiting=waiting)
        self.by_id[request.request_id] = request
        queue.waiting.append(request)
        if self._fetches is not None:
            self._fetches.add(request)
        self._events.emit(RequestAdded(request, min(sent_time, now), now))

    def take_results(self, plan: StepPlan, results: StepResult, now: float) -> list[RequestOutput]:
        """Move the requests of a plan on. Those that have ended or lose their blocks are to be settled."""
        outputs = []
        self._unsettled.clear()
        for chunk in plan.chunks:
            request = self.by_id[chunk.request_id]
            request.num_plans_in_flight -= 1
            request.num_output_placeholders -= chunk.samples
            if not request.is_finished:
                outputs.append(self.take_result(request, chunk, results[chunk.request_id], now))
                is_leaving = request.most_here >= 0 and request.is_leaving
                if is_leaving and not request.is_finished and not request.num_plans_in_flight:
                    outputs.append(self.leave(request, now))
            if request.is_finished or request.kv.preempt_on_return:
                self._unsettled.append(request)
        return outputs

    def take_result(self, request: Request, chunk: Chunk, result: ChunkResult, now: float) -> RequestOutput:
        """Move a request on by one computed chunk. An exception ends this request, and no other."""
        error, before = result.error, len(request.output_token_ids)
        if result.loan_lost:
            self.finish(request, FinishReason.MOVED, now)
            return RequestOutput(request.request_id, finish_reason=FinishReason.MOVED, error=LOAN_LOST)
        if error is None:
            try:
                reason = advance(request, chunk, result, self._allocator, now=now)
                if request.most_here > 0 and self._fetches is not None and not request.is_leaving:
                    # Its blocks go ahead of it, chunk by chunk.
                    self._going_ahead += self._save(request, request.kv.num_computed)
                self.fair_share.charge_tokens(request, len(request.output_token_ids) - before)
                if reason is not None:
                    self.finish(request, reason, now)
                return output_of(request, chunk, result)
            except Exception as failure:
                logger.exception("a request failed: %s", request.request_id)
                error = f"the scheduler failed on it: {failure!r}"
        if not request.is_finished:
            self.finish(request, FinishReason.ERROR, now)
        return RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)

    def finish(self, request: Request, reason: FinishReason, now: float, wanted_until: float | None = None) -> None:
        """Take an unfinished request from the queue. It is to be settled."""
        if self._fetches is not None:
            self._fetches.forget(request)
        self._queue.remove(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        try:
            self.fair_share.refund(request)
        except Exception:
            logger.exception("a request ended without a refund to its owner: %s", request.request_id)
        self._events.emit(RequestFinished(request, now, wanted_until))

    def leave(self, request: Request, now: float, wanted_until: float | None = None) -> RequestOutput:
        """End a request of which nothing is in flight, since it goes on elsewhere. It is to be settled. With logprobs
        of its prompt all is computed again there, so no block is saved.
        """
        if self._fetches is not None and request.kv.blocks and request.params.prompt_logprobs is None:
            self._departing += self._save(request, request.kv.num_computed, part=True)
        self.finish(request, FinishReason.MOVED, now, wanted_until)
        return RequestOutput(request.request_id, finish_reason=FinishReason.MOVED)

    def take_departing(self) -> tuple[Save, ...]:
        """Return the blocks of the requests that have left since the last call, which are to be saved before the next
        plan is made.
        """
        taken = tuple(self._departing)
        self._departing.clear()
        return taken

    def take_going_ahead(self) -> tuple[Save, ...]:
        """Return the blocks that have been computed since the last call of the requests which will leave. No plan
        writes to them while their requests run.
        """
        taken = tuple(self._going_ahead)
        self._going_ahead.clear()
        return taken

    def save_blocks(self, request_id: str, num_blocks: int, most: int) -> Sequence[bytes]:
        """Save the first `num_blocks` blocks of a request with the next plan, as far as they are computed and were not
        saved so before, and at most `most` of them. Returns the names of all that are saved now.
        """
        request = self.by_id.get(request_id)
        if request is None or request.is_finished:
            return ()
        size, kv = self._allocator.block_size, request.kv
        count = min(num_blocks, kv.num_computed // size, kv.num_saved_blocks + most)
        self._allocator.save(self._save(request, count * size))
        return request.kv.block_names[: request.kv.num_saved_blocks]

    def _save(self, request: Request, num_tokens: int, *, part: bool = False) -> tuple[Save, ...]:
        """Return the saves of the blocks with the first `num_tokens` tokens of a request: see RequestKv.save."""
        tokens = request.tokens(0, num_tokens)
        return request.kv.save(self._allocator, tokens, part=part, salt=request.scheduling.cache_salt)

    def settle_all(self, now: float) -> None:
        """Settle the requests of the plan that is back."""
        for request in self._unsettled:
            self.settle(request, now)
        self._unsettled.clear()

    def settle(self, request: Request, now: float) -> None:
        """Release a request that has finished, or preempt one that is to be, unless one of its plans is in flight."""
        if request.num_plans_in_flight:
            return
        if request.is_finished:
            if self._allocator.saves_published:
                tokens = request.tokens(0, min(request.kv.num_computed, request.num_tokens))
                request.kv.save_end(self._allocator, tokens, salt=request.scheduling.cache_salt)
            request.kv.release(self._allocator)
            request.num_scheduled = 0
            del self.by_id[request.request_id]
            if request.sent_to_executor:
                self.retired.append(request.request_id)
        elif request.kv.preempt_on_return:
            state_lost = request.kv.state is not None and request.kv.state.is_lost
            if request is self._queue.running[0] and not state_lost:
                request.kv.preempt_on_return = False  # those older have ended, and the oldest keeps its blocks
            else:
                self._queue.preempt(request, now)

    def retire_again(self, plan: StepPlan) -> None:
        """Let the next plan retire the requests which `plan`, that was perhaps not executed, should have retired, and
        use nothing that it should have landed for others.
        """
        if self._fetches is not None:
            self._fetches.ahead.distrust(plan.prefetched)
        for request_id in plan.retired_requests:
            request = self.by_id.get(request_id)  # a later one of that id
            if request is None or not request.sent_to_executor:  # else it has taken the place of the earlier one
                self.retired.append(request_id)
