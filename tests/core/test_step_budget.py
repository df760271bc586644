"""The token budget is the smallest with nearly the best throughput, and follows the steps that are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any
from weakref import ref

import pytest

from splitfuse.config.engine import MAX_TOKEN_BUDGET, SchedulerConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.plan import Chunk, ChunkResult, StepPlan
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo import cost_model
from splitfuse.core.slo.cost_model import CostModel, StepFeatures, features_of
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.core.step_budget import (
    BUDGETS,
    COLD_STEPS,
    FIRST_BUDGET,
    FIRST_FIT,
    HYSTERESIS,
    SPARE_TOKENS,
    THROUGHPUT,
    USUAL_STEP,
    StepBudget,
    budgets_between,
    choose_budget,
)

ROOFLINE = CostModel(floor=0.1, per_token=0.0, knee=250, per_token_beyond=0.0004)
"""Up to 250 tokens a step takes as long as the weights take to be read, then as long as its arithmetic."""
ADDITIVE = CostModel(floor=0.03, per_token=0.0005)
"""Reading the weights and arithmetic never overlap."""
COMPUTE_BOUND = CostModel(floor=0.001, per_token=0.001)
FLOOR = CostModel(floor=1.0, per_token=1e-6)
"""No step that is planned for is limited by arithmetic."""


def throughput(cost: CostModel, budget: int, step: StepFeatures = USUAL_STEP) -> float:
    scaled = StepFeatures(*(round(budget / step.tokens * count) for count in step))
    return budget / cost.seconds(scaled)


@pytest.mark.parametrize(
    ("cost", "expected"), [(ROOFLINE, 256), (ADDITIVE, 768), (COMPUTE_BOUND, 64), (FLOOR, MAX_TOKEN_BUDGET)]
)
def test_the_budget_of_known_machines(cost: CostModel, expected: int) -> None:
    assert choose_budget(cost) == expected
    assert StepBudget.of(SchedulerConfig(max_num_seqs=1), cost).tokens == expected


def random_cost(random: Random) -> CostModel:
    return CostModel(
        floor=random.choice((0.0, 10 ** random.uniform(-4, 1))),
        per_token=random.choice((0.0, 10 ** random.uniform(-6, -2))),
        knee=random.uniform(0, 3000),
        per_token_beyond=random.choice((0.0, 10 ** random.uniform(-6, -2))),
        per_row=random.choice((0.0, 1e-4)),
        per_pair=random.choice((0.0, 10 ** random.uniform(-9, -6))),
        per_kv_token=random.choice((0.0, 10 ** random.uniform(-8, -6))),
        per_request=random.choice((0.0, 1e-5)),
    )


def test_no_smaller_budget_has_the_throughput() -> None:
    random = Random(0)
    for _ in range(300):
        cost = random_cost(random)
        chosen = choose_budget(cost)
        if cost.seconds(StepFeatures(64, 7, 18_000, 4000, 7)) == 0.0:
            continue
        best = max(throughput(cost, budget) for budget in BUDGETS)
        assert throughput(cost, chosen) >= 0.999 * THROUGHPUT * best
        assert all(throughput(cost, less) < 1.001 * THROUGHPUT * best for less in BUDGETS if less < chosen)


def test_a_longer_wait_for_weights_never_lowers_it() -> None:
    random = Random(1)
    for _ in range(200):
        cost = random_cost(random)
        slower = CostModel(**{**vars(cost), "floor": 2 * cost.floor + 0.01})
        assert choose_budget(slower) >= choose_budget(cost)
        assert choose_budget(cost.slower(7.0)) == choose_budget(cost), "a machine that is slower in all has the same"


def test_a_model_without_time_chooses_the_smallest() -> None:
    assert choose_budget(CostModel(floor=0.0, per_token=0.0)) == BUDGETS[0]


def test_bounds_of_the_budget() -> None:
    assert budgets_between(100, 300) == (128, 192, 256)
    assert budgets_between(1, MAX_TOKEN_BUDGET) == BUDGETS
    assert budgets_between(5000, 256) == (256,), "memory bounds it more than requests do"
    for seqs in (1, 64, 256, 10_000):
        for most in (256, 512, MAX_TOKEN_BUDGET):
            for cost in (None, COMPUTE_BOUND, FLOOR):
                budget = StepBudget.of(SchedulerConfig(max_num_seqs=seqs), cost, most=most)
                assert min(seqs + SPARE_TOKENS, most) <= budget.tokens <= budget.most <= most
    assert StepBudget.of(SchedulerConfig()).tokens == FIRST_BUDGET


def test_a_given_budget_never_changes() -> None:
    budget = StepBudget.of(SchedulerConfig(max_num_batched_tokens=100), FLOOR)
    run(budget, steps_of(Random(0), budget), FLOOR.seconds, 2000)
    assert (budget.tokens, budget.most) == (100, 100)


def test_only_requests_with_an_slo_raise_it_to_the_most() -> None:
    config = SchedulerConfig(enable_slo=True)
    policy = make_policy(config, COMPUTE_BOUND)
    scheduler = Scheduler(config, BlockAllocator(100, 16), policy, StepBudget(64, BUDGETS))

    def step(name: str, targets: SloTargets) -> StepPlan:
        options = SchedulingOptions(targets=targets, arrival_time=0.0)
        scheduler.add(Request(name, (1,) * 300, SamplingParams(), max_tokens=9, seed=0, scheduling=options))
        plan = scheduler.schedule(0.0)
        assert plan is not None
        return plan

    plan = step("a", NO_SLO)
    assert (plan.token_budget, plan.num_tokens) == (64, 64)
    plan = step("b", SloTargets(ttft=30.0))
    assert plan.token_budget == MAX_TOKEN_BUDGET


# Following real steps -------------------------------------------------------------------------------------------------


def steps_of(random: Random, budget: StepBudget, *, most: int = 10_000) -> Iterator[tuple[Chunk, ...]]:
    """Steps of a server under load: some requests decode, a prompt takes what is left of the budget, or some of it."""
    while True:
        decodes = [chunk(f"d{i}", random.randrange(16, 700), 1) for i in range(random.choice((1, 2, 4, 16)))]
        left = min(budget.tokens, most) - len(decodes)
        if (count := random.choice((0, left, left, random.randint(1, left)))) > 0:
            decodes.append(chunk("p", random.choice((0, 0, 128, 512)), count))
        yield tuple(decodes)


def chunk(name: str, start: int, count: int) -> Chunk:
    return Chunk(name, start, (7,) * count, (), int(count == 1), count == 1)


def run(
    budget: StepBudget,
    steps: Iterator[tuple[Chunk, ...]],
    seconds: Callable[[StepFeatures], float],
    count: int,
    *,
    noise: float = 0.0,
    error: str | None = None,
) -> list[int]:
    """Let a budget observe steps of a machine. Returns the budgets that it had, each once for a run of equal ones."""
    random, found = Random(2), [budget.tokens]
    for number in range(count):
        chunks = next(steps)
        plan = StepPlan(number + 1, budget.tokens, chunks)
        took = seconds(features_of(plan)) * random.lognormvariate(0.0, noise)
        result = {each.request_id: ChunkResult(error=error) for each in chunks}
        budget.observe(StepRecord(plan, result, 10.0, 10.0 + took, 0.0, len(chunks), 0))
        if budget.tokens != found[-1]:
            found.append(budget.tokens)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.08])
@pytest.mark.parametrize("cost", [ROOFLINE, ADDITIVE, COMPUTE_BOUND, FLOOR], ids=str)
def test_it_comes_to_the_machines_budget(cost: CostModel, noise: float) -> None:
    for start in (128, 2048):
        budget = StepBudget(start, BUDGETS)
        run(budget, steps_of(Random(3), budget), cost.seconds, 2600, noise=noise)
        best = max(throughput(cost, each) for each in BUDGETS)
        slack = 0.001 + noise / 4
        assert throughput(cost, budget.tokens) >= (THROUGHPUT - HYSTERESIS - slack) * best
        smaller = [each for each in BUDGETS if throughput(cost, each) >= (THROUGHPUT + HYSTERESIS + slack) * best]
        assert budget.tokens <= 2 * min(smaller, default=MAX_TOKEN_BUDGET), "a knee is found to some tokens"


def test_it_follows_a_machine_that_changes() -> None:
    """A neighbour takes memory bandwidth: the wait for weights is four times as long, then as before."""
    budget, usual = StepBudget(256, BUDGETS), StepFeatures(576, 1, 0, 0, 1)
    budget.choose(ROOFLINE.slower(7.0))
    assert budget.seconds(usual) == ROOFLINE.slower(7.0).seconds(usual)
    budget.tokens = 256
    steps = steps_of(Random(4), budget)
    run(budget, steps, ROOFLINE.seconds, 4000, noise=0.05)
    assert 192 <= budget.tokens <= 512 and budget.seconds(usual) == pytest.approx(ROOFLINE.seconds(usual), rel=0.2)
    slower = CostModel(floor=0.4, per_token=0.0, knee=1000, per_token_beyond=0.0004)
    run(budget, steps, slower.seconds, 7000, noise=0.05)
    assert budget.tokens >= 768 and budget.seconds(usual) == pytest.approx(slower.seconds(usual), rel=0.2)
    run(budget, steps, ROOFLINE.seconds, 7000, noise=0.05)
    assert 192 <= budget.tokens <= 512


def test_it_does_not_go_to_and_fro() -> None:
    for seed in range(1):
        budget = StepBudget(256, BUDGETS)
        changes = run(budget, steps_of(Random(seed), budget), ADDITIVE.seconds, 8000, noise=0.08)
        assert changes[:2] == [256, 512] and len(changes) <= 4


def test_it_grows_by_an_octave_at_most() -> None:
    budget = StepBudget(128, BUDGETS)
    changes = run(budget, steps_of(Random(5), budget), FLOOR.seconds, 5000)
    assert changes == [128, 256, 512, 1024, 2048]


def test_steps_that_say_too_little_change_nothing() -> None:
    budget = StepBudget(256, BUDGETS)
    alike = iter(lambda: (chunk("a", 100, 1),), ())
    assert run(budget, alike, FLOOR.seconds, 3000) == [256], "decodes of a lone request"
    assert run(budget, steps_of(Random(6), budget), lambda _: 0.0, 500) == [256], "a clock that stands"
    assert run(budget, steps_of(Random(6), budget), FLOOR.seconds, 500, error="lost") == [256], "steps that failed"


def test_few_steps_change_nothing() -> None:
    budget = StepBudget(256, BUDGETS)
    assert run(budget, steps_of(Random(7), budget), FLOOR.seconds, FIRST_FIT - 1) == [256]


@pytest.mark.interpreted
def test_a_step_does_a_small_part_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it takes a tenth of a second in Python, for which every stream would wait."""
    solved, most, least_squares = 0, 0, cost_model._least_squares

    def count(*args: Any) -> list[float]:
        nonlocal solved
        solved += 1
        return least_squares(*args)

    monkeypatch.setattr(cost_model, "_least_squares", count)
    budget = StepBudget(128, BUDGETS)
    steps = steps_of(Random(5), budget)
    for _ in range(600):
        before = solved
        run(budget, steps, FLOOR.seconds, 1)
        most = max(most, solved - before)
    assert most == 1 and solved > 100 and budget.tokens > 128


def test_what_is_remembered_is_bounded() -> None:
    budget = StepBudget(256, BUDGETS)
    run(budget, steps_of(Random(8), budget), ADDITIVE.seconds, 5000)
    assert sum(map(len, budget._samples.values())) <= 4 * 4 * 12


def test_no_plan_is_kept() -> None:
    """It has the prompts of requests that may have ended long ago."""
    budget, chunks = StepBudget(256, BUDGETS), (chunk("a", 0, 100),)
    plans = []
    for number in range(2 * COLD_STEPS):
        plan = StepPlan(number + 1, budget.tokens, chunks)
        budget.observe(StepRecord(plan, {"a": ChunkResult()}, 10.0, 11.0, 0.0, 1, 0))
        plans.append(ref(plan))
    del plan
    assert budget._samples and not any(each() for each in plans)
