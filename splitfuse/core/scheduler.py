"""Schedules by Dynamic SplitFuse: decides which tokens of which requests make up the next forward step.

A request is two counters, tokens known and tokens scheduled; every step lets the second catch up with the first under
one token budget. Long prompts are split over steps, in equal chunks, short ones fused with the running decodes, and
without SLOs the budget is filled while runnable work and blocks remain (Holmes et al., DeepSpeed-FastGen, arXiv
2401.08671, section 3).

    order of claims      core/policy.py: by priority; within one, decodes, which need only their newest token, then
                         prefills in progress, then waiting requests; each by fair share, then oldest first. The last
                         claim is cut to fit. With SLOs, by deadline (core/slo/deadline_policy.py).
    no block left        The newest running request of the lowest priority is preempted (with SLOs, a late one
                         first): its tokens are kept, and computed again later.
    progress             The oldest unfinished request gets at least one token of every step that is scheduled with
                         nothing in flight: one is reserved for it. It may preempt any request and is never preempted,
                         and `add` has made sure that it fits the cache alone. So it finishes; then the next one is the
                         oldest.
    blocks elsewhere     core/kv/fetching.py: what a prompt begins with, and another has computed, may be fetched. A
                         request is made to wait for at most one answer, once, the oldest too; until then it holds
                         nothing, and the oldest of the others is the oldest. Answers come in bounded time, or `arrived`
                         is called without.
    plans in flight      `schedule` may be called before earlier plans have come back. A request in flight is preempted
                         in the `update` of its last plan.
    drafts               core/speculation/drafting.py: tokens that may come next, if nothing is in flight. How many of
                         them are right is known when the step is back, so nothing is planned until then.

One step: `Scheduler.schedule` -> `SchedulingPolicy.compose` (policy.py) -> `StepBuilder` (step_builder.py), which
grants tokens and blocks -> `StepPlan` (plan.py); then `Scheduler.update` with its `StepResult`. The scheduler
reads no clock.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from splitfuse.config import SchedulerConfig
from splitfuse.core.advance import advance, output_of
from splitfuse.core.events import (
    EngineEvents,
    FetchBegun,
    FetchEnded,
    RequestAdded,
    RequestFinished,
    RequestPreempted,
    RequestStarted,
    StepRecord,
    StepScheduled,
)
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Arrived, Fetch, Fetching, Frame, Inbox
from splitfuse.core.limits import check_blocks
from splitfuse.core.plan import Chunk, ChunkResult, Save, StepPlan, StepResult
from splitfuse.core.policy import Fcfs, PlanningError, SchedulingPolicy
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.slo.cost_model import StepFeatures, features_of
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.step_budget import StepBudget
from splitfuse.core.step_builder import RequestQueue, StepBuilder
from splitfuse.errors import InvalidRequestError

logger = logging.getLogger(__name__)


class _InFlight(NamedTuple):
    number: int
    planned_at: float
    has_drafts: bool


class Scheduler:
    """Owns every unfinished request and the blocks they hold. One thread: `add`, `schedule`, `update`, `finish`.

    `now` is seconds on any one clock, the same for all calls and for arrival times; it may be left out without SLOs and
    listeners. The policy is `Fcfs` if none is given, the token budget that of the settings.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: BlockAllocator,
        policy: SchedulingPolicy | None = None,
        budget: StepBudget | None = None,
        drafting: Drafting | None = None,
        fetching: Fetching | None = None,
    ) -> None:
        events = self.events = EngineEvents()
        self.policy = policy or Fcfs()
        self.budget = budget or StepBudget.of(config)
        self.drafting = drafting
        self.fetching = fetching
        assert drafting is None or allocator.states is None, "a recurrent state cannot be taken back"
        assert fetching is None or allocator.states is None, "a recurrent state is not fetched with its blocks"
        self._allocator = allocator
        self.queue = RequestQueue(
            allocator,
            config.max_num_seqs,
            on_preempt=lambda request, now: events.emit(RequestPreempted(request, now)),
        )
        self._requests: dict[str, Request] = {}  # unfinished, or finished and still in flight
        self._retired: list[str] = []  # finished since the last plan
        self._to_ask: deque[Request] = deque()  # that have not run, and for which nothing was asked
        self._awaited: dict[int, Request] = {}  # number of a fetch -> its request
        self._fair_share = FairShare()
        self._num_accepted = 0
        self._num_scheduled_steps = 0
        self._in_flight: deque[_InFlight] = deque()
        self._last_update = 0.0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.queue.waiting or self.queue.running or self.queue.fetching)

    def get(self, request_id: str) -> Request | None:
        """Return the request of that id, while it is unfinished or in flight."""
        return self._requests.get(request_id)

    def add(self, request: Request, now: float = 0.0, *, sent_time: float | None = None) -> None:
        """Accept a request: from here on it will finish. `sent_time` is when its sender handed it over, if not now.

        Raises RequestTooLargeError if it could not fit the cache even alone, InvalidRequestError if its id is taken,
        SloUnattainableError if it has `on_time_only` and could not meet its SLO.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        allocator, queue = self._allocator, self.queue
        num_blocks, block_size = allocator.num_blocks, allocator.block_size
        check_blocks(request.num_prompt_tokens, request.max_tokens, num_blocks=num_blocks, block_size=block_size)
        request.sequence_number = self._num_accepted
        if request.on_time_only and request.is_new:  # else it was admitted once
            self.policy.check_admission(request, queue, now=now)
        self.policy.accept(request, queue, now=now)  # which may raise: nothing is changed before
        self._num_accepted += 1
        waiting = [*queue.waiting, *queue.fetching] if queue.fetching else queue.waiting
        request.fair_share_key = self._fair_share.key(request, running=queue.running, waiting=waiting)
        self._requests[request.request_id] = request
        queue.waiting.append(request)
        if self.fetching is not None and request.params.prompt_logprobs is None:  # those need all positions computed
            self._to_ask.append(request)
        self.events.emit(RequestAdded(request, now if sent_time is None else min(sent_time, now), now))

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """Return the next step; None if nothing can run before an `update` or `arrived`. Blocks are taken for all of
        it.

        Raises PlanningError, from the exception that the policy or the builder has raised. Nothing is in flight then.
        """
        if self._in_flight and self.drafting is not None and self._awaits_drafts():
            return None
        step = StepBuilder(
            self.queue,
            self._allocator,
            token_budget=self.budget.tokens,
            choose_victim=self.policy.preemption_victim,
            predictor=self.policy.predictor,
            now=now,
        )
        try:
            if self.policy.predictor is not None and self._has_slo():  # the policy limits the step by time
                step.raise_budget(self.budget.most)
            self.policy.compose(step)
            if not step.granted:
                return None
            if self.drafting is not None and not self._in_flight:
                self.drafting.compose(step, self.policy.predictor)
            plan = step.build(self._num_scheduled_steps + 1, tuple(self._retired))
        except Exception as error:
            raise PlanningError(self.policy.blamed(step)) from error
        self._num_scheduled_steps, self._retired = plan.step, []
        if self.fetching is not None:
            self._take_in(plan.chunks, self.fetching.inbox)
        self._in_flight.append(_InFlight(plan.step, now, has_drafts=bool(step.drafts)))
        for new in plan.new_requests:
            self.events.emit(RequestStarted(self._requests[new.request_id], now))
        self.events.emit(StepScheduled(plan, step, now))
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> list[RequestOutput]:
        """Take in the result of a plan. Returns what is new of each of its requests.

        Plans come back in the order in which they were scheduled.
        """
        step = self._in_flight.popleft()
        assert plan.step == step.number, "plans must come back in the order they were scheduled"
        start_time, self._last_update = max(step.planned_at, self._last_update), now
        predictor = self.policy.predictor
        predicted = 0.0 if predictor is None else predictor.observe(features_of(plan), now - start_time)
        running, waiting = self.queue.running, self.queue.waiting
        self.events.emit(StepRecord(plan, result, start_time, now, predicted, len(running), len(waiting)))
        outputs = []
        for chunk in plan.chunks:
            request = self._requests[chunk.request_id]
            request.num_plans_in_flight -= 1
            request.num_output_placeholders -= chunk.samples
            if not request.is_finished:
                outputs.append(self._take_result(request, chunk, result[chunk.request_id], now))
        if self.fetching is not None:
            self.fetching.inbox.discard(land.number for land in plan.lands)
        for chunk in plan.chunks:  # once it is known which have ended, and so which is the oldest
            request = self._requests[chunk.request_id]
            if request.num_plans_in_flight == 0 and (request.is_finished or request.kv.preempt_on_return):
                self._settle(request, now)
        return outputs

    def take_fetches(self, now: float = 0.0) -> list[Fetch]:
        """Return what is to be asked for now, of the requests that have not run, in their order and as long as the
        inbox has room. Each is to be answered by `arrived`, within its seconds; its request waits until then.
        """
        fetches: list[Fetch] = []
        while self._to_ask and self.fetching is not None:
            request = self._to_ask[0]
            if request.status is RequestStatus.WAITING and not request.sent_to_executor:
                if not self.fetching.has_room(request.num_tokens // self._allocator.block_size):
                    break
                try:
                    fetch = self._ask_for(request, self.fetching, now)
                except Exception:  # of this request: others have no part in it
                    logger.exception("no KV blocks are asked for: %s", request.request_id)
                    fetch = None
                if fetch is not None:
                    fetches.append(fetch)
                    self.events.emit(FetchBegun(request, now))
            self._to_ask.popleft()
        return fetches

    def arrived(self, number: int, frames: Sequence[Frame] = (), now: float = 0.0) -> bool:
        """Take in the answer to a fetch: the leading blocks that were found, which are intact; without any, it has
        failed. Returns False, and changes nothing, if it was answered before or its request has ended.
        """
        request = self._awaited.pop(number, None)
        if request is None:
            return False
        assert self.fetching is not None and request.kv.fetch is not None
        fetch, inbox = request.kv.fetch, self.fetching.inbox
        numbers = inbox.put(fetch.matching(frames), reserved=len(fetch.names))
        request.kv.arrived = tuple(Arrived(index, each) for index, each in enumerate(numbers, start=fetch.first))
        if numbers:
            covered = (fetch.first + len(numbers)) * self._allocator.block_size
            request.num_expected_cached = max(request.num_expected_cached, covered)
        self.queue.end_fetch(request)
        self.events.emit(FetchEnded(request, now))
        return True

    def take_saves(self) -> tuple[Save, ...]:
        """Return the blocks to save that no plan has: after the last one, while nothing is in flight."""
        return self._allocator.take_saves()

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        num_tokens: int | None = None,
        now: float = 0.0,
        wanted_until: float | None = None,
    ) -> bool:
        """End a request from outside, keeping only its first `num_tokens` generated tokens if that is given.

        `wanted_until` is when its caller gave it up, if that was earlier. Its blocks come back at once, or with the
        last of its plans in flight. Returns False if there is no such unfinished request.
        """
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return False
        if num_tokens is not None:
            del request.output_token_ids[num_tokens:]
        self._finish(request, reason, now, wanted_until)
        if request.num_plans_in_flight == 0:
            self._settle(request, now)
        return True

    def retire_again(self, plan: StepPlan) -> None:
        """Let the next plan retire the requests which `plan`, that was perhaps not executed, should have retired."""
        for request_id in plan.retired_requests:
            request = self._requests.get(request_id)  # a later one of that id
            if request is None or not request.sent_to_executor:  # else it has taken the place of the earlier one
                self._retired.append(request_id)

    def _ask_for(self, request: Request, fetching: Fetching, now: float) -> Fetch | None:
        """Return what to ask for of a request, which waits for it from here on; None if it need not wait."""
        tokens, kv, size = request.tokens(0, request.num_tokens), request.kv, self._allocator.block_size
        first = self._allocator.count_cached(tokens, kv.block_names, salt=request.scheduling.cache_salt) // size
        limit = (len(tokens) - 1) // size  # a token is left to compute
        if first >= limit:
            return None
        self._allocator.name_blocks(tokens, kv.block_names, limit, salt=request.scheduling.cache_salt)
        predictor, seconds, patience = self.policy.predictor, None, math.inf
        if predictor is not None:
            seconds = partial(_seconds_to_compute, predictor, first * size, size)
            if request.on_time_only:  # it was admitted as one that computes all
                patience = request.slo.deadline - now - seconds(limit - first + 1)
        blocks = [tokens[start : start + size] for start in range(first * size, limit * size, size)]
        names = kv.block_names[first:limit]
        fetch = fetching.ask(request.request_id, first, names, blocks, seconds, patience=patience)
        if fetch is not None:
            self.queue.begin_fetch(request, fetch)
            self._awaited[fetch.number] = request
        return fetch

    def _take_in(self, chunks: Sequence[Chunk], inbox: Inbox) -> None:
        """Forget what has arrived for the requests that have begun, but for what their chunks bring into the cache."""
        for chunk in chunks:
            kv = self._requests[chunk.request_id].kv
            if kv.arrived:
                kept = {land.number for land in chunk.lands}
                inbox.discard(each.number for each in kv.arrived if each.number not in kept)
                kv.arrived = ()

    def _forget_fetch(self, request: Request, fetching: Fetching) -> None:
        """Forget what a request that has ended was waiting for, and what has arrived for it."""
        kv = request.kv
        if kv.fetch is not None:
            del self._awaited[kv.fetch.number]
            fetching.source.forget(kv.fetch.number)
            fetching.inbox.num_free += len(kv.fetch.names)
            kv.fetch = None
        fetching.inbox.discard(each.number for each in kv.arrived)
        kv.arrived = kv.landing = ()

    def _has_slo(self) -> bool:
        """Return whether any unfinished request has an SLO."""
        return any(request.slo.exists for part in (self.queue.running, self.queue.waiting) for request in part)

    def _awaits_drafts(self) -> bool:
        """Return whether the next step is to be planned only when those in flight are back: they have drafts, or it may
        have some.
        """
        assert self.drafting is not None
        if any(step.has_drafts for step in self._in_flight):
            return True
        return self.drafting.is_expected([each for each in self.queue.running if each.num_output_placeholders])

    def _take_result(self, request: Request, chunk: Chunk, result: ChunkResult, now: float) -> RequestOutput:
        """Move a request on by one computed chunk. An exception ends this request, and no other."""
        error, before = result.error, len(request.output_token_ids)
        if error is None:
            try:
                reason = advance(request, chunk, result, self._allocator, now=now)
                self._fair_share.charge_tokens(request, len(request.output_token_ids) - before)
                if reason is not None:
                    self._finish(request, reason, now)
                return output_of(request, chunk, result)
            except Exception as failure:
                logger.exception("a request failed: %s", request.request_id)
                error = f"the scheduler failed on it: {failure!r}"
        if not request.is_finished:
            self._finish(request, FinishReason.ERROR, now)
        return RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)

    def _finish(self, request: Request, reason: FinishReason, now: float, wanted_until: float | None = None) -> None:
        self.queue.remove(request)
        if self.fetching is not None:
            self._forget_fetch(request, self.fetching)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        try:
            self._fair_share.refund(request)
        except Exception:
            logger.exception("a request ended without a refund to its owner: %s", request.request_id)
        self.events.emit(RequestFinished(request, now, wanted_until))

    def _settle(self, request: Request, now: float) -> None:
        """Release or preempt a request once none of its plans is in flight."""
        if request.is_finished:
            request.kv.release(self._allocator)
            request.num_scheduled = 0
            del self._requests[request.request_id]
            if request.sent_to_executor:
                self._retired.append(request.request_id)
        elif request.kv.preempt_on_return:
            state_lost = request.kv.state is not None and request.kv.state.is_lost
            if request is self.queue.running[0] and not state_lost:
                request.kv.preempt_on_return = False  # those older have ended, and the oldest keeps its blocks
            else:
                self.queue.preempt(request, now)


def _seconds_to_compute(predictor: LatencyPredictor, start: int, block_size: int, num_blocks: int) -> float:
    """Return by how much longer steps take in all that compute so many blocks from position `start`."""
    computed = StepFeatures().plus(start=start, count=num_blocks * block_size, rows=0)
    return predictor.seconds(computed) - predictor.seconds(StepFeatures())
