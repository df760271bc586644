"""Requests move to another engine with their KV blocks: what comes after is equal, and hardly anything is computed
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from patience import PATIENCE
from router_streams import held, read, resumed, running, until
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepScheduled
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.client import LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Add, Export, Finish, Prefetch, ResumePoint, Stop
from splitfuse.engine.moving import Mover
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.engine.tier_files import open_tiers
from splitfuse.runtime.loading import load_model

SETTINGS: dict[str, Any] = {"num_blocks": 400, "max_num_batched_tokens": 64, "num_threads": 1}
BLOCK = 32


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def make(engines: list[Engine], **settings: Any) -> tuple[Engine, Engine, Engine]:
    """Two engines of one model that share memory, for moves alone unless tiers are asked for, and one that shares
    none.
    """
    config = EngineConfig.from_settings({**SETTINGS, **settings})
    model = load_model(config)
    files, key = open_tiers(config.cache, for_moves=True)
    assert files is not None
    first, second = (Engine(config, model, name_key=key, tier_files=part) for part in files.split(2))
    engines += first, second
    return first, second, Engine(config, model)


def requests(count: int, *, max_tokens: int = 60, **params: Any) -> list[Add]:
    rng, made = Random(count), []
    for number in range(count):
        prompt = tuple(rng.randrange(5, 700) for _ in range(rng.randrange(1, 150)))
        temperature = 0.9 if number % 2 else 0.0
        each = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature, seed=number, **params)
        made.append(Add(str(number), prompt, each).settled)
    return made


def run(engine: Engine, wanted: Sequence[Add], *, until: int = 10**9) -> dict[str, list[int]]:
    """What each request is given, up to `until` tokens and a few more; then it moves."""
    for request in wanted:
        engine.add(request)
    given: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    left: set[str] = set()
    while engine.has_unfinished:
        outputs = engine.step(isolate=True)
        for output in outputs:
            assert output.error is None
            given[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.MOVED:
                left.add(output.request_id)
        for request_id, tokens in given.items():
            if len(tokens) >= until and request_id not in left:
                output_at_once = engine.finish(Finish(request_id, FinishReason.MOVED))
                if output_at_once is not None:
                    left.add(request_id)
        check_scheduler(engine.scheduler)
    assert engine.allocator.num_held == 0
    return given


def resumption(request: Add, tokens: list[int], engine: Engine) -> Add:
    assert engine.tiers is not None
    point = ResumePoint(tuple(tokens), (0.0,) * len(tokens))
    return msgspec.structs.replace(request, resume_point=point, block_sources=engine.tiers.block_sources)


FORMS: list[dict[str, Any]] = [
    {},
    {"kv_cache_dtype": "int8"},
    {"num_speculative_tokens": 5},
    {"kv_memory_tier": "64MiB"},
]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_nothing_is_computed_again_at_the_other_engine(settings: dict[str, Any], engines: list[Engine]) -> None:
    first, second, alone = make(engines, **settings)
    wanted = requests(4, max_tokens=40)
    whole = run(alone, wanted)
    begun = run(first, wanted, until=20)
    assert all(20 <= len(tokens) < 40 for tokens in begun.values())
    computed: dict[str, int] = {}
    second.events.subscribe(
        StepScheduled,
        lambda step: computed.update({chunk.request_id: chunk.start for chunk in step.plan.chunks} | computed),
    )
    rest = run(second, [resumption(request, begun[request.request_id], first) for request in wanted])
    for request in wanted:
        name = request.request_id
        assert begun[name] + rest[name] == whole[name]
        num_known = len(request.prompt_token_ids) + len(begun[name])
        assert computed[name] == num_known - 1, "it begins with its newest token"


@pytest.mark.parametrize(("params", "num_saved"), [({}, 16), ({"prompt_logprobs": 1}, 0)], ids=str)
def test_what_leaves_unprepared_copies_no_more_than_others_can_have(
    params: dict[str, Any], num_saved: int, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfuse.engine.tiers.MOVES_BYTES", 2**21)
    first, second, alone = make(engines)
    assert first.tiers is not None and second.tiers is not None and first.tiers.num_export_slots == 16
    (request,) = requests(1, max_tokens=40, **params)
    request = msgspec.structs.replace(request, prompt_token_ids=tuple(Random(1).randrange(5, 700) for _ in range(800)))
    whole = run(alone, [request])["0"]
    tokens = run(first, [request], until=20)["0"]
    assert first.tiers.stats.num_saved == num_saved
    point = ResumePoint(tuple(tokens), (0.0,) * len(tokens), 799 if params else 0)
    moved = msgspec.structs.replace(resumption(request, tokens, first), resume_point=point)
    assert tokens + run(second, [moved])["0"] == whole
    assert second.tiers.stats.num_fetched == num_saved, "the leading ones"


def test_a_form_goes_on_with_its_blocks(engines: list[Engine]) -> None:
    first, second, alone = make(engines)
    with splitfuse.pipeline(**SETTINGS) as pipe:
        form = {"structured_outputs": {"regex": "[a-z ]{50,80}"}}
        prepared = [next(iter(pipe.prepare(text, **form))) for text in ("Once upon", "One day")]
    wanted = [Add(str(n), each.token_ids, each.params).settled for n, each in enumerate(prepared)]
    whole = run(alone, wanted)
    begun = run(first, wanted, until=10)
    rest = run(second, [resumption(request, begun[request.request_id], first) for request in wanted])
    assert {name: begun[name] + rest[name] for name in begun} == whole


def test_blocks_are_fetched_ahead_while_the_old_engine_goes_on(engines: list[Engine]) -> None:
    first, second, alone = make(engines)
    (request,) = requests(1, max_tokens=120)
    prompt = tuple(Random(1).randrange(5, 700) for _ in range(300))
    request = msgspec.structs.replace(request, prompt_token_ids=prompt)
    whole = run(alone, [request])["0"]
    first.add(request)
    tokens: list[int] = []
    while len(tokens) < 30:
        tokens += [token for output in first.step(isolate=True) for token in output.token_ids]
    num_exported = 0
    while num_exported < 10:  # a few at a time
        first.export(Export("0", 99))
        exported: dict[str, int] = {}
        while not exported:
            tokens += [token for output in first.step(isolate=True) for token in output.token_ids]
            exported = first.take_exported()
        assert exported["0"] >= num_exported
        num_exported = exported["0"]
    assert len(tokens) < 60
    names: list[bytes] = []
    known = (*prompt, *tokens)
    first.allocator.name_blocks(known, names, num_exported, salt=request.cache_salt)
    blocks = tuple(known[start : start + BLOCK] for start in range(0, BLOCK * len(names), BLOCK))
    assert first.tiers is not None and second.tiers is not None
    assert second.prefetch(Prefetch("0", tuple(names), blocks, first.tiers.block_sources))
    come: list[tuple[str, int]] = []
    while not come:
        second.step(isolate=True)
        check_scheduler(second.scheduler)
        come = second.take_prefetched()
    assert come == [("0", len(names))] and second.allocator.num_cached == len(names)
    assert second.tiers.stats.num_fetched == len(names)
    assert not second.has_unfinished
    assert first.finish(Finish("0", FinishReason.MOVED)) is None or not first.has_unfinished
    while first.has_unfinished:
        tokens += [token for output in first.step(isolate=True) for token in output.token_ids]
    rest = run(second, [resumption(request, tokens, first)])["0"]
    assert tokens + rest == whole
    assert second.tiers.stats.num_fetched <= len(names) + 3, "the newest alone came at the end"


def test_a_step_saves_a_few_blocks_of_all_that_move(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfuse.engine.block_transfers.MOVING_SHARE", 0.0)
    first, *_ = make(engines)
    wanted = [
        msgspec.structs.replace(each, prompt_token_ids=tuple(Random(n).randrange(5, 700) for _ in range(300)))
        for n, each in enumerate(requests(3, max_tokens=60))
    ]
    for request in wanted:
        first.add(request)
    while first.scheduler.queue.waiting or any(not r.output_token_ids for r in first.scheduler.queue.running):
        first.step(isolate=True)
    saved: list[int] = []
    first.events.subscribe(StepScheduled, lambda step: saved.append(len(step.plan.saves)))
    for request in wanted:
        first.export(Export(request.request_id, 9))
    exported: dict[str, int] = {}
    while exported != dict.fromkeys("012", 9):
        assert first.has_unfinished
        first.step(isolate=True)
        assert first.tiers is not None and first.tiers.wait_until_written(PATIENCE)  # before a request ends
        exported |= first.take_exported()
    assert max(saved) == 4 and sum(saved) == 27


def test_what_has_moved_is_in_the_next_step(engines: list[Engine]) -> None:
    """Others wait until its newest blocks are read, since it would wait for the whole step."""
    first, second, _ = make(engines)
    other, request = requests(2)
    tokens = run(first, [request], until=20)[request.request_id]
    second.add(msgspec.structs.replace(other, request_id="other"))
    second.step(isolate=True)
    second._step_seconds = PATIENCE
    plans: list[list[str]] = []
    second.events.subscribe(StepScheduled, lambda step: plans.append(step.plan.request_ids))
    assert second.tiers is not None
    second.add(resumption(request, tokens, first))
    while not any(request.request_id in ids for ids in plans):
        second._step_seconds = PATIENCE
        second.step(isolate=True)
        assert not second.tiers.is_asked
    assert len(plans) == 1


def test_what_leaves_between_two_steps_is_reported_at_once(engines: list[Engine]) -> None:
    first, *_ = make(engines)
    first.executor.keeps_plans = False
    reports: list[tuple[int, list[tuple[str, FinishReason | None]]]] = []

    def report(said: Any) -> None:
        outputs = [(output.request_id, output.finish_reason) for output in said.outputs]
        reports.append((said.stats.num_steps, outputs))
        if len(reports) == 1:
            loop.commands.put(Finish("0", FinishReason.MOVED))
        if len(reports) == 3:
            loop.commands.put(Stop())

    loop = EngineLoop(first, report)
    for request in requests(2):
        loop.commands.put(request)
    loop.run()
    (steps, _), (steps_then, left), (steps_later, others) = reports
    assert left == [("0", FinishReason.MOVED)] and steps_then == steps
    assert others == [("1", None)] and steps_later == steps + 1


@pytest.mark.parametrize("is_narrow", [False, True], ids=["roomy", "narrow"])
def test_a_drain_computes_at_most_a_block_of_each_again(is_narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In narrow memory, blocks go through windows of a few; to a full engine, requests go two by two."""
    if is_narrow:
        monkeypatch.setattr("splitfuse.engine.tiers.MOVES_BYTES", 2**21)
        monkeypatch.setattr("splitfuse.engine.router._fits", lambda _: False)
    # on a busy machine blocks come late, and are computed again then
    for bound in ("engine.moving.STAGE_SECONDS", "core.kv.fetching.LONGEST_FETCH", "core.kv.prefetching.LONGEST_FETCH"):
        monkeypatch.setattr(f"splitfuse.{bound}", PATIENCE)
    monkeypatch.setattr("splitfuse.engine.moving.AHEAD_SECONDS", PATIENCE)
    events: list[tuple[str, Stream]] = []
    bring, hand_over = Mover._bring, Mover._hand_over

    async def note_brought(self: Mover, source: LocalClient, stream: Stream, **how: bool) -> None:
        await bring(self, source, stream, **how)
        events.append(("brought", stream))

    async def note_leaving(self: Mover, source: LocalClient, stream: Stream) -> None:
        events.append(("leaves", stream))
        await hand_over(self, source, stream)

    monkeypatch.setattr(Mover, "_bring", note_brought)
    monkeypatch.setattr(Mover, "_hand_over", note_leaving)
    wanted = [
        msgspec.structs.replace(each, prompt_token_ids=each.prompt_token_ids * 3)
        for each in requests(8, max_tokens=200)
    ]

    async def test() -> None:
        config = EngineConfig.from_settings(SETTINGS)
        model = load_model(config)
        files, _ = open_tiers(config.cache, for_moves=True)
        assert files is not None
        made = [Engine(config, model, name_key=b"k", tier_files=part) for part in files.split(2)]
        first, second = map(AsyncEngine, made)
        async with running(first, second, name_key=b"k") as router:

            def open_at_first(name: str) -> list[Stream]:
                salted = SchedulingOptions(cache_salt=name)  # no engine has anything of it
                second.is_drained = True
                streams = [router.open(msgspec.structs.replace(each, scheduling=salted)) for each in wanted]
                second.is_drained = False
                return streams

            def num_computed() -> int:
                return sum(stats.num_computed_tokens for stats in router.stats)

            whole = await asyncio.gather(*map(read, open_at_first("alone")))
            alone = num_computed()
            for number in count():
                before, streams = num_computed(), open_at_first(f"{number}")
                reading = [asyncio.create_task(read(stream)) for stream in streams]
                await until(lambda streams=streams: min(stream.num_tokens for stream in streams) > 20)  # type: ignore[misc]
                events.clear()
                assert await router.drain_engine(0) >= len(resumed(streams))
                first_leaves = [what for what, _ in events].index("leaves")
                assert len({stream for _, stream in events[:first_leaves]}) == (2 if is_narrow else 8), "come before"
                assert await asyncio.gather(*reading) == whole
                assert num_computed() - before - alone <= 8 * BLOCK
                assert all(stream.num_resumed <= 1 for stream in streams)
                if len(resumed(streams)) > 1:
                    break
                router.undrain_engine(0)  # they had ended before they could move

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


