"""KV blocks from the tiers of an engine on another machine: they give what computing them gives, and whatever happens
to the peer or the connection costs what would have been saved, no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from patience import PATIENCE
from scheduler_checks import check_scheduler

from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import parse_address
from splitfuse.core.kv import fetching
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.block_seconds import BlockSeconds
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Add
from splitfuse.engine.remote import peers
from splitfuse.engine.remote.listener import Listener
from splitfuse.engine.remote.transport import frame
from splitfuse.engine.tier_files import open_tiers
from splitfuse.runtime.loading import load_model

KEY, NAME_KEY = b"k" * 32, b"n" * 32
SETTINGS = {"dtype": "float32", "num_blocks": 40, "block_size": 4, "max_num_batched_tokens": 16}
MEMORY = {"kv_memory_tier": "1MiB"}
Harm = Callable[[bytes, int], bytes | None]
"""What becomes of bytes on their way to the client, behind so many before; None: the connection ends."""


class Relay:
    """Stands between two ends, and harms what passes."""

    def __init__(self, target: str) -> None:
        self.harm: Harm = lambda data, _: data
        self.seconds = 0.0  # before each piece is passed on
        self.piece = 2**16
        self._target = parse_address("relay", target)
        self._meetings: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._meet, "127.0.0.1", 0), self._loop).result()
        self.source = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        meeting = asyncio.current_task()
        assert meeting is not None
        self._meetings.add(meeting)  # the loop itself keeps none that waits for a reader: it could be collected
        up, down = await asyncio.open_connection(*self._target)
        ways = [
            asyncio.create_task(self._pass(reader, down, lambda data, _: data)),
            asyncio.create_task(self._pass(up, writer, lambda data, before: self.harm(data, before))),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            down.close()
            writer.close()
            self._meetings.discard(meeting)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, harm: Harm) -> None:
        before = 0
        with suppress(OSError):
            while data := await reader.read(self.piece):
                passed = harm(data, before)
                if passed is None:
                    return
                await asyncio.sleep(self.seconds)
                writer.write(passed)
                before += len(data)

    def close(self) -> None:
        async def stop() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        self._thread.join()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a connection may take longer than a request would wait for it."""
    monkeypatch.setattr(fetching, "LONGEST_FETCH", PATIENCE)
    monkeypatch.setattr(peers, "LEAST_SECONDS", PATIENCE)


def make(**settings: Any) -> Engine:
    """An engine with tiers of its own, as on a machine of its own."""
    config = EngineConfig.from_settings(settings)
    files, _ = open_tiers(config.cache)
    return Engine(config, load_model(config), name_key=NAME_KEY, tier_files=files)


class Pair:
    """An engine that lets others have its blocks, and one that fetches from it through a relay."""

    def __init__(self, **settings: Any) -> None:
        self.first, self.second = make(**settings), make(**settings)
        self.listener = Listener("127.0.0.1:0", KEY, self.first.config)
        self.listener.start()
        assert self.first.tiers is not None
        self.listener.read_block = self.first.tiers.give
        self.relay = Relay(self.listener.address)
        self.second.use_peers(KEY)
        self._number = 0

    @property
    def peers(self) -> peers.Peers:
        assert self.second.tiers is not None and self.second.tiers.peers is not None
        return self.second.tiers.peers

    def ask(self, engine: Engine, prompt: list[int], *, source: str | None = None, **params: Any) -> tuple[Any, int]:
        """The tokens of the answer, and how many of the prompt's were not computed."""
        self._number += 1
        sources = () if engine is self.first else (self.relay.source if source is None else source,)
        params = {"max_tokens": 9, "ignore_eos": True, **params}
        engine.add(Add(f"{self._number}", tuple(prompt), SamplingParams(**params), block_sources=sources))
        tokens: list[int] = []
        cached = 0
        while engine.has_unfinished:
            for output in engine.step(isolate=True):
                assert output.error is None
                tokens += output.token_ids
                cached = max(cached, output.num_cached_tokens)
                check_scheduler(engine.scheduler)
        assert engine.tiers is not None and engine.tiers.wait_until_written(PATIENCE)
        return tokens, cached

    def close(self) -> None:
        self.relay.close()
        self.listener.stop()
        for engine in (self.first, self.second):
            engine.close()


@pytest.fixture(scope="module")
def shared_pair(folder_of: Callable[[str], str]) -> Iterator[Pair]:
    made = Pair(model=folder_of("llama-gqa"), **SETTINGS, **MEMORY)
    yield made
    made.close()


