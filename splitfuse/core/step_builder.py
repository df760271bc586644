"""Builds a step: which requests run, how many tokens each is granted, and the blocks that hold them.

`RequestQueue` holds the requests between steps; a `StepBuilder` lives for one step. Policies (core/policy.py) decide,
and call its methods in their order.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Fetch
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import Chunk, DraftKind, StepPlan
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.slo.cost_model import StepCounts, StepFeatures
from splitfuse.core.slo.latency_predictor import LatencyPredictor

ALIGNMENT = 16
"""Number of tokens that evenly cut chunks are a multiple of, the height of the kernels' tiles."""

by_sequence_number = attrgetter("sequence_number")


class FreeResources(NamedTuple):
    """Counts the resources left for further requests."""

    sequence_slots: int
    blocks: int
    block_size: int

    def fit(self, requests: Sequence[Request], *, num_running: int) -> bool:
        """Return whether the prompts of `requests` fit, with a block left for each running request."""
        blocks = sum(ceil_div(request.num_tokens, self.block_size) for request in requests)
        return len(requests) <= self.sequence_slots and blocks + num_running <= self.blocks

    def after(self, request: Request) -> FreeResources:
        """Return what is free once a running request has ended."""
        return FreeResources(self.sequence_slots + 1, self.blocks + len(request.kv.blocks), self.block_size)


class RequestQueue:
    """Holds the unfinished requests, waiting or running, each list in order of acceptance. Only running ones hold
    blocks. Those that are `fetching` wait for an answer first, and no policy sees them.
    """

    def __init__(
        self, allocator: BlockAllocator, max_num_seqs: int, *, on_preempt: Callable[[Request, float], None]
    ) -> None:
        """`on_preempt` is called with each request that is about to lose its blocks, and the time."""
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.fetching: list[Request] = []
        self.num_preemptions = 0
        self._allocator = allocator
        self._on_preempt = on_preempt

    @property
    def unfinished(self) -> list[Request]:
        """Return all requests."""
        return [*self.running, *self.waiting, *self.fetching]

    @property
    def free(self) -> FreeResources:
        """Return what is free for further requests."""
        slots = self.max_num_seqs - len(self.running)
        return FreeResources(slots, self._allocator.num_available, self._allocator.block_size)

    def start(self, request: Request) -> None:
        """Let a waiting request run, with the blocks that the prefix cache has for it."""
        self.waiting.remove(request)
        insort(self.running, request, key=by_sequence_number)
        request.status = RequestStatus.RUNNING
        request.kv.start(self._allocator, request.num_tokens)
        num_landing = 0
        if request.kv.loan is not None:
            request.kv.num_computed = request.kv.num_lent * self._allocator.block_size
        elif request.params.prompt_logprobs is None:  # else the logits of every position are needed: all are computed
            tokens = request.tokens(0, request.num_tokens)
            request.kv.reuse_prefix(self._allocator, tokens, salt=request.scheduling.cache_salt)
            if request.kv.arrived:
                num_landing = request.kv.land(self._allocator, spare=len(self.running))
        request.num_scheduled = request.kv.num_computed + num_landing
        request.num_expected_cached = 0

    def begin_fetch(self, request: Request, fetch: Fetch) -> None:
        """Let a waiting request wait for blocks first."""
        request.kv.fetch = fetch
        self.waiting.remove(request)
        insort(self.fetching, request, key=by_sequence_number)

    def end_fetch(self, request: Request) -> None:
        """Let a request run as soon as it may."""
        request.kv.fetch = None
        self.fetching.remove(request)
        insort(self.waiting, request, key=by_sequence_number)

    def requeue(self, request: Request) -> None:
        """Send a running request back to waiting: it keeps its tokens and gives its blocks back."""
        assert request.num_plans_in_flight == 0
        self.running.remove(request)
        insort(self.waiting, request, key=by_sequence_number)
        request.status = RequestStatus.WAITING
        request.kv.release(self._allocator)
        request.num_scheduled = 0

    def preempt(self, request: Request, now: float) -> None:
        """Take the blocks of a running request, which will be computed again later."""
        self._on_preempt(request, now)
        request.kv.note_preemption()
        self.num_preemptions += 1
        self.requeue(request)

    def expect_cached(self, request: Request) -> None:
        """Look up how much of a new request's tokens the prefix cache has."""
        if request.params.prompt_logprobs is None and request.kv.loan is None:
            tokens = request.tokens(0, request.num_tokens)
            request.num_expected_cached = self._allocator.count_cached(
                tokens, request.kv.block_names, salt=request.scheduling.cache_salt
            )

    def remove(self, request: Request) -> None:
        """Forget a request which has finished, and waits for no blocks."""
        (self.waiting if request.status is RequestStatus.WAITING else self.running).remove(request)


