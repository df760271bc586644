"""The number of replicas follows the load: the rule is in core/replicas/capacity.py, what is done about it is here."""

import asyncio
import logging
from typing import Any

import pytest
from told_replicas import Stoppable, add, router_of, step

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.engine.client import EngineState
from splitfuse.engine.router import Router
from splitfuse.errors import ConfigError, EngineUnavailableError
from splitfuse.server import autoscaler
from splitfuse.server.autoscaler import Autoscaler
from splitfuse.server.lifecycle import run_server


def load(router: Router, count: int) -> None:
    """Requests of 21 s each, whose first tokens are due within 100 s."""
    for number in range(count):
        router.open(add(f"{number}", 200))


def test_replicas_come_with_the_load_and_go_with_it() -> None:
    async def test() -> None:
        router, made = await router_of(1, 3)
        scaler = Autoscaler(router, 1, 3)
        assert await scaler.count() == 1, "nothing is known of the time of steps"
        made[0].tell(step())
        assert await scaler.count() == 1
        load(router, 9)
        await scaler.check()
        assert router.num_replicas == 3, "189 s of prompts, and as much is expected"
        for each in router.engines:
            each.arrivals.clear()  # they are older than the window
        await scaler.check()
        assert router.num_replicas == 1 and made[0].num_open == 9
        await router.close()

    asyncio.run(test())


def test_fewer_are_tried_if_so_many_cannot_be_had() -> None:
    async def test() -> None:
        router, made = await router_of(1, 4)
        made[0].tell(step())
        load(router, 60)
        made[4].prevented = EngineUnavailableError("there is no place for it")
        scaler = Autoscaler(router, 1, 5)
        await scaler.check()
        assert router.num_replicas == 3, "half of the way to 5"
        for each in made[3:]:
            each.prevented = EngineUnavailableError("there is no place for it")
        with pytest.raises(EngineUnavailableError, match="there is no place"):
            await scaler.check()
        assert router.num_replicas == 3
        await router.close()

    asyncio.run(test())


def test_it_goes_on_after_failures(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(autoscaler, "CHECK_SECONDS", 0.001)
    caplog.set_level(logging.INFO)

    async def test() -> None:
        router, made = await router_of(1, 1)
        made[0].tell(step())
        made[1].prevented = EngineUnavailableError("there is no place for it")
        load(router, 9)
        with Autoscaler(router, 1, 2).running():
            while "the number of replicas stays 1: there is no place for it" not in caplog.text:
                await asyncio.sleep(0.001)
            made[1].prevented = None
            while made[1].state is not EngineState.READY:
                await asyncio.sleep(0.001)
            while "replicas: 2, not 1, by load" not in caplog.text:
                await asyncio.sleep(0.001)
        await router.close()

    asyncio.run(test())


def test_engines_elsewhere_have_their_part_of_the_load() -> None:
    async def test() -> None:
        alone, made = await router_of(1, 0)
        made[0].tell(step())
        load(alone, 9)
        needed = await Autoscaler(alone, 1, 99).count()
        assert needed > 4

        made = [Stoppable(str(index)) for index in range(5)]
        router = Router(made[:3], num_scaled=1, spare=made[3:], why_no_more="there is no room")
        await router.start()
        assert router.engines_elsewhere == made[1:3]
        for each in made[1:3]:
            each.start_seconds = 0.1  # that is how long a connection has taken
        made[0].tell(step())
        load(router, 9)
        scaler = Autoscaler(router, 1, 99)
        assert await scaler.count() == needed - 2
        assert await Autoscaler(router, 1, 2).count() == 2
        made[1].is_drained = True
        assert await scaler.count() == needed - 1
        made[2].is_drained = True
        assert await scaler.count() == needed
        for each in router.engines:
            each.is_drained = False
            each.arrivals.clear()
        assert await scaler.count() == 1
        await alone.close()
        await router.close()

    asyncio.run(test())


def test_an_slo_that_no_number_of_replicas_keeps_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        router, made = await router_of(1, 1)
        made[0].tell(step())
        load(router, 3)
        scaler = Autoscaler(router, 1, 2)
        await scaler.count()
        assert not caplog.records
        router.open(add("late", 2000))  # 201 s, and its first token is due within 100 s
        for _ in range(2):
            await scaler.count()
        (record,) = caplog.records
        assert "25 % of the last minute's requests cannot meet their SLO with any number" in record.getMessage()
        await router.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({}, "autoscale needs an SLO, by which it knows what is enough: set ttft, itl, tpot or enable_slo"),
        ({"ttft": "1s", "kv_loans": True}, "autoscale and kv_loans are mutually exclusive"),
    ],
    ids=str,
)
def test_what_it_needs(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asyncio.run(run_server(EngineConfig.from_settings(engine), ServerConfig(autoscale="1:2", port=0)))
