"""Drafts in the scheduler: equal outputs on random workloads, and which drafts are worth their seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_harness import Run, Workload

from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.speculation.request_drafts import RequestDrafts
from splitfuse.core.speculation.token_cost import TokenCost

PARTS = [pytest.param(part, marks=() if part < 1 else pytest.mark.slow) for part in range(20)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slo", [False, pytest.param(True, marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("part", PARTS)
def test_every_workload_ends_as_if_nothing_were_drafted(depth: int, part: int, slo: bool) -> None:
    preemptions = drafted = accepted = 0
    for seed in range(part * 75, part * 75 + 75):
        try:
            run = Workload(seed).run(depth, slo=slo, drafts=True, ticks=slo)
        except AssertionError as error:
            raise AssertionError(f"Workload({seed}).run({depth}, slo={slo}, drafts=True): {error}") from error
        drafted += sum(chunk.num_drafts for plan in run.plans for chunk in plan.chunks)
        accepted += run.num_accepted
        preemptions += run.scheduler.queue.num_preemptions
    assert drafted > 100 and 0.2 * drafted < accepted < drafted and preemptions > 3, "too tame to prove anything"


def decoding(num_requests: int, *, budget: int = 64, drafting: Drafting | None = None) -> Run:
    """Return a run of requests that decode, whose next 20 tokens are known to be forced."""
    run = Run.make(num_blocks=200, block_size=4, budget=budget, drafting=drafting or Drafting(7))
    for number in range(num_requests):
        run.add(Request(f"r{number}", (1, 2, 3), SamplingParams(), max_tokens=50, seed=0))
    while any(not request.output_token_ids for request in run.running) or run.waiting:
        run.step()
    for request in run.running:
        request.drafts.forced = (15,) * 20
    return run


def num_drafts(run: Run) -> list[int]:
    plan = run.scheduler.schedule(run.now)
    assert plan is not None and all(chunk.samples for chunk in plan.chunks)
    return [chunk.num_drafts for chunk in plan.chunks]


@pytest.mark.parametrize(("budget", "total"), [(64, 14), (12, 10), (2, 0)])
def test_drafts_get_what_is_left_of_the_budget(budget: int, total: int) -> None:
    counts = num_drafts(decoding(2, budget=budget))
    assert sum(counts) == total and max(counts) - min(counts) <= 1


def test_prompts_come_before_drafts() -> None:
    run = decoding(2, budget=16)
    run.add(Request("long", (1,) * 40, SamplingParams(), max_tokens=5, seed=0))
    plan = run.scheduler.schedule(run.now)
    assert plan is not None and [(len(c.token_ids), c.num_drafts) for c in plan.chunks] == [(1, 0), (1, 0), (14, 0)]


@pytest.mark.parametrize(("per_token", "expected"), [(0.01, 7), (0.8, 4), (9.0, 0)])
def test_drafts_must_be_worth_the_seconds_that_they_add(per_token: float, expected: int) -> None:
    drafting = Drafting(7)
    for tokens in (1, 4, 2, 8) * 30:
        drafting.cost.observe(tokens, 1.0 + per_token * tokens)
    (count,) = num_drafts(decoding(1, drafting=drafting))
    assert count == expected


def test_a_request_whose_drafts_are_wrong_gets_none() -> None:
    run = decoding(1)
    (request,) = run.running
    request.drafts.forced = ()
    prompt = [token for n in range(16, 60) for token in (1, 2, n)]  # what follows 1, 2 is always new
    request.drafts.begin([*prompt, 1, 2], max_tokens=400, ends=())
    assert len(request.drafts.ahead(7, least=0.2)) > 0
    for n in range(100, 140):
        request.drafts._lookup.extend([n, 1, 2])  # type: ignore[union-attr]
    assert request.drafts.ahead(7, least=0.2) == []


def test_no_draft_is_made_of_a_token_that_ends_the_request() -> None:
    drafts = RequestDrafts()
    drafts.begin([1, 2, 5, 6, 9, 7, 1], max_tokens=9, ends={9})
    assert drafts.update([2]) and [token for token, _ in drafts.ahead(7)] == [5, 6]
    drafts.forced = (4, 9, 4)
    assert [token for token, _ in drafts.ahead(7)] == [4]


def test_nothing_is_planned_ahead_of_drafts() -> None:
    run = decoding(2)
    assert sum(num_drafts(run)) and run.scheduler.schedule(run.now) is None
    run = decoding(2)
    run.running[0].drafts.forced = run.running[1].drafts.forced = ()
    assert num_drafts(run) == [0, 0]
    assert run.scheduler.schedule(run.now) is not None, "no draft is likely"
    run = decoding(2)
    run.running[0].drafts.forced = ()
    run.scheduler.drafting, drafting = None, run.scheduler.drafting
    assert num_drafts(run) == [0, 0]
    run.scheduler.drafting = drafting
    assert run.scheduler.schedule(run.now) is None, "the next step has drafts once this one is back"


@given(
    st.floats(1e-4, 1.0),
    st.floats(0.0, 1.0),
    st.lists(st.tuples(st.integers(1, 64), st.floats(0.98, 1.02)), min_size=60, max_size=120),
)
def test_the_cost_of_a_token_is_found_in_noise(base: float, share: float, steps: list[tuple[int, float]]) -> None:
    cost, per_token = TokenCost(), base * share
    for tokens, noise in steps:
        cost.observe(tokens, (base + per_token * tokens) * noise)
    newest = sorted(tokens for tokens, _ in steps[-40:])
    if newest[-10] - newest[9] > 30:  # a few of another size may be taken for steps that were held up
        assert abs(cost.per_token - per_token) < 0.01 * base + 0.1 * per_token
    assert cost.per_token >= 0 and cost.seconds(1) > 0


def test_a_step_that_is_held_up_changes_little() -> None:
    cost = TokenCost()
    for tokens in (4, 8, 6) * 20:
        cost.observe(tokens, 0.01 + 0.001 * tokens)
    before = cost.per_token
    cost.observe(5, 10.0)
    assert cost.per_token < 1.3 * before and cost.seconds(5) < 0.016


def test_a_step_without_decodes_has_no_drafts() -> None:
    drafting = Drafting(7)
    for tokens in range(1, 9):
        drafting.cost.observe(tokens, float(tokens * tokens))  # as if a step of no tokens took no time
    run = Run.make(num_blocks=200, block_size=4, budget=8, drafting=drafting)
    run.add(Request("a", (1,) * 20, SamplingParams(), max_tokens=2, seed=0))
    assert run.scheduler.schedule(run.now) is not None
