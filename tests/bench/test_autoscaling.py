"""Replicas that start and drain in simulation."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from benchmarks.autoscaling import MOST, Day, FluidServer
from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import LoadRequest
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.autoscaling import AutoscaledTarget, Autoscaling
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget

TARGETS = SloTargets(ttft=4.0, itl=1.0)


def engine(*, enable_slo: bool = True) -> SimulationConfig:
    calibration = Calibration(
        name="test",
        cost=CostModel(floor=0.05, per_token=0.002),
        num_blocks=400,
        block_size=16,
        max_model_len=4096,
        identity={},
        about={},
    )
    config = SchedulerConfig(max_num_seqs=32, enable_slo=enable_slo)
    return SimulationConfig(calibration=calibration, scheduler=config, enable_prefix_caching=False)


def test_a_drained_replica_takes_nothing_away_from_its_requests() -> None:
    """They go on elsewhere after the step in flight, with what was computed: prompts and streams alike."""
    target = SimulatedTarget(Deployment.of(engine(enable_slo=False), replicas=2))
    random = Random(1)
    sizes = [(random.randint(50, 1500), random.randint(1, 60)) for _ in range(12)]

    async def load() -> list[tuple[float, ...]]:
        async def drain() -> None:
            await asyncio.sleep(3.0)
            assert target._replicas[1].num_open > 3
            target._replicas[1].drain()
            await asyncio.sleep(1.5)
            assert target._replicas[1].num_open == 0 < target._replicas[0].num_open

        asks = (
            target.answer(LoadRequest("", number, 0, (0,) * prompt, count), NO_SLO)
            for number, (prompt, count) in enumerate(sizes)
        )
        *answers, _ = await asyncio.gather(*asks, drain())
        return [each.token_times for each in answers if each is not None]

    times = virtual_time.run(load())
    assert [len(each) for each in times] == [count for _, count in sizes], "every token came, once"
    assert sum(each.num_tokens for each in target._replicas) == sum(prompt + count - 1 for prompt, count in sizes)


def test_replicas_come_with_the_load_and_go_with_it() -> None:
    scaling = Autoscaling(least=1, most=6, start_seconds=20.0, check_seconds=10.0, window=100.0)
    target = AutoscaledTarget(engine(), scaling)
    random = Random(2)

    async def ask(number: int, at: float) -> tuple[float, bool]:
        await asyncio.sleep(at)
        answer = await target.answer(LoadRequest("", number, 0, (0,) * 300, 20), TARGETS)
        assert answer.error is None and len(answer.token_times) == 20
        return at, metrics.meets_slo(MeasuredRequest(number, at, 300, answer.token_times), TARGETS)

    async def load() -> list[tuple[float, bool]]:
        await target.start()
        times = [random.uniform(0.0, 330.0) for _ in range(30)] + [random.uniform(60.0, 150.0) for _ in range(280)]
        met = await asyncio.gather(*(ask(number, at) for number, at in enumerate(times)))
        await target.close()
        return met

    met = virtual_time.run(load())
    numbers = [number for _, number in target.counts]
    assert numbers[0] == 1 and max(numbers) > 2 and numbers[-1] < max(numbers)
    first = next(at for at, number in target.counts if number > 1)
    assert 60.0 < first < 85.0, "in the first seconds of the busy time"
    later = [kept for at, kept in met if at > 135.0]
    assert sum(kept for _, kept in met) < len(met) and sum(later) > 0.9 * len(later), "late until they have started"
    ends = [at for at, _ in target.counts[1:]]
    seconds = sum(number * (end - at) for (at, number), end in zip(target.counts, ends, strict=False))
    assert target.replica_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"least": 0}, "0 and 2"), ({"least": 3}, "3 and 2"), ({"check_seconds": 0.0}, "0.0"), ({"window": 5.0}, "5.0")],
)
def test_autoscaling_that_cannot_be(change: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Autoscaling(**{"least": 1, "most": 2, **change})  # type: ignore[arg-type]


def test_a_simulated_day_follows_its_load() -> None:
    day = Day(0.1, seed=1)
    server = FluidServer(day, Autoscaling(least=1, most=MOST, start_seconds=10.0))
    answers = server.run()
    assert [at for at, _ in answers] == day.times
    numbers = [number for _, number in server.counts]
    assert numbers[0] == 1 and 5 < max(numbers) <= MOST
    assert max(numbers) * day.seconds > server.replica_seconds > day.seconds
    assert sum(kept for _, kept in answers) > 0.7 * len(answers)
