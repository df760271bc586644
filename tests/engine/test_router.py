"""The router between a front and its replicas, which are told by hand what they would report."""

import asyncio

import msgspec
import pytest
from told_replicas import INFO, TIMES, Told, add, step

from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.router import Router
from splitfuse.errors import EngineUnavailableError


async def two_replicas() -> tuple[Router, Told, Told]:
    first, second = Told(), Told()
    router = Router([first, second])
    await router.start()
    return router, first, second


def test_streams_and_reports_tell_what_a_replica_has_to_do() -> None:
    async def test() -> None:
        router, first, second = await two_replicas()
        for name, prompt in (("a", 300), ("b", 200), ("c", 50)):
            router.open(add(name, prompt))
        assert (first.sent, second.sent) == (["a"], ["b", "c"])
        router.open(add("d", 100))
        assert second.sent[-1] == "d", "250 tokens before it, not 300"
        first.tell(step(RequestOutput("a", num_computed=280)))
        router.open(add("e", 100))
        assert first.sent[-1] == "e", "20 tokens are left of the prompt"
        second.tell(step(*(RequestOutput(name, (7,), num_computed=9, finish_reason=None) for name in "bcd")))
        assert first.view is not None and second.view is not None
        assert [each.num_scheduled for each in second.view.running] == [9, 9, 9]
        second.tell(step(RequestOutput("b"), RequestOutput("c")))
        assert len(second.view.running) == 1 and len(second.view.waiting) == 2, "their states were lost"

    asyncio.run(test())


def test_a_replica_that_died_is_followed_anew() -> None:
    async def test() -> None:
        router, first, _ = await two_replicas()
        router.open(add("a", 300))
        assert first.view is not None and len(first.view.waiting) == 1
        await first.close()
        assert first.view is None
        await first.start()
        assert first.view is not None and not first.view.waiting and first.view.times == TIMES

    asyncio.run(test())


def test_of_many_replicas_a_few_are_tested() -> None:
    """What was sent where is known by an index: drained engines, and the caches of those that died, are not."""

    async def test() -> None:
        replicas = [Told() for _ in range(40)]
        router = Router(replicas)
        await router.start()

        def sent_to(name: str) -> int:
            router.open(add(name, 320))
            (number,) = (each for each, replica in enumerate(replicas) if name in replica.sent)
            replicas[number].tell(step(RequestOutput(name, (7,), num_computed=320)))
            replicas[number].tell(step(RequestOutput(name, (7,), finish_reason=FinishReason.LENGTH)))
            return number

        homes = {letter: sent_to(f"1{letter}") for letter in "abcdefgh"}
        assert len(set(homes.values())) > 3
        assert {letter: sent_to(f"2{letter}") for letter in "abcdefgh"} == homes
        assert await router.drain_engine(homes["a"]) == 0
        assert sent_to("3a") != homes["a"]
        await replicas[homes["b"]].close()
        assert sent_to("3b") != homes["b"]
        await replicas[homes["b"]].start()
        assert replicas[homes["b"]].view is not None and sent_to("4b") != homes["b"], "it was sent 3b elsewhere"

    asyncio.run(test())


def test_a_request_that_no_replica_can_serve_in_time_is_told_the_least_wait() -> None:
    async def test() -> None:
        router, first, second = await two_replicas()
        for name, prompt in (("a", 700), ("b", 600)):
            router.open(add(name, prompt))
        tight = SloTargets(ttft=50.0, itl=50.0)
        router.open(add("c", 300, targets=tight, on_time_only=True))
        assert (first.sent, second.sent) == (["a"], ["b", "c"])
        second.tell(step(*(RequestOutput(name, finish_reason="error") for name in "bc")))  # type: ignore[arg-type]
        router.open(add("d", 300, targets=tight, on_time_only=True))
        assert second.sent[-1] == "d", "it is admitted"

    asyncio.run(test())


@pytest.mark.parametrize("large_first", [False, True])
def test_engines_of_two_sizes_count_by_what_they_can_hold_now(*, large_first: bool) -> None:
    """The largest says what is too large for ever, the largest that is open what can begin."""
    limits = EngineLimits(max_model_len=641, vocab_size=256, num_blocks=40, block_size=16)

    async def test() -> None:
        large, small = Told(), Told(msgspec.structs.replace(INFO, limits=limits))
        router = Router([large, small] if large_first else [small, large])
        with pytest.raises(EngineUnavailableError, match="no engine is ready yet"):
            router.open(add("a", 30))
        await router.start()
        assert router.info.limits == router.open_limits == INFO.limits
        for name in "abcd":
            stream = router.open(msgspec.structs.replace(add(name, 30), params=SamplingParams()))
            assert stream.request.params.max_tokens == 4096 - 30, "as many wherever it is computed"
        assert (len(large.sent), len(small.sent)) == (4, 0)
        router.open(add("e", 30))
        assert small.sent == ["e"]
        await large.close()
        assert router.info.limits == INFO.limits and router.open_limits == limits
        with pytest.raises(EngineUnavailableError, match="no engine that is ready can hold a request of 1010 tokens"):
            router.open(add("f", 1000))
        stream = router.open(msgspec.structs.replace(add("g", 30), params=SamplingParams()))
        assert stream.request.params.max_tokens == 641 - 30 and small.sent == ["e", "g"]
        await small.close()
        assert router.open_limits == INFO.limits
        with pytest.raises(EngineUnavailableError, match=r"no engine is ready$"):
            router.open(add("h", 1000))

    asyncio.run(test())


def test_blocks_come_from_the_same_memory_or_from_who_listens() -> None:
    async def test() -> None:
        here = ("memory:a",)
        sources = {"one": here, "other": here, "elsewhere": ("memory:b", "tcp://10.0.0.2:9000"), "none": ()}
        engines = {
            name: Told(msgspec.structs.replace(INFO, block_sources=each), name) for name, each in sources.items()
        }
        for each in engines.values():
            await each.start()
        can = {
            name: [each.told_name for each in engines.values() if each.fetches_from(source)]
            for name, source in engines.items()
        }
        everywhere = ["one", "other", "elsewhere", "none"]
        assert can == {"one": ["one", "other"], "other": ["one", "other"], "elsewhere": everywhere, "none": []}

    asyncio.run(test())


def test_what_steps_take_crosses_to_the_front() -> None:
    async def test() -> None:
        router, first, _ = await two_replicas()
        assert first.view is not None and first.view.times == TIMES
        slower = StepTimes(CostModel(floor=2.0, per_token=0.1, noise=0.05), (1.5, 0.5), 0.9)
        router.open(add("a", 10))
        first.tell(step(RequestOutput("a", num_computed=5), times=slower))
        assert first.view.times == slower

    asyncio.run(test())


def test_arrivals_are_accounted_for() -> None:
    async def test() -> None:
        router, first, _ = await two_replicas()
        router.open(add("a", 64, targets=SloTargets(ttft=1.0)))
        stream = router.open(add("b", 32))
        first.tell(step(RequestOutput("a", (7, 7), num_cached_tokens=48)))
        (arrival,) = first.arrivals
        assert (arrival.num_prompt, arrival.num_cached, arrival.num_generated) == (64, 48, 2)
        assert not arrival.has_ended and arrival.targets == SloTargets(ttft=1.0)
        first.tell(step(RequestOutput("a", (7,), finish_reason=FinishReason.LENGTH)))
        assert arrival.has_ended and arrival.num_generated == 3
        assert stream.arrival is not None and stream.arrival.targets == INFO.targets

    asyncio.run(test())
