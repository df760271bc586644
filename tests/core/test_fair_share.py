"""Fair shares and priorities: the law of keys alone, and what it does to loads through the real scheduler."""

from collections import Counter
from itertools import count
from random import Random

import pytest
from scheduler_harness import Run

from splitfuse.core.policy import SchedulingPolicy
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import Priority, SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import NO_SLO, SloTargets

COST = CostModel(floor=0.01, per_token=0.001)
BUDGET = 64
numbers = count()


def request(
    owner: str = "",
    *,
    weight: float = 1.0,
    priority: Priority = Priority.NORMAL,
    prompt: int = 60,
    generate: int = 4,
    targets: SloTargets = NO_SLO,
) -> Request:
    number = next(numbers)
    tokens = tuple(Random(number).randbytes(prompt))
    scheduling = SchedulingOptions(targets=targets, owner=owner, weight=weight, priority=priority)
    params = SamplingParams(ignore_eos=True)
    return Request(f"{owner}-{number}", tokens, params, generate, seed=0, scheduling=scheduling)


def make_run(policy: str, *, max_num_seqs: int = 8) -> Run:
    deadline_policy: SchedulingPolicy | None = (
        DeadlinePolicy(LatencyPredictor(COST), token_budget=BUDGET) if policy == "deadline" else None
    )
    return Run.make(num_blocks=400, block_size=16, budget=BUDGET, max_num_seqs=max_num_seqs, policy=deadline_policy)


POLICIES = pytest.mark.parametrize(
    ("policy", "targets"), [("fcfs", NO_SLO), ("deadline", NO_SLO), ("deadline", SloTargets(2.0, 0.5))]
)


@pytest.mark.parametrize("seed", range(20))
def test_with_one_owner_keys_are_in_the_order_of_arrival(seed: int) -> None:
    rng, shares = Random(seed), FairShare()
    unfinished: list[Request] = []
    keys = []
    for _ in range(100):
        made = request(prompt=rng.randint(1, 50))
        made.fair_share_key = shares.key(made, running=unfinished[:4], waiting=unfinished[4:])
        keys.append(made.fair_share_key)
        unfinished.append(made)
        while unfinished and rng.random() < 0.5:
            shares.charge_tokens(unfinished[0], 1)
            unfinished.pop(0)
    assert keys == sorted(keys)


def test_a_rare_owner_is_next_without_accumulated_credit() -> None:
    shares, flood = FairShare(), [request("flood", prompt=100) for _ in range(10)]
    for number, each in enumerate(flood):
        each.fair_share_key = shares.key(each, running=flood[:1], waiting=flood[1:number])
    assert [each.fair_share_key for each in flood] == [100.0 * i for i in range(10)]
    late = request("rare", prompt=100)
    late.fair_share_key = shares.key(late, running=flood[5:6], waiting=flood[6:])
    assert (
        late.fair_share_key == 600.0
    )  # with the next of the flood: before its others, and with no credit for having been away
    second = request("rare", prompt=100)
    assert shares.key(second, running=flood[5:6], waiting=[*flood[6:], late]) == 700.0


def test_a_starving_priority_gives_no_credit_in_another() -> None:
    shares, busy = FairShare(), [request("busy", prompt=100) for _ in range(50)]
    starving = [request("third", priority=Priority.LOW, prompt=100) for _ in range(20)]
    for number, each in enumerate(starving):
        each.fair_share_key = shares.key(each, running=[], waiting=starving[:number])
    for each in busy:  # one after the other: each has ended when the next one comes
        each.fair_share_key = shares.key(each, running=[], waiting=starving)
    rare = request("rare", prompt=100)
    assert shares.key(rare, running=busy[-1:], waiting=starving) >= 4900.0  # not 0, as the starving have had


def test_an_aborted_request_is_refunded_what_was_not_computed() -> None:
    shares, other = FairShare(), request("other", prompt=10)
    other.fair_share_key = shares.key(other, running=[], waiting=[])
    gone = request("x", prompt=1000)
    gone.fair_share_key = shares.key(gone, running=[other], waiting=[])
    gone.num_scheduled = 300
    shares.refund(gone)
    again = request("x", prompt=10)
    assert shares.key(again, running=[other], waiting=[]) == gone.fair_share_key + 300.0
    own = request("x", prompt=1000)  # while a later one of its own waits, the order stays that of arrival
    own.fair_share_key = shares.key(own, running=[other], waiting=[])
    later = request("x", prompt=1000)
    later.fair_share_key = shares.key(later, running=[other], waiting=[own])
    shares.refund(own)
    assert shares.key(request("x"), running=[other], waiting=[later]) == later.fair_share_key


