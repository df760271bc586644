"""The number of a router's replicas changes while it serves."""

import asyncio
import math
from typing import Any

import pytest
from router_streams import closed_loop, read, requests, resumed, run, until
from told_replicas import Stoppable, add, router_of, step

from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.request import SchedulingOptions
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import Add, EngineInfo
from splitfuse.engine.remote.launcher import Launcher, Link
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.errors import ConfigError, EngineUnavailableError, InvalidRequestError

SETTINGS: dict[str, Any] = {"num_blocks": 400, "max_num_batched_tokens": 64, "num_threads": 1}


def states(router: Router) -> str:
    return " ".join(engine.state for engine in router.engines)


async def begin_restart(router: Router, index: int) -> asyncio.Task[int]:
    restarting = asyncio.create_task(router.restart_engine(index))
    await until(lambda: router.engines[index].state is EngineState.DEAD)
    return restarting


def test_replicas_come_and_go_and_keep_their_numbers() -> None:
    async def test() -> None:
        router, made = await router_of(1, 2)
        followed: list[object] = []
        router.follow_engines(followed.append)
        assert followed == made[:1] and (router.num_replicas, router.max_replicas) == (1, 3)
        assert await router.scale(3) == 0
        assert followed == made and states(router) == "ready ready ready"
        for number in range(6):
            router.open(add(str(number), 50))
        assert [len(each.sent) for each in made] == [2, 2, 2]
        assert await router.scale(1) == 4
        assert states(router) == "ready stopped stopped" and made[0].num_open == 6
        assert not any(each.is_drained for each in made)
        with pytest.raises(EngineUnavailableError, match="engine 2 is stopped: splitfuse scale starts it again"):
            await router.drain_engine(2)
        assert await router.scale(2) == 0
        assert states(router) == "ready ready stopped" and len(followed) == 3
        assert await router.scale(2) == 0 and made[1].starts == ["starting"] * 2
        await router.close()

    asyncio.run(test())


def test_those_that_take_no_requests_are_ended_first() -> None:
    async def test() -> None:
        router, made = await router_of(3, 0)
        made[0]._die("it was killed")
        assert await router.scale(2) == 0 and states(router) == "stopped ready ready"
        await router.drain_engine(1)
        assert await router.scale(1) == 0 and states(router) == "stopped stopped ready"
        await router.close()

    asyncio.run(test())


def test_if_one_cannot_be_started_none_is() -> None:
    async def test() -> None:
        router, made = await router_of(1, 2)
        made[2].prevented = ConfigError("there is no memory for it")
        stream = router.open(add("a", 50))
        with pytest.raises(ConfigError, match="there is no memory for it"):
            await router.scale(3)
        assert states(router) == "ready stopped stopped" and router.num_replicas == 1
        router.open(add("b", 50))
        assert made[0].sent == ["a", "b"] and not stream.is_over
        made[2].prevented = None
        await router.scale(3)
        assert states(router) == "ready ready ready"
        await router.close()

    asyncio.run(test())


def test_a_new_replica_is_kept_where_no_other_engine_is_ready() -> None:
    """The first one dies while two are started, of which one cannot be."""

    async def test() -> None:
        router, made = await router_of(1, 2)
        made[2].may_start.clear()
        made[2].prevented = ConfigError("there is no memory for it")
        scaling = asyncio.create_task(router.scale(3))
        await until(lambda: made[1].state is EngineState.READY)
        made[0]._die("it was killed")
        stream = router.open(add("a", 50))
        made[2].may_start.set()
        with pytest.raises(ConfigError, match="there is no memory for it"):
            await scaling
        assert states(router) == "dead ready stopped" and router.num_replicas == 2
        router.open(add("b", 50))
        assert made[1].sent == ["a", "b"] and not stream.is_over
        made[2].prevented = None
        assert await router.scale(3) == 0 and states(router) == "dead ready ready"
        await router.close()

    asyncio.run(test())


def test_of_new_replicas_one_is_kept_at_most() -> None:
    async def test() -> None:
        router, made = await router_of(1, 3)
        made[3].may_start.clear()
        made[3].prevented = ConfigError("there is no memory for it")
        scaling = asyncio.create_task(router.scale(4))
        await until(lambda: made[2].state is EngineState.READY)
        made[0]._die("it was killed")
        made[3].may_start.set()
        with pytest.raises(ConfigError, match="there is no memory for it"):
            await scaling
        assert states(router) == "dead ready stopped stopped"
        await router.close()

    asyncio.run(test())


