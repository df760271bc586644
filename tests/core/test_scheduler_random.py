"""The scheduler's law on thousands of random workloads: tight caches, aborts, prefix hits, failures, preemption."""

import pytest
from scheduler_harness import Workload

PARTS = [pytest.param(part, marks=() if part < 2 else pytest.mark.slow) for part in range(10)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("slo", "recurrent"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("part", PARTS)
def test_every_workload_ends_as_if_each_request_were_alone(depth: int, part: int, slo: bool, recurrent: bool) -> None:
    preemptions = cached = 0
    for seed in range(part * 500, part * 500 + (100 if recurrent else 500)):
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
