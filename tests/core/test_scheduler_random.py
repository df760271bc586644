"""The scheduler's law on thousands of random workloads: tight caches, aborts, prefix hits, failures, preemption."""

import pytest
from scheduler_harness import FakeTier, Workload

PARTS = [pytest.param(part, marks=() if part == 0 else pytest.mark.slow) for part in range(20)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("slo", "recurrent"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("part", PARTS)
def test_every_workload_ends_as_if_each_request_were_alone(depth: int, part: int, slo: bool, recurrent: bool) -> None:
    preemptions = cached = 0
    for seed in range(part * 250, part * 250 + (80 if recurrent else 250)):
        try:
            run = Workload(seed, recurrent).run(depth, slo=slo)
        except AssertionError as error:
            raise AssertionError(f"Workload({seed}, {recurrent}).run({depth}, slo={slo}): {error}") from error
        starts = [(chunk.request_id, chunk.start) for plan in run.plans for chunk in plan.chunks]
        first_starts: dict[str, int] = {}
        for name, start in starts:
            cached += first_starts.setdefault(name, start) > 0
            first_starts[name] = start
        preemptions += run.scheduler.queue.num_preemptions
    assert preemptions > 3 and cached > (30 if recurrent else 100), "the workloads are too tame to prove anything"


TIER_PARTS = [pytest.param(part, marks=() if part == 0 else pytest.mark.slow) for part in range(11)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("slo", "drafts"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("part", TIER_PARTS)
def test_blocks_from_elsewhere_change_no_output(part: int, depth: int, slo: bool, drafts: bool) -> None:
    """Answers come late, never, partly, twice, short, and with another's bytes: 10,000 workloads in the slow parts."""
    answers, landed, refused, saved = dict.fromkeys(FakeTier.ANSWERS, 0), 0, 0, 0
    for seed in range(1000 * part, 1000 * part + (170 if part else 40)):
        try:
            run = Workload(seed).run(depth, slo=slo, drafts=drafts, tier=True)
        except AssertionError as error:
            how = f"slo={slo}, drafts={drafts}, tier=True"
            raise AssertionError(f"Workload({seed}).run({depth}, {how}): {error}") from error
        tier = run.executor.tier
        assert tier is not None
        answers = {how: count + tier.answers[how] for how, count in answers.items()}
        landed, refused = landed + tier.num_landed, refused + tier.num_refused
        saved += sum(len(plan.saves) for plan in run.plans)
    assert all(answers.values()), answers
    assert landed > 10 and refused > 3 and saved > 100, "the workloads are too tame to prove anything"


LOAN_PARTS = [pytest.param(part, marks=() if part == 0 else pytest.mark.slow) for part in range(10)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("slo", "drafts"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("part", LOAN_PARTS)
def test_loans_change_no_output(part: int, depth: int, slo: bool, drafts: bool) -> None:
    """Creditors hold the leading tiles of requests that the cache could not hold alone."""
    deposits = preemptions = 0
    for seed in range(1000 * part, 1000 * part + (500 if part else 30)):
        try:
            run = Workload(seed).run(depth, slo=slo, drafts=drafts, loans=True)
        except AssertionError as error:
            how = f"slo={slo}, drafts={drafts}, loans=True"
            raise AssertionError(f"Workload({seed}).run({depth}, {how}): {error}") from error
        deposits += run.executor.num_deposits
        preemptions += run.scheduler.queue.num_preemptions
    assert deposits > 60 and preemptions > 0, "the workloads are too tame to prove anything"
