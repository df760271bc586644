"""Drafts in the scheduler: equal outputs on random workloads, and which drafts are worth their seconds."""

import pytest
from scheduler_harness import Workload

PARTS = [pytest.param(part, marks=() if part < 1 else pytest.mark.slow) for part in range(20)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slo", [False, True])
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
