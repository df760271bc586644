"""An engine for prompts hands requests over after their first token, with their KV blocks; the text is the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
from patience import PATIENCE
from router_streams import read
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.config.values import EngineRole, parse_roles
from splitfuse.core.events import StepScheduled
from splitfuse.core.limits import ceil_div
from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.router import Router
from splitfuse.engine.thread import AsyncEngine
from splitfuse.engine.tier_files import open_tiers
from splitfuse.errors import ConfigError, InvalidRequestError
from splitfuse.runtime.loading import load_model

CHUNK, BLOCK = 64, 32
SETTINGS: dict[str, Any] = {"num_blocks": 300, "max_num_batched_tokens": CHUNK, "num_threads": 1}
SPLIT = (EngineRole.PROMPT, EngineRole.GENERATION)


@asynccontextmanager
async def running(roles: Sequence[EngineRole] = SPLIT, **settings: Any) -> AsyncIterator[Router]:
    config = EngineConfig.from_settings({**SETTINGS, **settings})
    model = load_model(config)
    files, key = open_tiers(config.cache, for_moves=True)
    assert files is not None
    made = [Engine(config, model, name_key=key, tier_files=part) for part in files.split(len(roles))]
    router = Router([AsyncEngine(engine) for engine in made], name_key=key, roles=roles)
    await router.start()
    try:
        yield router
        for engine in made:
            while engine.has_unfinished:
                await asyncio.sleep(0.001)
            check_scheduler(engine.scheduler)
            assert engine.allocator.num_held == 0
        for each in router.replicas:
            await each.wait_until(lambda each=each: not (each.num_open or each._ending))
        await asyncio.sleep(0)  # what is called at the end of a stream
        assert not _known(router), "the front counts requests that are gone"
        assert not any(each._exported or each._prefetched for each in router.replicas), "answers to ended requests"
    finally:
        await router.close()


def _known(router: Router) -> set[str]:
    """Return the ids of the requests that the front counts at its engines."""
    views = [each.view for each in router.replicas if each.view is not None]
    return {name for view in views for name in (*view._prefills, *view._decodes)}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def requests(count: int, *, max_tokens: int = 30, **params: Any) -> list[Add]:
    rng, made = Random(count), []
    for number in range(count):
        prompt = tuple(rng.randrange(5, 700) for _ in range(rng.randrange(1, 200)))
        temperature = 0.9 if number % 2 else 0.0
        each = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number, **params)
        made.append(Add(str(number), prompt, each).settled)
    return made


async def alone(wanted: Sequence[Add], **settings: Any) -> list[list[int]]:
    engine = AsyncEngine(Engine.load(EngineConfig.from_settings({**SETTINGS, **settings})))
    await engine.start()
    answers = await asyncio.gather(*(read(engine.open(request)) for request in wanted))
    await engine.close()
    return answers


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int8", "num_speculative_tokens": 5}], ids=str)
def test_a_request_gets_the_same_from_two_engines(settings: dict[str, Any]) -> None:
    wanted = requests(12, ignore_eos=True)

    async def test() -> None:
        whole = await alone(wanted, **settings)
        async with running(**settings) as router:
            streams = [router.open(request) for request in wanted]
            assert await asyncio.gather(*map(read, streams)) == whole
            assert router.num_resumed["hand_over"] == len(wanted)
            first, second = router.stats
            num_prompts = sum(len(request.prompt_token_ids) for request in wanted)
            assert first.num_computed_tokens == num_prompts and first.num_generated_tokens == len(wanted)
            assert second.num_computed_tokens - second.num_draft_tokens <= sum(map(len, whole)), "no prompt is computed"

    run(test)


def test_blocks_go_ahead_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all chunks but the last three come while the prompt is computed, however long it is: its last chunk
    waits for them here.
    """
    for bound in ("engine.moving.STAGE_SECONDS", "core.kv.prefetching.LONGEST_FETCH"):
        monkeypatch.setattr(f"splitfuse.{bound}", PATIENCE)
    come: dict[str, int] = {}
    has_come, num_awaited = threading.Event(), 0
    prefetch = AsyncEngine.prefetch

    async def counted(engine: AsyncEngine, request_id: str, *how: Any) -> int:
        count = await prefetch(engine, request_id, *how)
        come[request_id] = come.get(request_id, 0) + count
        if come[request_id] >= num_awaited:
            has_come.set()
        return count

    monkeypatch.setattr(AsyncEngine, "prefetch", counted)
    (request,) = requests(1, max_tokens=5)

    async def test() -> None:
        nonlocal num_awaited
        async with running() as router:
            first = router.replicas[0]
            assert isinstance(first, AsyncEngine) and first._engine.tiers is not None
            tiers = first._engine.tiers

            def hold(step: StepScheduled) -> None:
                tiers.wait_until_written(PATIENCE)  # what is written is reported with the step that runs now
                if any(chunk.end == len(each.prompt_token_ids) for chunk in step.plan.chunks):
                    has_come.wait(PATIENCE)

            first._engine.events.subscribe(StepScheduled, hold)
            for length in (400, 800):
                prompt = tuple(Random(length).randrange(5, 700) for _ in range(length))
                each = msgspec.structs.replace(request, request_id=f"{length}", prompt_token_ids=prompt)
                num_awaited = CHUNK // BLOCK * (ceil_div(length, CHUNK) - 3)
                has_come.clear()
                await read(router.open(each))
                assert come[f"{length}"] >= num_awaited

    run(test)


