"""A scheduler driven to the end by a fake executor that computes every token from what the KV cache really holds.

The executor keeps a cache of token ids instead of keys and values. A next token is a hash of everything the
chunk's block table leads to, so a block lost, shared wrongly or written late changes the output. With recurrent states,
a slot holds a hash of all tokens so far in their order, and the cache that hash at each position, so a wrong slot, an
overwritten snapshot or a missing load changes the output too. With no torch importable.

Blocks may come from elsewhere: a `FakeTier` has what others computed, and answers late, never, partly, twice, or with
another's bytes.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate, takewhile
from random import Random

from scheduler_checks import check_scheduler

from splitfuse.bench.baselines import BASELINES
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.events import StepScheduled
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetch_queue import FetchQueue
from splitfuse.core.kv.fetching import Fetch, Fetching, Found, Frame, Inbox
from splitfuse.core.kv.loans import FEWEST_TILES, KvLoan
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.latency.ledger import LatencyLedger
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import (
    PLACEHOLDER,
    ZERO_STATE,
    Chunk,
    ChunkLoan,
    ChunkResult,
    Land,
    Save,
    StateSlots,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from splitfuse.core.policy import Fcfs, SchedulingPolicy
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel, features_of
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import SloTargets
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.speculation.model_drafts import Guess, Guesses, ModelDrafts

VOCABULARY = 16
EOS = 3
TILE = 8
"""Of loans."""


def next_token(context: tuple[int, ...]) -> int:
    """The fake model: any change anywhere in the context changes the choice."""
    return zlib.crc32(bytes(context)) % VOCABULARY


def states_after(tokens: Iterable[int], state: int = 0) -> list[int]:
    """The fake recurrence: the state after each token."""
    return list(accumulate(tokens, lambda state, token: zlib.crc32(b"%d %d" % (state, token)), initial=state))[1:]


def cached(states: Iterable[int]) -> tuple[int, ...]:
    """What a network with recurrent states writes to the cache at each position."""
    return tuple(state % 256 for state in states)


def lent_block(loan: int, index: int) -> int:
    """A block of a creditor, in the fake cache of its debtor."""
    return -1 - 1000 * loan - index


def written(slots: StateSlots) -> list[int]:
    """The slots that a chunk writes."""
    return [slots.write, *(slot for _, slot in slots.kept)]


def reference(request: Request, *, recurrent: bool = False) -> tuple[list[int], FinishReason]:
    """What a request gives alone, computed without scheduler, blocks or chunks."""
    tokens = list(request.prompt_token_ids)
    while True:
        tokens.append(next_token(cached(states_after(tokens)) if recurrent else tuple(tokens)))
        count = len(tokens) - request.num_prompt_tokens
        if tokens[-1] in request.eos_token_ids and count > request.params.min_tokens:
            return tokens[request.num_prompt_tokens :], FinishReason.STOP
        if count == request.max_tokens:
            return tokens[request.num_prompt_tokens :], FinishReason.LENGTH


def arrive(request: Request, now: float | Fraction) -> None:
    """Set the time of arrival of a request that was made earlier."""
    request.scheduling = replace(request.scheduling, arrival_time=now)
    request.__post_init__()


def namer(block_size: int) -> BlockNamer:
    """Names the blocks of all runs."""
    return BlockNamer(block_size, key=b"test")


class FakeTier:
    """Has blocks that other engines have computed, and those that this one saves. Its answers are of every kind."""

    ANSWERS = ("at once", "late", "never", "partly", "twice", "another's bytes", "a flipped bit", "short", "nothing")

    def __init__(self, rng: Random, block_size: int) -> None:
        self.block_size = block_size
        self.frames: dict[bytes, Frame] = {}
        self.answers = dict.fromkeys(self.ANSWERS, 0)
        self.num_landed = self.num_refused = 0
        self._rng = rng
        self._moving: list[tuple[int, Fetch, list[Frame]]] = []  # rounds until they are there
        self._deadlines: dict[int, int] = {}

    def fill(self, requests: Iterable[Request]) -> None:
        """Have the blocks of some requests, with what they generate, as if another engine had computed them."""
        for request in requests:
            tokens = [*request.prompt_token_ids, *reference(request)[0]]
            names: list[bytes] = []
            namer(self.block_size).extend(names, tokens, salt=request.scheduling.cache_salt)
            for index, name in enumerate(names[: self._rng.randint(0, len(names))]):
                block = tokens[index * self.block_size : (index + 1) * self.block_size]
                self.save(name, tuple(block), block)

    def save(self, name: bytes, token_ids: tuple[int, ...], content: list[int]) -> None:
        """Keep a block."""
        assert content == list(token_ids), "another content was saved than the name says"
        self.frames[name] = Frame.of(name, token_ids, bytes(content).ljust(self.block_size, b"\0"))

    def find(self, names: Sequence[bytes], _: Sequence[str] = ()) -> Found:
        count = next((n for n, name in enumerate(names) if name not in self.frames), len(names))
        return Found(count, self._rng.choice((0.0, 0.0, 1.0, 100.0)))

    def find_one(self, names: Iterable[bytes]) -> tuple[bytes, float] | None:
        return next(((name, self._rng.choice((0.0, 1.0))) for name in names if name in self.frames), None)

    def forget(self, number: int) -> None:
        """Some answers come all the same."""

    def ask(self, fetch: Fetch) -> None:
        """Send off a fetch."""
        assert 0 <= fetch.seconds <= 2
        rng, how = self._rng, self._rng.choice(self.ANSWERS)
        self.answers[how] += 1
        frames = [self.frames[name] for name in fetch.names]
        place = rng.randrange(len(frames))
        frame = frames[place]
        if how == "partly":
            del frames[place:]
        elif how == "another's bytes":
            other = self.frames[rng.choice([*self.frames])]
            frames[place] = rng.choice((other, frame._replace(data=other.data), other._replace(name=frame.name)))
        elif how == "a flipped bit":
            data = bytearray(frame.data)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            frames[place] = frame._replace(data=bytes(data))
        elif how == "short":  # with a checksum that is right
            frames[place] = Frame.of(frame.name, frame.token_ids, frame.data[:-1])
        elif how == "nothing":
            frames = []
        self._deadlines[fetch.number] = rng.randint(1, 6)
        if how != "never":
            self._moving.append((rng.randint(3, 12) if how == "late" else 0, fetch, frames))
        if how == "twice":
            self._moving.append((rng.randint(0, 5), fetch, frames))

    def pass_time(self, fetches: FetchQueue, now: float) -> None:
        """Give the answers that have come, and give up fetches whose time is over."""
        moving, self._moving = self._moving, []
        for rounds, fetch, frames in moving:
            if rounds:
                self._moving.append((rounds - 1, fetch, frames))
                continue
            intact = list(takewhile(lambda frame: frame.is_intact, frames))  # as threads of an engine do
            self.num_refused += len(intact) < len(frames)
            if fetches.arrived(fetch.number, intact, now):
                del self._deadlines[fetch.number]
        for number, rounds in list(self._deadlines.items()):
            self._deadlines[number] = rounds - 1
            if rounds == 0:
                del self._deadlines[number]
                fetches.arrived(number, now=now)


class FakeExecutor:
    """Executes plans in the order they are given, as a device would."""

    keeps_plans = False

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[tuple[int, int], int] = {}
        self.last_chosen: dict[str, int] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.failing: set[str] = set()
        self.breaking: Random | None = None
        """Breaks some steps off half way; like an engine, it then computes the chunks that can be repeated."""
        self.states: dict[int, int] = {}
        self.tier: FakeTier | None = None
        self.inbox: Inbox | None = None
        self.submitted: deque[tuple[int, StepResult]] = deque()
        self.num_deposits = 0

    def submit(self, plan: StepPlan) -> int:
        self.submitted.append((plan.step, self._execute(plan)))
        return plan.step

    def wait_for_layers(self, handle: int) -> None:
        pass

    def drain(self) -> None:
        self.submitted.clear()

    def collect(self, handle: int) -> StepResult:
        step, result = self.submitted.popleft()
        assert step == handle, "steps must be collected in the order in which they were submitted"
        return result

    def _execute(self, plan: StepPlan) -> StepResult:
        for save in plan.saves:
            self.save(save)
        self.land(plan.lands)
        for chunk in plan.chunks:
            if chunk.loan is not None:
                self._deposit(chunk, chunk.loan)
        for retired in plan.retired_requests:
            del self.prompts[retired]
        for new in plan.new_requests:
            self.prompts[new.request_id] = new.prompt_token_ids
        self._check_states([chunk.state for chunk in plan.chunks if chunk.state is not None])
        if self.breaking is None or self.breaking.random() > 0.1:
            return {chunk.request_id: self._run(chunk) for chunk in plan.chunks}
        self.states |= {slot: -1 for chunk in plan.chunks if chunk.state is not None for slot in written(chunk.state)}
        lost = ChunkResult(state_lost=True)
        return {chunk.request_id: self._run(chunk) if chunk.is_repeatable else lost for chunk in plan.chunks}

    def land(self, lands: Iterable[Land]) -> None:
        for land in lands:
            assert self.inbox is not None and self.tier is not None
            self.tier.num_landed += 1
            self.cache |= {(land.block, place): token for place, token in enumerate(self.inbox[land.number])}

    def _deposit(self, chunk: Chunk, loan: ChunkLoan) -> None:
        """Give a creditor blocks, which it keeps when they are given away here."""
        assert loan.num_tokens <= chunk.start and loan.num_tokens % TILE == 0
        for index, block in loan.deposits:
            assert chunk.block_table[index] == block and (index + 1) * self.block_size <= loan.num_tokens
            for place in range(self.block_size):
                self.cache[lent_block(loan.number, index), place] = self.cache[block, place]
            self.num_deposits += 1

    def save(self, save: Save) -> None:
        assert self.tier is not None
        content = [self.cache[save.block, place] for place in range(len(save.token_ids))]
        self.tier.save(save.name, save.token_ids, content)

    @staticmethod
    def _check_states(slots: list[StateSlots]) -> None:
        """A slot that is written is neither read nor written by any other chunk of the step."""
        all_written = [slot for each in slots for slot in written(each)]
        assert len(set(all_written)) == len(all_written)
        assert all(each.read == each.write or each.read not in all_written for each in slots)

    def _run(self, chunk: Chunk) -> ChunkResult:
        assert chunk.num_choices <= chunk.num_logits <= len(chunk.token_ids)
        assert chunk.num_drafts == 0 or (chunk.samples and PLACEHOLDER not in chunk.token_ids)
        assert {land.block for land in chunk.lands} <= {*chunk.block_table[: ceil_div(chunk.start, self.block_size)]}
        table = list(chunk.block_table)
        if (loan := chunk.loan) is not None:
            for index in range(loan.num_tokens // self.block_size):
                table[index] = lent_block(loan.number, index)
        slots = [(table[p // self.block_size], p % self.block_size) for p in range(chunk.end)]
        # A request that has failed chose nothing; what a plan already in flight makes of it is dropped.
        chosen = self.last_chosen.get(chunk.request_id, 0)
        content = [chosen if token == PLACEHOLDER else token for token in chunk.token_ids]
        if chunk.state is not None:
            assert chunk.start or chunk.state.read == ZERO_STATE
            states = states_after(content, 0 if chunk.start == 0 else self.states[chunk.state.read])
            for position, slot in (*chunk.state.kept, (chunk.end, chunk.state.write)):
                self.states[slot] = states[position - chunk.start - 1]
            content = list(cached(states))
        self.cache |= zip(slots[chunk.start :], content, strict=True)
        if chunk.request_id in self.failing:
            return ChunkResult(error="the logits are NaN")
        prompt = self.prompts[chunk.request_id]
        rows = range(chunk.end - chunk.num_logits, chunk.end - chunk.num_choices)
        prompt_logprobs = tuple(TokenLogprob(prompt[p + 1], -float(p)) for p in rows)
        if not chunk.samples:
            return ChunkResult(prompt_logprobs=prompt_logprobs)
        tokens: list[int] = []
        for draft, end in zip((*chunk.drafts, -1), range(chunk.end - chunk.num_drafts, chunk.end + 1), strict=True):
            tokens.append(next_token(tuple(self.cache[slot] for slot in slots[:end])))
            if tokens[-1] != draft:
                break
        self.last_chosen[chunk.request_id] = tokens[-1]
        return ChunkResult(tuple(tokens), prompt_logprobs=prompt_logprobs)


class Guessing(Drafting):
    """Drafts what the request gives alone, with some of the tokens wrong."""

    def __init__(self, rng: Random) -> None:
        super().__init__(most=rng.randint(1, 9))
        self._rng, self._right = rng, rng.random()

    def is_expected(self, requests: Sequence[Request]) -> bool:
        return self._rng.random() < 0.2 * len(requests)

    @staticmethod
    def _update(request: Request) -> bool:
        return Drafting._update(request) or bool(request.output_token_ids)

    def _ahead(self, request: Request, most: int, least: float) -> list[tuple[int, float]]:  # type: ignore[override]
        assert least < 1
        rng, known = self._rng, len(request.output_token_ids)
        tokens = reference(request)[0][known : known + min(most, request.max_tokens - known - 1)]
        guessed = [token if rng.random() < self._right else rng.randrange(VOCABULARY) for token in tokens]
        count = next((n for n, token in enumerate(guessed) if token in request.eos_token_ids), len(guessed))
        return [(token, 0.99**n) for n, token in enumerate(guessed[:count], start=1)]


class FakeDraftModel:
    """Guesses what the fake model gives, mostly; now and then nonsense, or nothing. Its cache must lead to the tokens
    that the request has, and to what was guessed for it in this step: `fault` says where it does not.
    """

    def __init__(
        self,
        rng: Random,
        block_size: int,
        *,
        seconds: float = 0.0,
        right: float | None = None,
        vocab_size: int = VOCABULARY,
    ) -> None:
        self.requests: dict[str, Request] = {}
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.seconds = seconds
        self.cache: dict[tuple[int, int], int] = {}
        self.computed: list[list[int]] = []  # tokens of each chunk, in each step
        self.fault: AssertionError | None = None
        self.num_failures = 0
        self._rng = rng
        self._right = rng.choice((0.2, 0.6, 0.9, 1.0)) if right is None else right
        self.fails = rng.choice((0.0, 0.0, 0.0, 0.03)) if right is None else 0.0

    def guess(self, chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]) -> Guesses:
        if self._rng.random() < self.fails:
            self.num_failures += 1
            raise RuntimeError("the draft model dies")
        self.computed.append([len(chunk.token_ids) for chunk in chunks])
        try:
            guesses = [self._guess(chunk, each) for chunk, each in zip(chunks, drafts, strict=True)]
        except AssertionError as error:
            self.fault = error
            raise
        return Guesses(guesses, self.seconds)

    def _guess(self, chunk: Chunk, drafts: Sequence[int]) -> Guess | None:
        request, size, rng = self.requests[chunk.request_id], self.block_size, self._rng
        slots = [(chunk.block_table[p // size], p % size) for p in range(chunk.end)]
        assert all(0 <= token < self.vocab_size for token in chunk.token_ids), "it has no such token"
        self.cache |= zip(slots[chunk.start :], chunk.token_ids, strict=True)
        known = tuple(self.cache[slot] for slot in slots)
        assert known == (request.tokens(0, request.num_tokens) + tuple(drafts))[: len(known)]
        if not chunk.num_logits:
            return None
        assert len(known) == request.num_tokens + len(drafts), "a guess behind something else"
        if rng.random() > self._right:
            return rng.choice((None, Guess(rng.randrange(VOCABULARY), rng.random()), Guess(-1, 1.0), Guess(10**9, 0.9)))
        return Guess(next_token(known), rng.uniform(0.8, 1.0))

    def drafting(
        self, most: int, num_blocks: int, *, prefix: bool = True, cost: float = 0.1, per_token: float = 0.02
    ) -> Drafting:
        """Drafting with this model, which takes `cost` of the seconds of a step."""
        allocator = BlockAllocator(num_blocks, self.block_size, namer=namer(self.block_size) if prefix else None)
        sizes = {"vocab_size": self.vocab_size, "max_positions": 60}
        drafting = Drafting(most, ModelDrafts(self, allocator, relative_cost=cost, **sizes))
        for tokens in (1, 2, 4, 8):
            drafting.cost.observe(tokens, 1.0 + per_token * tokens)
        return drafting


@dataclass
class Outcome:
    """What a caller saw of one request."""

    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class Run:
    """One scheduler with its executor, `depth - 1` plans in flight while another is scheduled; everything checked at
    every call.
    """

    scheduler: Scheduler
    latencies: LatencyLedger
    allocator: BlockAllocator
    executor: FakeExecutor
    depth: int
    budget: int
    max_num_seqs: int
    now: float | Fraction = 0.0
    ticks: Random | None = None
    """Moves the clock on before every call, by exact fractions."""
    in_flight: deque[tuple[StepPlan, int]] = field(default_factory=deque)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    breakdowns: dict[str, LatencyBreakdown] = field(default_factory=dict)
    began: list[float | Fraction] = field(default_factory=list)  # when each plan was made
    ended: list[float | Fraction] = field(default_factory=list)  # when it was back
    num_accepted: int = 0  # drafts that were right
    asked: set[str] = field(default_factory=set)  # requests that have waited for blocks
    coming: set[str] = field(default_factory=set)  # names under which blocks are fetched ahead
    moving: dict[str, Request] = field(default_factory=dict)  # requests that leave
    num_moved: int = 0

    @classmethod
    def make(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int = 64,
        depth: int = 1,
        prefix: bool = True,
        policy: SchedulingPolicy | None = None,
        spare_states: int | None = None,
        interval: int = 1,
        drafting: Drafting | None = None,
        tier: FakeTier | None = None,
        inbox_blocks: int = 1,
    ) -> Run:
        """With recurrent states there are `spare_states` slots more than requests can hold, and snapshots every
        `interval` blocks of a prompt.
        """
        states = None
        if spare_states is not None:
            num_slots = 2 * depth * max_num_seqs + spare_states
            states = StateAllocator(
                num_slots, interval=interval * block_size if prefix else None, num_reserved=depth * max_num_seqs
            )
        allocator = BlockAllocator(
            *(num_blocks, block_size),
            namer=namer(block_size) if prefix else None,
            states=states,
            saves_blocks=tier is not None,
        )
        config = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
        executor, fetching = FakeExecutor(block_size), None
        if tier is not None:
            executor.tier, executor.inbox = tier, Inbox(inbox_blocks, block_size)
            fetching = Fetching(tier, executor.inbox)
        scheduler = Scheduler(config, allocator, policy, drafting=drafting, fetching=fetching)
        scheduler.events.subscribe(StepScheduled, _check_drafts)
        cost = None if policy is None or policy.predictor is None else policy.predictor.cost
        latencies = LatencyLedger(scheduler.events, cost=cost)
        if drafting is not None and drafting.model is not None:
            assert isinstance(drafting.model._model, FakeDraftModel)
            drafting.model._model.requests = scheduler.requests.by_id
        return cls(scheduler, latencies, allocator, executor, depth, budget, max_num_seqs)

    def add(self, request: Request) -> None:
        self._tick()
        arrive(request, self.now)
        self.scheduler.add(request, self.now)
        self.outcomes[request.request_id] = Outcome()
        check_scheduler(self.scheduler)

    def finish(self, request_id: str, reason: FinishReason, num_tokens: int | None = None) -> None:
        self._tick()
        if self.scheduler.finish(request_id, reason, num_tokens=num_tokens, now=self.now):
            self.note_breakdown(request_id)
            outcome = self.outcomes[request_id]
            outcome.finish_reason = reason
            del outcome.tokens[num_tokens if num_tokens is not None else len(outcome.tokens) :]
        check_scheduler(self.scheduler)

    def move(self, request: Request) -> None:
        """Let a request leave, and come again as it would come to another engine with the same tiers."""
        self._tick()
        self.moving[request.request_id] = request
        if self.scheduler.finish(request.request_id, FinishReason.MOVED, now=self.now):
            self._come_again(request.request_id)

    def _come_again(self, request_id: str) -> None:
        self._save_departing()
        self.latencies.pop(request_id)
        left = self.moving.pop(request_id)
        again = Request(
            *(request_id, left.prompt_token_ids, left.params, left.max_tokens, left.seed, left.eos_token_ids),
            scheduling=left.scheduling,
            block_sources=("memory:test",),
        )
        times = [self.now] * len(left.output_token_ids)
        again.resume(left.output_token_ids, times, num_prompt_logprobs=left.num_prompt_logprobs)
        self.asked.discard(request_id)
        self.num_moved += 1
        self.scheduler.add(again, self.now)
        check_scheduler(self.scheduler)

    def _save_departing(self) -> None:
        for save in self.scheduler.requests.take_departing():
            self.executor.save(save)

    def step(self) -> list[RequestOutput]:
        """One cycle of the loop: schedule as far ahead as the depth allows, then take in the oldest plan."""
        while len(self.in_flight) < self.depth and (plan := self._schedule()):
            self.in_flight.append((plan, self.executor.submit(plan)))
        if not self.in_flight:
            assert self.fetching or not self.scheduler.has_unfinished, "no progress: nothing scheduled, or in flight"
            for save in self.allocator.take_saves():
                self.executor.save(save)
            if (fetches := self.scheduler.fetches) is not None:
                lands = fetches.take_lands_ahead()
                self.executor.land(lands)
                fetches.ahead.landed(lands, is_there=True)
            check_scheduler(self.scheduler)
            return []
        running = list(self.running)
        plan, handle = self.in_flight.popleft()
        result = self.executor.collect(handle)
        self.num_accepted += sum(max(len(each.token_ids) - 1, 0) for each in result.values())
        if (predictor := self.scheduler.policy.predictor) is not None:
            self.now += predictor.cost.seconds(features_of(plan))
        self._tick()
        self.ended.append(self.now)
        outputs = self.scheduler.update(plan, result, self.now)
        self._save_departing()
        if self.waiting and not self.running and not any(each.state_lost for each in result.values()):
            assert self.waiting[0] not in running, "the oldest request was preempted"
        check_scheduler(self.scheduler)
        for output in outputs:
            if output.finish_reason is FinishReason.MOVED:
                self._come_again(output.request_id)
                continue
            outcome = self.outcomes[output.request_id]
            assert outcome.finish_reason is None, "an output after the end"
            if output.finish_reason is not None:
                self.note_breakdown(output.request_id)
            outcome.tokens += output.token_ids
            outcome.prompt_logprobs += output.prompt_logprobs or ()
            outcome.finish_reason, outcome.error = output.finish_reason, output.error
        return outputs

    def drain(self, limit: int = 100_000) -> None:
        while self.scheduler.has_unfinished or self.in_flight or self.is_prefetching:
            self.step()
            limit -= 1
            assert limit, "does not end"
        check_scheduler(self.scheduler)
        assert self.allocator.num_held == 0
        if (drafting := self.scheduler.drafting) is not None and drafting.model is not None:
            assert drafting.model.num_held == 0
        assert self.executor.inbox is None or self.executor.inbox.num_free == self.executor.inbox.capacity
        assert self.allocator.states is None or self.allocator.states.num_held == 0

    @property
    def is_prefetching(self) -> bool:
        return self.scheduler.fetches is not None and self.scheduler.fetches.ahead.is_busy

    @property
    def waiting(self) -> list[Request]:
        return self.scheduler.queue.waiting

    @property
    def running(self) -> list[Request]:
        return self.scheduler.queue.running

    @property
    def fetching(self) -> list[Request]:
        return self.scheduler.queue.fetching

    def note_breakdown(self, request_id: str) -> None:
        breakdown = self.latencies.pop(request_id)
        assert breakdown is not None, "a request that has ended has a breakdown"
        self.breakdowns[request_id] = breakdown

    def _tick(self) -> None:
        if self.ticks is not None:
            self.now = self.now + Fraction(self.ticks.choice((0, 1, 2, 7, 50)), 1000)

    def _schedule(self) -> StepPlan | None:
        if self.executor.tier is not None:
            fetches = self.scheduler.fetches
            assert fetches is not None
            self.executor.tier.pass_time(fetches, self.now)
            check_scheduler(self.scheduler)
            for fetch in fetches.take(self.now):
                if fetch.request_id in self.coming:
                    assert fetch.names, "a fetch of nothing"
                else:
                    assert fetch.request_id not in self.asked, "a request waits twice"
                    self.asked.add(fetch.request_id)
                self.executor.tier.ask(fetch)
        waiting, running = list(self.waiting), list(self.running)
        oldest = min(waiting + running, key=lambda r: r.sequence_number, default=None)
        oldest_wants = oldest is not None and oldest.num_unscheduled > 0
        self._tick()
        plan = self.scheduler.schedule(self.now)
        check_scheduler(self.scheduler)
        if plan is None:
            assert self.in_flight or not (waiting or running), "no progress with nothing in flight"
            return None
        assert plan.num_tokens > 0
        if (drafting := self.scheduler.drafting) is not None and drafting.model is not None:
            drafting.model.check()
            assert isinstance(fake := drafting.model._model, FakeDraftModel) and fake.fault is None, fake.fault
        has_drafts = any(chunk.num_drafts for chunk in plan.chunks)
        assert not has_drafts or not self.in_flight, "drafts whose request is in flight"
        assert not any(chunk.num_drafts for before, _ in self.in_flight for chunk in before.chunks), "planned too soon"
        chosen = {chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks}
        assert len(chosen) == len(plan.chunks) <= self.max_num_seqs
        self.plans.append(plan)
        self.began.append(self.now)
        policy = self.scheduler.policy
        if type(policy) in BASELINES.values():
            self._check_whole(plan)
            return plan
        assert plan.num_tokens <= self.budget
        if oldest_wants and not self.in_flight:
            assert oldest.request_id in chosen, "the oldest request got nothing"
        if num_granted(plan) < self.budget and not self.in_flight and type(policy) is Fcfs:
            self._explain_unfilled(plan)
        return plan

    def _check_whole(self, plan: StepPlan) -> None:
        """The baselines never split a prompt; only one that is alone, apart from decodes, exceeds the budget."""
        assert all(chunk.samples for chunk in plan.chunks), "a prompt was split"
        prompts = [len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1]
        assert plan.num_tokens <= self.budget or len(prompts) == 1, "prompts together exceed the budget"

    def _explain_unfilled(self, plan: StepPlan) -> None:
        """A budget may stay unfilled only when no request can use more of it, or would need as many steps with more of
        it, or no block is left but one for each that runs, and one for deposits.
        """
        deposits = any(each.kv.loan is not None and each.kv.loan.is_open for each in (*self.running, *self.waiting))
        if self.allocator.num_available <= len(self.running) + deposits:
            return
        counts = {chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks}
        for request in self.running:
            if (rest := request.num_unscheduled) and request.request_id not in sampled(plan):
                count = counts.get(request.request_id, 0)
                assert count, "runnable work, a block and budget, and yet not filled"
                most = count + self.budget - num_granted(plan)
                assert ceil_div(count + rest, count) == ceil_div(count + rest, most), "it takes a step more"
        assert not self.waiting or len(self.running) == self.max_num_seqs


def _check_drafts(event: StepScheduled) -> None:
    """Drafts keep within the seconds of their step, and take no block that a running request will soon need."""
    builder, predictor = event.builder, event.builder.predictor
    if builder.drafts:
        assert builder.queue.free.blocks >= len(builder.queue.running)
        spent = float(event.time - builder.now)  # in which a draft model has guessed
        assert predictor is None or predictor.seconds(features_of(event.plan)) + spent <= builder.max_seconds


def num_granted(plan: StepPlan) -> int:
    return sum(len(chunk.token_ids) - chunk.num_drafts for chunk in plan.chunks)


def sampled(plan: StepPlan) -> set[str]:
    return {chunk.request_id for chunk in plan.chunks if chunk.samples}


@dataclass(frozen=True)
class Workload:
    """Everything random about one run, from one seed."""

    seed: int
    recurrent: bool = False

    def run(
        self,
        depth: int,
        *,
        policy: SchedulingPolicy | None = None,
        slo: bool = False,
        ticks: bool = False,
        drafts: bool = False,
        tier: bool = False,
        loans: bool = False,
        draft_model: bool = False,
    ) -> Run:
        """Drive the workload to its end and compare every outcome with the reference. With `slo`, some requests have
        targets, and the scheduler meets them as well as it can. With `ticks` time passes at every call. With `drafts`,
        tokens are guessed, with `draft_model` by a fake of one. With `tier`, blocks are saved and fetched. With
        `loans`, creditors hold the beginning of some requests. `recurrent` workloads have states, and with one plan at
        a time steps that break off.
        """
        rng = Random(self.seed)
        block_size = rng.choice((1, 2, 4, 8))
        requests = list(self._requests(rng))
        budget = rng.choice((1, 2, 3, 5, 8, 16, 64))
        if slo:
            for request in requests:
                request.scheduling = replace(request.scheduling, targets=self._targets(rng))
            cost = CostModel(floor=rng.random(), per_token=rng.random() / 10, per_row=rng.random() / 10)
            policy = DeadlinePolicy(LatencyPredictor(cost), token_budget=budget)
        of_states = Random(f"states {self.seed}")
        of_loans = Random(f"loans {self.seed}")
        needs = [-(-(r.num_prompt_tokens + r.max_tokens - 1) // block_size) for r in requests]
        for number, request in enumerate(requests if loans else []):
            if tiles := of_loans.randint(0, needs[number] * block_size // TILE):
                request.kv.loan = KvLoan(number, tiles * TILE // block_size, block_size, tile=TILE)
                needs[number] -= request.kv.loan.num_blocks
        largest = max(*needs, FEWEST_TILES * TILE // block_size if loans else 1)
        of_tier = Random(f"tier {self.seed}")
        fake_tier = FakeTier(of_tier, block_size) if tier else None
        if fake_tier is not None:
            fake_tier.fill(request for request in requests if of_tier.random() < 0.6)
        drafting = Guessing(Random(f"drafts {self.seed}")) if drafts else None
        if draft_model:
            of_drafts = Random(f"draft model {self.seed}")
            model = FakeDraftModel(of_drafts, block_size)
            count, prefix = of_drafts.choice((3, 10, 100)), of_drafts.random() < 0.5
            drafting = model.drafting(of_drafts.randint(1, 9), count, prefix=prefix)
        run = Run.make(
            num_blocks=largest + rng.choice((0, 0, 1, 2, 5, 20)),
            block_size=block_size,
            budget=budget,
            max_num_seqs=rng.choice((1, 2, 3, 8)),
            depth=depth,
            prefix=rng.random() < 0.7 or tier,
            policy=policy,
            spare_states=of_states.choice((0, 1, 5, 50)) if self.recurrent else None,
            interval=of_states.choice((1, 2, 3)),
            drafting=drafting,
            tier=fake_tier,
            inbox_blocks=of_tier.choice((1, 2, 5, 20, 100)),
        )
        if self.recurrent and depth == 1 and of_states.random() < 0.3:
            run.executor.breaking = of_states
        if ticks:
            run.now, run.ticks = Fraction(0), Random(self.seed)
        meddled: dict[str, int] = {}
        coming = deque(requests)
        run.executor.failing = {r.request_id for r in requests if rng.random() < 0.03}
        while coming or run.scheduler.has_unfinished or run.in_flight:
            while coming and rng.random() < 0.4:
                run.add(coming.popleft())
            if rng.random() < 0.04:
                meddled |= self._meddle(rng, run)
            if tier:
                self._move_about(of_tier, run, requests)
            run.step()
        run.drain()
        for request in requests:
            self._compare(request, run, meddled)
        return run

    def _requests(self, rng: Random) -> Iterator[Request]:
        shared = [rng.randrange(VOCABULARY) for _ in range(40)]
        for number in range(rng.randint(1, 10)):
            prompt = shared[: rng.randint(0, 40)] if rng.random() < 0.6 else []
            prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
            max_tokens = rng.randint(1, 16)
            params = SamplingParams(
                min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
                prompt_logprobs=0 if rng.random() < 0.15 else None,
            )
            eos = (EOS,) if rng.random() < 0.7 else ()
            salt = rng.choice(("", "", "other"))
            options = SchedulingOptions(cache_salt=salt)
            yield Request(
                f"r{number}", tuple(prompt), params, max_tokens, seed=0, eos_token_ids=eos, scheduling=options
            )

    @staticmethod
    def _targets(rng: Random) -> SloTargets:
        """Easy, hard, impossible, or none; steps take up to some seconds."""
        first = 10.0 ** rng.uniform(-2, 2) if rng.random() < 0.7 else None
        return SloTargets(first, 10.0 ** rng.uniform(-2, 1) if rng.random() < 0.7 else None)

    @staticmethod
    def _meddle(rng: Random, run: Run) -> dict[str, int]:
        """Abort a request, or end it at one of its tokens, as a stop string does."""
        alive = [name for name, outcome in run.outcomes.items() if outcome.finish_reason is None]
        if not alive:
            return {}
        name = rng.choice(alive)
        if rng.random() < 0.5:
            run.finish(name, FinishReason.ABORT)
        else:
            run.finish(name, FinishReason.STOP, rng.randint(0, len(run.outcomes[name].tokens)))
        return {name: len(run.outcomes[name].tokens)}

    @staticmethod
    def _move_about(rng: Random, run: Run, requests: Sequence[Request]) -> None:
        """Let a request leave and come again, save some of its blocks before that, or fetch some ahead."""
        scheduler, each = run.scheduler, rng.choice(requests)
        request = scheduler.get(each.request_id)
        if request is not None and not request.is_finished and request.request_id not in run.moving:
            if rng.random() < 0.1:
                run.move(request)
            elif rng.random() < 0.1:
                scheduler.requests.save_blocks(request.request_id, rng.randint(1, 9), rng.randint(1, 3))
        if rng.random() < 0.2 and scheduler.fetches is not None:
            tokens, size = [*each.prompt_token_ids, *reference(each)[0]], run.allocator.block_size
            names: list[bytes] = []
            namer(size).extend(names, tokens, salt=each.scheduling.cache_salt)
            blocks = [tuple(tokens[size * index : size * index + size]) for index in range(len(names))]
            first, last = sorted((rng.randint(0, len(names)), rng.randint(0, len(names))))
            name = f"{each.request_id} to come"
            run.coming.add(name)
            scheduler.fetches.ahead.add(name, names[first:last], blocks[first:last], ("memory:test",))
        check_scheduler(scheduler)

    def _compare(self, request: Request, run: Run, meddled: dict[str, int]) -> None:
        outcome = run.outcomes[request.request_id]
        tokens, reason = reference(request, recurrent=self.recurrent)
        if request.request_id in meddled:
            assert outcome.tokens == tokens[: meddled[request.request_id]]
            return
        if request.request_id in run.executor.failing:
            assert (outcome.finish_reason, outcome.tokens) == (FinishReason.ERROR, [])
            assert outcome.error == "the logits are NaN"
            return
        assert (outcome.tokens, outcome.finish_reason) == (tokens, reason)
        if request.params.prompt_logprobs is not None:
            assert [p.token_id for p in outcome.prompt_logprobs] == list(request.prompt_token_ids[1:])
            assert [p.logprob for p in outcome.prompt_logprobs] == [
                -float(p) for p in range(request.num_prompt_tokens - 1)
            ]
