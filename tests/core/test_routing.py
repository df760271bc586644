"""The choice of a replica, and what a front knows of each to make it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_harness import Run

from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.replicas.routing import Candidate, choose_replica
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import Priority, SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.errors import SloUnattainableError

BLOCK = 16
BUDGET = 100
COST = CostModel(floor=0.01, per_token=0.001)
TIMES = StepTimes(COST)


def view(*, times: StepTimes | None = TIMES, num_blocks: int = 1000, max_num_seqs: int = 16) -> ReplicaView:
    made = ReplicaView(num_blocks=num_blocks, block_size=BLOCK, max_num_seqs=max_num_seqs, token_budget=BUDGET)
    made.take([], times, available_blocks=num_blocks, now=0.0)
    return made


def request(
    name: str,
    prompt: int,
    targets: SloTargets = NO_SLO,
    *,
    generate: int = 10,
    now: float = 0.0,
    on_time_only: bool = False,
    priority: Priority = Priority.NORMAL,
) -> Request:
    tokens = tuple(Random(name).randbytes(prompt))
    scheduling = SchedulingOptions(targets=targets, arrival_time=now, on_time_only=on_time_only, priority=priority)
    return Request(name, tokens, SamplingParams(), generate, seed=0, scheduling=scheduling)


def with_prompts(*lengths: int, targets: SloTargets = NO_SLO, **how: object) -> ReplicaView:
    """A replica that was sent prompts and has computed nothing of them."""
    made = view(**how)  # type: ignore[arg-type]
    for number, length in enumerate(lengths):
        made.add(request(f"p{number}", length, targets), [])
    return made


def with_decodes(count: int, targets: SloTargets = NO_SLO, *, generate: int = 10, **how: int) -> ReplicaView:
    made = view(**how)
    for number in range(count):
        made.add(request(f"d{number}", BLOCK, targets, generate=generate), [])
    outputs = [RequestOutput(f"d{number}", (7,), num_computed=BLOCK) for number in range(count)]
    left = how.get("num_blocks", 1000) - count
    made.take(outputs, TIMES, available_blocks=left, now=0.0)
    return made


def chosen(new: Request, *replicas: ReplicaView | Candidate | None, now: float = 0.0) -> int | None:
    return choose_replica([Candidate(each) if isinstance(each, ReplicaView) else each for each in replicas], new, now)


def test_without_replicas_that_accept_there_is_no_choice() -> None:
    assert chosen(request("a", 10)) is chosen(request("a", 10), None, None) is None
    assert chosen(request("a", 10), None, with_prompts(1000)) == 1


def test_a_silent_replica_is_chosen_only_if_all_are() -> None:
    idle, busy = view(), with_prompts(900)
    assert chosen(request("a", 10), Candidate(idle, silent=True), busy) == 1
    assert chosen(request("a", 10), Candidate(busy, silent=True), Candidate(idle, silent=True)) == 1
    assert chosen(request("a", 10), Candidate(busy, silent=True), None) == 0


@pytest.mark.parametrize("times", [TIMES, None])
def test_the_first_token_comes_soonest(times: StepTimes | None) -> None:
    """With times of steps or, without any, in tokens."""
    new, idle = request("a", 200), view(times=times)
    assert chosen(new, with_prompts(500, times=times), with_prompts(100, 300, times=times), idle) == 2
    assert chosen(new, with_prompts(500, times=times), with_prompts(100, 300, times=times)) == 1
    assert chosen(new, idle, view(times=times)) == 0
    assert chosen(new, idle, Candidate(with_prompts(150, times=times), cached=192)) == 1
    assert new.num_expected_cached == 192
    assert chosen(new, idle, Candidate(with_prompts(250, times=times), cached=192)) == 0
    assert new.num_expected_cached == 0


def test_running_decodes_are_load() -> None:
    assert chosen(request("a", 50), with_decodes(3), with_decodes(2)) == 1
    assert chosen(request("a", 50), with_decodes(9), with_prompts(20)) == 0, "9 tokens in a step, or 20 before it"
    assert chosen(request("a", 50), with_decodes(9), with_prompts(5)) == 1


def test_what_waits_for_a_slot_or_blocks_comes_later() -> None:
    long, short = (with_decodes(2, generate=count, max_num_seqs=2) for count in (100, 5))
    assert chosen(request("a", 50), long, with_prompts(900)) == 1
    assert chosen(request("a", 50), short, with_prompts(900)) == 0
    assert chosen(request("a", 50), long, short) == 1
    full = with_decodes(2, generate=100, num_blocks=5)
    assert chosen(request("a", 50), full, with_prompts(400)) == 1, "3 blocks are free, for 4 and one for each decode"


def test_an_slo_is_met_where_it_can_be() -> None:
    """The replica that would be soonest has no time for it between its decodes."""
    tight = SloTargets(ttft=100.0, itl=0.0131)
    strained, queued = with_decodes(3, tight), with_prompts(400)
    assert strained.first_token(request("a", 100), 0) < queued.first_token(request("a", 100), 0)
    assert chosen(request("a", 100, SloTargets(ttft=1.0, itl=1.0)), strained, queued) == 1
    assert chosen(request("a", 100), strained, queued) == 0


def test_no_other_request_is_made_late() -> None:
    """A prompt that is due at once, and leaves another one no time, goes where none is due."""
    due, other = with_prompts(300, targets=SloTargets(ttft=0.4)), with_prompts(400, targets=SloTargets(ttft=4.0))
    assert chosen(request("a", 100), due, other) == 0
    assert chosen(request("a", 100, SloTargets(ttft=0.35)), due, other) == 1


def test_where_all_break_an_slo_the_fewest_are_broken() -> None:
    two = with_prompts(100, 100, targets=SloTargets(ttft=0.23))
    one = with_prompts(250, targets=SloTargets(ttft=0.28))
    new = request("a", 190, SloTargets(ttft=0.25))
    assert (two.num_broken(new, 0, 0.0), one.num_broken(new, 0, 0.0)) == (1, 1)
    assert chosen(new, two, one) == 0
    late = with_prompts(600, targets=SloTargets(ttft=0.1))
    assert late.num_broken(new, 0, 0.0) == 0, "what is late anyway gives way"
    assert chosen(new, two, one, late) == 2


SLOS = [NO_SLO, *(SloTargets(ttft=0.1 * n) for n in (1, 3, 6)), *(SloTargets(ttft=2.0, itl=0.02 * n) for n in (1, 2))]
some_requests = st.lists(
    st.builds(
        request,
        st.uuids().map(str),
        st.integers(1, 300),
        st.sampled_from(SLOS),
        on_time_only=st.booleans(),
        priority=st.sampled_from(Priority),
    ),
    max_size=5,
)


@given(
    decodes=some_requests, prompts=some_requests, new=some_requests.filter(bool), now=st.sampled_from([0.0, 0.05, 0.2])
)
def test_broken_are_those_that_would_be_in_time_otherwise(
    decodes: list[Request], prompts: list[Request], new: list[Request], now: float
) -> None:
    known = view()
    for each in (*decodes, *prompts):
        known.add(each, [])
    outputs = [RequestOutput(each.request_id, (7,), num_computed=each.num_prompt_tokens) for each in decodes]
    known.take(outputs, TIMES, available_blocks=900, now=0.0)
    for each in new:
        found = known.num_broken(each, 0, now)
        every = [*prompts, each]
        priority = min(one.priority for one in every)
        feasibility = Feasibility(TIMES, decodes, now=now, priority=priority, token_budget=BUDGET)
        before = {one.request for one in feasibility.feasible(prompts)} | (
            {each} if each.slo.deadline < math.inf else set()
        )
        after = {one.request for one in feasibility.feasible(every)}
        together = Feasibility(TIMES, decodes, soon=every, now=now, token_budget=BUDGET)
        assert found == len(before - after) + (not together.is_sustainable)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 900), max_size=3), st.integers(0, 9)), max_size=6))
def test_no_other_is_sooner_without_slos(states: list[tuple[bool, list[int], int]]) -> None:
    replicas = [
        Candidate(with_prompts(*prompts), cached=BLOCK * cached) if accepts else None
        for accepts, prompts, cached in states
    ]
    new = request("a", 150)
    index = chosen(new, *replicas)
    waits = [math.inf if each is None else each.view.first_token(new, each.cached) for each in replicas]
    assert (index is None and min(waits, default=math.inf) == math.inf) or waits[index or 0] == min(waits)


@dataclass
class Front:
    """A scheduler, and what a front that hears its outputs knows of it."""

    run: Run
    view: ReplicaView
    predictor: LatencyPredictor

    @classmethod
    def make(cls, *, num_blocks: int = 400, max_num_seqs: int = 16) -> Front:
        predictor, sizes = LatencyPredictor(COST), {"num_blocks": num_blocks, "max_num_seqs": max_num_seqs}
        policy = DeadlinePolicy(predictor, token_budget=BUDGET)
        run = Run.make(block_size=BLOCK, budget=BUDGET, policy=policy, **sizes)
        return cls(run, view(**sizes), predictor)

    def add(self, new: Request) -> None:
        self.run.add(new)
        self.view.add(request(new.request_id, new.num_prompt_tokens, new.slo.targets, now=float(self.run.now)), [])

    def step(self) -> None:
        outputs, available = self.run.step(), self.run.allocator.num_available
        self.view.take(outputs, self.predictor.times, available_blocks=available, now=float(self.run.now))


TARGETS = (NO_SLO, SloTargets(ttft=1.0, itl=0.1), SloTargets(ttft=3.0, tpot=0.05), SloTargets(itl=0.2))


@pytest.mark.parametrize("seed", range(20))
def test_a_front_knows_what_its_replica_has_to_do(seed: int) -> None:
    random, front = Random(seed), Front.make()
    run = front.run
    for number in range(40):
        if random.random() < 0.5:
            front.add(request(f"r{number}", random.randint(1, 300), random.choice(TARGETS)))
        elif run.scheduler.has_unfinished:
            front.step()
        known = {each.request_id: each for each in (*front.view.running, *front.view.waiting)}
        assert known.keys() == {each.request_id for each in (*run.running, *run.waiting)}
        assert {each.request_id for each in front.view.waiting} == {each.request_id for each in run.waiting}
        for real in (*run.running, *run.waiting):
            copy = known[real.request_id]
            assert (copy.num_scheduled, copy.output_token_ids) == (real.num_scheduled, real.output_token_ids)
            assert (copy.num_unscheduled, copy.slo.deadline, copy.slo.missed) == (
                real.num_unscheduled,
                real.slo.deadline,
                real.slo.missed,
            )


def test_a_front_predicts_the_wait_that_its_replica_tells() -> None:
    assert sum(map(_refusals, range(20))) > 100


def _refusals(seed: int) -> int:
    """Return how many requests with `on_time_only` were refused, each with the same wait by both."""
    random = Random(seed)
    front = Front.make(max_num_seqs=random.choice((3, 16)), num_blocks=random.choice((60, 400)))
    run, refused = front.run, 0
    for number in range(30):
        front.add(request(f"r{number}", random.randint(1, 300), random.choice(TARGETS)))
        for _ in range(random.randint(0, 2)):
            front.step()
        if run.scheduler.queue.num_preemptions:
            break  # a front hears of them when they are computed again
        now, targets = float(run.now), SloTargets(ttft=random.uniform(0.1, 2.0), itl=random.uniform(0.02, 0.5))
        new, copy = (request("new", 100, targets, now=now, on_time_only=True) for _ in range(2))
        try:
            run.scheduler.policy.check_admission(new, run.scheduler.queue, now=now)
            wait = 0.0
        except SloUnattainableError as error:
            wait = error.retry_after
            refused += wait < math.inf
        assert front.view.wait(copy, 0, now) == pytest.approx(wait)
    return refused


def test_a_request_that_no_replica_admits_goes_where_its_wait_is_least() -> None:
    targets = SloTargets(ttft=0.5, itl=1.0)
    busy = [with_prompts(*lengths, targets=SloTargets(ttft=1.0, itl=1.0)) for lengths in ((700,), (400, 200), (650,))]
    new = request("a", 300, targets, on_time_only=True)
    waits = [each.wait(new, 0, 0.0) for each in busy]
    assert 0.0 < waits[1] < waits[2] < waits[0]
    assert chosen(new, *busy) == 1
    assert chosen(new, *busy, view()) == 3


def test_a_preempted_request_is_a_prompt_again() -> None:
    made = with_decodes(1)
    assert [each.num_unscheduled for each in made.running] == [1]
    before = made.first_token(request("a", 10), 0)
    made.take([RequestOutput("d0", num_computed=4)], TIMES, available_blocks=900, now=1.0)
    assert [each.num_unscheduled for each in made.running] == [BLOCK + 1 - 4]
    assert made.first_token(request("a", 10), 0) > before
    made.take([RequestOutput("d0", finish_reason=FinishReason.ABORT)], TIMES, available_blocks=900, now=1.0)
    assert made.running == made.waiting == []


def names(prompt: list[int], salt: str = "") -> list[bytes]:
    made: list[bytes] = []
    BlockNamer(BLOCK, key=b"test").extend(made, prompt, salt=salt)
    return made


def test_a_sent_prompt_is_remembered_as_far_as_it_agrees() -> None:
    memory = PrefixMemory(100, BLOCK)
    prompt = list(range(5 * BLOCK + 3))
    assert memory.cached_tokens(names(prompt)) == 0
    memory.add(names(prompt))
    assert memory.cached_tokens(names(prompt)) == 5 * BLOCK
    other = [*prompt[: 2 * BLOCK + 1], -1, *prompt[2 * BLOCK + 2 :]]
    assert memory.cached_tokens(names(other)) == 2 * BLOCK
    assert memory.cached_tokens(names(prompt, salt="another")) == 0
    assert memory.cached_tokens(names(prompt[: BLOCK - 1])) == 0


def test_the_block_sent_longest_ago_is_forgotten_first() -> None:
    memory = PrefixMemory(2, BLOCK)
    prompts = [[number] * BLOCK for number in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        memory.add(names(prompt))
    assert [memory.cached_tokens(names(prompt)) > 0 for prompt in prompts] == [True, False, True]
