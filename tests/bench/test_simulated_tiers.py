"""KV tiers in the simulator: timed by hand, and fetched as by an engine."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import tiny_models
from patience import PATIENCE
from typer.testing import CliRunner, Result

from splitfuse.bench import metrics
from splitfuse.bench.load import open_loop
from splitfuse.bench.target import Answer
from splitfuse.bench.workload import Chat, Lengths, LoadRequest, poisson
from splitfuse.cli.commands import app
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.events import StepScheduled
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH, LATENCY, LONGEST_FETCH, STAGED_BYTES, WAITING_SHARE
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.engine.engine import Engine
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Failure, Link, Machine, SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget
from splitfuse.simulator.tiers import TierStore

SIZE = 32
COST = CostModel(floor=0.010, per_token=0.0001, per_row=0.0001)
BLOCK_BYTES = 1000 * SIZE
CALIBRATION = Calibration(
    name="by hand", cost=COST, num_blocks=16, block_size=SIZE, max_model_len=512, kv_bytes_per_token=1000.0
)
MANY = 1000 * BLOCK_BYTES
SPEED = 1e8  # a block in 0.32 ms


def config(**changes: Any) -> SimulationConfig:
    given: dict[str, Any] = {"kv_memory_tier": MANY, "kv_memory_speed": SPEED}
    scheduler = SchedulerConfig(max_num_batched_tokens=512, max_num_seqs=8)
    return SimulationConfig(**{"calibration": CALIBRATION, "scheduler": scheduler, **given, **changes})


def seconds(start: int, count: int) -> float:
    return COST.seconds(StepFeatures().plus(start=start, count=count, rows=1))


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple(range(1000 * number, 1000 * number + length))


def answers(deployment: Deployment | SimulationConfig, *requests: tuple[float, int, int]) -> list[Answer]:
    """Send one request after another, each after a pause: number of its prompt and length of it; one token each."""

    async def main() -> list[Answer]:
        target = SimulatedTarget(deployment)
        await target.start()
        found = []
        for pause, number, length in requests:
            await asyncio.sleep(pause)
            sent = asyncio.get_running_loop().time()
            answer = await target.ask(LoadRequest("", number, 0, prompt(number, length), 1))
            found.append(replace(answer, token_times=tuple(each - sent for each in answer.token_times)))
        return found

    return virtual_time.run(main())


def first_tokens(*args: Any) -> list[float]:
    return [answer.token_times[0] for answer in answers(*args)]


def test_fetched_blocks_take_the_time_of_a_tier() -> None:
    copied = BLOCK_BYTES / SPEED
    first, other, again = first_tokens(config(), (0.0, 1, 400), (1.0, 2, 400), (1.0, 1, 400))
    assert (first, other) == pytest.approx((seconds(0, 400),) * 2)
    # Of 16 blocks, the second prompt took 13, and left three of the first one's twelve full ones.
    fetch = LATENCY + 9 * copied
    saved = 0.0  # after the last step: no step waits for it
    assert again == pytest.approx(fetch + seconds(384, 16) + 9 * copied + saved)
    (_, _, without) = first_tokens(
        config(kv_memory_tier=0, kv_memory_speed=FIRST_BANDWIDTH), (0.0, 1, 400), (1.0, 2, 400), (1.0, 1, 400)
    )
    assert without == pytest.approx(seconds(96, 304))


def test_a_request_goes_on_while_another_waits_for_blocks() -> None:
    """The step that is planned with new requests waits a little for their blocks, and then goes without."""

    async def main() -> tuple[Answer, Answer, float]:
        slow = config(kv_memory_tier=0, kv_disk_tier=MANY, kv_disk_speed=SPEED / 20)
        target = SimulatedTarget(slow)
        for number in (1, 2):
            await target.ask(LoadRequest("", number, 0, prompt(number, 400), 1))
        await asyncio.sleep(10.0)
        began = asyncio.get_running_loop().time()
        running = asyncio.ensure_future(target.ask(LoadRequest("", 3, 0, prompt(3, 20), 40)))
        await asyncio.sleep(0)
        fetching = asyncio.ensure_future(target.ask(LoadRequest("", 1, 0, prompt(1, 400), 1)))
        return await running, await fetching, began

    running, fetching, began = virtual_time.run(main())
    decode, copied = seconds(0, 1), BLOCK_BYTES / SPEED
    longer = [later - earlier - decode for earlier, later in pairwise(running.token_times)]
    landing = 9 * copied + seconds(384, 16) - COST.floor
    expected = sorted([WAITING_SHARE * seconds(0, 20), landing, copied])  # a block of its answer is saved
    assert sorted(each for each in longer if each > 1e-6) == pytest.approx(expected)
    assert fetching.token_times[0] - began > 9 * 20 * copied, "it has waited for its blocks"


def test_what_takes_too_long_is_computed() -> None:
    slow = BLOCK_BYTES / LONGEST_FETCH  # a block in the longest time that a request waits
    times = first_tokens(config(kv_memory_speed=slow), (0.0, 1, 400), (60.0, 2, 400), (60.0, 1, 400))
    assert times[2] == pytest.approx(LONGEST_FETCH + seconds(96, 304))


def test_blocks_are_fetched_only_where_that_is_sooner() -> None:
    """With SLOs a cost model says what computing takes: a tier that is slower is not asked."""
    scheduler = SchedulerConfig(max_num_batched_tokens=512, max_num_seqs=8, ttft="5s")
    per_block = COST.per_token * SIZE
    load = ((0.0, 1, 400), (60.0, 2, 400), (60.0, 1, 400))
    for speed, fetched in ((1.2, True), (0.8, False)):
        how = config(scheduler=scheduler, kv_memory_speed=speed * BLOCK_BYTES / per_block)
        assert (first_tokens(how, *load)[2] != pytest.approx(seconds(96, 304))) is fetched


def test_replicas_find_what_others_computed_also_after_a_failure() -> None:
    engine = config()
    failure = Failure(machine=0, at=5.0, seconds=1.0)
    deployment = Deployment(machines=(Machine(engine=engine),) * 2, failures=(failure,))
    first, elsewhere, again = first_tokens(deployment, (0.0, 1, 400), (10.0, 1, 400), (1.0, 1, 400))
    copied = BLOCK_BYTES / SPEED
    assert first == pytest.approx(seconds(0, 400))
    assert elsewhere == pytest.approx(LATENCY + 12 * copied + seconds(384, 16) + 12 * copied)
    assert again == pytest.approx(seconds(384, 16)), "its own cache has them now"


def test_a_disk_tier_keeps_what_a_smaller_memory_tier_has_lost() -> None:
    how = config(kv_memory_tier=13 * BLOCK_BYTES, kv_disk_tier=MANY, kv_disk_speed=SPEED / 2)
    load = [(1.0, number, 400) for number in (1, 2, 3)]
    *_, again = first_tokens(how, *load, (1.0, 1, 400))
    copied = BLOCK_BYTES / SPEED
    assert again == pytest.approx(LATENCY + 12 * 2 * copied + seconds(384, 16) + 12 * copied)


def test_no_more_blocks_are_written_than_there_is_memory_for() -> None:
    large = replace(CALIBRATION, kv_bytes_per_token=STAGED_BYTES / SIZE / 9)  # nine blocks on their way
    how = config(calibration=large, kv_memory_tier=32 * STAGED_BYTES, kv_memory_speed=1e12)

    async def main() -> int:
        target = SimulatedTarget(how)
        await target.ask(LoadRequest("", 1, 0, prompt(1, 400), 2))
        tiers = target._replicas[0]._tiers
        assert tiers is not None
        return tiers.num_unsaved

    assert virtual_time.run(main()) == 12 - 9


def test_each_part_of_a_tier_forgets_its_oldest() -> None:
    store = TierStore(5, num_parts=2, seconds_per_block=1.0)
    names = [bytes([number]) for number in range(8)]
    for number in (0, 1, 2):
        store.write(names[number], names[number - 1] if number else b"", part=0, now=10.0 * number)
    store.write(names[3], b"", part=1, now=31.0)
    assert len(store) == 4 and all(name in store for name in names[:4])
    store.touch(names[1], 40.0)  # and the one before it
    store.write(names[4], b"", part=0, now=50.0)
    assert [number for number in range(5) if names[number] in store] == [0, 1, 3, 4]
    store.write(names[5], b"", part=0, now=60.0)
    assert names[1] not in store and names[0] in store


def test_an_engine_fetches_what_its_simulation_fetches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same prompts, one after the other, on an engine and simulated: equally many tokens are computed."""
    folder = tmp_path_factory.mktemp("llama-gqa")
    tiny_models.save("llama-gqa", folder)
    settings = EngineConfig.from_settings(
        {
            "model": str(folder),
            "dtype": "float32",
            "num_blocks": 24,
            "block_size": 4,
            "max_num_batched_tokens": 64,
            "kv_memory_tier": "1MiB",
        }
    )
    random = Random(1)
    texts = [[random.randrange(15, 60) for _ in range(random.randrange(30, 70))] for _ in range(4)]
    order = [random.choice(texts) for _ in range(24)]
    engine = Engine.load(settings)
    try:
        measured = _computed(engine)
        for number, text in enumerate(order):
            engine.add_request(f"{number}", text, SamplingParams(max_tokens=1))
            while engine.has_unfinished:
                engine.step()
            assert engine.tiers is not None and engine.tiers.wait_until_written(PATIENCE)
        block_bytes = engine.tiers.block_bytes
    finally:
        engine.close()
    calibration = replace(
        CALIBRATION,
        num_blocks=24,
        block_size=4,
        kv_bytes_per_token=block_bytes / 4,
        cost=CostModel(floor=1.0, per_token=1.0),
    )
    simulated = _simulated_computed(SimulationConfig.of(calibration, settings), order)
    assert measured == simulated
    assert sum(measured) < sum(map(len, order)) / 2, "most is fetched, or cached"


