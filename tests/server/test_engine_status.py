"""What is said of an engine that has been there for less than a minute, or was away."""

import asyncio

from pytest import approx
from told_replicas import INFO, router_of

from splitfuse.server.engines import status_of


def test_answers_count_by_the_time_that_an_engine_was_there() -> None:
    async def test() -> None:
        router, made = await router_of(1, 1)
        await router.scale(2)
        engine = made[1]
        began = engine.came_at
        assert began is not None
        engine.ends.extend((began + second, second % 2 == 0) for second in range(10))
        status = status_of(1, engine, now=began + 10.0)
        assert (status.requests_per_second, status.goodput, status.slo_attainment) == approx((1.0, 0.5, 0.5))
        assert status_of(1, engine, now=began + 64.5).requests_per_second == approx(5 / 60)
        assert status_of(1, engine, now=began + 200.0).requests_per_second == 0.0

        engine._die("a test ended it")
        engine.tell(INFO)
        assert engine.came_at == began, "a death is part of its minute"
        await router.scale(1)
        assert engine.came_at is None
        await router.scale(2)
        assert engine.came_at is not None and engine.came_at > began
        await router.close()

    asyncio.run(test())