@POLICIES
def test_a_flood_does_not_hold_up_another_owner(policy: str, targets: SloTargets) -> None:
    run = make_run(policy)
    for _ in range(40):
        run.add(request("flood", targets=targets))
    for _ in range(5):
        run.step()
    mine = request("mine", targets=targets)
    run.add(mine)
    ended: list[str] = []
    while mine.request_id not in ended:
        ended += [output.request_id for output in run.step() if output.finish_reason is not None]
    assert mine.slo.met or len(ended) <= 12  # within its SLO; else after those that ran, and few more
    assert mine.slo.met is not False
    run.drain()


@POLICIES
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (5.0, 2.0)])
def test_tokens_are_shared_by_weight_while_all_want_more(
    policy: str, targets: SloTargets, weights: tuple[float, float]
) -> None:
    run = make_run(policy)
    for _ in range(150):
        for owner, weight in zip("ab", weights, strict=True):
            run.add(request(owner, weight=weight, targets=targets))
    served: Counter[str] = Counter()
    while sum(served.values()) < 100:
        served.update(output.request_id[0] for output in run.step() if output.finish_reason is not None)
    assert served["a"] / served["b"] == pytest.approx(weights[0] / weights[1], rel=0.25)
    run.drain()


@POLICIES
def test_a_priority_comes_before_those_below_it(policy: str, targets: SloTargets) -> None:
    run = make_run(policy, max_num_seqs=4)
    classes = [Priority.LOW] * 20 + [Priority.HIGH] * 5
    waves = [request("", priority=each, targets=targets) for each in classes]
    for each in waves:
        run.add(each)
    ended: list[str] = []
    while run.scheduler.has_unfinished:
        ended += [output.request_id for output in run.step() if output.finish_reason is not None]
    high = [ended.index(each.request_id) for each in waves[20:]]
    assert max(high) <= 5  # all of them, and at most the oldest, which always moves, before the last


@POLICIES
def test_the_oldest_ends_under_an_endless_load_of_higher_priority(policy: str, targets: SloTargets) -> None:
    run = make_run(policy, max_num_seqs=4)
    low = request("", priority=Priority.LOW, prompt=200, generate=10, targets=targets)
    run.add(low)
    for _ in range(400):
        if low.is_finished:
            break
        while len(run.scheduler.queue.running) + len(run.scheduler.queue.waiting) < 8:
            run.add(request("", priority=Priority.HIGH, targets=targets))
        run.step()
    assert low.is_finished  # its 210 tokens at a sixteenth of 64 in each step need 53, and one for each of its answer's
    run.drain()


def test_higher_priorities_preempt_lower_ones_but_not_the_oldest() -> None:
    for policy in ("fcfs", "deadline"):
        run = make_run(policy)
        oldest, low, normal, high = (
            request("", priority=p) for p in (Priority.LOW, Priority.LOW, Priority.NORMAL, Priority.HIGH)
        )
        running = [oldest, low, normal]
        for each in (*running, high):
            run.add(each)
        used = run.scheduler.policy
        assert used.preemption_victim(running, claimant=high) is low
        assert used.preemption_victim([oldest, normal], claimant=high) is normal
        assert used.preemption_victim([oldest, low], claimant=normal) is low
        assert used.preemption_victim([oldest], claimant=high) is None
        assert used.preemption_victim([oldest, normal, high], claimant=low) is None
        assert used.preemption_victim([oldest, normal, high], claimant=oldest) is normal


@pytest.mark.parametrize("seed", range(6))
def test_no_output_is_lost_with_owners_weights_and_priorities(seed: int) -> None:
    """The random loads of the scheduler's law, with owners, weights and classes in them."""
    rng = Random(seed)
    for policy in ("fcfs", "deadline"):
        run = make_run(policy, max_num_seqs=rng.randint(1, 6))
        made = [
            request(
                rng.choice("abc"),
                weight=rng.choice((0.5, 1.0, 4.0)),
                priority=rng.choice(list(Priority)),
                prompt=rng.randint(1, 200),
                generate=rng.randint(1, 20),
                targets=rng.choice((NO_SLO, SloTargets(1.0, 0.2), SloTargets(None, 0.05))),
            )
            for _ in range(40)
        ]
        for each in made:
            run.add(each)
            if rng.random() < 0.5:
                run.step()
        run.drain()
        assert all(len(run.outcomes[each.request_id].tokens) == each.max_tokens for each in made)