def test_nothing_is_ended_if_the_replica_that_stays_dies_meanwhile() -> None:
    async def test() -> None:
        router, made = await router_of(3, 0)
        made[1].lets_go = False
        streams = [router.open(add(name, 50)) for name in "abc"]
        assert [each.sent for each in made] == [["a"], ["b"], ["c"]]
        scaling = asyncio.create_task(router.scale(1))
        await until(lambda: made[0].sent == ["a", "c"] and made[1]._moving)
        made[0]._die("it was killed")
        made[1].tell(step(RequestOutput("b", finish_reason=FinishReason.MOVED)))
        with pytest.raises(EngineUnavailableError, match="no other engine is ready any more: none is ended"):
            await scaling
        assert states(router) == "dead ready ready" and not any(each.is_drained for each in made)
        assert made[1].num_open + made[2].num_open == 3 and not any(stream.is_over for stream in streams)
        await router.close()

    asyncio.run(test())


def test_an_engine_is_not_restarted_if_the_other_dies_meanwhile() -> None:
    async def test() -> None:
        router, made = await router_of(2, 0)
        made[1].lets_go = False
        for name in "ab":
            router.open(add(name, 50))
        restarting = asyncio.create_task(router.restart_engine(1))
        await until(lambda: made[1]._moving)
        made[0]._die("it was killed")
        made[1].tell(step(RequestOutput("b", finish_reason=FinishReason.MOVED)))
        with pytest.raises(EngineUnavailableError, match="no other engine is ready any more: none is ended"):
            await restarting
        assert states(router) == "dead ready" and not made[1].is_drained and made[1].num_open == 2
        await router.close()

    asyncio.run(test())