@pytest.fixture
def pair(shared_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The pair, whose relay harms nothing, and which asks again at once whatever has failed."""
    shared_pair.relay.harm, shared_pair.relay.seconds, shared_pair.relay.piece = lambda data, _: data, 0.0, 2**16
    monkeypatch.setattr(peers, "FIRST_PAUSE", 0.0)
    for each in shared_pair.peers._peers.values():
        each.asked_from, each.pause, each.block_seconds = 0.0, 0.0, BlockSeconds(1e-4)
        each.idle.clear()
    return shared_pair


_numbers = iter(range(10**6))


def prompt(length: int = 50) -> list[int]:
    """One that nothing has."""
    rng = Random(next(_numbers))
    return [rng.randrange(15, 60) for _ in range(length)]


@pytest.mark.parametrize("kind", ["mistral-window", "deepseek-v3"])
def test_blocks_of_another_machine_give_what_computing_them_gives(kind: str, folder_of: Callable[[str], str]) -> None:
    pair = Pair(model=folder_of(kind), **SETTINGS, **MEMORY)
    try:
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        assert pair.ask(pair.second, text) == (wanted, 48)
        assert pair.peers.num_fetched == 12
        assert pair.second.tiers is not None and pair.second.tiers.stats.num_fetched == 12
        longer = text + wanted + prompt(5)
        assert pair.ask(pair.second, longer)[1] == 56  # its own now, and what it has computed
        assert pair.peers.num_fetched == 12
    finally:
        pair.close()


def test_the_own_tiers_come_first_and_the_peer_has_the_rest(pair: Pair) -> None:
    text = prompt()
    wanted, _ = pair.ask(pair.first, text)
    pair.ask(pair.second, text[:21], source="")
    before = pair.peers.num_fetched
    assert pair.ask(pair.second, text) == (wanted, 48)
    assert pair.peers.num_fetched - before == 7


def test_counters_begin_anew_with_the_next_server(pair: Pair) -> None:
    text = prompt()
    pair.ask(pair.first, text)
    pair.ask(pair.second, text)
    loop = EngineLoop(pair.second, lambda _: None)
    stats = loop._stats_now()
    assert stats.num_saved_blocks and stats.num_moved_bytes and stats.num_peer_blocks
    loop.close()
    stats = EngineLoop(pair.second, lambda _: None)._stats_now()
    assert (stats.num_saved_blocks, stats.num_moved_bytes, stats.num_peer_blocks) == (0, 0, 0)
    assert stats.num_tier_blocks, "what is there is there"


def flip(at: int) -> Harm:
    """One bit is another."""

    def harm(data: bytes, before: int) -> bytes:
        if not before <= at < before + len(data):
            return data
        harmed = bytearray(data)
        harmed[at - before] ^= 1 << at % 8
        return bytes(harmed)

    return harm


def cut(at: int) -> Harm:
    """Nothing comes behind some bytes."""

    def harm(data: bytes, before: int) -> bytes | None:
        return data[: at - before] if at > before else None

    return harm


def sizes(pair: Pair) -> tuple[int, int]:
    """Bytes before the first block, and those of all blocks of a prompt."""
    seen = [0]

    def count(data: bytes, before: int) -> bytes:
        seen[0] = before + len(data)
        return data

    pair.relay.harm = count
    text = prompt()
    pair.ask(pair.first, text)
    _, cached = pair.ask(pair.second, text)
    assert cached == 48
    return seen[0] - 12 * pair.peers._block_bytes, seen[0]


def test_a_connection_that_is_cut_or_changed_anywhere_costs_blocks_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake and what follows it, heads, bytes and end."""
    head, whole = sizes(pair)
    monkeypatch.setattr(fetching, "LONGEST_FETCH", 0.1)  # where more is announced than comes
    rng = Random(51)
    for number in range(12):
        at = rng.randrange(head) if number % 4 == 0 else rng.randrange(whole)
        pair.relay.harm = (flip if number % 2 else cut)(at)
        for each in pair.peers._peers.values():
            each.asked_from, each.idle = 0.0, []
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        assert pair.ask(pair.second, text)[0] == wanted, (number, at)


def test_a_flipped_bit_is_never_used_and_counted(pair: Pair) -> None:
    _, whole = sizes(pair)
    for each in pair.peers._peers.values():
        each.idle.clear()
    before, dropped = pair.peers.num_fetched, pair.peers.num_dropped
    pair.relay.harm = flip(whole - 3 * pair.peers._block_bytes)  # among the last blocks
    text = prompt()
    wanted, _ = pair.ask(pair.first, text)
    tokens, cached = pair.ask(pair.second, text)
    assert tokens == wanted and pair.peers.num_dropped == dropped + 1
    assert cached == 4 * (pair.peers.num_fetched - before) and 28 <= cached < 48, "those before it were used"


def test_a_peer_that_is_stopped_is_waited_for_no_longer_than_allowed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetching, "LONGEST_FETCH", 0.2)
    released = threading.Event()
    read = pair.listener.read_block

    def hang(name: bytes) -> Any:
        released.wait()
        return read(name)

    pair.listener.read_block = hang
    try:
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        assert pair.ask(pair.second, text) == (wanted, 0)
        assert "0 of 12 blocks have come within" in caplog.text
    finally:
        released.set()
        pair.listener.read_block = read
    monkeypatch.setattr(peers, "FIRST_PAUSE", 1e6)  # and is not asked again for a while
    pair.relay.harm = cut(0)
    other = prompt()
    wanted, _ = pair.ask(pair.first, other)
    for each in pair.peers._peers.values():
        each.pause, each.idle, each.asked_from = 1e6, [], 0.0
    assert pair.ask(pair.second, other) == (wanted, 0)
    assert pair.peers.find(pair.relay.source, 1, PATIENCE).num_blocks == 0