def _computed(engine: Any) -> list[int]:
    tokens: list[int] = []
    engine.events.subscribe(StepScheduled, lambda event: tokens.append(event.plan.num_tokens))
    return tokens


def _simulated_computed(simulation: SimulationConfig, order: list[list[int]]) -> list[int]:
    async def main() -> list[int]:
        target = SimulatedTarget(simulation)
        tokens = _computed(target._replicas[0].scheduler)
        for text in order:
            await target.ask(LoadRequest("", 0, 0, tuple(text), 1))
            await asyncio.sleep(60.0)
        return tokens

    return virtual_time.run(main())


def test_conversations_that_think_gain_from_a_tier() -> None:
    lengths = Lengths(100, 20, 0.3, 512)

    def ttft(simulation: SimulationConfig) -> float:
        async def main() -> Any:
            target = SimulatedTarget(simulation)
            workload = Chat(lengths, target.answer_vocabulary, turns=4, think=5.0)
            arrivals = poisson(0.5, seed=0, stream="")
            return await open_loop(target, workload, rate=None, arrivals=arrivals, requests=30)

        return metrics.percentile([metrics.ttft(each) for each in metrics.counted(virtual_time.run(main()))], 50)

    assert ttft(config()) < 0.8 * ttft(config(kv_memory_tier=0, kv_memory_speed=FIRST_BANDWIDTH))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": replace(CALIBRATION, kv_bytes_per_token=0.0)}, "how many KV bytes a token has"),
        ({"enable_prefix_caching": False}, "KV tiers need enable_prefix_caching"),
        ({"kv_memory_tier": 0}, "--kv-memory-speed needs --kv-memory-tier or --kv-disk-tier"),
        ({"kv_disk_speed": 1e9}, "--kv-disk-speed needs --kv-disk-tier"),
        ({"kv_memory_speed": 0.0}, "--kv-memory-speed 0.0 must be a number of bytes/s above 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_deployments_that_cannot_share_tiers_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no KV block of 32000 bytes for each of 2 engines"):
        SimulatedTarget(Deployment.of(config(kv_memory_tier=BLOCK_BYTES), replicas=2))
    with pytest.raises(ConfigError, match="all machines share their KV tiers"):
        Deployment(machines=(Machine(engine=config()), Machine(engine=config(kv_memory_tier=2 * MANY))))
    parts = tuple(Machine(engine=config(), role=role) for role in (EngineRole.PROMPT, EngineRole.GENERATION))
    with pytest.raises(ConfigError, match="KV tiers of machines with roles are not simulated"):
        Deployment(machines=parts, link=Link(1e9), kv_bytes_per_token=1000.0)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def test_command_simulates_tiers() -> None:
    load = ("--prompt", "800", "--generate", "20", "--turns", "3", "--think", "20", "--rate", "0.4", "--requests", "10")
    machine = ("--machine", "a100-70b", "--num-blocks", "150", "--max-num-batched-tokens", "512")
    tier = ("--kv-memory-tier", "200GiB", "--kv-memory-speed", "25e9")
    without, with_tier = (command("simulate", *machine, *load, *how) for how in ((), tier))
    assert without.exit_code == with_tier.exit_code == 0, with_tier.output
    assert without.output != with_tier.output
    refused = command("simulate", *machine, *load, "--kv-memory-speed", "25e9")
    assert refused.exit_code == 1 and "--kv-memory-speed needs" in refused.output


def test_command_tunes_with_tiers() -> None:
    slo = ("--itl", "300ms", "--requests", "3", "--max-num-batched-tokens", "512", "--max-num-seqs", "2")
    load = ("--prompt", "100", "--generate", "2", "--turns", "2")
    ended = command("tune", "--machine", "a100-70b", *slo, *load, "--kv-disk-tier", "/nowhere:100GiB")
    assert ended.exit_code == 0, ended.output
    assert "--kv-disk-tier /nowhere:100GiB" in ended.output
    ended = command("tune", "--place", "2", "--link", "1e9", "--itl", "1s", "--kv-memory-tier", "1GiB")
    assert ended.exit_code == 1 and "--place does not simulate kv_memory_tier" in ended.output