def test_an_engine_elsewhere_is_not_ended_before_its_blocks_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie ready in its process until the engine that goes on has them, and has given a token."""
    monkeypatch.setattr("splitfuse.engine.router.LONGEST_FETCH", math.inf)

    async def test() -> None:
        router, made = await router_of(2, 0)
        made[1].address = "10.0.0.2:9000"
        for name in "ab":
            router.open(add(name, 50))
        scaling = asyncio.create_task(router.scale(1))
        await until(lambda: made[0].sent == ["a", "b"])
        for _ in range(20):
            await asyncio.sleep(0)
        assert states(router) == "ready ready"
        made[0].tell(step(RequestOutput("b", (7,))))
        assert await scaling == 1 and states(router) == "ready stopped"
        await router.close()

    asyncio.run(test())


def test_the_number_changes_while_an_engine_is_restarted() -> None:
    """More replicas can be had meanwhile, and fewer if the engine is none of them."""

    async def test() -> None:
        made = [Stoppable(str(index)) for index in range(4)]
        router = Router(made[:3], num_scaled=2, spare=made[3:], why_no_more="there is no room")
        await router.start()
        restarting = await begin_restart(router, 2)  # which is none of the replicas
        assert await router.scale(3) == 0 and states(router) == "ready ready dead ready"
        assert await router.scale(2) == 0 and states(router) == "ready ready dead stopped"
        await made[2].start()
        assert await restarting == 0
        restarting = await begin_restart(router, 1)
        assert await router.scale(3) == 0 and states(router) == "ready dead ready ready"
        with pytest.raises(EngineUnavailableError, match="engine 1 is being restarted"):
            await router.scale(2)
        await made[1].start()
        assert await restarting == 0
        assert await router.scale(2) == 0 and states(router) == "ready ready ready stopped"
        await router.close()

    asyncio.run(test())


class NeverReady(Launcher):
    """Begins to bring an engine up, and does not end."""

    async def launch(self) -> Link:
        await asyncio.Event().wait()
        raise AssertionError

    def accept(self, info: EngineInfo) -> None:
        raise AssertionError(info)

    def close(self) -> None:
        pass


def test_what_waits_for_an_engine_is_told_that_it_was_ended() -> None:
    async def test() -> None:
        engine = SupervisedEngine(NeverReady())
        for end in (engine.stop, engine.close):
            starting = asyncio.create_task(engine.start())
            await until(lambda: engine._tasks)
            engine.is_drained = True
            restarting = asyncio.create_task(engine.restart())
            await asyncio.sleep(0)
            await end()
            with pytest.raises(EngineUnavailableError, match="the engine did not start: it was "):
                await starting
            with pytest.raises(EngineUnavailableError, match="an engine was ended while it was restarted"):
                await restarting
        with pytest.raises(EngineUnavailableError, match="the engine was closed"):
            await engine.start()

    run(test())


def test_a_server_that_ends_starts_no_replicas() -> None:
    """Those that are being started end with it."""

    async def test() -> None:
        first, spare = Stoppable(), SupervisedEngine(NeverReady())
        router = Router([first], num_scaled=1, spare=[spare])
        await router.start()
        scaling = asyncio.create_task(router.scale(2))
        await until(lambda: spare._tasks)
        router.end_soon()
        with pytest.raises(EngineUnavailableError, match="the server is ending"):
            await router.scale(2)
        await router.close()
        with pytest.raises(EngineUnavailableError, match="the engine did not start: it was closed"):
            await scaling
        assert states(router) == "dead dead"

    run(test())


def test_a_replica_that_was_ended_has_no_stage() -> None:
    """A server of which the last engine has died is dead, and not starting."""

    async def test() -> None:
        router, made = await router_of(2, 0)
        await router.scale(1)
        made[0]._die("it was killed")
        assert (router.state, router.stage.stage) == (EngineState.DEAD, "ready")
        await router.close()

    asyncio.run(test())


def test_numbers_that_there_cannot_be() -> None:
    async def test() -> None:
        router, made = await router_of(1, 1)
        for count in (0, 3):
            with pytest.raises(InvalidRequestError, match=f"cannot be {count} replicas, but 1 to 2: there is no room"):
                await router.scale(count)
        scaling = asyncio.create_task(router.scale(2))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError, match="is being changed from 1 to 2: wait for that"):
            await router.scale(1)
        await scaling
        assert states(router) == "ready ready" and made[1].starts == ["starting"]
        await router.close()

    asyncio.run(test())


def test_an_engine_that_is_being_ended_is_left_alone() -> None:
    """It waits for its request; what others ask of it meanwhile is refused."""

    async def test() -> None:
        router, made = await router_of(2, 0)
        made[1].lets_go = False
        stream = router.open(add("a", 50))
        router.open(add("b", 60))
        assert made[1].sent == ["b"] and not stream.is_over
        scaling = asyncio.create_task(router.scale(1))
        while not made[1]._moving:
            await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError, match="engine 1 is being ended"):
            router.undrain_engine(1)
        with pytest.raises(EngineUnavailableError, match="engine 1 is being ended"):
            await router.restart_engine(1)
        router.open(add("c", 50))
        assert made[0].sent == ["a", "c"]
        made[1].tell(step(RequestOutput("b", finish_reason=FinishReason.MOVED)))
        assert await scaling == 1 and made[0].sent == ["a", "c", "b"]
        await router.close()

    asyncio.run(test())


def test_nothing_is_ended_if_no_replica_that_stays_is_ready() -> None:
    async def test() -> None:
        router, made = await router_of(2, 0)
        for each in made:
            each._enter(EngineState.STARTING)
        with pytest.raises(EngineUnavailableError, match="no other engine is ready to go on"):
            await router.scale(1)
        assert states(router) == "starting starting" and not any(each.is_drained for each in made)
        await router.close()

    asyncio.run(test())


@pytest.mark.parametrize("setting", ["roles", "lends"])
def test_fixed_numbers_of_engines(setting: str) -> None:
    async def test() -> None:
        changes: dict[str, Any] = (
            {"roles": (EngineRole.PROMPT, EngineRole.GENERATION)} if setting == "roles" else {"lends": True}
        )
        router = Router([Stoppable(), Stoppable()], num_scaled=2, **changes)
        with pytest.raises(InvalidRequestError, match="the number of engines is fixed"):
            await router.scale(1)

    asyncio.run(test())


def test_no_token_is_lost_from_one_to_two_and_back() -> None:
    """Real engines, in processes of their own."""
    wanted = requests(6, max_tokens=150)

    def again(request: Add, name: str) -> Add:
        salted = SchedulingOptions(cache_salt=name)  # no engine has anything of it
        return Add(f"{name}{request.request_id}", request.prompt_token_ids, request.params, scheduling=salted)

    async def test() -> None:
        router = make_replicas(EngineConfig.from_settings(SETTINGS), replicas=1, max_replicas=2)
        await router.start()
        try:
            whole = await asyncio.gather(*(read(router.open(again(each, "alone"))) for each in wanted))
            streams = [router.open(again(each, "first")) for each in wanted]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            assert await router.scale(2) == 0
            assert len({engine.info.planned_bytes for engine in router.engines}) == 1, "the memory was divided before"
            assert await asyncio.gather(*reading) == whole
            async with closed_loop(router, [again(each, "both") for each in wanted], whole) as streams:
                await until(lambda: all(engine.num_open for engine in router.engines))
                num_moved = await router.scale(1)
                while not resumed(streams):  # each had ended before it could move
                    await router.scale(2)
                    num_moved = await router.scale(1)
            assert num_moved >= len(resumed(streams))
            assert [engine.state for engine in router.engines] == ["ready", "stopped"]
            assert router.engines[1].pid is None  # type: ignore[attr-defined]
            assert await router.scale(2) == 0 and await read(router.open(again(wanted[0], "last"))) == whole[0]
        finally:
            await router.close()

    run(test())