def test_a_form_is_kept_over_the_hand_over() -> None:
    with splitfuse.pipeline(**SETTINGS) as pipe:
        (prepared,) = pipe.prepare("Once upon", structured_outputs={"regex": "[a-z ]{50,80}"})
    request = Add("a", prepared.token_ids, prepared.params).settled

    async def test() -> None:
        whole = await alone([request])
        async with running() as router:
            assert [await read(router.open(request))] == whole
            assert router.num_resumed["hand_over"] == 1

    run(test)


def test_what_ends_with_its_prompt_stays() -> None:
    (request,) = requests(1)

    async def test() -> None:
        async with running() as router:
            one = msgspec.structs.replace(request, params=SamplingParams(max_tokens=1))
            assert len(await read(router.open(one))) == 1
            numbers = msgspec.structs.replace(request, params=NOTHING_GENERATED, pooling=PoolingParams())
            async with router.open(numbers) as stream:
                assert [output.values async for output in stream][-1]
            assert router.num_resumed["hand_over"] == 0 and router.stats[1].num_steps == 0

    run(test)


def test_what_does_not_come_to_be_handed_over_is_expected_no_more() -> None:
    """`running` looks whether anything is left."""
    (request,) = requests(1)
    long = msgspec.structs.replace(request, prompt_token_ids=tuple(Random(1).randrange(5, 700) for _ in range(900)))

    async def test() -> None:
        async with running() as router:
            for number in range(3):
                router.open(msgspec.structs.replace(long, request_id=f"cancelled{number}")).close()
            async with router.open(long):
                with pytest.raises(InvalidRequestError, match="still running"):
                    router.open(request)
            first = SamplingParams(max_tokens=30, stop_token_ids=tuple(range(700)))
            assert len(await read(router.open(msgspec.structs.replace(request, params=first)))) == 1
            assert router.num_resumed["hand_over"] == 0

    run(test)


def test_an_engine_is_drained_while_it_computes_prompts() -> None:
    """They go on at the other one, or end on the way; `running` looks whether anything is left."""
    (request,) = requests(1, ignore_eos=True)
    long = msgspec.structs.replace(request, prompt_token_ids=tuple(Random(1).randrange(5, 700) for _ in range(900)))

    async def test() -> None:
        async with running((EngineRole.PROMPT, EngineRole.GENERATION, EngineRole.GENERATION)) as router:
            streams = [router.open(msgspec.structs.replace(long, request_id=f"{number}")) for number in range(6)]
            draining = asyncio.create_task(router.drain_engine(0))
            await asyncio.sleep(0)
            for stream in streams[::2]:
                stream.close()
            assert all(len(answer) == 30 for answer in await asyncio.gather(*map(read, streams[1::2])))
            await draining

    run(test)


def test_an_engine_without_room_is_passed_over() -> None:
    """The second engine has one sequence slot: others are generated where their prompt was computed."""
    wanted = requests(6, max_tokens=60, ignore_eos=True)

    async def test() -> None:
        whole = await alone(wanted)
        async with running() as router:
            view = router.replicas[1].view
            assert view is not None
            view._max_num_seqs = 1
            assert await asyncio.gather(*(read(router.open(request)) for request in wanted)) == whole
            assert router.stats[0].num_generated_tokens > len(wanted), "the engine for prompts has generated"
            assert router.stats[1].num_generated_tokens > 0

    run(test)


def test_without_the_other_role_an_engine_does_all() -> None:
    wanted = requests(4, ignore_eos=True)

    async def test() -> None:
        whole = await alone(wanted)
        async with running() as router:
            for index in range(2):
                await router.drain_engine(index)
                assert await asyncio.gather(*(read(router.open(request)) for request in wanted)) == whole
                router.undrain_engine(index)
            assert router.num_resumed["hand_over"] == 0

    run(test)


def test_mixed_engines_take_both_parts() -> None:
    wanted = requests(8, ignore_eos=True)

    async def test() -> None:
        whole = await alone(wanted)
        async with running((EngineRole.PROMPT, EngineRole.MIXED)) as router:
            assert await asyncio.gather(*(read(router.open(request)) for request in wanted)) == whole
            assert 0 < router.num_resumed["hand_over"] < len(wanted)

    run(test)


@pytest.mark.parametrize(
    ("roles", "num_engines", "message"),
    [
        ("prompts:1,generation:1", 2, "not 'prompts:1'"),
        ("prompt:1,generation", 2, "not 'generation'"),
        ("prompt:0,mixed:2", 2, "not 'prompt:0'"),
        ("prompt:1,generation:1", 3, "are of 2 engines, and there are 3"),
        ("prompt:2", 2, "leave out generation engines"),
        ("generation:2", 2, "leave out prompt engines"),
    ],
)
def test_roles_that_cannot_be_are_refused(roles: str, num_engines: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_roles(roles, num_engines)
    with pytest.raises(ConfigError, match=message):
        ServerConfig(replicas=num_engines, roles=roles)


def test_roles_need_blocks_that_move() -> None:
    async def test() -> None:
        with pytest.raises(AssertionError):
            async with running(enable_prefix_caching=False):
                pass
        engines = [AsyncEngine(Engine.load(EngineConfig.from_settings(SETTINGS))) for _ in SPLIT]
        router = Router(engines, roles=SPLIT)
        with pytest.raises(ConfigError, match="roles need KV blocks that move"):
            await router.start()
        await router.close()

    run(test)
