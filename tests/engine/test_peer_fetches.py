"""Fetches from peers, with tiers and sockets but no engine: how long one waits for them, and whose fault a delay is."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from patience import PATIENCE

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.fetching import Fetch, Frame
from splitfuse.engine import tiers as tiers_module
from splitfuse.engine.block_file import BlockFile
from splitfuse.engine.block_seconds import HALF_LIFE, BlockSeconds
from splitfuse.engine.remote import peers
from splitfuse.engine.remote.listener import Listener
from splitfuse.engine.tiers import Tiers

KEY = b"k" * 32
BLOCK_BYTES = 4096
NAMES = tuple(bytes([index + 1]) * 16 for index in range(12))
TOKEN_IDS = ((1, 2, 3, 4),) * len(NAMES)
_numbers = count(1)


def file_with(num_blocks: int) -> BlockFile:
    """A file of a tier that has the first blocks."""
    file = BlockFile(
        os.memfd_create("tier"), num_bytes=2**20, block_bytes=BLOCK_BYTES, block_size=4, fingerprint=b"f" * 32
    )
    data = np.zeros(BLOCK_BYTES, np.uint8)
    for before, name in zip((b"", *NAMES), NAMES[:num_blocks], strict=False):
        file.write(Frame.of(name, TOKEN_IDS[0], data), before)
    return file


def tiers_with(num_blocks: int) -> Tiers:
    """Tiers that have the first blocks."""
    return Tiers({"memory": file_with(num_blocks)}, BLOCK_BYTES)


class Ends:
    """Tiers that have no more than the first blocks, and those of a peer, which has all."""

    def __init__(self, num_own: int) -> None:
        self.own, self.theirs = tiers_with(num_own), tiers_with(len(NAMES))
        self.listener = Listener("127.0.0.1:0", KEY, EngineConfig.from_settings({}))
        self.listener.start()
        self.listener.read_block = self.theirs.give
        self.source = f"tcp://{self.listener.address}"
        self.peers = self.own.peers = peers.Peers(KEY, block_bytes=BLOCK_BYTES, block_size=4)
        self._silent = socket.create_server(("127.0.0.1", 0))
        self.silent = f"tcp://127.0.0.1:{self._silent.getsockname()[1]}"
        """A peer that says nothing."""

    def peer(self, source: str) -> peers._Peer:
        peer = self.peers._peer(source)
        assert peer is not None
        return peer

    def ask(self, source: str, seconds: float = PATIENCE) -> int:
        fetch = Fetch(next(_numbers), "request", 0, NAMES, TOKEN_IDS, seconds, (source,))
        self.own.ask(fetch)
        return fetch.number

    def answers(self, *numbers: int) -> list[int]:
        """How many blocks have come for some fetches, once all are answered."""
        found: dict[int, int] = {}
        while not found.keys() >= {*numbers}:
            self.own.wait(0.01)
            found.update((number, len(frames)) for number, frames in self.own.answers())
        return [found[number] for number in numbers]

    def close(self) -> None:
        self.listener.stop()
        self._silent.close()
        for tiers in (self.own, self.theirs):
            assert tiers.close()


@pytest.fixture
def make_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ends]]:
    monkeypatch.setattr(peers, "LEAST_SECONDS", PATIENCE)
    made: list[Ends] = []

    def make_ends(num_own: int) -> Ends:
        made.append(Ends(num_own))
        return made[-1]

    yield make_ends
    for ends in made:
        ends.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)


def test_what_is_read_at_once_is_in_memory_and_in_time() -> None:
    """What is overwritten after one has looked may be on a disk, which the engine's own thread does not wait for."""
    memory, disk = file_with(4), file_with(len(NAMES))
    tiers = Tiers({"kv_memory_tier": memory, "kv_disk_tier": disk}, BLOCK_BYTES)
    fetch = Fetch(1, "request", 0, NAMES[:4], TOKEN_IDS[:4], PATIENCE)
    in_time = time.monotonic() + PATIENCE
    assert tiers.seconds_in_memory(fetch) < PATIENCE
    frames = tiers.read_at_once(fetch, in_time)
    assert frames is not None and [frame.name for frame in frames] == [*NAMES[:4]]
    assert tiers.read_at_once(fetch, time.monotonic() - 1.0) is None
    memory.drop(NAMES[2])
    assert tiers.read_at_once(fetch, in_time) is None
    assert [frame.name for frame in tiers._read(fetch.names, lambda: True)] == [*NAMES[:4]], "the disk has it"
    assert tiers.close()


