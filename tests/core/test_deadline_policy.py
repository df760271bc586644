"""The order of claims under SLOs: on hand-made requests, against laws and against every other order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduler_harness import Run

from splitfuse.config.engine import TAIL_SHARE, SchedulerConfig
from splitfuse.config.values import MAX_TARGET, MIN_TARGET
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Fetching, Found, Frame, Inbox
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.policy import Tier
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import Priority, SchedulingOptions
from splitfuse.core.slo.cost_model import MAX_COEFFICIENT, CostModel, StepCounts, StepFeatures
from splitfuse.core.slo.deadline_policy import ClaimOrder, DeadlinePolicy, Fcfs
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.slo.latency_predictor import MAX_SAFETY_FACTOR, LatencyPredictor
from splitfuse.core.slo.request_slo import MISSED_ITL_FACTOR
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.core.slo.usual_step import MOST_LOOKED_AT
from splitfuse.core.step_builder import StepBuilder
from splitfuse.errors import CostModelError, InvalidRequestError, SloUnattainableError

COST = CostModel(floor=0.01, per_token=0.001)  # 100 tokens take 0.11 s
BUDGET = 100


def request(name: str, prompt: int, targets: SloTargets = NO_SLO, *, arrival_time: float = 0.0) -> Request:
    scheduling = SchedulingOptions(targets=targets, arrival_time=arrival_time)
    made = Request(name, (1,) * prompt, SamplingParams(), 50, seed=0, scheduling=scheduling)
    made.sequence_number = int(arrival_time * 1000)
    return made


def change(request: Request, **options: Any) -> None:
    changed = request.scheduling = replace(request.scheduling, **options)
    request.priority, request.owner, request.on_time_only = changed.priority, changed.owner, changed.on_time_only


def decode(name: str, itl: float | None, *, token_at: float, arrival_time: float = 0.0) -> Request:
    """It has its first token and needs its newest."""
    made = request(name, 10, SloTargets(None, itl), arrival_time=arrival_time)
    made.status, made.output_token_ids, made.kv.num_computed, made.num_scheduled = RequestStatus.RUNNING, [1], 10, 10
    made.slo.observe_token(token_at)
    return made


def make_policy() -> DeadlinePolicy:
    return DeadlinePolicy(LatencyPredictor(COST), token_budget=BUDGET)


class Everything:
    """Has all blocks."""

    def find(self, names: Sequence[bytes], _: Sequence[str] = ()) -> Found:
        return Found(len(names), 0.001)

    def find_one(self, _: Iterable[bytes]) -> tuple[bytes, float] | None:
        return None

    def forget(self, number: int) -> None: ...


def test_what_has_arrived_from_a_tier_is_no_work() -> None:
    policy = make_policy()
    allocator = BlockAllocator(100, 16, namer=BlockNamer(16, key=b"k"), saves_blocks=True)
    config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=4)
    scheduler = Scheduler(config, allocator, policy, fetching=Fetching(Everything(), Inbox(100, 4)))
    added = request("a", 1000, SloTargets(0.2, None))  # computing it takes 1 s
    scheduler.add(added, 0.0)
    assert scheduler.fetches is not None
    (fetch,) = scheduler.fetches.take()
    assert not policy._feasibility([], now=0.0).feasible([added])
    scheduler.fetches.arrived(
        fetch.number, [Frame.of(*each, b"data") for each in zip(fetch.names, fetch.token_ids, strict=True)]
    )
    assert added.num_expected_cached == 992
    assert [each.request for each in policy._feasibility([], now=0.0).feasible([added])] == [added]


@pytest.mark.parametrize(("ttft", "most"), [(1.5, 0.5), (1.03, 0.03), (0.9, None), (30.0, 1.0)])
def test_a_request_that_is_to_be_on_time_waits_for_blocks_as_long_as_it_can(ttft: float, most: float | None) -> None:
    allocator = BlockAllocator(100, 16, namer=BlockNamer(16, key=b"k"), saves_blocks=True)
    config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=4)
    scheduler = Scheduler(config, allocator, make_policy(), fetching=Fetching(Everything(), Inbox(100, 4)))
    added = request("a", 1000, SloTargets(ttft, None))  # computing it takes 1 s
    change(added, on_time_only=True)
    added.is_new = False  # else it would be refused where it cannot be on time
    scheduler.add(added, 0.0)
    assert scheduler.fetches is not None
    fetches = scheduler.fetches.take(0.0)
    if most is None:
        assert fetches == []
    else:
        assert fetches[0].seconds == pytest.approx(most, abs=0.02)


def names(order: ClaimOrder) -> tuple[list[str], list[str]]:
    """The urgent requests, and the others in the order of their claims."""
    urgent, *others = order.tiers
    return [r.request_id for r in urgent.claims], [r.request_id for tier in others for r in tier.claims]


def seconds(order: ClaimOrder) -> float:
    """How long the step may be for prompts that can be in time."""
    return order.tiers[2].max_seconds


@pytest.mark.parametrize("seed", range(50))
def test_without_slos_the_order_is_first_come_first_served(seed: int) -> None:
    rng = Random(seed)
    running = []
    for number in range(rng.randint(1, 12)):
        if rng.random() < 0.5:
            running.append(decode(f"r{number}", None, token_at=number, arrival_time=number))
        else:
            made = request(f"r{number}", rng.randint(2, 90), arrival_time=number)
            made.status = RequestStatus.RUNNING
            running.append(made)
    waiting = [request(f"r{n}", rng.randint(1, 90), arrival_time=n) for n in range(12, 12 + rng.randint(0, 4))]
    plain = Fcfs().order(running, waiting, now=99.0)
    ordered = make_policy().order(running, waiting, now=99.0)
    assert ordered == plain and all(tier.max_seconds == math.inf for tier in ordered.tiers)
    for claimant in (*running, *waiting):
        chosen = [policy.preemption_victim(running, claimant=claimant) for policy in (Fcfs(), make_policy())]
        assert chosen[0] is chosen[1]


def test_a_decode_lends_its_time_to_a_prompt_that_needs_it() -> None:
    stream = decode("s", 0.25, token_at=1.0)
    tight, loose = (request("p", 80, SloTargets(ttft), arrival_time=1.0) for ttft in (0.0935, 0.5))
    assert names(make_policy().order([stream], [tight], now=1.0)) == ([], ["p", "s"])
    assert names(make_policy().order([stream], [loose], now=1.0)) == (["s"], ["p"])  # there is time for both
    due = make_policy().order([stream], [tight], now=1.16)  # its deadline is before the end of the next step
    assert names(due)[0] == ["s"]


def test_decodes_leave_time_for_a_prompt_to_come_though_another_is_late() -> None:
    stream, prompt = decode("s", 0.25, token_at=1.0), request("p", 80, SloTargets(0.12), arrival_time=1.0)
    late = request("l", 80, SloTargets(0.5))
    late.turn = 9.0
    for waiting in ([prompt], [late, prompt]):
        assert names(make_policy().order([stream], waiting, now=1.0))[0] == []


def test_a_step_ends_before_the_slack_of_a_decode_is_used_up() -> None:
    stream, prompt = decode("s", 0.25, token_at=1.0), request("p", 800, SloTargets(2.5))
    assert seconds(make_policy().order([stream], [prompt], now=1.1)) <= MAX_SAFETY_FACTOR * 0.15
    for early in range(1, 40):  # tokens after 10 ms each leave more and more of it
        stream.slo.observe_token(1.0 + early / 100)
    order = make_policy().order([stream], [prompt], now=1.4)
    assert 0.25 < seconds(order) <= MAX_SAFETY_FACTOR * (stream.slo.deadline - 1.4)


def test_a_step_is_no_longer_than_the_first_prompt_may_take() -> None:
    prompts = [request(f"p{n}", 100, SloTargets(0.25 + n), arrival_time=n / 1000) for n in range(9)]
    assert 0.11 <= seconds(make_policy().order([], prompts, now=0.01)) <= 0.25


def test_steps_are_short_for_the_sake_of_decodes_only_while_no_more_prompts_can_be_in_time() -> None:
    cost = CostModel(floor=0.009, per_token=0.0, knee=19.0, per_token_beyond=0.00042)  # a decode leaves most of a step
    policy = DeadlinePolicy(LatencyPredictor(cost), token_budget=BUDGET)
    stream = decode("s", 9.0, token_at=0.0)
    prompts = [request(f"p{n}", 50, SloTargets(60.0), arrival_time=n / 1000) for n in range(3)]
    assert seconds(policy.order([stream], prompts[:1], now=0.01)) < 0.012
    assert seconds(policy.order([stream], prompts, now=0.01)) > 0.03
    assert seconds(policy.order([], prompts[:1], now=0.01)) > 0.03


def test_rounding_at_the_knee_limits_no_step() -> None:
    predictor = LatencyPredictor(CostModel(floor=0.264, per_token=0.0, knee=4.125, per_token_beyond=0.064))
    for tokens in range(1, 40):
        step = StepFeatures(tokens=tokens)
        predictor.observe(step, 1.01 * predictor.seconds(step))
        assert Feasibility(predictor, (), now=0.0).longest == math.inf


def test_the_token_of_the_oldest_request_makes_no_decode_late() -> None:
    stream = decode("s", 0.25, token_at=1.0)
    feasibility = make_policy()._feasibility([stream], now=1.231)
    assert feasibility.slack + COST.per_token <= MAX_SAFETY_FACTOR * (stream.slo.deadline - 1.231)


def test_others_yield_to_on_time_only_requests() -> None:
    """A second is left, of which seven eighths must be enough for it, also if it is not among the first deadlines."""

    def feasible(*, on_time_only: bool) -> list[str]:
        prompts = [request(f"other{n}", 60, SloTargets(0.9), arrival_time=n / 1000) for n in range(5)]
        prompts.append(request("taken", 590, SloTargets(1.0), arrival_time=0.01))
        change(prompts[-1], on_time_only=on_time_only)
        found = Feasibility(LatencyPredictor(COST), (), now=0.0).feasible(prompts, at_most=5)
        return sorted(each.request.request_id for each in found)

    assert len(feasible(on_time_only=False)) == 5  # the last deadline is not looked at
    assert [name[:5] for name in feasible(on_time_only=True)] == ["other"] * 4 + ["taken"]  # 0.84 s


@pytest.mark.parametrize("number", [MOST_LOOKED_AT - 1, MOST_LOOKED_AT, MOST_LOOKED_AT + 8])
def test_prompts_of_low_priority_hide_none_of_a_higher(number: int) -> None:
    low = [request(f"low{n}", 10, SloTargets(2.0), arrival_time=n / 1000) for n in range(number)]
    for each in low:
        change(each, priority=Priority.LOW)
    high = request("high", 10, SloTargets(2.0), arrival_time=0.1)  # the last deadline
    change(high, priority=Priority.HIGH)
    for each in (*low, high):
        each.turn = 9.0
    _, others = names(make_policy().order([], [*low, high], now=0.2))
    assert others[0] == "high" and len(others) == number + 1


def test_an_impossible_itl_target_shortens_no_step() -> None:
    prompt = request("p", 200, SloTargets(9.0))
    alone = seconds(make_policy().order([], [prompt], now=0.0))
    assert seconds(make_policy().order([decode("s", 1e-6, token_at=0.0)], [prompt], now=0.0)) >= alone
    late = decode("l", 1e-6, token_at=0.0)
    late.slo.observe_token(0.5)
    assert late.slo.missed and seconds(make_policy().order([late], [prompt], now=0.5)) >= alone  # nor a late one
    other = decode("t", 0.05, token_at=0.0)
    both = make_policy().order([decode("s", 1e-6, token_at=0.0), other], [prompt], now=0.0)
    assert seconds(both) <= MAX_SAFETY_FACTOR * 0.05  # the target that can be met does


def test_a_prompt_that_does_not_start_is_as_short_as_before() -> None:
    """What the cache has of it counts as no work, also once it was tried to start it and the step had no time left."""
    run = Run.make(num_blocks=100, block_size=16, budget=100, policy=make_policy())
    first, second = request("a", 96), request("b", 99)
    first.max_tokens = 1
    run.add(first)
    run.drain()
    run.add(second)
    queue = run.scheduler.queue
    assert second.num_expected_cached == 96
    step = StepBuilder(
        queue, run.allocator, token_budget=100, choose_victim=Fcfs().preemption_victim, predictor=LatencyPredictor(COST)
    )
    step.max_seconds = 0.0
    assert not step.start(second) and queue.waiting == [second]
    assert second.num_expected_cached == 96 and run.allocator.num_held == 0


def test_a_decode_of_lower_priority_shortens_no_step() -> None:
    low, prompt = decode("s", 0.03, token_at=0.0), request("p", 200, SloTargets(3.0))
    change(low, priority=Priority.LOW)
    assert seconds(make_policy().order([low], [prompt], now=0.0)) > 0.03
    change(prompt, priority=Priority.LOW)
    assert seconds(make_policy().order([low], [prompt], now=0.0)) <= MAX_SAFETY_FACTOR * 0.03


def test_feasible_prompts_come_first_and_late_ones_last() -> None:
    late = decode("late", 0.25, token_at=1.0)
    late.slo.observe_token(5.9)
    running = [
        late,
        decode("free", None, token_at=5.0, arrival_time=1.0),
        decode("ahead", 0.25, token_at=6.0, arrival_time=2.0),
    ]
    waiting = [
        request("hopeless", 20, SloTargets(0.5), arrival_time=3.0),
        request("any", 20, arrival_time=4.0),
        request("hopeful", 200, SloTargets(1.2273), arrival_time=5.0),  # it needs 0.23 s
    ]
    for each in waiting:
        each.turn = math.inf
    assert names(make_policy().order(running, waiting, now=6.0)) == (
        [],
        ["hopeful", "ahead", "free", "any", "late", "hopeless"],
    )


def test_a_prompt_at_risk_is_not_given_up_unless_another_is_in_time() -> None:
    late = request("late", 100, SloTargets(0.1, None))
    risky = request("risky", 100, SloTargets(0.112, None), arrival_time=0.001)  # takes 0.11 s
    safe = request("safe", 20, SloTargets(1.0, None), arrival_time=0.002)
    late.turn = risky.turn = safe.turn = 9.0
    assert names(make_policy().order([], [late, risky], now=0.002)) == ([], ["risky", "late"])
    assert names(make_policy().order([], [late, risky, safe], now=0.002)) == ([], ["safe", "late", "risky"])


def test_the_share_of_the_late_comes_on_top_of_the_floor() -> None:
    """A step of few decodes takes its floor, though their tokens alone would take less."""
    predictor = LatencyPredictor(CostModel(floor=0.03, per_token=5e-5, knee=2000.0, per_token_beyond=5e-5))
    policy = DeadlinePolicy(predictor, token_budget=2048)
    late, prompt = request("late", 100, SloTargets(0.01)), request("p", 200, SloTargets(1.0), arrival_time=4.99)
    order = policy.order([decode("d", 0.25, token_at=4.98)], [late, prompt], now=5.0)
    assert [[each.request_id for each in tier.claims] for tier in order.tiers] == [["d"], ["late"], ["p"], []]
    decodes = StepCounts()
    decodes.add(10, 1)
    assert predictor.tokens_within(order.tiers[1].max_seconds, decodes, 0, 100) > 0


def test_a_prompt_without_time_in_its_tier_keeps_no_other_tier_from_starting() -> None:
    class Tight(Fcfs):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = LatencyPredictor(COST)  # a compiled policy does not see attributes of other classes

        def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
            del now
            return ClaimOrder((Tier(running), Tier(waiting[:2], 0.0), Tier(waiting[2:])))

    run = Run.make(num_blocks=100, block_size=16, budget=100, policy=Tight())
    for number in range(4):
        run.scheduler.add(request(f"r{number}", 20, arrival_time=float(number)))
    plan = run.scheduler.schedule()
    assert plan is not None and [chunk.request_id for chunk in plan.chunks] == ["r0", "r3"]


def test_order_is_fcfs_where_hardly_any_request_can_be_in_time() -> None:
    late, prompt = decode("d", 0.1, token_at=0.0), request("p", 100, SloTargets(0.05, 0.1), arrival_time=5.0)
    late.slo.observe_token(5.0)
    prompt.turn, policy = 9.0, make_policy()
    by_age = Fcfs().order([late], [prompt], now=5.1)
    assert late.slo.missed and policy.order([late], [prompt], now=5.1) != by_age
    run = Run.make(num_blocks=100, block_size=16, budget=100, policy=policy)
    run.scheduler.add(prompt, 5.0)  # it takes 0.11 s
    assert run.scheduler.schedule(5.0) is not None
    assert policy.order([late], [prompt], now=5.1) == by_age
    in_time = decode("i", 0.1, token_at=5.05)
    assert policy.order([late, in_time], [prompt], now=5.1).limits_time  # it is not slowed down
    run.scheduler.add(request("q", 10, SloTargets(0.05, 0.1), arrival_time=5.1), 5.1)  # takes 0.02 s
    assert run.scheduler.schedule(5.1) is not None
    assert policy.order([late], [prompt], now=5.15).limits_time
    for number, is_few in enumerate((False, False, False, False, True)):  # 1 of 7 is less than TAIL_SHARE
        run.scheduler.add(request(f"r{number}", 100, SloTargets(0.05, 0.1), arrival_time=5.15), 5.15)
        run.scheduler.schedule(5.15)
        assert (policy.order([late], [prompt], now=5.2) == by_age) is is_few


@pytest.mark.parametrize("tail_share", [0.001, TAIL_SHARE, 0.5])
def test_a_decode_skipped_too_often_is_urgent(tail_share: float) -> None:
    policy = DeadlinePolicy(LatencyPredictor(COST), token_budget=BUDGET, tail_share=tail_share)
    late = decode("late", 0.25, token_at=1.0)
    late.slo.observe_token(5.9)
    for late.slo.steps_skipped in (0, 6):
        assert names(policy.order([late], [], now=6.0)) == ([], ["late"])
    late.slo.steps_skipped = 7
    assert names(policy.order([late], [], now=6.0)) == (["late"], [])


def test_a_late_decode_gets_twice_the_itl_target() -> None:
    late = decode("late", 0.25, token_at=1.0)
    late.slo.observe_token(5.0)
    assert late.slo.missed and late.slo.deadline == 5.0 + MISSED_ITL_FACTOR * 0.25
    feasible = request("p", 80, SloTargets(9.0), arrival_time=5.0)
    assert names(make_policy().order([late], [feasible], now=5.2)) == ([], ["p", "late"])
    assert names(make_policy().order([late], [feasible], now=5.51)) == (["late"], ["p"])


@pytest.mark.parametrize("seed", range(100))
def test_no_other_order_meets_more_ttft_targets(seed: int) -> None:
    rng = Random(seed)
    prompts = [
        request(f"p{number}", rng.randint(2, 150), SloTargets(rng.uniform(0.05, 0.9)), arrival_time=number / 1000)
        for number in range(rng.randint(1, 6))
    ]
    feasibility = Feasibility(LatencyPredictor(COST), (), now=0.01)

    def on_time(chosen: Sequence[Request]) -> int:
        """How many are, if only those are begun that can be, in this order."""
        work, count = 0.0, 0
        for each in chosen:
            if work + feasibility.seconds(each) <= feasibility.room(each.slo.deadline):
                work, count = work + feasibility.seconds(each), count + 1
        return count

    found = [each.request for each in feasibility.feasible(prompts)]
    assert len(found) == on_time(found) == max(on_time(chosen) for chosen in permutations(prompts))


def test_the_late_request_with_the_least_to_lose_is_preempted() -> None:
    running = [decode(name, 0.25, token_at=1.0, arrival_time=i) for i, name in enumerate("abcd")]
    for each, computed in zip(running, (90, 40, 60, 10), strict=True):
        each.kv.num_computed = computed
    for each in running[:3]:
        each.slo.observe_token(9.0)
    in_time = decode("e", 0.25, token_at=9.0, arrival_time=10.0)
    assert (
        make_policy().preemption_victim(running, claimant=in_time) is running[1]
    )  # late, and less to lose than c; a is the oldest of all
    assert make_policy().preemption_victim(running, claimant=running[1]) is running[2]  # from a late one after it
    assert make_policy().preemption_victim(running, claimant=running[2]) is None
    assert make_policy().preemption_victim(running[:1], claimant=in_time) is None
    assert make_policy().preemption_victim(running, claimant=running[0]) is running[1]


def test_a_prompt_takes_blocks_from_lower_priorities_alone() -> None:
    running = [decode(name, 0.25, token_at=1.0, arrival_time=i) for i, name in enumerate("abcd")]
    for each in running[:3]:
        each.slo.observe_token(9.0)  # late
    prompt = request("e", 20, SloTargets(9.0), arrival_time=10.0)
    assert make_policy().preemption_victim(running, claimant=prompt) is None
    change(running[3], priority=Priority.LOW)
    assert make_policy().preemption_victim(running, claimant=prompt) is running[3]
    change(running[2], priority=Priority.LOW)
    assert make_policy().preemption_victim(running, claimant=prompt) is running[2]  # which is late
    oldest = request("o", 20, SloTargets(9.0), arrival_time=-1.0)
    assert make_policy().preemption_victim(running, claimant=oldest) is running[2]


def test_a_long_prompt_makes_no_decode_late() -> None:
    forecast = LatencyPredictor(COST)
    run = Run.make(num_blocks=1000, block_size=16, budget=256, policy=DeadlinePolicy(forecast, token_budget=256))
    for number in range(8):
        run.add(request(f"s{number}", 5, SloTargets(1.0, 0.25)))
    outputs = []
    while run.scheduler.has_unfinished:
        if len(run.plans) == 2:
            run.add(request("long", 4000, SloTargets(60.0, 0.25)))
        outputs += run.step()
    assert sum(len(output.token_ids) for output in outputs) == 9 * 50
    assert all(output.slo_met for output in outputs)


def test_every_request_is_served_under_lasting_overload() -> None:
    """One and a half times what can be done, for five minutes, with a bound on those that wait: the oldest always
    moves, so none waits longer than all that are before it take at the share reserved for the late.
    """
    rng = Random(1)
    run = Run.make(num_blocks=250, block_size=16, budget=100, max_num_seqs=16, policy=make_policy())
    alone = 2 * 0.11 + 10 * 0.011  # of a request of 200 tokens that generates 10: seconds of the machine
    due, most = 0.0, 40
    waits: list[float] = []
    begun: dict[str, float] = {}
    number = 0
    while run.now < 300.0:
        while due <= run.now:
            due += rng.expovariate(1.5 / alone)
            if len(begun) < most:
                made = request(f"r{number}", 200, SloTargets(0.5, 0.25))
                made.max_tokens, made.prompt_token_ids = 10, tuple(rng.randbytes(200))
                number += 1
                run.add(made)
                begun[made.request_id] = run.now
        if not run.scheduler.has_unfinished:
            run.now = due
            continue
        ended = [output.request_id for output in run.step() if output.finish_reason is not None]
        waits += [run.now - begun.pop(name) for name in ended]
        run.plans.clear()
        run.outcomes = {name: run.outcomes[name] for name in begun}
    longest = max(*waits, *(run.now - since for since in begun.values()))
    assert longest < most * alone / TAIL_SHARE * 2


EXTREME_TARGETS = st.none() | st.sampled_from([MIN_TARGET, MAX_TARGET]) | st.floats(MIN_TARGET, MAX_TARGET)
EXTREME_SECONDS = st.sampled_from([0.0, 5e-324, 1e-300, MAX_COEFFICIENT]) | st.floats(0.0, 0.1)
COEFFICIENTS = ("floor", "per_token", "per_token_beyond", "per_row", "per_pair", "per_kv_token", "per_request")


@settings(max_examples=60, deadline=None)
@example(
    cost=dict.fromkeys(COEFFICIENTS, 0.0),
    targets=[(1.0, 0.1, None, False, 40), (1.0, 0.1, None, True, 40)],
    tail_share=0.1,
)
@given(
    cost=st.fixed_dictionaries(dict.fromkeys((*COEFFICIENTS, "knee", "noise"), EXTREME_SECONDS)),
    targets=st.lists(st.tuples(*[EXTREME_TARGETS] * 3, st.booleans(), st.integers(1, 300)), min_size=1, max_size=8),
    tail_share=st.sampled_from([5e-324, 1e-300, TAIL_SHARE, 0.25]),
)
def test_no_target_or_cost_model_stops_the_scheduler(
    cost: dict[str, float], targets: list[tuple[float, float, float, bool, int]], tail_share: float
) -> None:
    policy = DeadlinePolicy(LatencyPredictor(CostModel(**cost)), token_budget=BUDGET, tail_share=tail_share)
    run = Run.make(num_blocks=60, block_size=16, budget=BUDGET, policy=policy)
    for number, (ttft, itl, ttft_per_token, on_time_only, prompt) in enumerate(targets):
        made = request(f"r{number}", prompt, SloTargets(ttft, itl, ttft_per_token))
        made.max_tokens = 5
        change(made, on_time_only=on_time_only)
        try:
            run.add(made)
        except SloUnattainableError as error:
            assert on_time_only and error.retry_after > 0
        except InvalidRequestError:
            assert on_time_only and not made.slo.exists
        run.step()
    run.drain(limit=2000)
    assert all(outcome.error is None and len(outcome.tokens) == 5 for outcome in run.outcomes.values())


NO_TARGETS = [
    0,
    -0.0,
    5e-324,
    1e-300,
    MIN_TARGET / 2,
    2 * MAX_TARGET,
    1e300,
    math.inf,
    math.nan,
    -1,
    10**5000,
    True,
    "1s",
]


@pytest.mark.parametrize("name", ["ttft", "itl", "ttft_per_token"])
def test_a_target_out_of_bounds_is_refused_by_name(name: str) -> None:
    for value in NO_TARGETS:
        with pytest.raises(
            InvalidRequestError, match=f"^{name} must be a number of seconds from 1e-06 to 86400"
        ) as error:
            SloTargets(**{name: value})
        assert error.value.parameter == name and len(str(error.value)) < 200


@pytest.mark.parametrize("weight", [0.0, 5e-324, 1e300, math.inf, math.nan, -1.0])
def test_a_weight_or_an_arrival_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"weight must be a number from 0.001 to 1000"):
        SchedulingOptions(weight=weight)
    with pytest.raises(InvalidRequestError, match="arrival_time must be a time in seconds"):
        SchedulingOptions(arrival_time=math.nan)


@pytest.mark.parametrize("value", [-1.0, 1e300, math.inf, math.nan])
def test_a_cost_model_of_no_machine_is_refused(value: float) -> None:
    for name in (*COEFFICIENTS, "knee", "noise"):
        with pytest.raises(CostModelError, match=f"^{name} of a cost model must be a number from 0 to 1e"):
            CostModel(**{"floor": 0.01, "per_token": 0.001, name: value})
