"""Requests go on when their engine dies: elsewhere, or at the restarted one, with the same tokens and without an error.
One that kills engines is found, and harms no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from random import Random
from typing import Any

import msgspec
import pytest
from router_streams import closed_loop, read, requests, resumed, run, running, until

from splitfuse.config.engine import EngineConfig
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine import recovery
from splitfuse.engine import router as router_module
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import (
    AdapterLoaded,
    Add,
    Command,
    Finish,
    Leaving,
    LoadAdapter,
    StepReport,
    Stop,
    UnloadAdapter,
)
from splitfuse.engine.quarantine import Quarantine, find_suspects
from splitfuse.engine.remote import launcher, supervisor
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, RequestQuarantinedError, SplitfuseError

CONFIG = EngineConfig.from_settings({"num_blocks": 600, "num_threads": 1})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.01)


def move_all(engine: LocalClient) -> None:
    for stream in engine.drain():
        engine.move(stream)


def kill(engine: SupervisedEngine) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


def test_streams_of_a_killed_engine_end_as_without_a_kill(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills at random moments: of one of two engines, and of one that all requests wait for. The other end of its
    socket is not closed, as if the system were still taking back its memory; nor is its end waited for.
    """
    wanted, kept = requests(16, max_tokens=100), []
    make_pair, end = socket.socketpair, launcher._SubprocessLink.end
    has_moved = asyncio.Event()

    def make_kept_pair() -> tuple[socket.socket, socket.socket]:
        ours, theirs = make_pair()
        kept.append(theirs.dup())
        return ours, theirs

    async def end_late(self: Any, seconds: float) -> str:
        await has_moved.wait()
        return await end(self, seconds)

    monkeypatch.setattr(launcher._SubprocessLink, "end", end_late)

    async def test() -> None:
        rng = Random(24)
        victim, other = SupervisedEngine(SubprocessLauncher(CONFIG)), AsyncEngine(Engine.load(CONFIG))
        async with running(victim, other) as router:
            whole = await asyncio.gather(*(read(other.open(request)) for request in wanted))
            assert all(len(tokens) == 100 for tokens in whole)
            num_moved = 0
            for name in "both", "alone":
                if name == "alone":
                    other.drain()
                    victim._quarantine = Quarantine()  # the other, a thread, has not told it which were harmless
                    await until(lambda: victim.state is EngineState.READY)
                async with closed_loop(router, wanted, whole, name) as streams:
                    moment = rng.randrange(100, 800)
                    await until(lambda m=moment, each=streams: sum(s.num_tokens for s in each) > m)  # type: ignore[misc]
                    kill(victim)
                    await until(lambda: victim.state is not EngineState.READY)
                    if name == "both":
                        assert router.state is EngineState.READY
                        await until(lambda: router.num_resumed["death"] > 0)
                        has_moved.set()
                        beside = msgspec.structs.replace(wanted[0], request_id="beside")
                        assert len(await read(router.open(beside))) == 100
                moved = resumed(streams)
                assert 0 < len(moved) <= 16 and all(stream.num_resumed == stream.num_deaths == 1 for stream in moved)
                for stream in moved:
                    breakdown = await stream.breakdown
                    phases = breakdown.phases
                    assert phases[LatencyPhase.FAILED] > 0 and phases[LatencyPhase.BETWEEN_ENGINES] >= 0
                    assert sum(phases.values()) == pytest.approx(breakdown.closed - breakdown.opened)
                num_moved += len(moved)
            assert router.num_resumed["death"] == num_moved

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(launcher.socket, "socketpair", make_kept_pair)
        run(test())
    assert "requests that go on once an engine is ready" in caplog.text
    assert "hangs" not in caplog.text and "its process ended with signal 9 (SIGKILL); starting it again" in caplog.text
    for each in kept:
        each.close()


