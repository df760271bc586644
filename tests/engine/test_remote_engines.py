"""Engines that run by themselves, used over sockets: the same tokens, whatever happens to them, to their servers and to
the connection.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from engine_process import EngineProcess, engine_process, make_key
from patience import PATIENCE
from router_streams import closed_loop, read, requests, resumed, run, running, until

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv import fetching, prefetching
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine import moving
from splitfuse.engine.client import EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.quarantine import Quarantine
from splitfuse.engine.remote import dial, peers, supervisor
from splitfuse.engine.remote.connector import Agreement, ConnectLauncher
from splitfuse.engine.remote.launcher import BlockListen
from splitfuse.engine.remote.listener import Listener, let_blocks_be_fetched
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.engine.tier_files import open_tiers
from splitfuse.errors import ConfigError, EngineUnavailableError
from splitfuse.runtime.loading import load_model
from splitfuse.runtime.secret import read_secret

SETTINGS = {"num_blocks": 600, "num_threads": 1}
FLAGS = ("--num-blocks=600",)
CONFIG = EngineConfig.from_settings(SETTINGS)
LONG = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engines")
    make_key(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineProcess]:
    """An engine that the tests leave as it was."""
    with engine_process(folder / "first", "--key-file", str(folder / "key"), *FLAGS) as made:
        yield made


def elsewhere(
    engine: EngineProcess, folder: Path, *, agreement: Agreement | None = None, **more: Any
) -> SupervisedEngine:
    key = read_secret(str(folder / "key")).link_key
    agreement = agreement or Agreement(CONFIG, has_local=True)
    return SupervisedEngine(ConnectLauncher(engine.address, key, agreement), **more)


@pytest.fixture(scope="module")
def whole() -> list[list[int]]:
    """What an engine of this process gives for `requests(8, max_tokens=120)`."""

    async def test() -> list[list[int]]:
        async with running(AsyncEngine(Engine.load(CONFIG))) as router:
            return await asyncio.gather(*(read(router.open(each)) for each in requests(8, max_tokens=120)))

    return asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_an_engine_serves_one_server_after_the_other(
    engine: EngineProcess, folder: Path, whole: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "splitfuse")
    wanted = requests(8, max_tokens=120)

    async def first() -> None:
        client = make_replicas(CONFIG, replicas=0, engines=[engine.address], key_file=str(folder / "key"))
        await client.start()
        try:
            assert await asyncio.gather(*(read(client.open(each)) for each in wanted)) == whole
            other = elsewhere(engine, folder)
            with pytest.raises(EngineUnavailableError, match=r"cannot be used: the server at .* has it"):
                await Router([other]).start()
            await other.close()
            left = [client.open(Add(f"left {each.request_id}", each.prompt_token_ids, LONG)) for each in wanted]
            await until(lambda: any(each.num_tokens for each in left))
        finally:
            await client.close()  # with requests that run

    async def second() -> None:
        async with running(elsewhere(engine, folder)) as router:
            assert router.stats[0].num_steps == 0  # counters begin anew
            stream = router.open(wanted[1])
            assert await read(stream) == whole[1]
            assert router.stats[0].num_running == 0  # what the first has left is gone
            assert router.stats[0].num_available_blocks == SETTINGS["num_blocks"]
            breakdown = await stream.breakdown
            assert sum(breakdown.phases.values()) == pytest.approx(breakdown.closed - breakdown.opened)

    run(first())
    run(second())
    assert "the server at 127.0.0.1:" in engine.said and "has left" in engine.said


def test_an_engine_elsewhere_that_is_stopped_loses_its_streams_which_no_request_is_blamed_for(
    engine: EngineProcess, folder: Path, whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(8, max_tokens=120)

    async def test() -> None:
        quarantine = Quarantine()
        remote = elsewhere(engine, folder, silence_timeout=PATIENCE, quarantine=quarantine)
        local = AsyncEngine(Engine.load(CONFIG))
        async with running(local, remote) as router:
            with monkeypatch.context() as patched:
                async with closed_loop(router, wanted, whole) as streams:
                    engine.send(signal.SIGSTOP)
                    try:
                        await until(lambda: remote.silent)
                        remote._silence_timeout = 0.0
                        patched.setattr(dial, "HANDSHAKE_SECONDS", 0.1)  # it says nothing to the next one either
                        await until(lambda: remote.state is not EngineState.READY)
                        remote._silence_timeout = PATIENCE
                    finally:
                        engine.send(signal.SIGCONT)
            moved = resumed(streams)
            assert moved and all((each.num_deaths, each.num_lost) == (0, 1) for each in moved)
            await until(lambda: remote.state is EngineState.READY)
            again = msgspec.structs.replace(wanted[3], request_id="again")
            assert await read(remote.open(again)) == whole[3]

    run(test())


def test_a_server_starts_without_an_engine_that_cannot_be_reached(
    engine: EngineProcess, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        key = str(folder / "key")
        client = make_replicas(CONFIG, replicas=0, engines=["127.0.0.1:1", engine.address], key_file=key)
        await client.start()
        assert [each.state is EngineState.READY for each in client.replicas] == [False, True]
        await client.close()
        client = make_replicas(CONFIG, replicas=0, engines=["127.0.0.1:1"], key_file=key)
        with pytest.raises(
            EngineUnavailableError, match=r"the engine 127.0.0.1:1 cannot be used: nothing listens there"
        ):
            await client.start()
        await client.close()
        other = make_key(folder / "first", "another secret of many characters")
        client = make_replicas(CONFIG, replicas=0, engines=["127.0.0.1:1", engine.address], key_file=other)
        with pytest.raises(ConfigError, match=r"the engine .* cannot be used: it has another key"):
            await client.start()
        await client.close()
        client = make_replicas(
            EngineConfig.from_settings({"quantization": "int8"}), replicas=0, engines=[engine.address], key_file=key
        )
        with pytest.raises(ConfigError, match=r"it was started with no quantization, and this server with"):
            await client.start()
        await client.close()

    run(test())
    assert "nothing listens there: start it with splitfuse engine; it is used as soon as it can be" in caplog.text
    assert "is refused: it has another key" in engine.said


def test_a_drain_brings_kv_blocks_from_an_engine_elsewhere(
    engine: EngineProcess, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((fetching, "LONGEST_FETCH"), (moving, "STAGE_SECONDS"), (peers, "LEAST_SECONDS")):
        monkeypatch.setattr(module, name, PATIENCE)  # on a busy machine all of it takes longer
    monkeypatch.setattr(prefetching, "LONGEST_FETCH", PATIENCE)
    secret = read_secret(str(folder / "key"))
    rng = Random(7)
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    wanted = [Add(f"{number}", tuple(rng.randrange(5, 700) for _ in range(400)), params) for number in range(3)]

    async def test() -> None:
        files, _ = open_tiers(CONFIG.cache, for_moves=True)
        made = Engine(CONFIG, load_model(CONFIG), name_key=secret.name_key, tier_files=files)
        made.use_peers(secret.link_key)
        remote, local = elsewhere(engine, folder), AsyncEngine(made)
        router = Router([local, remote], name_key=secret.name_key)
        await router.start()
        try:
            whole = [await read(remote.open(msgspec.structs.replace(each, request_id="whole"))) for each in wanted]
            moved: list[Stream] = []
            while not moved:  # each had ended before it could move
                router.undrain_engine(1)
                streams = [remote.open(each) for each in wanted]
                reading = [asyncio.create_task(read(each)) for each in streams]
                await until(lambda streams=streams: all(each.num_tokens > 2 for each in streams))  # type: ignore[misc]
                await router.drain_engine(1)
                assert await asyncio.gather(*reading) == whole
                moved = resumed(streams)
            assert all(each.num_deaths == 0 for each in moved)
            stats = local.stats[0]
            assert stats.num_peer_blocks >= 10 * len(moved)
            assert stats.num_computed_tokens - stats.num_generated_tokens < 100 * len(moved), (
                "400 tokens each, and more"
            )
        finally:
            await router.close()

    run(test())


def test_a_drain_brings_kv_blocks_to_an_engine_elsewhere(
    engine: EngineProcess, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((moving, "STAGE_SECONDS"), (peers, "LEAST_SECONDS")):
        monkeypatch.setattr(module, name, PATIENCE)
    secret = read_secret(str(folder / "key"))
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    wanted = Add("long", tuple(Random(8).randrange(5, 700) for _ in range(400)), params)

    async def test() -> None:
        files, _ = open_tiers(CONFIG.cache, for_moves=True)
        made = Engine(CONFIG, load_model(CONFIG), name_key=secret.name_key, tier_files=files)
        assert made.tiers is not None
        let_blocks_be_fetched(made.tiers, BlockListen("127.0.0.1:0"), secret.link_key, CONFIG)
        remote, local = elsewhere(engine, folder), AsyncEngine(made)
        router = Router([local, remote], name_key=secret.name_key)
        await router.start()
        try:
            whole = await read(remote.open(msgspec.structs.replace(wanted, request_id="whole")))
            while not router.num_resumed["drain"]:  # it had ended before it could move
                router.undrain_engine(0)
                stream = local.open(wanted)
                reading = asyncio.create_task(read(stream))
                await until(lambda stream=stream: stream.num_tokens > 2)  # type: ignore[misc]
                await router.drain_engine(0)
                assert await reading == whole
            await until(lambda: remote.stats[0].num_peer_blocks > 0)
        finally:
            await router.close()

    run(test())


def test_a_listener_for_blocks_takes_no_server(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = read_secret(str(folder / "key")).link_key

    async def test() -> None:
        listener = Listener("127.0.0.1:0", key, CONFIG, serves_fronts=False)
        await asyncio.to_thread(listener.start)
        client = SupervisedEngine(ConnectLauncher(listener.address, key, Agreement(CONFIG, has_local=True)))
        with pytest.raises(EngineUnavailableError):
            await client.start()
        await client.close()
        await asyncio.to_thread(listener.stop)

    run(test())
    assert "is refused: another server has the engine" in caplog.text


def test_settings_that_were_given_must_be_those_of_the_engine() -> None:
    theirs = EngineConfig.from_settings({"block_size": 16})
    Agreement(CONFIG, has_local=True, given=("block_size",)).check_settings(theirs)
    Agreement(EngineConfig(), has_local=False).check_settings(theirs)
    Agreement(EngineConfig(), has_local=False, given=("dtype",)).check_settings(theirs)
    with pytest.raises(ConfigError, match=r"it was started with block_size 16, and this server with block_size 32"):
        Agreement(EngineConfig(), has_local=False, given=("block_size",)).check_settings(theirs)


def test_streams_go_on_when_an_engine_elsewhere_is_killed(
    engine: EngineProcess, folder: Path, whole: list[list[int]]
) -> None:
    """The last test that uses the engine."""
    wanted = requests(8, max_tokens=120)

    async def test() -> None:
        remote, local = elsewhere(engine, folder), AsyncEngine(Engine.load(CONFIG))
        async with running(local, remote) as router:
            async with closed_loop(router, wanted, whole) as streams:
                engine.send(signal.SIGKILL)
                await until(lambda: remote.state is not EngineState.READY)
            moved = resumed(streams)
            assert moved and len(moved) == router.num_resumed["death"]
            assert all(each.num_deaths == 1 for each in moved)  # suspected, as at any death

    run(test())


@pytest.mark.slow
def test_an_engine_that_comes_back_is_found_again(
    folder: Path, whole: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "splitfuse")
    wanted = requests(8, max_tokens=120)
    flags = ("--key-file", str(folder / "key"), *FLAGS)

    async def test() -> None:
        with engine_process(folder / "second", *flags) as victim, ExitStack() as later:
            remote = elsewhere(victim, folder)
            async with running(remote) as router:
                async with closed_loop(router, wanted, whole) as streams:
                    victim.send(signal.SIGKILL)
                    await until(lambda: remote.state is EngineState.DEAD)
                    later.enter_context(engine_process(folder / "second", *flags, listen=victim.address))
                assert resumed(streams)
                assert await restart(remote)
                assert await read(remote.open(wanted[2])) == whole[2]

    async def restart(remote: SupervisedEngine) -> bool:
        """Drained, the program there begins anew."""
        remote.drain()
        await remote.restart()
        remote.undrain()
        return remote.state is EngineState.READY

    run(test())
    assert "is gone: the connection has ended; connecting again in 0.01 s" in caplog.text
    assert "nothing listens there: start it with splitfuse engine; connecting again in 0.05 s" in caplog.text
    assert "is ready again after" in caplog.text


@pytest.mark.slow
def test_an_engine_that_is_told_to_end_lets_its_requests_go_on(
    folder: Path, whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfuse.engine.router.LEAVING_SECONDS", 0.0)  # they are short
    wanted, flags = requests(8, max_tokens=120), ("--key-file", str(folder / "key"), *FLAGS)

    async def test() -> None:
        with engine_process(folder / "third", *flags) as ending:
            remote, local = elsewhere(ending, folder), AsyncEngine(Engine.load(CONFIG))
            async with running(local, remote) as router:
                async with closed_loop(router, wanted, whole) as streams:
                    ending.send(signal.SIGTERM)
                    await asyncio.to_thread(ending.process.wait, PATIENCE)
                assert all(each.num_deaths == 0 for each in streams)
                assert router.num_resumed["drain"] and not router.num_resumed["death"]
                assert ending.process.returncode == 0
                with engine_process(folder / "third", *flags, listen=ending.address):
                    await until(lambda: remote.state is EngineState.READY and not remote.is_drained)

    run(test())
