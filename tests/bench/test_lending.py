"""Simulated machines that hold parts of each other's requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from benchmarks.papers import infinite_llm
from splitfuse.bench.target import Answer
from splitfuse.bench.workload import LoadRequest
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import machines, virtual_time
from splitfuse.simulator.deployment import Deployment, Failure, Machine, SimulationConfig
from splitfuse.simulator.lending import Lending
from splitfuse.simulator.simulate import SimulatedTarget

BLOCK, NUM_BLOCKS, BUDGET = 128, 40, 1024
COST = CostModel(floor=1.0, per_token=1e-3, per_kv_token=1e-3)


def deployment(count: int, cost: CostModel = COST, *, latency: float = 0.0, **lending: Any) -> Deployment:
    calibration = Calibration(name="x", cost=cost, num_blocks=NUM_BLOCKS, block_size=BLOCK, max_model_len=2**20)
    scheduler = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=8)
    engine = SimulationConfig(calibration=calibration, scheduler=scheduler, enable_prefix_caching=False)
    lends = Lending(latency=latency, layers=10, **lending)
    return Deployment(machines=(Machine(engine=engine),) * count, lending=lends)


def ask(target: SimulatedTarget, *requests: tuple[int, int]) -> list[Answer]:
    async def main() -> list[Answer]:
        asked = [LoadRequest("", number, 0, (0,) * length, count) for number, (length, count) in enumerate(requests)]
        return await asyncio.gather(*(target.ask(request) for request in asked))

    return virtual_time.run(main())


def target_of(placed: Deployment) -> SimulatedTarget:
    async def main() -> SimulatedTarget:
        return SimulatedTarget(placed)

    return virtual_time.run(main())


def gap(answer: Answer) -> float:
    """The time of the last token."""
    return answer.token_times[-1] - answer.token_times[-2]


def test_request_of_several_caches_is_computed_over_loans() -> None:
    length = 2 * NUM_BLOCKS * BLOCK
    target = target_of(deployment(4))
    long, short = ask(target, (length, 4), (100, 4))
    assert len(long.token_times) == len(short.token_times) == 4
    for replica in target._replicas:
        assert replica.allocator.num_held == replica.allocator.num_lent == 0
    # Each machine reads its part at the same time, which is less than one could.
    parts = [len(part.blocks) for part in target_of(deployment(4))._loans._place(2 * NUM_BLOCKS).parts]  # type: ignore[union-attr]
    assert len(parts) == 3 and max(parts) - min(parts) <= 4
    assert gap(long) == pytest.approx(1.0 + 1e-3 + 1e-3 * BLOCK * max(parts), rel=0.05)


def test_layers_of_a_step_with_a_loan_take_two_messages_each() -> None:
    slow, fast = (ask(target_of(deployment(4, latency=latency)), (9000, 3))[0] for latency in (0.5, 0.0))
    assert gap(slow) - gap(fast) == pytest.approx(2 * 0.5 * 10)


def test_creditors_compute_for_their_debtor() -> None:
    """A machine that decodes has longer steps while it lends."""
    alone, *_ = ask(target_of(deployment(2)), (100, 60))
    beside, *_ = ask(target_of(deployment(2)), (100, 60), (6000, 40))
    assert beside.token_times[-1] > 1.2 * alone.token_times[-1]


def test_requests_wait_for_room_in_their_order() -> None:
    answers = ask(target_of(deployment(2)), (6000, 20), (6000, 20), (100, 2))
    assert all(len(answer.token_times) in (2, 20) for answer in answers)
    assert answers[1].token_times[0] > answers[0].token_times[-1]


def test_request_that_all_caches_together_do_not_hold_is_refused() -> None:
    for placed, length in (
        (deployment(2), 2 * NUM_BLOCKS * BLOCK),
        (deployment(4, most_creditors=0), NUM_BLOCKS * BLOCK),
    ):
        (answer,) = ask(target_of(placed), (length, 2))
        assert answer.error is not None and "longer than what these machines hold" in answer.error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failures": (Failure(0, 1.0),)}, "roles, stages or failures"),
        ({"machines": (replace(deployment(1).machines[0], step_times=COST),)}, "by cost models"),
    ],
    ids=["failures", "step times"],
)
def test_what_is_not_simulated_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(deployment(2), **changes)
    with pytest.raises(ConfigError, match="at least 0"):
        Lending(latency=-1.0, layers=1)
    with pytest.raises(ConfigError, match="at least 1"):
        Lending(latency=0.0, layers=0)


@pytest.mark.parametrize("seed", [5, 50])
def test_machines_lend_what_is_free_at_the_time(seed: int) -> None:
    """A debtor that is to lend holds more of its own request than it will need, until that is deposited elsewhere."""
    random = Random(seed)
    requests = [(int(2 ** random.uniform(7, 13)), random.randint(5, 60)) for _ in range(25)]
    answers = ask(target_of(deployment(4)), *requests)
    assert [len(answer.token_times) for answer in answers] == [count for _, count in requests]


def test_instances_of_infinite_llm_hold_what_they_should() -> None:
    small, large = infinite_llm.SHAPES["7b"], infinite_llm.SHAPES["70b"]
    assert [infinite_llm.fits(large, gpus, 2_000_000) for gpus in large.sizes] == [False, False, True, True]
    assert [infinite_llm.fits(small, 1, longest) for longest in (60_000, 200_000)] == [True, False]
    assert infinite_llm.deployment(large, 8, lends=True).gpus == infinite_llm.vllm(small, 1).gpus == infinite_llm.GPUS
    assert infinite_llm.instance(large, machines.GPUS).cost == machines.MACHINES["a100-70b"].cost