def test_a_slow_peer_gives_what_has_come_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SLACK", 1e6)

    def stop_behind_some(data: bytes, before: int) -> bytes:
        if before > 6 * pair.peers._block_bytes:
            pair.relay.seconds = 1e6  # the rest takes for ever
        return data

    cached, seconds = 0, 0.25
    while not cached:  # on a busy machine nothing may come in so little time
        seconds *= 2
        monkeypatch.setattr(fetching, "LONGEST_FETCH", seconds)
        for each in pair.peers._peers.values():
            each.asked_from, each.idle = 0.0, []
        pair.relay.harm, pair.relay.piece, pair.relay.seconds = stop_behind_some, 256, 0.0
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        tokens, cached = pair.ask(pair.second, text)
        assert tokens == wanted
    assert cached < 48


def test_what_was_evicted_before_it_is_asked_for_is_computed(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    text = prompt()
    wanted, _ = pair.ask(pair.first, text)
    names: list[bytes] = []
    pair.first.allocator.name_blocks(tuple(text), names, 12, salt="")
    assert pair.first.tiers is not None
    for tier in pair.first.tiers._tiers:
        tier.file.drop(names[5])
    assert pair.ask(pair.second, text) == (wanted, 20)
    for tier in pair.first.tiers._tiers:
        tier.file.drop(names[0])
    text = text[:16] + prompt(30)
    assert pair.ask(pair.second, text)[0] == pair.ask(pair.first, text)[0]
    assert not caplog.records, "a peer that has a block no longer has not failed"


def test_a_peer_of_another_model_or_deployment_has_nothing(pair: Pair, folder_of: Callable[[str], str]) -> None:
    other = Pair(model=folder_of("mistral-window"), **SETTINGS, **MEMORY)
    stranger = Listener("127.0.0.1:0", b"another key".ljust(32), pair.first.config)
    stranger.start()
    assert pair.first.tiers is not None
    stranger.read_block = pair.first.tiers.read
    try:
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        other.ask(other.first, text)
        assert pair.ask(pair.second, text, source=other.relay.source) == (wanted, 0)
        text = prompt()
        wanted, _ = pair.ask(pair.first, text)
        assert pair.ask(pair.second, text, source=f"tcp://{stranger.address}") == (wanted, 0)
        assert pair.ask(pair.second, text, source="tcp://127.0.0.1:1")[0] == wanted  # nothing listens there
        assert pair.ask(pair.second, text, source="memory:0123")[0] == wanted  # no peer at all
    finally:
        other.close()
        stranger.stop()


def test_what_a_stranger_asks_for_is_bounded() -> None:
    async def test() -> None:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peers.serve_blocks(reader, writer, lambda _: None)
            writer.close()

        server = await asyncio.start_server(meet, "127.0.0.1", 0)
        for said in (b"\xff\xff\xff\xff", frame(b"\xc1"), frame(b"\x91\x93\x01\x02\x03")):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(said)
            assert await reader.read() == b""
            writer.close()
        server.close()

    asyncio.run(test())
