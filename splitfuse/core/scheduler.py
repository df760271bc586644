"""Schedules by Dynamic SplitFuse: decides which tokens of which requests make up the next forward step.

A request is two counters, tokens known and tokens scheduled; every step lets the second catch up with the first under
one token budget. Long prompts are split over steps, in equal chunks, short ones fused with the running decodes, and
without SLOs the budget is filled while runnable work and blocks remain (Holmes et al., DeepSpeed-FastGen, arXiv
2401.08671, section 3).

    order of claims      core/policy.py: by priority; within one, decodes, which need only their newest token, then
                         prefills in progress, then waiting requests; each by fair share, then oldest first. The last
                         claim is cut to fit. With SLOs, by deadline (core/slo/deadline_policy.py).
    no block left        The newest running request of the lowest priority is preempted (with SLOs, a late one
                         first, but for no prompt of its priority): its tokens are kept, and computed again later.
    progress             The oldest unfinished request gets at least one token of every step that is scheduled with
                         nothing in flight: one is reserved for it. It may preempt any request and is never preempted,
                         and `add` has made sure that it fits the cache alone. So it finishes; then the next one is the
                         oldest.
    blocks elsewhere     core/kv/fetch_queue.py: what a prompt begins with, and another has computed, may be fetched.
                         Until the answer a request holds nothing, the oldest too; the oldest of the others counts then.
                         What is fetched ahead (core/kv/prefetching.py) lands in blocks that a plan has left, and holds
                         them until it is back.
    moves                A request that goes on at another engine leaves when no plan of it is in flight: with its
                         newest token, and all its blocks saved.
    plans in flight      `schedule` may be called before earlier plans have come back. A request in flight is preempted
                         in the `update` of its last plan.
    loans                core/kv/loans.py: leading blocks of a request may be held by another engine. While that lives,
                         the request fits as if the cache had them; it ends, to go on elsewhere, if it does not answer.
                         Blocks lent to others are no part of the cache that requests have.
    drafts               core/speculation/drafting.py: tokens that may come next, if nothing is in flight. How many of
                         them are right is known when the step is back, so nothing is planned until then. What a draft
                         model takes to guess them (model_drafts.py) goes before the step.

One step: `Scheduler.schedule` -> `SchedulingPolicy.compose` (policy.py) -> `StepBuilder` (step_builder.py), which
grants tokens and blocks -> `StepPlan` (plan.py); then `Scheduler.update` with its `StepResult`. The scheduler
reads no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.events import EngineEvents, RequestPreempted, RequestStarted, StepRecord, StepScheduled
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetch_queue import FetchQueue
from splitfuse.core.kv.fetching import Fetching
from splitfuse.core.limits import check_blocks
from splitfuse.core.plan import StepPlan, StepResult
from splitfuse.core.policy import Fcfs, PlanningError, SchedulingPolicy
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.request_table import RequestTable
from splitfuse.core.slo.cost_model import features_of
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.step_budget import StepBudget
from splitfuse.core.step_builder import RequestQueue, StepBuilder
from splitfuse.errors import InvalidRequestError


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
        assert drafting is None or allocator.states is None, "a recurrent state cannot be taken back"
        self._allocator = allocator
        queue = self.queue = RequestQueue(
            allocator,
            config.max_num_seqs,
            on_preempt=lambda request, now: events.emit(RequestPreempted(request, now)),
        )
        self.fetches: FetchQueue | None = None
        """Requests that wait for KV blocks from elsewhere, if there is an elsewhere."""
        if fetching is not None:
            self.fetches = FetchQueue(fetching, queue, allocator, events, self.policy.predictor)
        if drafting is not None:
            drafting.follow(events)
        self.requests = RequestTable(queue, allocator, events, self.policy, self.fetches)
        self._num_scheduled_steps = 0
        self._in_flight: deque[_InFlight] = deque()
        self._last_update = 0.0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.queue.waiting or self.queue.running or self.queue.fetching)

    def get(self, request_id: str) -> Request | None:
        """Return the request of that id, while it is unfinished or in flight."""
        return self.requests.by_id.get(request_id)

    def add(self, request: Request, now: float = 0.0, *, sent_time: float | None = None) -> None:
        """Accept a request: from here on it will finish. `sent_time` is when its sender handed it over, if not now.

        Raises RequestTooLargeError if it could not fit the cache even alone, InvalidRequestError if its id is taken,
        SloUnattainableError if it has `on_time_only` and could not meet its SLO.
        """
        if self.get(request.request_id) is not None:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        lent = 0 if request.kv.loan is None else request.kv.loan.num_blocks
        num_blocks, block_size = self._allocator.capacity + lent, self._allocator.block_size
        check_blocks(request.num_prompt_tokens, request.max_tokens, num_blocks=num_blocks, block_size=block_size)
        request.sequence_number = self.requests.num_accepted
        if request.on_time_only and request.is_new:  # else it was admitted once
            self.policy.check_admission(request, self.queue, now=now)
        self.policy.accept(request, self.queue)  # which may raise: nothing is changed before
        self.requests.accept(request, sent_time=now if sent_time is None else sent_time, now=now)

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """Return the next step; None if nothing can run before an `update` or an answer to a fetch. Blocks are taken
        for all of it.

        Raises PlanningError, from the exception that the policy or the builder has raised. Nothing is in flight then.
        """
        if (
            self.drafting is not None
            and self._in_flight
            and (any(each.has_drafts for each in self._in_flight) or self.drafting.is_expected(self.queue.running))
        ):
            return None
        step = StepBuilder(
            self.queue,
            self._allocator,
            token_budget=self.budget.tokens,
            most_tokens=self.budget.most,
            choose_victim=self.policy.preemption_victim,
            predictor=self.policy.predictor,
            now=now,
        )
        try:
            self.policy.compose(step)
            if not step.granted:
                return None
            if self.drafting is not None and not self._in_flight:
                now += self.drafting.compose(step, self.policy.predictor)  # the step begins when its drafts are there
            plan = step.build(self._num_scheduled_steps + 1, tuple(self.requests.retired))
        except Exception as error:
            raise PlanningError(self.policy.blamed(step)) from error
        self._num_scheduled_steps, self.requests.retired = plan.step, []
        if self.fetches is not None:
            self.fetches.begin(step.granted, plan.lands)
            if lands := self.fetches.take_lands_ahead():
                plan = replace(plan, prefetched=lands)
        self._in_flight.append(_InFlight(plan.step, now, has_drafts=bool(step.drafts)))
        for new in plan.new_requests:
            self.events.emit(RequestStarted(self.requests.by_id[new.request_id], now))
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
        outputs = self.requests.take_results(plan, result, now)
        if self.fetches is not None:
            self.fetches.end(plan, is_done=all(each.error is None for each in result.values()))
        self.requests.settle_all(now)  # once it is known which have ended, and so which is the oldest
        return outputs

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        num_tokens: int | None = None,
        num_there: int | None = None,
        now: float = 0.0,
        wanted_until: float | None = None,
    ) -> bool:
        """End a request from outside, keeping only its first `num_tokens` generated tokens if that is given.

        `wanted_until` is when its caller gave it up, if that was earlier. Its blocks come back at once, or with the
        last of its plans in flight. Returns False if there is no such unfinished request; and with MOVED if it has
        plans in flight: it leaves in the `update` of the last one. Then it takes its blocks along but for the first
        `num_there`, or those that were saved for it.
        """
        request = self.get(request_id)
        if request is None or request.is_finished:
            return False
        if reason is FinishReason.MOVED:
            request.most_here = 0
            if num_there is not None:
                request.kv.num_saved_blocks = min(request.kv.num_saved_blocks, num_there)
            if request.num_plans_in_flight:
                return False
            self.requests.leave(request, now, wanted_until)
            self.requests.settle(request, now)
            return True
        if num_tokens is not None:
            del request.output_token_ids[num_tokens:]
        self.requests.finish(request, reason, now, wanted_until)
        self.requests.settle(request, now)
        return True