@pytest.mark.slow
def test_engines_are_restarted_one_after_the_other_under_load() -> None:
    wanted = requests(16, max_tokens=400)

    async def test() -> None:
        engines = [SupervisedEngine(SubprocessLauncher(CONFIG)), SupervisedEngine(SubprocessLauncher(CONFIG))]
        async with running(*engines) as router:
            whole = await asyncio.gather(*(read(router.open(request)) for request in wanted))
            for index, engine in enumerate(engines):
                async with closed_loop(router, wanted, whole, f"{index}") as streams:
                    pid = engine.pid
                    moved = await router.restart_engine(index)
                assert engine.pid != pid and engine.state is EngineState.READY and not engine.is_drained
                assert moved >= len(resumed(streams)) > 0
            assert router.num_resumed["death"] == 0

    run(test())


def test_a_request_that_kills_engines_is_found_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front kills an engine whenever it has the request in the step in flight."""
    for name in "TRIAL_OUTPUTS", "NEXT_OUTPUTS":
        monkeypatch.setattr(recovery, name, 50)  # a busy front may look only some steps later
    wanted = requests(6, max_tokens=200)
    killer = Add("killer", (5, 6, 7), SamplingParams(max_tokens=900, ignore_eos=True))

    async def test() -> None:
        quarantine = Quarantine()
        engine = SupervisedEngine(SubprocessLauncher(CONFIG), quarantine=quarantine)
        async with running(engine) as router:
            whole = await asyncio.gather(*(read(router.open(request)) for request in wanted))
            streams = [router.open(request) for request in wanted]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: all(stream.num_tokens > 5 for stream in streams))
            dead: set[int | None] = set()

            async def watch() -> None:
                while True:
                    link = engine._link
                    if link is not None and link.pid not in dead and "killer" in link.in_flight():
                        dead.add(engine.pid)
                        kill(engine)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            with pytest.raises(RequestQuarantinedError):
                while True:  # it may end before the front looks
                    await read(router.open(killer))
            assert await asyncio.gather(*reading) == whole
            watching.cancel()
            assert len(dead) == 2
            assert all(stream.num_deaths <= 1 for stream in streams)
            with pytest.raises(RequestQuarantinedError):
                router.open(killer)
            assert await read(router.open(wanted[0])) == whole[0]

    run(test())


def test_requests_of_a_drained_engine_go_on_at_another() -> None:
    wanted = requests(12, max_tokens=120)

    async def test() -> None:
        config = EngineConfig.from_settings({"num_blocks": 600, "num_threads": 1})
        first, second = (AsyncEngine(Engine.load(config)) for _ in range(2))
        async with running(first, second) as router:
            whole = await asyncio.gather(*(read(first.open(request)) for request in wanted))
            async with closed_loop(router, wanted, whole) as streams:
                count = await router.drain_engine(0)
                while not router.num_resumed["drain"]:  # each had ended before it could move
                    router.undrain_engine(0)
                    count = await router.drain_engine(0)
                assert first.num_open == 0
                for request in requests(3, max_tokens=2):
                    beside = msgspec.structs.replace(request, request_id=f"beside {request.request_id}")
                    assert len(await read(router.open(beside))) == 2
            assert count >= router.num_resumed["drain"] == sum(router.num_resumed.values()) == len(resumed(streams))
            phases = (await resumed(streams)[0].breakdown).phases
            assert {LatencyPhase.PREFILL, LatencyPhase.DECODE, LatencyPhase.BETWEEN_ENGINES} <= phases.keys()
            assert LatencyPhase.FAILED not in phases
            with pytest.raises(EngineUnavailableError, match="engine 1 cannot be drained: no other engine is ready"):
                await router.drain_engine(1)
            with pytest.raises(InvalidRequestError, match="there is no engine 2: this server has 2, the first is 0"):
                await router.drain_engine(2)
            router.undrain_engine(0)
            assert await router.drain_engine(1) == 0

    run(test())


class Engines(LocalClient):
    """An engine that is played by the test."""

    restarts = True

    def __init__(self, model: AsyncEngine) -> None:
        super().__init__()
        self.sent: list[Command] = []
        self._model = model

    def come(self) -> None:
        self._take(self._model._engine_loop.info)

    def go(self) -> None:
        self._die("it was told to")

    def _send(self, command: Command) -> None:
        self.sent.append(command)

    async def start(self) -> None:
        self.come()

    async def close(self) -> None:
        self._die("it was closed")

    @property
    def added(self) -> list[str]:
        return [each.request_id for each in self.sent if isinstance(each, Add)]

    def give(self, request_id: str, *tokens: int, reason: FinishReason | None = None) -> None:
        output = RequestOutput(request_id, tokens, finish_reason=reason)
        self._take(StepReport((output,), self._stats))


class Quarantined(Engines):
    """An engine that tells a quarantine of its deaths, as one in a process does; `in_flight` is its last step."""

    def __init__(self, model: AsyncEngine, quarantine: Quarantine) -> None:
        super().__init__(model)
        self.in_flight: list[str] = []
        self.absolved: list[str] = []
        self._quarantine = quarantine

    def absolve(self, request: Add) -> None:
        self.absolved.append(request.request_id)
        self._quarantine.absolve(request)

    def _check(self, request: Add) -> None:
        self._quarantine.check(request)
        super()._check(request)

    def _suspects(self) -> list[Stream]:
        suspects, causes = find_suspects(self._streams.values(), self.in_flight)
        self._quarantine.engine_died(stream.request for stream in causes)
        return suspects


@pytest.fixture(scope="module")
def model() -> AsyncEngine:
    return AsyncEngine(Engine.load(EngineConfig.from_settings({"num_blocks": 16})))


def test_suspects_go_on_alone_the_shortest_first_then_more_at_once(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second):
            names = {"a": 9, "b": 3, "c": 6, "d": 12, "e": 11, "f": 10, "g": 13, "h": 14}
            streams = {name: first.open(Add(name, tuple(range(5, 5 + n)), PARAMS)) for name, n in names.items()}
            first.give("b", 7, 7, 7, 7)
            first.go()

            def give(name: str) -> str:
                """Give a request on trial a token, and return who goes on then."""
                assert streams[name].on_trial
                before = second.added
                second.give(name, 5)
                return "".join(second.added[len(before) :])

            assert second.added == ["c"]
            assert [give(name) for name in "cba"] == ["ba", "fe", "dg"]
            assert [give(name) for name in "cbacba"] == [""] * 6, "they take what is left of their trial beside others"
            assert [stream.on_trial for stream in streams.values()] == [name not in "abch" for name in streams]
            point = next(each for each in second.sent if isinstance(each, Add) and each.request_id == "b").resume_point
            assert point is not None and point.token_ids == (7,) * 4 and len(point.token_times) == 4
            first.come()  # it has seen none of them pass
            assert first.added[8:] == ["h"]
            assert [stream.num_resumed for stream in streams.values()] == [1] * 8

    run(test())


@pytest.mark.parametrize("num_given", range(recovery.TRIAL_OUTPUTS))
def test_those_of_which_an_engine_died_together_are_tried_alone(num_given: int, model: AsyncEngine) -> None:
    """One kills each engine that has given it so many outputs."""

    async def test() -> None:
        engine = Quarantined(model, Quarantine())
        async with running(engine) as router:
            innocents = [router.open(Add(f"i{n}", (5, 6, 7, n), PARAMS)) for n in range(12)]
            killer, num_deaths = router.open(Add("killer", (9,) * 8, PARAMS)), 0
            engine.in_flight = [stream.request.request_id for stream in innocents[:3]]
            engine.go()
            engine.come()
            while not killer.is_over:
                is_killing = "killer" in engine._streams and killer.num_outputs_here == num_given
                if is_killing:
                    num_deaths += 1
                    is_alone = sum(stream.on_trial for stream in engine._streams.values()) == 1
                    assert is_alone == (num_deaths > 1)
                    engine.in_flight = list(engine._streams)
                    engine.go()
                    engine.come()
                for name in list(engine._streams) if not is_killing else ():
                    engine.give(name, 1)
            assert num_deaths == 3
            with pytest.raises(RequestQuarantinedError):
                await read(killer)
            assert not any(stream.is_over for stream in innocents)
            assert max(stream.num_deaths for stream in innocents) == 2

    run(test())


def test_a_trial_that_does_not_end_keeps_the_others_for_some_time(
    model: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "TRIAL_SECONDS", 0.01)

    async def test() -> None:
        engine = Quarantined(model, Quarantine())
        async with running(engine) as router:
            stuck, other, third = (router.open(Add(name, (5,) * n, PARAMS)) for n, name in enumerate("abc", start=1))
            engine.go()
            engine.come()
            assert engine.added[3:] == ["a"]
            await until(lambda: engine.added[3:] == ["a", "b", "c"])
            assert all(stream.on_trial for stream in (stuck, other, third))
            engine.in_flight = ["a", "b", "c"]
            engine.go()
            for stream in stuck, other, third:
                engine._quarantine.check(stream.request)  # it is not known which it was

    run(test())


def test_requests_that_cannot_have_caused_it_go_on_at_once_and_use_no_try(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        first._suspects = lambda: [streams[0]]  # type: ignore[method-assign]
        async with running(first, second):
            streams = [first.open(Add(name, (5, 6), SamplingParams(max_tokens=50))) for name in "abc"]
            first.go()
            assert sorted(second.added) == ["a", "b", "c"]
            assert [stream.num_deaths for stream in streams] == [1, 0, 0]

    run(test())


def test_after_four_times_comes_the_error(model: AsyncEngine) -> None:
    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            stream = router.open(Add("a", (5, 6), SamplingParams(max_tokens=50)))
            for number in range(5):
                engine.give("a", number)
                engine.go()
                engine.come()
            tokens = []
            with pytest.raises(EngineUnavailableError, match="the engine died while the request ran: it was told to"):
                async for output in stream:
                    tokens += output.token_ids
            assert tokens == [0, 1, 2, 3, 4] and len(engine.added) == 5
            assert router.num_resumed["death"] == 4

    run(test())


def test_an_answer_does_not_go_on_with_another_model(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second):
            begun, new = (first.open(Add(name, (5, 6), SamplingParams(max_tokens=50))) for name in ("begun", "new"))
            first.give("begun", 7)
            assert second._info is not None and first._info is not None
            for engine in first, second:
                engine.restarts = False  # type: ignore[misc]
            second._take(msgspec.structs.replace(second._info, identity={**second._info.identity, "model": "another"}))
            first.go()
            with pytest.raises(EngineUnavailableError, match="died"):
                await read(begun)
            assert second.added == ["new"] and not new.is_over

    run(test())


def test_a_request_whose_client_leaves_while_it_waits_does_not_go_on(model: AsyncEngine) -> None:
    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            streams = [router.open(Add(name, (5, 6), SamplingParams(max_tokens=50))) for name in "ab"]
            engine.go()
            streams[0].close()
            breakdown = await streams[0].breakdown
            assert set(breakdown.phases) == {LatencyPhase.FAILED, LatencyPhase.BETWEEN_ENGINES}
            engine.come()
            assert engine.added == ["a", "b", "b"]
            streams[1].close()
            assert engine.sent[-1] == Finish(
                "b", *(getattr(engine.sent[-1], name) for name in ("reason", "num_tokens", "ended"))
            )

    run(test())


def test_requests_fail_if_no_engine_comes(model: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MAX_WAIT", 0.01)

    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            stream = router.open(Add("a", (5, 6), SamplingParams(max_tokens=50)))
            engine.go()
            with pytest.raises(EngineUnavailableError, match=r"no engine was ready within 0\.01 s"):
                await read(stream)

    run(test())


PARAMS = SamplingParams(max_tokens=50)


def test_a_request_that_kills_before_its_first_step_is_found(model: AsyncEngine) -> None:
    async def test() -> None:
        quarantine = Quarantine()
        engines = [Quarantined(model, quarantine) for _ in range(2)]
        async with running(*engines):
            innocents = []
            for number, engine in enumerate(engines):
                streams = [engine.open(Add(f"{number}{n}", (5, 6, 7, number, n + 8), PARAMS)) for n in range(3)]
                for stream in streams:
                    engine.give(stream.request.request_id, 1)
                innocents += streams
            killer, num_deaths = engines[0].open(Add("killer", (9, 9), PARAMS)), 0
            while any(not stream.is_over for stream in (killer, *innocents)):
                for engine in engines:
                    if "killer" in engine._streams:
                        num_deaths += 1
                        engine.go()
                        engine.come()
                    engine.in_flight = list(engine._streams)
                    for name in engine.in_flight if "killer" not in engine._streams else ():
                        reason = FinishReason.LENGTH if engine._streams[name].num_tokens >= 30 else None
                        engine.give(name, 1, reason=reason)
            assert num_deaths <= recovery.MAX_RESUMES + 1
            with pytest.raises(SplitfuseError):
                await read(killer)
            assert {len(await read(stream)) for stream in innocents} == {31}

    run(test())


def test_a_new_request_that_kills_during_trials_makes_no_other_refused(model: AsyncEngine) -> None:
    async def test() -> None:
        engine = Quarantined(model, Quarantine())
        async with running(engine) as router:
            innocents = [router.open(Add(f"i{n}", (5, 6, 7 + n), PARAMS)) for n in range(4)]
            engine.in_flight = list(engine._streams)
            engine.go()
            engine.come()
            killer = router.open(Add("killer", (9,) * 8, PARAMS))
            while not killer.is_over:
                engine.in_flight = list(engine._streams)
                if "killer" in engine._streams:
                    engine.go()
                    engine.come()
                else:
                    for name in engine.in_flight:
                        engine.give(name, 1)
            assert not any(stream.is_over for stream in innocents)
            assert killer.num_deaths <= recovery.MAX_RESUMES + 1
            with pytest.raises(SplitfuseError):
                await read(killer)

    run(test())


def test_however_often_engines_die_the_error_comes(model: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MAX_LOST", 5)

    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            one, other = (router.open(Add(name, (5, 6), PARAMS)) for name in ("one", "other"))
            engine._suspects = lambda: [other]  # type: ignore[method-assign]
            for number in range(6):
                engine.give("one", number)
                engine.go()
                engine.come()
            assert other.num_deaths > 0 == one.num_deaths
            with pytest.raises(EngineUnavailableError, match="it was told to"):
                await read(one)

    run(test())


def test_a_request_on_trial_is_tried_elsewhere_if_its_engine_is_drained(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second):
            move_all(second)
            stream = first.open(Add("a", (5, 6), PARAMS))
            first.go()
            first.come()
            assert stream.on_trial
            second.undrain()
            move_all(first)
            first.give("a", reason=FinishReason.MOVED)
            assert second.added == ["a"] and stream.on_trial
            first.go()
            first.come()
            for token in range(3):
                second.give("a", token)
            assert not stream.on_trial and not stream.is_over
            second.go()
            first.undrain()
            assert first.added == ["a", "a", "a"] and stream.on_trial

    run(test())


def test_a_request_whose_client_leaves_during_its_trial_is_not_cleared(model: AsyncEngine) -> None:
    async def test() -> None:
        engine = Quarantined(model, Quarantine())
        async with running(engine) as router:
            streams = [router.open(Add(name, (5, 6, n), PARAMS)) for n, name in enumerate("ab")]
            engine.go()
            engine.come()
            streams[0].close()
            assert engine.added == ["a", "b", "a"]
            engine.give("a", reason=FinishReason.ABORT)
            assert engine.added == ["a", "b", "a", "b"] and engine.absolved == []
            engine.give("b", 1, reason=FinishReason.STOP)
            assert engine.absolved == ["b"]

    run(test())


def test_each_request_waits_for_itself(model: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MAX_WAIT", 1000.0)

    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            first = router.open(Add("first", (5, 6), PARAMS))
            engine.go()
            timer = router._recovery._timer
            assert timer is not None
            first.close()
            assert timer.cancelled() and router._recovery._timer is None
            engine.come()
            streams = [router.open(Add(name, (5, 6), PARAMS)) for name in "ab"]
            engine.go()
            timer = router._recovery._timer
            assert timer is not None
            router._recovery._waiting["b"].until += 1.0
            router._recovery._end_late(timer.when())
            assert [stream.is_over for stream in streams] == [True, False]
        assert router._recovery._timer is None

    run(test())


def test_a_failure_of_what_lets_requests_go_on_ends_only_these(model: AsyncEngine, caplog: Any) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second) as router:
            lost, moved, other = (
                first.open(Add("lost", (5, 6), PARAMS)),
                *(second.open(Add(name, (5, 6), PARAMS)) for name in ("moved", "other")),
            )
            router._recovery._choose = lambda *_: 1 / 0  # type: ignore[assignment, return-value]
            first.go()
            with pytest.raises(EngineUnavailableError, match="it was told to; it cannot go on: ZeroDivisionError"):
                await read(lost)
            other.on_output = lambda _: 1 / 0
            second.give("other", 1)
            assert not other.is_over and second.state is EngineState.READY
            for name in "rescue", "on_moved", "on_available":
                monkey = lambda *_: 1 / 0  # noqa: E731
                setattr(second, name, monkey)
            move_all(second)
            second.give("moved", reason=FinishReason.MOVED)
            second.undrain()
            second.go()
            for stream in moved, other:
                with pytest.raises(EngineUnavailableError):
                    await read(stream)

    run(test())
    assert caplog.text.count("ZeroDivisionError") >= 5


def test_a_request_that_had_not_begun_goes_on_as_a_new_one(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second):
            for name in "ab":
                first.open(Add(name, (5, 6), PARAMS))
            first.give("a", 7)
            move_all(first)
            for name in "ab":
                first.give(name, reason=FinishReason.MOVED)
            points = {each.request_id: each.resume_point for each in second.sent if isinstance(each, Add)}
            assert points["a"] is not None and points["a"].token_ids == (7,) and points["b"] is None

    run(test())


def test_an_engine_whose_restart_fails_is_not_left_drained(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second) as router:
            with pytest.raises(NotImplementedError):
                await router.restart_engine(0)
            assert not first.is_drained

    run(test())


def test_undo_and_another_restart_are_refused_while_an_engine_is_restarted(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second) as router:
            is_back = asyncio.Event()

            async def restart() -> None:
                first.go()
                await is_back.wait()
                first.come()

            first.restart = restart  # type: ignore[method-assign]
            first.open(Add("a", (5, 6), PARAMS))
            restarting = asyncio.create_task(router.restart_engine(0))
            for moved in False, True:  # while requests leave it, and while it is away
                await asyncio.sleep(0)
                with pytest.raises(EngineUnavailableError, match="engine 0 is being restarted: it takes requests"):
                    router.undrain_engine(0)
                with pytest.raises(EngineUnavailableError, match="engine 0 is being restarted"):
                    await router.restart_engine(0)
                if not moved:
                    first.give("a", reason=FinishReason.MOVED)
            assert first.is_drained and second.added == ["a"]
            is_back.set()
            assert await restarting == 1 and not first.is_drained
            await router.drain_engine(0)
            router.undrain_engine(0)

    run(test())


def test_an_engine_that_a_signal_asks_to_end_is_drained_first(
    model: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router_module, "LEAVING_SECONDS", 0.0)
    caplog.set_level(logging.WARNING, "splitfuse")

    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second) as router:
            restarted = []

            async def restart() -> None:
                restarted.append(first.num_open)
                first.go()
                first.come()

            first.restart = restart  # type: ignore[method-assign]
            stream = first.open(Add("a", (5, 6), PARAMS))
            first._take(Leaving())
            await until(lambda: first.is_drained)
            first.give("a", 7)
            first.give("a", reason=FinishReason.MOVED)
            await until(lambda: restarted and not first.is_drained)
            assert restarted == [0] and stream.num_resumed == 1 and stream.num_deaths == 0
            assert second.added == ["a"] and router.num_resumed["drain"] == 1
            second.go()
            first._take(Leaving())  # no other is ready
            await until(lambda: "cannot be drained: no other engine is ready" in caplog.text)
            assert not first.is_drained and Stop() not in first.sent, "one of this machine goes on"
            second.come()
            second.go()
            first.address = "10.0.0.2:9000"
            first._take(Leaving())
            await until(lambda: Stop() in first.sent)
            first.address = ""
            second.come()
            router.end_soon()
            first._take(Leaving())
            await asyncio.gather(*router._leaving)
            assert len(restarted) == 1 and not first.is_drained, "the server ends, and its engines with it"

    run(test())


@pytest.mark.slow
def test_a_replica_that_is_terminated_is_drained_and_started_again() -> None:
    wanted = requests(16, max_tokens=400)

    async def test() -> None:
        router = make_replicas(CONFIG, replicas=2)
        await router.start()
        try:
            whole = await asyncio.gather(*(read(router.open(each)) for each in wanted))
            engine = router.replicas[0]
            assert isinstance(engine, SupervisedEngine) and engine.pid is not None
            pid = engine.pid
            async with closed_loop(router, wanted, whole):
                os.kill(pid, signal.SIGTERM)
                await until(lambda: engine.pid != pid and engine.state is EngineState.READY and not engine.is_drained)
            assert router.num_resumed["drain"] and not router.num_resumed["death"]
        finally:
            await router.close()

    run(test())


def test_no_engine_is_ready_if_those_which_are_ready_are_drained(model: AsyncEngine) -> None:
    async def test() -> None:
        first, second = Engines(model), Engines(model)
        async with running(first, second) as router:
            await router.drain_engine(0)
            assert router.state is EngineState.READY
            second.go()
            assert first.state is EngineState.READY and router.state is EngineState.DEAD
            router.undrain_engine(0)
            assert router.state is EngineState.READY

    run(test())


def test_an_adapter_that_only_requests_have_is_loaded_again(model: AsyncEngine) -> None:
    async def test() -> None:
        engine = Engines(model)
        async with running(engine) as router:
            for path, digest in ("/one", "first"), ("/two", "second"):  # the second takes the name of the first
                load = asyncio.create_task(router.load_adapter("a", path))
                await until(lambda path=path: LoadAdapter("a", path) in engine.sent)  # type: ignore[misc]
                engine._take(AdapterLoaded("a", digest))
                await load
                router.hold_adapter("first")
            stream = router.open(Add("r", (5, 6), PARAMS, adapter="first"))
            for found in "first", "changed since":
                engine.give("r", 7)
                engine.go()
                engine.sent.clear()
                engine.come()
                nameless = LoadAdapter(" first", "/one")
                assert engine.sent == [LoadAdapter("a", "/two"), nameless]
                engine._take(AdapterLoaded("a", "second"))
                assert not engine.added and router.adapters == {"a": "second"}
                engine._take(AdapterLoaded(nameless.name, found))
                assert engine.added == (["r"] if found == "first" else [])
                assert router.adapters == {"a": "second"} and not router.loading_adapters
            assert engine.sent[-1] == UnloadAdapter("changed since")
            with pytest.raises(EngineUnavailableError, match="its adapter is not loaded any more"):
                await read(stream)

    run(test())