def test_one_hiccup_is_one_failure(
    make_ends: Callable[[int], Ends], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends = make_ends(0)
    monkeypatch.setattr(peers, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(peers, "ROUND_TRIP", 0.0)
    monkeypatch.setattr(peers, "LONGEST_PAUSE", 2 * PATIENCE)
    ends.peer(ends.silent).pause = PATIENCE  # nothing is asked for a second time
    with caplog.at_level(logging.WARNING):
        assert ends.answers(*[ends.ask(ends.silent) for _ in range(8)]) == [0] * 8
    assert ends.peer(ends.silent).pause == 2 * PATIENCE
    assert caplog.text.count("do not come from") == 1


def test_who_waits_for_a_busy_peer_does_not_blame_it(
    make_ends: Callable[[int], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MOST_CONNECTIONS", 1)
    ends = make_ends(0)
    reading, released = threading.Event(), threading.Event()

    def hang(name: bytes) -> Frame | None:
        reading.set()
        released.wait()
        return ends.theirs.give(name)

    ends.listener.read_block = hang
    idle = ends.peers.find(ends.source, 3, PATIENCE)
    try:
        first = ends.ask(ends.source)
        reading.wait()
        busy = ends.peers.find(ends.source, 3, PATIENCE)
        assert busy.num_blocks == 3 and busy.seconds > 2 * (idle.seconds - peers.ROUND_TRIP), "behind 12 others"
        assert ends.peers.find(ends.source, 3, idle.seconds).num_blocks == 0, "they would not be there in time"
        assert ends.answers(ends.ask(ends.source, 0.05)) == [0]
        peer = ends.peer(ends.source)
        assert (peer.asked_from, peer.failure) == (0.0, "")
    finally:
        released.set()
    assert ends.answers(first) == [12]
    until(lambda: not peer.num_awaited)


def test_a_peer_that_was_slow_is_asked_again_some_time(
    make_ends: Callable[[int], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = BlockSeconds(1.0)
    assert estimate.at(50.0) == 1.0
    estimate.update(5.0, 50.0)
    assert estimate.at(50.0) == 2.0 and estimate.at(50.0 + HALF_LIFE) == 1.5
    estimate.raise_to(9.0, 50.0)
    assert estimate.at(50.0) == 9.0 and estimate.at(50.0 + 3 * HALF_LIFE) == 2.0
    estimate.update(0.0, 1e6)
    assert 0.7 < estimate.at(1e6) == estimate.at(2e6) < 0.8, "what is faster than the first estimate stays"
    ends = make_ends(0)
    ends.peer(ends.source).block_seconds.raise_to(0.1, 100.0)
    found = []
    for now in (100.0, 100.0 + 10 * HALF_LIFE):
        monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda now=now: now))
        found.append(ends.peers.find(ends.source, 12, 0.05).num_blocks)
    assert found == [0, 12]


def test_own_blocks_are_not_lost_to_a_late_peer(
    make_ends: Callable[[int], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The own read may take most of the time that the request has: the peer then has what is left."""
    ends = make_ends(5)
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(peers, "time", clock)
    monkeypatch.setattr(tiers_module, "time", clock)
    read = ends.own.read
    for taken, failure in ((0.95, "0 of 7 blocks have come within 0.045 s"), (0.999, "")):
        clock.now = 100.0

        def slow(name: bytes, taken: float = taken) -> Frame | None:
            clock.now = 100.0 + taken
            return read(name)

        monkeypatch.setattr(ends.own, "read", slow)
        peer = ends.peer(ends.silent)
        peer.asked_from, peer.failure = 0.0, ""
        assert ends.answers(ends.ask(ends.silent, 1.0)) == [5]
        assert peer.failure == failure


def test_what_is_not_wanted_any_more_does_not_come(
    make_ends: Callable[[int], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = make_ends(5)
    reading, released = threading.Event(), threading.Event()

    def hang(name: bytes) -> Frame | None:
        reading.set()
        released.wait()
        return ends.theirs.give(name)

    ends.listener.read_block = hang
    try:
        number = ends.ask(ends.source)
        reading.wait()
        ends.own.forget(number)
        until(lambda: not ends.peers._tasks)
        assert ends.peer(ends.source).num_awaited == 0 and not ends.peer(ends.source).idle
    finally:
        released.set()
    assert ends.peers.num_fetched == 0 and ends.peer(ends.source).failure == ""
    read, asked = ends.own.read, []

    def forget(name: bytes) -> Frame | None:
        ends.own.forget(number)  # during the own read
        return read(name)

    with monkeypatch.context() as patched:
        patched.setattr(ends.own, "read", forget)
        patched.setattr(ends.peers, "ask", lambda *_: asked.append(1))
        number = ends.ask(ends.source)
        until(lambda: not ends.own.is_asked)
        assert not asked
    assert ends.answers(ends.ask(ends.source)) == [12]


def test_what_others_fetch_counts_as_used(make_ends: Callable[[int], Ends]) -> None:
    ends = make_ends(0)
    file = ends.theirs._tiers[0].file
    file._used[:] = 1
    assert ends.answers(ends.ask(ends.source)) == [12]
    assert (file._used > 1).sum() == 12
