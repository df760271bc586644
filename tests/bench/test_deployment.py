"""Machines of several kinds in the simulator: roles, links, the mixed pool, stages and failures, timed by hand."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from splitfuse.bench import metrics
from splitfuse.bench.target import Answer
from splitfuse.bench.workload import Independent, Lengths, LoadRequest, Loads
from splitfuse.config.engine import SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Failure, Link, Machine, SimulationConfig
from splitfuse.simulator.links import Network
from splitfuse.simulator.simulate import SimulatedTarget, simulate

COST = CostModel(floor=0.010, per_token=0.0001, knee=64, per_token_beyond=0.0004, per_row=0.0001, per_kv_token=1e-7)
CALIBRATION = Calibration(name="by hand", cost=COST, num_blocks=2000, block_size=32, max_model_len=4096)
KV_BYTES = 1000
LINK = Link(bytes_per_second=1e6 * KV_BYTES, latency=0.002)


def machine(role: EngineRole = EngineRole.MIXED, *, num_blocks: int = 2000, **changes: Any) -> Machine:
    calibration = replace(CALIBRATION, num_blocks=num_blocks)
    config = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=64)
    return Machine(engine=SimulationConfig(calibration=calibration, scheduler=config), role=role, **changes)


def split(
    prompt: int = 1, generation: int = 1, *, link: Link = LINK, num_blocks: int = 2000, **changes: Any
) -> Deployment:
    machines = (machine(EngineRole.PROMPT),) * prompt + (
        machine(EngineRole.GENERATION, num_blocks=num_blocks),
    ) * generation
    return Deployment(machines=machines, link=link, kv_bytes_per_token=KV_BYTES, **changes)


def seconds(*chunks: tuple[int, int, int]) -> float:
    step = StepFeatures()
    for start, count, rows in chunks:
        step = step.plus(start=start, count=count, rows=rows)
    return COST.seconds(step)


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple(range(length * number, length * (number + 1)))


def answers(deployment: Deployment, *requests: tuple[float, int, int]) -> tuple[SimulatedTarget, list[Answer]]:
    """Send requests, each with its time, prompt length and tokens to generate."""

    async def main() -> tuple[SimulatedTarget, list[Answer]]:
        target = SimulatedTarget(deployment)
        await target.start()

        async def ask(number: int, at: float, length: int, generate: int) -> Answer:
            await asyncio.sleep(at)
            return await target.ask(LoadRequest("", number, 0, prompt(number, length), generate))

        return target, await asyncio.gather(*(ask(number, *each) for number, each in enumerate(requests)))

    return virtual_time.run(main())


def test_handed_over_request_waits_for_its_last_chunk_alone() -> None:
    _, (answer,) = answers(split(), (0.0, 300, 3))
    first = seconds((0, 160, 0)) + seconds((160, 140, 1))
    assert seconds((160, 140, 1)) > 160e-6, "the first chunk has come before the second is computed"
    second = first + 140e-6 + LINK.latency + seconds((300, 1, 1))
    assert answer.token_times == pytest.approx((first, second, second + seconds((301, 1, 1))))


def test_unhidden_transfer_does_not_grow_with_the_prompt() -> None:
    """A link that takes a fifth as long as the computing: what remains is of the last chunk, of at most 256 tokens."""
    slow = Link(bytes_per_second=KV_BYTES * 256 / (seconds((0, 256, 1)) / 5))
    unhidden = {}
    for length in (256, 512, 1024, 2048, 3840):
        _, (answer,) = answers(split(link=slow), (0.0, length, 2))
        unhidden[length] = answer.token_times[1] - answer.token_times[0] - seconds((length, 1, 1))
    assert max(unhidden.values()) < 1.01 * min(unhidden.values())
    assert unhidden[3840] == pytest.approx(seconds((0, 256, 1)) / 5, rel=1e-3)


def test_transfers_share_the_connections_of_machines() -> None:
    async def main() -> list[float]:
        network, loop = Network(Link(bytes_per_second=100.0, latency=0.5)), asyncio.get_running_loop()

        async def move(source: int, destination: int, count: float, at: float = 0.0) -> float:
            await asyncio.sleep(at)
            transfer = network.transfer(source, destination)
            transfer.send(count)
            await transfer.received()
            return loop.time()

        return await asyncio.gather(move(0, 1, 100), move(0, 2, 300), move(3, 2, 50, at=2.0), move(4, 5, 100))

    # 0 -> 1 and 0 -> 2 at 50 a second, until 2; then 0 -> 2 and 3 -> 2 at 50, until 3; then 0 -> 2 at 100.
    assert virtual_time.run(main()) == pytest.approx([2.5, 5.0, 3.5, 1.5])


def test_prompts_do_not_stall_the_decodes_of_other_machines() -> None:
    loads = ((0.0, 64, 100), *((0.3 + 0.01 * number, 2000, 1) for number in range(3)))
    longest = {}
    for name, deployment in (
        ("mixed", Deployment(machines=(machine(),))),
        ("split", split(long_queue=float("inf"))),
    ):
        _, (decode, *_) = answers(deployment, *loads)
        longest[name] = max(b - a for a, b in zip(decode.token_times[1:], decode.token_times[2:], strict=False))
    assert longest["split"] < 0.012 < 0.1 < longest["mixed"]


def test_busy_prompt_machine_borrows_and_gives_back() -> None:
    deployment = split(long_queue=3000)
    target, came = answers(deployment, *((0.001 * number, 2000, 4) for number in range(4)), (60.0, 2000, 4))
    pools = target._pools
    assert pools is not None and pools.num_borrowed == 1
    alone = seconds((0, 256, 0)) * 7 + seconds((0, 256, 1))
    first = [answer.token_times[0] - 0.001 * number for number, answer in enumerate(came[:4])]
    assert max(first) < 3.2 * alone, "two machines computed four prompts"
    assert came[4].token_times[1] - came[4].token_times[0] > LINK.latency, "later, the request is handed over again"


def test_full_generation_machine_is_not_given_more() -> None:
    """Room for one request: the second is generated by the prompt machine, or, if none is borrowed, waits."""
    requests = ((0.0, 500, 50), (0.0, 500, 50))
    target, came = answers(split(num_blocks=32), *requests)
    assert all(len(answer.token_times) == 50 for answer in came)
    assert [replica.scheduler.queue.num_preemptions for replica in target._replicas] == [0, 0]
    assert target._pools is not None and target._pools.num_borrowed == 0, "one machine did all of it"
    _, waited = answers(split(num_blocks=32, long_queue=float("inf")), *requests)
    assert [len(answer.token_times) for answer in waited] == [50, 50]
    assert max(answer.token_times[-1] for answer in waited) > max(answer.token_times[-1] for answer in came)


def test_landed_blocks_are_released() -> None:
    target, came = answers(split(2, 2), *((0.01 * number, 40 + 37 * number, 1 + number % 5) for number in range(40)))
    assert [len(answer.token_times) for answer in came] == [1 + number % 5 for number in range(40)]
    for replica in target._replicas:
        replica.scheduler._allocator.check([])
        assert replica.is_idle and replica.num_to_compute == 0


def test_pipeline_computes_as_many_steps_at_once_as_it_has_stages() -> None:
    requests = [(0.0, 256, 1)] * 4
    one = answers(Deployment(machines=(machine(),)), *requests)[1]
    four = answers(Deployment(machines=(machine(stages=4),)), *requests)[1]
    step = seconds((0, 256, 1))
    assert [answer.token_times[0] for answer in four] == pytest.approx([step] * 4)
    assert max(answer.token_times[0] for answer in one) == pytest.approx(4 * step)


def test_requests_of_a_failed_machine_go_on_elsewhere() -> None:
    step = seconds((100, 1, 1))
    deployment = Deployment(machines=(machine(), machine()), failures=(Failure(0, at=0.5, seconds=1.0),))
    _, (first, second) = answers(deployment, (0.0, 100, 100), (2.0, 100, 5))
    assert len(first.token_times) == 100 and first.error is None
    gaps = [later - earlier for earlier, later in zip(first.token_times, first.token_times[1:], strict=False)]
    known = sum(time < 0.5 for time in first.token_times)
    assert max(gaps) < 2 * step + seconds((0, 100 + known, 1)), "it waits for the recomputing, and no longer"
    assert sum(gap > 1.5 * step for gap in gaps) == 1
    assert second.token_times[0] - 2.0 == pytest.approx(seconds((0, 100, 1)))
    both = replace(deployment, failures=(Failure(0, at=0.5), Failure(1, at=0.7)))
    _, (lost,) = answers(both, (0.0, 100, 100))
    assert lost.error == "all machines have failed"


def test_of_failures_that_overlap_the_last_to_end_counts() -> None:
    failures = (Failure(0, at=0.5, seconds=3.0), Failure(0, at=1.0, seconds=0.5))
    deployment = Deployment(machines=(machine(),), failures=failures)
    _, (during, after) = answers(deployment, (2.0, 100, 5), (3.6, 100, 5))
    assert during.error == "all machines have failed"
    assert after.error is None and len(after.token_times) == 5


def test_a_lost_machine_of_either_role_costs_no_request() -> None:
    for number in (0, 3):
        deployment = replace(split(2, 2), failures=(Failure(number, at=0.4, seconds=0.5),))
        target, came = answers(deployment, *((0.02 * number, 300, 20) for number in range(40)))
        assert [len(answer.token_times) for answer in came] == [20] * 40
        assert all(list(answer.token_times) == sorted(answer.token_times) for answer in came)
        for replica in target._replicas:
            replica.scheduler._allocator.check([])
            assert replica.is_idle


def test_split_deployment_runs_a_load() -> None:
    results = simulate(
        split(2, 1),
        lambda target: Independent(Lengths(500, 20, room=target.room), target.vocabulary),
        Loads(rate=(4.0,), requests=60, repeat=1),
        system="split",
        about={},
    )
    (point,) = results.points
    assert metrics.throughput(point) == pytest.approx(4.0, rel=0.35)
    assert results.about["simulation"]["roles"] == "prompt,prompt,generation"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Deployment(machines=()), "at least one machine"),
        (lambda: Deployment(machines=(machine(EngineRole.PROMPT),)), "prompt machines alone compute"),
        (lambda: replace(split(), link=None), "need a link"),
        (lambda: replace(split(), kv_bytes_per_token=0), "need the KV bytes of a token, such as 327680, not 0"),
        (lambda: Deployment.of(machine().engine, replicas=0), "--replicas 0 must be at least 1"),
        (lambda: replace(split(), failures=(Failure(2, at=0.0),)), "machine 2 fails, of machines 0 to 1"),
        (lambda: replace(split(), failures=(Failure(0, at=-1.0),)), "fails at a time from 0 on"),
        (lambda: machine(stages=0), "stages of a machine must be at least 1, not 0"),
        (lambda: machine(watts=-1.0), "watts of a machine must be a number, at least 0, not -1"),
        (lambda: Link(0.0), "positive number of bytes/s, not 0.0"),
        (lambda: Link(1.0, latency=-1.0), "latency of a link must be .* not -1.0"),
    ],
)
def test_impossible_deployment_is_rejected(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
