"""The memory of a KV cache is there before blocks are used, and stays what it is."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from splitfuse.kernels.cpu.memory import HUGE_PAGE, allocate, have
from splitfuse.models.kv_cache import PIECE_BYTES, Piece
from splitfuse.runtime import memory_ahead
from splitfuse.runtime.memory_ahead import MemoryAhead

_libc = ctypes.CDLL(None, use_errno=True)


def is_there(memory: Tensor) -> list[bool]:
    """Return whether each page of some memory is resident."""
    num_pages = memory.nbytes // mmap.PAGESIZE
    found = (ctypes.c_ubyte * num_pages)()
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
    assert _libc.mincore(address, size, found) == 0
    return [bool(each & 1) for each in found]


def test_memory_is_there_and_stays_what_it_is() -> None:
    memory = allocate(4 * HUGE_PAGE)
    if not have(memory[:1]):
        pytest.skip("this system gives memory only when it is written: Linux 5.14 and later do at a request")
    assert not any(is_there(memory[2 * HUGE_PAGE :]))
    memory[2 * HUGE_PAGE + 5] = 7
    assert have(memory[2 * HUGE_PAGE + 100 :]) and all(is_there(memory[2 * HUGE_PAGE :]))
    assert memory[2 * HUGE_PAGE :].sum() == 7 == memory[2 * HUGE_PAGE + 5]
    assert not have(torch.frombuffer((ctypes.c_uint8 * 1).from_address(mmap.PAGESIZE), dtype=torch.uint8))


class Cache:
    """Return a KV cache of two stores with blocks of a fourth and a half of a piece, in which nothing is stored."""

    block_bytes = PIECE_BYTES * 3 // 4

    def __init__(self, *, can: bool = True) -> None:
        self.had: list[tuple[int, int, int]] = []
        self._can = can

    def pieces(self) -> Iterator[Piece]:
        return iter(
            sorted([Piece(first, 0, 4) for first in (0, 4, 8)] + [Piece(first, 1, 2) for first in range(0, 12, 2)])
        )

    def have(self, piece: Piece) -> bool:
        self.had.append(piece)
        return self._can


def test_pieces_come_one_after_the_other_up_to_some_bytes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ahead, "AHEAD_BYTES", 3 * PIECE_BYTES)  # four blocks, of which two are reserved
    cache = Cache()
    ahead = MemoryAhead(cache)  # type: ignore[arg-type]
    for step in range(1, 6):
        ahead.follow(0.0)
        assert len(cache.had) == min(step, 3), "one a step, without time only what is reserved"
    assert [first for first, *_ in cache.had] == [0, 0, 2]
    ahead.follow(1e9)
    assert [first for first, *_ in cache.had[3:]] == [4, 4]
    ahead.use(9)
    ahead.follow(1e9)
    assert [first for first, *_ in cache.had[5:]] == [6, 8, 8, 10], "a long step leaves time for all"
    ahead.use(11)
    ahead.follow(1e9)
    assert len(cache.had) == 9


def test_a_piece_that_took_long_is_owed_by_the_steps_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ahead, "AHEAD_BYTES", 6 * PIECE_BYTES)  # eight blocks, of which four are reserved
    now = [0.0]
    monkeypatch.setattr(memory_ahead.time, "monotonic", lambda: now[0])
    cache = Cache()
    ahead = MemoryAhead(cache)  # type: ignore[arg-type]
    for _ in range(5):
        ahead.have_next()
    assert [first for first, *_ in cache.had] == [0, 0, 2, 4, 4]
    had = cache.have
    monkeypatch.setattr(cache, "have", lambda piece: (now.__setitem__(0, now[0] + 1.0), had(piece))[1])
    counts = []
    for _ in range(12):
        ahead.follow(2.0)  # of which a fourth of a second is allowed
        counts.append(len(cache.had) - 5)
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_others_may_have_what_is_there_beyond_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ahead, "AHEAD_BYTES", 3 * PIECE_BYTES)
    ahead = MemoryAhead(Cache())  # type: ignore[arg-type]
    assert ahead.num_ready() == 0
    for _ in range(5):
        ahead.have_next()
    assert (ahead.num_ready(), ahead.num_ready(reserve=True)) == (5, 3), "blocks 1 to 5"
    ahead.use(2)
    assert ahead.num_ready(reserve=True) == 1
    for _ in range(4):
        ahead.have_next()
    assert ahead.num_ready(reserve=True) > 100, "all of it is there"


def test_after_idle_time_steps_ask_for_nothing_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ahead, "AHEAD_BYTES", 3 * PIECE_BYTES)
    cache = Cache()
    ahead = MemoryAhead(cache)  # type: ignore[arg-type]
    for _ in range(20):
        ahead.have_some()
    assert [first for first, *_ in cache.had] == [0, 0, 2, 4, 4, 6, 8, 8], "up to eight blocks ahead"
    for last_used, count in ((3, 8), (6, 9)):
        ahead.use(last_used)
        ahead.follow(1e9)
        assert len(cache.had) == count, "up to four blocks ahead"


def test_it_ends_where_memory_cannot_be_asked_for() -> None:
    cache = Cache(can=False)
    ahead = MemoryAhead(cache)  # type: ignore[arg-type]
    for _ in range(3):
        ahead.follow(1e9)
    assert len(cache.had) == 1
