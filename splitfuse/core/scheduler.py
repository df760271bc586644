"""Dynamic SplitFuse: which tokens of which requests make up the next forward step.

A request is two counters, tokens known and tokens computed; every step lets the second catch up with the first under
one token budget. Long prompts are split over steps, short ones fused with the running generations, and the budget is
filled exactly while runnable work and blocks remain (Holmes et al., DeepSpeed-FastGen, arXiv 2401.08671, section 3).

    order of claims      core/slo/deadline_policy.py: requests that need only their newest token, then those with more,
    then those that wait, each oldest first and the last one cut to fit; or by what was promised
    no block left        take those of the newest running request; its tokens are kept and computed again later
    progress             The oldest unfinished request gets at least one token of every step: one is set aside for it,
                         it may take any other's blocks, and nobody may take its. `add` has made sure that it fits the
                         cache alone. So it finishes; then the next one is the oldest.
    plans in flight      `schedule` may be called before earlier plans have come back. What would take blocks from a
                         request in flight happens in the `update` of its last plan.

It knows neither text nor tensors, and of time what it is told.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from splitfuse.config import SchedulerConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.latency.ledger import LatencyLedger
from splitfuse.core.latency.phase_tracker import PhaseTracker
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import check_blocks
from splitfuse.core.plan import Chunk, ChunkResult, StepPlan, StepResult
from splitfuse.core.request import FinishReason, Request, RequestOutput, RequestStatus
from splitfuse.core.slo.admission import FreeResources, check_admission
from splitfuse.core.slo.cost_model import features
from splitfuse.core.slo.deadline_policy import SchedulingPolicy, make_policy
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.step_builder import StepBuilder
from splitfuse.errors import InvalidRequestError

by_arrival = attrgetter("arrival")


class Scheduler:
    """Owns every unfinished request and the blocks they hold. One thread: `add`, `schedule`, `update`, `finish`.

    `now` is seconds on any one clock, the same for all calls and for `Request.arrival_time`; where nothing is promised
    it may be left out.
    """

    def __init__(
        self, config: SchedulerConfig, allocator: BlockAllocator, rule: SchedulingPolicy | None = None
    ) -> None:
        self._rule = rule or make_policy(config)
        self._budget = config.max_num_batched_tokens
        self._max_num_seqs = config.max_num_seqs
        self._allocator = allocator
        self._requests: dict[str, Request] = {}  # unfinished, or finished and still in flight
        self._waiting: list[Request] = []  # both in order of arrival
        self._running: list[Request] = []
        self._retired: list[str] = []
        self._shares = FairShare()
        self._ledger = LatencyLedger()
        self._standing = PhaseTracker(self._rule.forecast, max_num_seqs=self._max_num_seqs)
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_updates = 0
        self._began: dict[int, float] = {}  # when each plan in flight was made
        self._last_update = 0.0
        self.num_preemptions = 0  # of all requests so far
        self.predicted_seconds = 0.0  # of the last step that came back; 0: nothing was predicted

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def forecast(self) -> LatencyPredictor | None:
        """What steps are predicted by, if they are."""
        return self._rule.forecast

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def get(self, request_id: str) -> Request | None:
        """The request of that id, while it is unfinished or in flight."""
        return self._requests.get(request_id)

    def add(self, request: Request, now: float = 0.0) -> None:
        """Accept a request: from here on it will finish.

        Raises RequestTooLargeError if it could not fit the cache even alone, InvalidRequestError if its id is taken,
        LateError if it wants to be on time or not at all, and cannot be.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        allocator = self._allocator
        check_blocks(
            request.num_prompt, request.max_tokens, num_blocks=allocator.num_blocks, block_size=allocator.block_size
        )
        request.arrival = self._num_arrivals
        if request.scheduling.on_time_only:
            room = FreeResources(self._max_num_seqs - len(self._running), allocator.num_available, allocator.block_size)
            check_admission(request, self._rule, running=self._running, waiting=self._waiting, room=room, now=now)
        self._num_arrivals += 1
        request.turn = self._shares.turn(request, running=self._running, waiting=self._waiting)
        self._requests[request.request_id] = request
        self._waiting.append(request)
        self._ledger.open(request.account, sent=now if request.sent is None else request.sent, now=now)

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None if nothing can run before an `update`. Blocks are taken for everything in it."""
        draft = StepBuilder(self._budget, self._rule.forecast, now=now)
        self._compose(draft, now)
        plan = self._finalize(draft)
        if plan is not None:
            self._began[plan.step] = now
            scene = self._standing.scene(
                plan,
                draft,
                running=self._running,
                waiting=self._waiting,
                num_blocks=self._allocator.num_available,
                now=now,
            )
            self._ledger.begin(scene, now)
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> list[RequestOutput]:
        """Take in what a plan gave: who advanced, who finished. Plans come back in the order they were scheduled."""
        self._num_updates += 1
        assert plan.step == self._num_updates, "plans must come back in the order they were scheduled"
        self._ledger.end(now)
        began, self._last_update = max(self._began.pop(plan.step), self._last_update), now
        if self._rule.forecast is not None:
            self.predicted_seconds = self._rule.forecast.observe(features(plan), now - began)
        outputs = []
        for chunk in plan.chunks:
            request = self._requests[chunk.request_id]
            request.num_plans_in_flight -= 1
            request.num_output_placeholders -= chunk.samples
            if not request.is_finished:
                outputs.append(self._advance(request, chunk, result.results[chunk.request_id], now))
        for chunk in plan.chunks:  # once it is known who has ended, and so who is the oldest
            request = self._requests[chunk.request_id]
            if request.num_plans_in_flight == 0:
                self._settle(request)
        return outputs

    def finish(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        num_tokens: int | None = None,
        now: float = 0.0,
        ended: float | None = None,
    ) -> LatencyBreakdown | None:
        """End a request from outside, keeping only its first `num_tokens` generated tokens if that is given; where its
        time went until `ended`, when it was given up, or until now.

        Its blocks come back at once, or with the last of its plans in flight. None if there is no such request, or no
        longer.
        """
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return None
        if num_tokens is not None:
            del request.output_token_ids[num_tokens:]
        self._finish(request, reason)
        if request.num_plans_in_flight == 0:
            self._settle(request)
        return self._ledger.close(request.account, now, ended)

    def check(self) -> None:
        """Assert what must hold between any two calls. For tests; costs as much as the cache is large."""
        self._allocator.check(request.blocks for request in self._requests.values())
        for queue, status in ((self._waiting, RequestStatus.WAITING), (self._running, RequestStatus.RUNNING)):
            assert queue == sorted(queue, key=by_arrival)
            assert all(request.status is status for request in queue)
        assert len(self._running) <= self._max_num_seqs
        for request in self._waiting:
            assert not request.blocks and not request.num_scheduled and not request.num_plans_in_flight
        for request in self._requests.values():
            assert request.num_computed <= request.num_scheduled <= len(request.blocks) * self._allocator.block_size
            assert request.num_plans_in_flight or request.num_computed == request.num_scheduled
            assert 0 <= request.num_output_placeholders <= request.num_plans_in_flight
            assert len(request.output_token_ids) <= request.max_tokens

    # Composing a step ------------------------------------------------------------------------------------------------

    def _compose(self, draft: StepBuilder, now: float) -> None:
        """Grant tokens in the order of claims. What core/baselines.py overrides."""
        oldest = self._admit_oldest()
        order = self._rule.order([r for r in self._running if r.num_wanted], self._waiting, now=now)
        if oldest is not None and oldest.num_wanted:
            draft.keep(order.kept, most=oldest.num_wanted)
        for request in order.urgent:
            self._claim(draft, request, oldest)
        draft.seconds = order.seconds
        waiting, admits = set(self._waiting), True  # until somebody who waits finds no place
        for request in order.others:
            if request not in waiting:
                self._claim(draft, request, oldest)
            elif admits:
                admits = self._can_admit(draft) and self._admit(draft, request)
        for request in [each for each in self._waiting if each not in waiting]:  # it has just lost its blocks
            if not self._can_admit(draft) or not self._admit(draft, request):
                break
        for request in self._running:
            request.steps_skipped = 0 if request in draft.granted else request.steps_skipped + 1

    def _claim(self, draft: StepBuilder, request: Request, oldest: Request | None) -> None:
        """The turn of a running request. The oldest gets a token in any case."""
        if request is oldest:
            draft.release()
        self._grant(draft, request, at_least=int(request is oldest))

    def _admit_oldest(self) -> Request | None:
        """See to it that the oldest unfinished request is running, making room for it if need be."""
        if self._waiting and (not self._running or self._waiting[0].arrival < self._running[0].arrival):
            if len(self._running) >= self._max_num_seqs and not self._preempt(than=self._waiting[0]):
                return None
            self._start(self._waiting[0])
        return self._running[0] if self._running else None

    def _grant(self, draft: StepBuilder, request: Request, *, at_least: int = 0) -> int:
        """Give a running request as many tokens as it wants, the step takes and blocks are found for; how many. The
        first `at_least` may make the step longer than it should be.
        """
        if request.status is not RequestStatus.RUNNING:  # it has just lost its blocks to another
            return 0
        wanted = draft.takes(request, at_least=at_least)
        if wanted == 0:
            return 0
        while not (room := self._room(request)) and self._preempt(than=request, draft=draft):
            wanted = draft.takes(request, at_least=at_least)
        granted = min(wanted, room)
        if granted:
            missing = self._allocator.blocks_for(request.num_scheduled + granted) - len(request.blocks)
            request.blocks += self._allocator.allocate(missing)
            draft.grant(request, granted)
        return granted

    def _room(self, request: Request) -> int:
        """Slots for further tokens of a request, in its own blocks and in those that nobody holds. A prompt leaves a
        block for each of the others that run, or it would soon lose its own to their streams; but for the oldest.
        """
        spare = self._allocator.num_available
        if request.num_wanted > 1 and request is not self._running[0]:
            spare = max(spare - len(self._running) + 1, 0)
        return (len(request.blocks) + spare) * self._allocator.block_size - request.num_scheduled

    def _can_admit(self, draft: StepBuilder) -> bool:
        """Whether there is budget, a seat and a block for somebody who waits, and one for each that runs."""
        num_running = len(self._running)
        return draft.left > 0 and num_running < self._max_num_seqs and self._allocator.num_available > num_running

    def _admit(self, draft: StepBuilder, request: Request) -> bool:
        """Start a waiting request with what it finds in the prefix cache and its first chunk; False if no block is
        left.
        """
        self._start(request)
        while request.blocks and not self._room(request):  # what it found was all there is: compute the end of it anew
            self._allocator.release([request.blocks.pop()])
            request.num_computed = request.num_scheduled = len(request.blocks) * self._allocator.block_size
        request.num_cached_blocks = len(request.blocks)
        if self._grant(draft, request):
            return True
        self._stop(request)
        return False

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=by_arrival)
        request.status = RequestStatus.RUNNING
        if request.params.prompt_logprobs is None:  # those are wanted for every position, so all must be computed
            known = request.tokens(0, request.num_known)
            salt = request.scheduling.cache_salt
            request.blocks = self._allocator.match(known, request.block_names, salt=salt)
        request.num_cached_blocks = len(request.blocks)
        request.num_computed = request.num_scheduled = len(request.blocks) * self._allocator.block_size

    def _stop(self, request: Request) -> None:
        """Back to waiting: the tokens stay, the blocks go."""
        assert request.num_plans_in_flight == 0
        self._running.remove(request)
        insort(self._waiting, request, key=by_arrival)
        request.status = RequestStatus.WAITING
        self._allocator.release(request.blocks)
        request.blocks = []
        request.num_cached_blocks = request.num_computed = request.num_scheduled = 0
        request.preempt_on_return = False

    def _preempt(self, *, than: Request, draft: StepBuilder | None = None) -> bool:
        """Take somebody's blocks for `than`. False if that must wait for an `update`, or if nobody has to give way."""
        preemption_victim = self._rule.preemption_victim(self._running, than=than)
        if preemption_victim is None:
            return False
        if draft is not None:
            draft.revoke(preemption_victim)
        if preemption_victim.num_plans_in_flight:
            preemption_victim.preempt_on_return = True
            return False
        self._count_preemption(preemption_victim)
        self._stop(preemption_victim)
        return True

    def _finalize(self, draft: StepBuilder) -> StepPlan | None:
        if not draft.granted:
            return None
        chunks, new_requests = [], []
        for request, count in draft.granted.items():
            chunks.append(self._chunk(request, count))
            if not request.sent_to_runner:
                request.sent_to_runner = True
                request.num_cached_tokens = chunks[-1].start
                new_requests.append(request.introduction())
        retired, self._retired = tuple(self._retired), []
        self._num_steps += 1
        return StepPlan(self._num_steps, self._budget, tuple(chunks), tuple(new_requests), retired)

    def _chunk(self, request: Request, count: int) -> Chunk:
        """The next `count` tokens of a request as a chunk, which is in flight from here on."""
        start, end = request.num_scheduled, request.num_scheduled + count
        samples = count == request.num_wanted
        num_logits = int(samples)
        if request.params.prompt_logprobs is not None:
            first_wanted = max(start, request.num_prompt_logprobs)
            if first_wanted < request.num_prompt - 1:
                num_logits = max(num_logits, end - first_wanted)  # none, if all of the chunk was read before
        covering = self._allocator.blocks_for(end)
        chunk = Chunk(
            request.request_id, start, request.tokens(start, end), tuple(request.blocks[:covering]), num_logits, samples
        )
        request.num_scheduled = end
        request.num_output_placeholders += samples
        request.num_plans_in_flight += 1
        return chunk

    # Taking in a result ----------------------------------------------------------------------------------------------

    def _advance(self, request: Request, chunk: Chunk, result: ChunkResult, now: float) -> RequestOutput:
        """Move a request's counter on by one chunk and append the token it chose."""
        if result.error is not None:
            self._finish(request, FinishReason.ERROR)
            return RequestOutput(
                request.request_id,
                finish_reason=FinishReason.ERROR,
                error=result.error,
                latency_breakdown=self._ledger.close(request.account, now),
            )
        request.num_computed = chunk.end
        request.num_prompt_logprobs += len(result.prompt_logprobs)
        tokens = result.token_ids
        assert len(tokens) == chunk.samples
        if tokens:
            request.output_token_ids += tokens
            request.note_token(now)
            self._shares.generated(request)
        size = self._allocator.block_size
        if chunk.end // size > chunk.start // size:
            computed = request.tokens(0, request.num_computed)
            request.num_cached_blocks = self._allocator.publish(
                request.blocks,
                computed,
                request.block_names,
                first=request.num_cached_blocks,
                salt=request.scheduling.cache_salt,
            )
        if tokens and (reason := request.reason_to_finish):
            self._finish(request, reason)
        return RequestOutput(
            request.request_id,
            tokens,
            result.logprobs,
            result.prompt_logprobs,
            request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            slo_met=request.slo_met,
            latency_breakdown=self._ledger.close(request.account, now) if request.is_finished else None,
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._shares.ended(request)
        (self._waiting if request.status is RequestStatus.WAITING else self._running).remove(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason

    def _settle(self, request: Request) -> None:
        """The last plan of a request is back: do what had to wait for it."""
        if request.is_finished:
            self._allocator.release(request.blocks)
            request.blocks = []
            request.num_computed = request.num_scheduled = 0
            del self._requests[request.request_id]
            if request.sent_to_runner:
                self._retired.append(request.request_id)
        elif request.preempt_on_return and request is self._running[0]:
            request.preempt_on_return = False  # whoever wanted its blocks has ended: now it is the oldest
        elif request.preempt_on_return:
            self._count_preemption(request)
            self._stop(request)

    def _count_preemption(self, request: Request) -> None:
        request.note_preemption()
        self._standing.forget(request)
        self.num_preemptions += 1
