"""What a machine can keep of an SLO is what its cost model says, and what loads reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitfuse.bench import metrics
from splitfuse.bench.load import closed_loop
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.slo.attainable import NEARLY, Attainable, attainable, prompt_seconds
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import SimulationConfig
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import SimulatedTarget

SLOS = (
    SloTargets(ttft=1.0, itl=0.1),
    SloTargets(ttft_per_token=1 / 512, itl=0.1, itl_percentile=99.0),
    SloTargets(ttft_per_token=0.002, tpot=0.05),
)
SLOW_BF16 = CostModel(floor=0.033, per_token=0.0, knee=18.5, per_token_beyond=0.00169)
"""0.5B in bf16 on two slow cores: a prompt of 512 tokens takes 0.87 s."""


def found(cost: CostModel, targets: SloTargets, **changes: Any) -> Attainable:
    sizes = {"max_num_seqs": 64, "max_model_len": 2048, "kv_tokens": 131_072, "max_num_batched_tokens": 2048}
    value = attainable(cost, targets, **{**sizes, **changes})
    assert value is not None
    return value


def test_a_prompt_that_takes_most_of_its_target_is_said() -> None:
    machine = found(SLOW_BF16, SloTargets(ttft_per_token=1 / 512, itl=0.25), estimated=True)
    assert machine.is_concern and machine.ttft_share == pytest.approx(0.867, abs=0.001)
    assert str(machine).startswith(
        "what this machine keeps of the SLO (estimated), nearly out of reach: all 64 decodes that have room keep their "
        "ITL at once; a prompt of 512 tokens takes 0.87 of its TTFT target alone; at most 1"
    )
    machine = found(SLOW_BF16.slower(2.0), SloTargets(ttft_per_token=1 / 512, itl=0.06))
    assert str(machine) == (
        "what this machine keeps of the SLO, out of reach: each token of a lone decode takes 1.1 times its ITL target; "
        "a prompt of 512 tokens takes 1.7 times its TTFT target alone"
    )
    assert machine.requests_per_second == machine.max_decodes == machine.longest_prompt == 0
    assert not found(MACHINES["a100-70b"].cost, SloTargets(ttft=1.0)).is_concern


def test_without_targets_there_is_nothing_to_keep() -> None:
    assert attainable(SLOW_BF16, SloTargets(), **dict.fromkeys(SIZES, 64)) is None


SIZES = ("max_num_seqs", "max_model_len", "kv_tokens", "max_num_batched_tokens")


@pytest.mark.parametrize("targets", SLOS, ids=str)
@pytest.mark.parametrize("name", MACHINES)
def test_one_token_or_decode_more_is_too_much(name: str, targets: SloTargets) -> None:
    cost = MACHINES[name].cost
    machine = found(cost, targets, max_num_seqs=4096)
    gap = min(each for each in (targets.itl, targets.tpot) if each is not None)

    def is_in_time(prompt: int) -> bool:
        return prompt_seconds(cost, prompt, max_num_batched_tokens=2048) <= targets.ttft_target(prompt)

    def keeps(decodes: int) -> bool:
        return cost.seconds(StepFeatures(decodes, decodes, decodes * 576, decodes * 576, decodes)) <= gap

    assert machine.ttft_share is not None and (machine.ttft_share <= 1.0) == is_in_time(512)
    if machine.longest_prompt:
        assert is_in_time(machine.longest_prompt)
    if machine.longest_prompt < machine.max_prompt:
        assert not is_in_time(max(machine.longest_prompt + 1, 2))
    assert machine.max_decodes == 0 or keeps(machine.max_decodes)
    assert machine.max_decodes == 131_072 // 576 or not keeps(machine.max_decodes + 1)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 1000, 1024])
def test_a_prompt_takes_the_time_of_its_steps(count: int) -> None:
    cost, seconds = replace(SLOW_BF16, per_pair=1e-7, per_kv_token=1e-6, per_row=1e-3), 0.0
    for start in range(0, count, 64):
        size = min(64, count - start)
        rows = int(start + size == count)
        seconds += cost.seconds(StepFeatures().plus(start=start, count=size, rows=rows))
    assert prompt_seconds(cost, count, max_num_batched_tokens=64) == pytest.approx(seconds)


def test_smaller_sizes_keep_less() -> None:
    cost, targets = MACHINES["0.5b-int8"].cost, SloTargets(ttft=1.0, itl=0.1)
    most = found(cost, targets)
    few = found(cost, targets, max_num_seqs=4)
    small = found(cost, targets, kv_tokens=3 * 576)
    assert (few.max_decodes, small.max_decodes) == (4, 3) and most.max_decodes == 64
    assert few.requests_per_second < most.requests_per_second
    short = found(cost, targets, max_model_len=40)
    assert (short.prompt_tokens, short.answer_tokens, short.max_prompt) == (20, 20, 39)
    assert found(cost, targets, max_model_len=1).answer_tokens == 0, "a context for no answer is not an error"
    assert most.times(2).max_decodes == 128 and most.times(2).ttft_share == most.ttft_share
    noisy = CostModel(**{**vars(cost), "noise": 0.2})
    assert found(noisy, SLOS[1], max_num_seqs=512).max_decodes < found(cost, SLOS[1], max_num_seqs=512).max_decodes


@pytest.mark.parametrize(
    ("name", "slo", "clients"),
    [
        ("0.5b-int8", {"ttft": "2ms/token", "itl": "250ms"}, 16),
        ("0.5b-bf16", {"ttft": "1s"}, 8),
        ("opt-13b", {"ttft": "1s", "itl": "100ms/p99"}, 64),
        ("splitwise-h100", {"ttft": "2ms/token", "itl": "250ms"}, 64),
    ],
)
def test_simulated_loads_come_close_to_the_bound(name: str, slo: dict[str, Any], clients: int) -> None:
    calibration, targets = MACHINES[name], SloTargets.parse(**slo)
    most = found(calibration.cost, targets, max_model_len=calibration.max_model_len).requests_per_second
    target = SimulatedTarget(SimulationConfig(calibration=calibration, scheduler=SchedulerConfig(**slo)))
    workload = Independent(Lengths(512, 64, room=target.room), target.vocabulary, 0)
    point = virtual_time.run(closed_loop(target, workload, clients=clients, requests=100))
    in_time = [metrics.meets_slo(each, targets) for each in metrics.counted(point)]
    assert 0.8 * most < metrics.throughput(point) * metrics.mean(in_time) < 1.05 * most


def test_shares_are_a_concern_beyond_the_limit() -> None:
    for share, concern in ((NEARLY - 0.01, False), (NEARLY + 0.01, True)):
        cost = CostModel(floor=share, per_token=0.0)
        assert found(cost, SloTargets(itl=1.0)).is_concern is concern
