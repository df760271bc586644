"""Dynamic SplitFuse: which tokens of which requests make up the next forward pass.

A request is two counters, tokens known and tokens computed; every step lets the second catch up with the first under
one token budget. Long prompts are split over steps, short ones fused with the running generations, and the budget is
filled exactly while runnable work and blocks remain (Holmes et al., DeepSpeed-FastGen, arXiv 2401.08671, section 3).

    order of claims      1. requests that need only their newest token, oldest first
                         2. requests with more pending tokens, oldest first
                         3. waiting requests, in order of arrival, the last one cut to fit
    no block left        take those of the newest running request; its tokens are kept and computed again later
    progress             The oldest unfinished request gets at least one token of every pass: one is set aside for it,
                         it may take any other's blocks, and nobody may take its. `add` has made sure that it fits the
                         cache alone. So it finishes; then the next one is the oldest.
    plans in flight      `schedule` may be called before earlier plans have come back. What would take blocks from a
                         request in flight happens in the `update` of its last plan.

It knows neither time nor text nor tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from splitfuse.config import SchedulerConfig
from splitfuse.core.block_allocator import BlockAllocator
from splitfuse.core.limits import check_blocks
from splitfuse.core.plan import Chunk, ChunkResult, NewRequest, StepPlan, StepResult
from splitfuse.core.request import FinishReason, Request, RequestOutput, RequestStatus
from splitfuse.errors import InvalidRequestError

by_arrival = attrgetter("arrival")


class Scheduler:
    """Owns every unfinished request and the blocks they hold. One thread: `add`, `schedule`, `update`, `finish`."""

    def __init__(self, config: SchedulerConfig, allocator: BlockAllocator) -> None:
        self._budget = config.max_num_batched_tokens
        self._max_num_seqs = config.max_num_seqs
        self._allocator = allocator
        self._requests: dict[str, Request] = {}  # unfinished, or finished and still in flight
        self._waiting: list[Request] = []  # both in order of arrival
        self._running: list[Request] = []
        self._retired: list[str] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_updates = 0
        self.num_preemptions = 0  # of all requests so far

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def get(self, request_id: str) -> Request | None:
        """The request of that id, while it is unfinished or in flight."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Accept a request: from here on it will finish.

        Raises RequestTooLargeError if it could not fit the cache even alone, InvalidRequestError if its id is taken.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"a request with the id {request.request_id!r} is still running")
        allocator = self._allocator
        check_blocks(
            request.num_prompt, request.max_tokens, num_blocks=allocator.num_blocks, block_size=allocator.block_size
        )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def schedule(self) -> StepPlan | None:
        """The next pass, or None if nothing can run before an `update`. Blocks are taken for everything in it."""
        draft = Draft(self._budget)
        self._compose(draft)
        return self._finalize(draft)

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in what a plan gave: who advanced, who finished. Plans come back in the order they were scheduled."""
        self._num_updates += 1
        assert plan.step == self._num_updates, "plans must come back in the order they were scheduled"
        outputs = []
        for chunk in plan.chunks:
            request = self._requests[chunk.request_id]
            request.num_plans_in_flight -= 1
            request.num_unread -= chunk.samples
            if not request.is_finished:
                outputs.append(self._advance(request, chunk, result.results[chunk.request_id]))
            if request.num_plans_in_flight == 0:
                self._settle(request)
        return outputs

    def finish(self, request_id: str, reason: FinishReason, *, num_tokens: int | None = None) -> bool:
        """End a request from outside, keeping only its first `num_tokens` generated tokens if that is given.

        Its blocks come back at once, or with the last of its plans in flight. False if there is no such request, or no
        longer.
        """
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return False
        if num_tokens is not None:
            del request.output_token_ids[num_tokens:]
        self._finish(request, reason)
        if request.num_plans_in_flight == 0:
            self._settle(request)
        return True

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
            assert 0 <= request.num_unread <= request.num_plans_in_flight
            assert len(request.output_token_ids) <= request.max_tokens

    # Composing a pass ------------------------------------------------------------------------------------------------

    def _compose(self, draft: Draft) -> None:
        """Grant tokens in the order of claims. What core/policies.py overrides."""
        oldest = self._admit_oldest()
        generating = [r for r in self._running if self._pending(r) == 1]
        prompts = [r for r in self._running if self._pending(r) > 1]

        draft.left -= (set_aside := 1 if oldest in prompts else 0)
        for request in generating:
            self._grant(draft, request)
        draft.left += set_aside
        for request in prompts:
            self._grant(draft, request)
        for request in self._admissible(draft):
            if not self._admit(draft, request):
                break

    def _pending(self, request: Request) -> int:
        """Tokens of a request to be scheduled; none if those in flight already bring its last."""
        if len(request.output_token_ids) + request.num_unread >= request.max_tokens:
            return 0
        return 0 if request.preempt_on_return else request.num_pending

    def _admit_oldest(self) -> Request | None:
        """See to it that the oldest unfinished request is running, making room for it if need be."""
        if self._waiting and (not self._running or self._waiting[0].arrival < self._running[0].arrival):
            if len(self._running) >= self._max_num_seqs and not self._preempt_newest(than=self._waiting[0]):
                return None
            self._start(self._waiting[0])
        return self._running[0] if self._running else None

    def _grant(self, draft: Draft, request: Request) -> int:
        """Give a running request as many tokens as it wants, the budget leaves and blocks are found for; how many."""
        if request.status is not RequestStatus.RUNNING:  # it has just lost its blocks to an older one
            return 0
        wanted = min(self._pending(request), draft.left)
        if wanted == 0:
            return 0
        while not (room := self._room(request)) and self._preempt_newest(than=request, draft=draft):
            wanted = min(self._pending(request), draft.left)
        granted = min(wanted, room)
        if granted:
            missing = self._allocator.blocks_for(request.num_scheduled + granted) - len(request.blocks)
            request.blocks += self._allocator.allocate(missing)
            draft.grant(request, granted)
        return granted

    def _room(self, request: Request) -> int:
        """Slots for further tokens of a request, in its own blocks and in those that nobody holds."""
        blocks = len(request.blocks) + self._allocator.num_available
        return blocks * self._allocator.block_size - request.num_scheduled

    def _admissible(self, draft: Draft) -> Iterator[Request]:
        """Waiting requests to admit, in order, while there is budget, a seat and a block."""
        for request in list(self._waiting):
            if not draft.left or len(self._running) >= self._max_num_seqs or not self._allocator.num_available:
                return
            yield request

    def _admit(self, draft: Draft, request: Request) -> bool:
        """Start a waiting request with what it finds in the prefix cache and its first chunk; False if no block is
        left.
        """
        self._start(request)
        while request.blocks and not self._room(request):  # what it found was all there is: compute the end of it anew
            self._allocator.release([request.blocks.pop()])
            request.num_computed = request.num_scheduled = len(request.blocks) * self._allocator.block_size
        request.num_published = len(request.blocks)
        if self._grant(draft, request):
            return True
        self._stop(request)
        return False

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=by_arrival)
        request.status = RequestStatus.RUNNING
        if request.params.prompt_logprobs is None:  # those are wanted for every position, so all must be computed
            request.blocks = self._allocator.match(request.tokens(0, request.num_known), salt=request.cache_salt)
        request.num_published = len(request.blocks)
        request.num_computed = request.num_scheduled = len(request.blocks) * self._allocator.block_size

    def _stop(self, request: Request) -> None:
        """Back to waiting: the tokens stay, the blocks go."""
        assert request.num_plans_in_flight == 0
        self._running.remove(request)
        insort(self._waiting, request, key=by_arrival)
        request.status = RequestStatus.WAITING
        self._allocator.release(request.blocks)
        request.blocks = []
        request.num_published = request.num_computed = request.num_scheduled = 0
        request.preempt_on_return = False

    def _preempt_newest(self, *, than: Request, draft: Draft | None = None) -> bool:
        """Take the blocks of the newest running request that is newer than `than`. False if that must wait for an
        `update`, or if there is none.
        """
        newest = self._running[-1] if self._running else than
        if newest.arrival <= than.arrival:
            return False
        if draft is not None:
            draft.revoke(newest)
        if newest.num_plans_in_flight:
            newest.preempt_on_return = True
            return False
        self._stop(newest)
        self._count_preemption(newest)
        return True

    def _finalize(self, draft: Draft) -> StepPlan | None:
        if not draft.granted:
            return None
        chunks, new_requests = [], []
        for request, count in draft.granted.items():
            chunks.append(self._chunk(request, count))
            if not request.known_to_runner:
                request.known_to_runner = True
                request.num_cached_tokens = chunks[-1].start
                new_requests.append(_introduce(request))
        retired, self._retired = tuple(self._retired), []
        self._num_steps += 1
        return StepPlan(self._num_steps, self._budget, tuple(chunks), tuple(new_requests), retired)

    def _chunk(self, request: Request, count: int) -> Chunk:
        """The next `count` tokens of a request as a chunk, which is in flight from here on."""
        start, end = request.num_scheduled, request.num_scheduled + count
        samples = count == self._pending(request)
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
        request.num_unread += samples
        request.num_plans_in_flight += 1
        return chunk

    # Taking in a result ----------------------------------------------------------------------------------------------

    def _advance(self, request: Request, chunk: Chunk, result: ChunkResult) -> RequestOutput:
        """Move a request's counter on by one chunk and append the token it chose."""
        if result.error is not None:
            self._finish(request, FinishReason.ERROR)
            return RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=result.error)
        request.num_computed = chunk.end
        request.num_prompt_logprobs += len(result.prompt_logprobs)
        tokens: tuple[int, ...] = ()
        logprobs = () if result.logprob is None else (result.logprob,)
        if chunk.samples:
            assert result.token_id is not None
            tokens = (result.token_id,)
            request.output_token_ids += tokens
        size = self._allocator.block_size
        if chunk.end // size > chunk.start // size:
            computed = request.tokens(0, request.num_computed)
            request.num_published = self._allocator.publish(
                request.blocks, computed, first=request.num_published, salt=request.cache_salt
            )
        if tokens and (reason := _reason_to_finish(request)):
            self._finish(request, reason)
        return RequestOutput(
            request.request_id,
            tokens,
            logprobs,
            result.prompt_logprobs,
            request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        (self._waiting if request.status is RequestStatus.WAITING else self._running).remove(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason

    def _settle(self, request: Request) -> None:
        """The last plan of a request is back: do what had to wait for it."""
        if request.is_finished:
            self._allocator.release(request.blocks)
            request.blocks = []
            request.num_computed = request.num_scheduled = 0
            del self._requests[request.request_id]
            if request.known_to_runner:
                self._retired.append(request.request_id)
        elif request.preempt_on_return and request is self._running[0]:
            request.preempt_on_return = False  # whoever wanted its blocks has ended: now it is the oldest
        elif request.preempt_on_return:
            self._stop(request)
            self._count_preemption(request)

    def _count_preemption(self, request: Request) -> None:
        request.num_preemptions += 1
        self.num_preemptions += 1


class Draft:
    """A pass being composed: tokens granted so far, in the order of the claims, and budget left."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.granted: dict[Request, int] = {}

    def grant(self, request: Request, count: int) -> None:
        self.granted[request] = count
        self.left -= count

    def revoke(self, request: Request) -> None:
        self.left += self.granted.pop(request, 0)


def _introduce(request: Request) -> NewRequest:
    return NewRequest(
        request.request_id,
        request.prompt_token_ids,
        request.params,
        request.eos_token_ids,
        request.seed,
        request.choice,
    )


def _reason_to_finish(request: Request) -> FinishReason | None:
    """Whether the newest token is a request's last. An end token within the first `min_tokens` does not count."""
    newest, count = request.output_token_ids[-1], len(request.output_token_ids)
    if count > request.params.min_tokens and (
        newest in request.eos_token_ids or newest in request.params.stop_token_ids
    ):
        return FinishReason.STOP
    return FinishReason.LENGTH if count >= request.max_tokens else None