@pytest.mark.parametrize("is_kept", [True, False], ids=["is fetched again", "goes along"])
def test_what_the_other_engine_forgets_is_not_computed_again(is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request takes the places of the blocks that were brought. They still lie ready, or do not any more."""
    for bound in ("engine.moving.STAGE_SECONDS", "core.kv.fetching.LONGEST_FETCH", "core.kv.prefetching.LONGEST_FETCH"):
        monkeypatch.setattr(f"splitfuse.{bound}", PATIENCE)
    monkeypatch.setattr("splitfuse.engine.moving.AHEAD_SECONDS", PATIENCE)
    prompts = [tuple(Random(n).randrange(5, 700) for _ in range(length)) for n, length in enumerate((300, 1100))]
    wanted, large = (
        msgspec.structs.replace(request, prompt_token_ids=prompt)
        for request, prompt in zip(requests(2, max_tokens=600), prompts, strict=True)
    )
    bring, count_again = Mover._bring, Mover._count_again

    async def test() -> None:
        config = EngineConfig.from_settings({**SETTINGS, "num_blocks": 36})
        model = load_model(config)
        files, _ = open_tiers(config.cache, for_moves=True)
        assert files is not None
        made = [Engine(config, model, name_key=b"k", tier_files=part) for part in files.split(2)]
        first, second = map(AsyncEngine, made)
        async with running(first, second, name_key=b"k") as router:
            num_there: list[int] = []  # before and after it is asked
            num_fetched: list[int] = []

            async def bring_and_forget(self: Mover, source: LocalClient, stream: Stream, *, once: bool = False) -> None:
                await bring(self, source, stream, once=once)
                if not once:
                    salted = SchedulingOptions(cache_salt=stream.request.scheduling.cache_salt)
                    params = SamplingParams(max_tokens=1)
                    other = msgspec.structs.replace(large, request_id="large", params=params, scheduling=salted)
                    await read(second.open(other))

            def note() -> None:
                num_there.append(max((coming.num_there for coming in router._mover._coming.values()), default=0))
                assert made[1].tiers is not None
                num_fetched.append(made[1].tiers.stats.num_fetched)

            async def note_counts(self: Mover, source: LocalClient, stream: Stream) -> None:
                assert made[0].tiers is not None
                (tier,) = made[0].tiers._tiers
                for name in () if is_kept else list(tier.file._index):
                    tier.file.drop(name)
                note()
                await count_again(self, source, stream)
                note()

            monkeypatch.setattr(Mover, "_bring", bring_and_forget)
            monkeypatch.setattr(Mover, "_count_again", note_counts)

            def open_at_first(name: str) -> Stream:
                second.is_drained = True
                stream = router.open(msgspec.structs.replace(wanted, scheduling=SchedulingOptions(cache_salt=name)))
                second.is_drained = False
                return stream

            whole = await read(open_at_first("alone"))
            alone = sum(stats.num_computed_tokens for stats in router.stats)
            for number in count():
                before = sum(stats.num_computed_tokens for stats in router.stats)
                stream = open_at_first(f"{number}")
                reading = asyncio.create_task(read(stream))
                await until(lambda stream=stream: stream.num_tokens > 20)  # type: ignore[misc]
                num_there.clear()
                num_fetched.clear()
                await router.drain_engine(0)
                assert await reading == whole
                if stream.num_resumed:
                    break
                router.undrain_engine(0)  # it had ended before it could move
            if is_kept:
                assert num_there[0] == num_there[1] > 0 and num_fetched[1] > num_fetched[0], "some were forgotten"
            else:
                assert num_there[0] > num_there[1] and num_fetched[1] == num_fetched[0]
            computed = sum(stats.num_computed_tokens for stats in router.stats) - before - len(large.prompt_token_ids)
            assert computed - alone <= BLOCK

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


@pytest.mark.parametrize("is_undrained", [False, True])
def test_those_whose_blocks_are_there_leave_before_others(is_undrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of two that follow do not come. Then the engine is not drained any more, or they come late."""
    monkeypatch.setattr("splitfuse.engine.moving.AHEAD_SECONDS", 0.0)

    class Named:
        """Is a stream by its number, which an engine has."""

        def __init__(self, number: int) -> None:
            self.number = number

    events: list[tuple[str, int]] = []
    source: Any = SimpleNamespace(is_drained=True, has=lambda _: True)
    streams: list[Any] = [Named(number) for number in range(6)]

    async def test() -> None:
        come = asyncio.Event()

        async def bring(_: Mover, __: LocalClient, stream: Any, **___: bool) -> None:
            if stream.number in (2, 3):
                await come.wait()
            events.append(("is brought", stream.number))

        async def hand_over(_: Mover, __: LocalClient, stream: Any) -> None:
            events.append(("leaves", stream.number))

        monkeypatch.setattr(Mover, "_bring", bring)
        monkeypatch.setattr(Mover, "_hand_over", hand_over)
        mover = Mover(lambda *_: None, lambda _: [], can_leave=lambda *_: True, fits=lambda _: True)
        draining = asyncio.create_task(mover.drain(source, streams))
        await until(lambda: {("leaves", 0), ("leaves", 1)} <= {*events})
        source.is_drained = not is_undrained
        events.clear()
        come.set()
        assert await draining == streams[: 2 if is_undrained else 6]
        named = {number for _, number in events}
        assert named == ({2, 3} if is_undrained else {2, 3, 4, 5}), "no blocks are brought for those that stay"

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_an_engine_that_has_restarted_has_nothing_of_what_it_was_brought() -> None:
    forgotten: list[str] = []
    receiver: Any = SimpleNamespace(view=SimpleNamespace(forget=forgotten.append), can_go_on_with=lambda _: True)
    source: Any = SimpleNamespace(has=lambda _: True)

    class Named:
        """Is a stream with an id."""

        request, breakdown = SimpleNamespace(request_id="a"), Future[None]()

    stream: Any = Named()
    mover = Mover(lambda *_: receiver, lambda _: [], can_leave=lambda *_: True, fits=lambda _: True)
    coming = mover._find_receiver(source, stream)
    assert coming is not None
    coming.num_there = 7
    assert mover._find_receiver(source, stream) is coming and not forgotten
    receiver.view = SimpleNamespace(forget=forgotten.append)
    again = mover._find_receiver(source, stream)
    assert again is not None and again.num_there == 0 and mover.take_receiver(stream) is receiver


def test_requests_that_leave_together_are_counted_where_each_will_be() -> None:
    async def test() -> None:
        config = EngineConfig.from_settings(SETTINGS)
        model = load_model(config)
        first, second, third = (AsyncEngine(Engine(config, model, name_key=b"k")) for _ in range(3))
        async with running(first, second, third, name_key=b"k") as router:
            second.is_drained = third.is_drained = True
            streams = [router.open(request) for request in requests(2, max_tokens=200)]
            second.is_drained = third.is_drained = False
            chosen = [router._chooser.choose_receiver(stream, first) for stream in streams]
            assert {*chosen} == {second, third}, "the second goes where the first does not"
            for stream in streams:
                stream.close()

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_what_no_other_engine_can_hold_ends_where_it_is() -> None:
    """Another request goes on elsewhere, though its blocks cannot be brought."""
    short, other = requests(2, max_tokens=200)
    large = msgspec.structs.replace(other, prompt_token_ids=tuple(Random(2).randrange(5, 700) for _ in range(900)))

    async def test(monkeypatch: pytest.MonkeyPatch) -> None:
        engines = [Engine.load(EngineConfig.from_settings(SETTINGS | {"num_blocks": size})) for size in (400, 33)]
        first, second = map(AsyncEngine, engines)
        async with running(first, second, name_key=b"k") as router:
            monkeypatch.setattr(router._mover, "_choose", lambda *_: 1 / 0)
            second.is_drained = True
            with held(engines[0], large, 5) as go_on:
                streams = [router.open(request) for request in (short, large)]
                await first.wait_until(lambda: all(stream.num_tokens for stream in streams))
                second.is_drained = False
                draining = asyncio.create_task(router.drain_engine(0))
                await until(lambda: first.is_drained)
                go_on.set()
                answers = await asyncio.gather(*map(read, streams))
            assert [len(answer) for answer in answers] == [200, 200]
            assert [stream.num_resumed for stream in streams] == [1, 0] and await draining == 1

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(asyncio.wait_for(test(monkeypatch), PATIENCE))


def test_restart_that_is_given_up_leaves_the_engine_open() -> None:
    (request,) = requests(1, max_tokens=200)

    async def test() -> None:
        first, second = (AsyncEngine(Engine.load(EngineConfig.from_settings(SETTINGS))) for _ in range(2))
        async with running(first, second, name_key=b"k") as router:
            second.is_drained = True
            stream = router.open(request)
            second.is_drained = False
            restarting = asyncio.create_task(router.restart_engine(0))
            await asyncio.sleep(0)
            assert first.is_drained
            restarting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await restarting
            assert not first.is_drained and len(await read(stream)) == 200

    asyncio.run(asyncio.wait_for(test(), PATIENCE))