class StepBuilder:
    """Holds the tokens granted so far, in the order of the claims, and what is left of two budgets: tokens and, with a
    predictor, seconds.
    """

    def __init__(
        self,
        queue: RequestQueue,
        allocator: BlockAllocator,
        *,
        token_budget: int,
        choose_victim: Callable[..., Request | None],
        most_tokens: int = 0,
        predictor: LatencyPredictor | None = None,
        now: float = 0.0,
    ) -> None:
        """`choose_victim` is `SchedulingPolicy.preemption_victim`, `most_tokens` the budget of a step that a policy
        limits by time.
        """
        self.queue = queue
        self.now = now
        self.granted: dict[Request, int] = {}
        self.tokens_left = token_budget
        """Tokens left of the token budget. A policy raises it for a prompt that is computed whole."""
        self.max_seconds = math.inf
        """Longest time that the step may be predicted to take. A policy lowers it for the grants that follow."""
        self._allocator = allocator
        self._token_budget, self._most_tokens = token_budget, most_tokens
        self._choose_victim = choose_victim
        self.predictor = predictor
        self._counts = StepCounts()
        self.drafts: dict[Request, tuple[DraftKind, tuple[int, ...]]] = {}
        """Drafts that are computed with the newest token of some requests, and where they come from."""
        self.claimant: Request | None = None
        """Request whose claim is being met or whose chunk is made: an exception meanwhile is put down to it."""
        self._oldest: Request | None = None
        self._reserved_tokens = 0
        self._reserved_share = 0.0

    def raise_budget(self) -> None:
        """Raise the token budget to that of a step which is limited by time. Call it before tokens are granted."""
        assert not self.granted
        self._token_budget = self.tokens_left = max(self._token_budget, self._most_tokens)

    @property
    def features(self) -> StepFeatures:
        """Return the features of all that is granted, without drafts; they are counted if there is a predictor."""
        return self._counts.features

    # Requests ---------------------------------------------------------------------------------------------------------

    def start_oldest(self) -> Request | None:
        """Make sure that the oldest unfinished request runs, preempting another if need be. Returns it; None if there
        is none, or if it must wait for plans in flight.
        """
        running, waiting = self.queue.running, self.queue.waiting
        if waiting and (not running or waiting[0].sequence_number < running[0].sequence_number):
            self.claimant = waiting[0]
            has_slot = len(running) < self.queue.max_num_seqs or self.preempt_for(waiting[0])
            if has_slot:
                self.queue.start(waiting[0])
            self.claimant = None
            if not has_slot:
                return None
        self._oldest = running[0] if running else None
        return self._oldest

    def can_start(self) -> bool:
        """Return whether there is budget, a sequence slot, and a block for a waiting request and each running one."""
        num_running = len(self.queue.running)
        has_block = self._allocator.num_available > num_running
        return self.tokens_left > 0 and num_running < self.queue.max_num_seqs and has_block

    def start(self, request: Request) -> bool:
        """Start a waiting request with its cached prefix and a first chunk. Returns False if it must go on waiting."""
        if not self.can_start():
            return False
        self.claimant = request
        self.queue.start(request)
        # If the cached prefix uses every block, drop its last one to make room for a token.
        while request.kv.blocks and not self.available_slots(request):
            request.kv.drop_last_block(self._allocator)
            request.num_scheduled = request.kv.num_computed
        if self.grant(request):
            return True
        num_cached = request.num_scheduled
        self.queue.requeue(request)
        request.num_expected_cached = num_cached
        return False

    def preempt_for(self, claimant: Request) -> bool:
        """Take the blocks of the policy's victim for `claimant`. Returns False if there is none, or if its plans in
        flight must come back first.
        """
        victim = self._choose_victim(self.queue.running, claimant=claimant)
        if victim is None:
            return False
        self._revoke(victim)
        if victim.num_plans_in_flight:
            victim.kv.preempt_on_return = True
            return False
        self.queue.preempt(victim, self.now)
        return True

    # Tokens and blocks ------------------------------------------------------------------------------------------------

    def reserve(self, share: float, *, at_most: int) -> None:
        """Hold a share of both budgets back for the oldest request until its `grant`: one token at least, `at_most`
        at most.
        """
        self._reserved_share = share
        self._reserved_tokens = min(max(1, int(share * self._token_budget)), at_most)
        self.tokens_left -= self._reserved_tokens

    def grant(self, request: Request) -> int:
        """Grant a running request as many tokens as it needs, the budgets allow and blocks are found for, preempting
        others if there is none that it may take. Returns how many.

        The oldest request gets a token even if that makes the step longer than it should be.
        """
        self.claimant = request
        at_least = 0
        if request is self._oldest:  # what was reserved is for it
            self.tokens_left += self._reserved_tokens
            self._reserved_tokens, self._reserved_share, at_least = 0, 0.0, 1
        if request.status is not RequestStatus.RUNNING:  # it was preempted in this step
            return 0
        count = self.fitting_tokens(request, at_least=at_least)
        kv, start = request.kv, request.num_scheduled
        needs_blocks = count > kv.num_blocks * self._allocator.block_size - start
        if needs_blocks:
            while not (available := self.available_slots(request)) and self.preempt_for(request):
                count = self.fitting_tokens(request, at_least=at_least)
            count = min(count, available)
        if count:
            if needs_blocks or kv.state is not None:
                kv.grow(self._allocator, start, start + count)
            self.granted[request] = count
            self.tokens_left -= count
            if self.predictor is not None:
                # One row of logits for each chunk: one with none (within a prompt) or several takes as long.
                self._counts.add(start, count)
        return count

    def fitting_tokens(self, request: Request, *, at_least: int = 0) -> int:
        """Return how many tokens of a request fit the budgets, `at_least` of them whatever time they take."""
        needed = request.num_unscheduled
        fitting = most = min(needed, max(self.tokens_left, 0))
        if self.predictor is not None and self.max_seconds < math.inf:
            seconds = self.max_seconds * (1.0 - self._reserved_share)
            fitting = self.predictor.tokens_within(seconds, self._counts, request.num_scheduled, most)
        if 0 < fitting < needed:
            fitting = self._even_chunk(request, fitting)
        return min(most, max(fitting, at_least))

    def available_slots(self, request: Request) -> int:
        """Return the KV slots for further tokens of a running request, in its own blocks and in those not held.

        A prefill leaves a block for each of the other running requests: their decodes would soon need it, and preempt
        the prefill for it. So a prefill may find none, and preempt a newer request, although a few blocks are free. The
        oldest request, which is never preempted, takes them all.
        """
        spare, running = self._allocator.num_available, self.queue.running
        if spare and request is not running[0] and request.num_unscheduled > 1:
            spare = max(spare - len(running) + 1, 0)
        loan = request.kv.loan
        if spare and loan is not None and loan.is_open and loan.due(request.num_scheduled) == loan.num_held:
            spare -= 1  # for the chunk that deposits tiles: only then blocks come back
        return (request.kv.num_blocks + spare) * self._allocator.block_size - request.num_scheduled

    def draft(self, request: Request, token_ids: Sequence[int], kind: DraftKind = DraftKind.LOOKUP) -> None:
        """Let tokens that are guesses be computed with the newest one of a request, which has been granted: those for
        which there are blocks that no running request will soon need.
        """
        end = request.num_scheduled + self.granted[request]
        spare = max(self._allocator.num_available - len(self.queue.running), 0)
        slots = (request.kv.num_blocks + spare) * self._allocator.block_size - end
        if count := min(len(token_ids), slots):
            request.kv.grow(self._allocator, request.num_scheduled, end + count)
            self.drafts[request] = kind, tuple(token_ids[:count])

    def _even_chunk(self, request: Request, most: int) -> int:
        """Split the rest of a prompt into equal chunks, avoiding a short last chunk, unless the extra step would miss
        the deadline. Returns the first chunk, of at most `most` tokens: as many steps as these take, and what it leaves
        of the budget is for the claims that follow.
        """
        steps = ceil_div(request.num_unscheduled, most)
        if self.now + (steps + 1) * self.max_seconds > request.slo.deadline:
            return most
        return min(most, ceil_div(request.num_unscheduled, steps * ALIGNMENT) * ALIGNMENT)

    def _revoke(self, request: Request) -> None:
        self.tokens_left += self.granted.pop(request, 0)
        self._counts = StepCounts()
        for other, count in self.granted.items():
            self._counts.add(other.num_scheduled, count)

    # The plan ---------------------------------------------------------------------------------------------------------

    def build(self, step: int, retired_requests: tuple[str, ...]) -> StepPlan:
        """Turn the grants into the plan of step number `step`. Its chunks are in flight from here on."""
        chunks, states = [], []
        for request, count in self.granted.items():  # what may raise comes before anything is in flight
            self.claimant = request
            chunks.append(self._chunk(request, count))
            if not request.sent_to_executor:
                states.append(request.sampling_state())
        self.claimant = None
        for request in self.queue.running if len(self.granted) < len(self.queue.running) else ():
            if request not in self.granted:
                request.slo.steps_skipped += 1
        for request, chunk in zip(self.granted, chunks, strict=True):
            request.slo.steps_skipped = 0
            if not request.sent_to_executor:
                request.sent_to_executor = True
                request.kv.num_cached_tokens = chunk.start
            request.kv.landing = ()
            if request.kv.loan is not None and chunk.loan is not None:
                request.kv.loan.num_sent = chunk.loan.num_tokens // self._allocator.block_size
            if request.kv.state is not None:
                request.kv.state.advance(chunk)
            request.num_scheduled += len(chunk.token_ids) - chunk.num_drafts  # which is certain
            request.num_output_placeholders += chunk.samples
            request.num_plans_in_flight += 1
        saves = self._allocator.take_saves()
        return StepPlan(step, self._token_budget, tuple(chunks), tuple(states), retired_requests, saves)

    def _chunk(self, request: Request, count: int) -> Chunk:
        start, end = request.num_scheduled, request.num_scheduled + count
        samples, kv = count == request.num_unscheduled, request.kv
        num_logits = int(samples)
        if request.params.prompt_logprobs is not None:
            first_wanted = max(start, request.num_prompt_logprobs)
            if first_wanted < request.num_prompt_tokens - 1:
                num_logits = max(num_logits, end - first_wanted)  # negative if all of the chunk was given out before
        tokens, num_drafts, kind = request.tokens(start, end), 0, DraftKind.LOOKUP
        if request in self.drafts:
            kind, drafts = self.drafts[request]
            num_drafts = len(drafts)
            tokens, end, num_logits = tokens + drafts, end + num_drafts, num_logits + num_drafts
        table = tuple(kv.blocks[: ceil_div(end, self._allocator.block_size) - kv.num_lent])
        loan = None
        if kv.loan is not None:
            table, loan = (0,) * kv.num_lent + table, kv.loan.next_chunk(start, kv.blocks)
        state, lands = kv.state_slots, kv.landing
        return Chunk(
            request.request_id, start, tokens, table, num_logits, samples, state, num_drafts, kind, lands, loan
        )
