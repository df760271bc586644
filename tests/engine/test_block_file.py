"""Blocks in a file: found again by every engine and after a restart, and never when a byte of them is wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import numpy as np
import pytest

from splitfuse.core.kv.fetching import Frame
from splitfuse.engine.block_file import BlockFile
from splitfuse.errors import ConfigError

BLOCK_BYTES, BLOCK_SIZE = 1000, 4
SLOT = 1024 + 52


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blocks"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def open_file(fd: int, *, slots: int = 8, **changes: Any) -> BlockFile:
    sizes = {"block_bytes": BLOCK_BYTES, "block_size": BLOCK_SIZE, "fingerprint": bytes(32)}
    return BlockFile(fd, **{"num_bytes": 8192 + SLOT * slots, **sizes, **changes})


def frame(number: int) -> Frame:
    rng = Random(number)
    data = np.frombuffer(rng.randbytes(BLOCK_BYTES), np.uint8)
    return Frame.of(rng.randbytes(16), tuple(rng.randrange(50000) for _ in range(BLOCK_SIZE)), data)


def equal(one: Frame | None, other: Frame) -> bool:
    return one is not None and one[:2] == other[:2] and bytes(one.data) == bytes(other.data) and one.is_intact


def test_what_is_written_is_read_by_others_and_after_a_restart(fd: int) -> None:
    writer, reader = (open_file(fd, part=part, num_parts=2) for part in (0, 1))
    frames = [frame(number) for number in range(3)]
    for each in frames:
        assert writer.write(each, b"")
    assert not writer.write(frames[0], b""), "it is there already"
    assert frames[0].name not in reader
    reader.refresh()
    assert all(each.name in reader for each in frames) and b"unknown" not in reader
    again = open_file(fd)  # by one engine, of which all slots are
    for each in frames:
        assert equal(reader.read(each.name), each) and equal(again.read(each.name), each)
    assert again.num_foreign == 0


def test_the_least_recently_used_goes_first_and_no_other_part_is_written(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**18, 2 * 10**18, 2 * 10**9))
    monkeypatch.setattr("time.time_ns", lambda: next(now))
    mine, others = (open_file(fd, part=part, num_parts=2) for part in (0, 1))  # four slots each
    frames = [frame(number) for number in range(12)]
    for each in frames[:4]:
        mine.write(each, b"")
        others.write(frames[frames.index(each) + 8], b"")
    mine.touch(frames[0].name)
    for each in frames[4:7]:
        mine.write(each, b"")
    assert [each.name in mine for each in frames[:8]] == [True, *[False] * 3, *[True] * 3, False]
    others.refresh()
    assert all(each.name in others for each in frames[8:])


def test_the_use_of_a_block_is_one_of_those_before_it(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**18, 2 * 10**18, 2 * 10**9))
    monkeypatch.setattr("time.time_ns", lambda: next(now))
    file = open_file(fd, slots=3)
    first, second, other, new = (frame(number) for number in range(4))
    file.write(first, b"")
    file.write(other, b"")
    file.write(second, first.name)
    file.write(new, b"")
    assert first.name in file and second.name in file and other.name not in file


def test_a_clock_that_goes_back_costs_order_alone(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, frames = open_file(fd, slots=3), [frame(number) for number in range(6)]
    for begin, written in ((2 * 10**18, frames[:3]), (10**18, frames[3:])):
        now = count(begin, 2 * 10**9)
        monkeypatch.setattr("time.time_ns", partial(next, now))
        for each in written:
            file.write(each, b"")
    assert [each.name in file for each in frames] == [False] * 3 + [True] * 3, "not one place for all that is new"
    file.touch(frames[3].name)
    file.write(frames[0], b"")
    assert [each.name in file for each in frames[3:]] == [True, False, True], "the newest use counts again"


@pytest.mark.parametrize("place", ["tokens", "data", "name", "checksum"])
def test_one_flipped_bit_is_never_read(fd: int, place: str) -> None:
    file, written = open_file(fd, slots=1), frame(0)
    file.write(written, b"")
    size = os.fstat(fd).st_size
    before = os.pread(fd, size, 0)
    needle = {
        "tokens": np.array(written.token_ids, np.int32).tobytes(),
        "data": bytes(written.data),
        "name": written.name,
        "checksum": written.checksum.to_bytes(4, "little"),
    }[place]
    at = before.index(needle)
    for bit in (0, 3, 8 * len(needle) - 1):
        changed = bytearray(before)
        changed[at + bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, changed, 0)
        read = open_file(fd, slots=1).read(written.name)
        assert read is None or not read.is_intact
        os.pwrite(fd, before, 0)
        assert equal(open_file(fd, slots=1).read(written.name), written)


def test_a_block_that_is_dropped_is_gone_for_all(fd: int) -> None:
    file, other, written = open_file(fd), open_file(fd), frame(0)
    file.write(written, b"")
    other.refresh()
    other.drop(written.name)
    assert written.name not in other and file.read(written.name) is None
    assert file.write(frame(1), b"") and written.name not in open_file(fd)


def test_a_block_that_another_engine_dropped_is_written_again(fd: int) -> None:
    owner, other = (open_file(fd, part=part, num_parts=2) for part in (0, 1))
    owner.write(frame(0), b"")
    other.refresh()
    other.drop(frame(0).name)
    assert owner.read(frame(0).name) is None and frame(0).name not in owner
    assert owner.write(frame(0), b"") and equal(owner.read(frame(0).name), frame(0))


def test_a_block_that_another_engine_has_written_is_not_written_twice(fd: int) -> None:
    one, other = (open_file(fd, part=part, num_parts=2) for part in (0, 1))
    assert one.write(frame(0), b"") and not other.write(frame(0), b"")
    assert equal(other.read(frame(0).name), frame(0))


def test_a_write_that_fails_without_an_os_error_costs_the_block_alone(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reader = open_file(fd, slots=1), open_file(fd, slots=1)

    def fail(*_: Any) -> int:
        raise MemoryError

    for number in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("os.pwritev", fail)
            with pytest.raises(MemoryError):
                file.write(frame(number), b"")
    file._sequences[0] |= 1  # as a writer that died has left it
    assert file.write(frame(5), b"")
    reader.refresh()
    assert equal(reader.read(frame(5).name), frame(5)) and equal(file.read(frame(5).name), frame(5))


def test_a_torn_write_is_not_read(fd: int) -> None:
    file, first, second = open_file(fd, slots=1), frame(0), frame(1)
    file.write(first, b"")
    slot = os.pread(fd, 600, file._data_at)
    file.write(second, b"")
    os.pwrite(fd, slot, file._data_at)  # its first half did not come to the disk
    read = open_file(fd, slots=1).read(second.name)
    assert read is not None and not read.is_intact
    os.ftruncate(fd, file._data_at + 300)
    read = open_file(fd, slots=1).read(second.name)
    assert read is not None and not read.is_intact


def test_an_engine_that_died_while_it_wrote_leaves_no_block(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, first, second = open_file(fd, slots=1), frame(0), frame(1)
    file.write(first, b"")

    def die(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.pwritev", die)
        with pytest.raises(KeyboardInterrupt):
            file.write(second, b"")
    again = open_file(fd, slots=1)
    assert len(again) == 0 and again.read(first.name) is None and again.read(second.name) is None
    assert again.write(second, b"") and equal(again.read(second.name), second)


WRITER = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_block_file import frame, open_file
file = open_file(os.open(sys.argv[1], os.O_RDWR), slots=40)
for number in range(10**9):
    file.write(frame(number), b"")
    if number == 100:
        print("writing", flush=True)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_whole_blocks(fd: int, path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent), *filter(None, sys.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    finally:
        process.kill()
        process.communicate()
    file = open_file(fd, slots=40)
    names = [*file._index]
    assert file.num_foreign == 0 and len(names) >= 39, "all but the one that was overwritten"
    for name in names:
        read = file.read(name)
        assert read is not None and read.is_intact
    for number in range(-60, 0):
        assert file.write(frame(number), b"") and equal(file.read(frame(number).name), frame(number))
    assert len(file) == 40


@pytest.mark.parametrize("write", [lambda *_: 17, lambda *_: os.pread(-1, 1, 0)], ids=["in part", "not at all"])
def test_a_full_disk_costs_the_block_alone(fd: int, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, first, second = open_file(fd), frame(0), frame(1)
    file.write(first, b"")
    with monkeypatch.context() as patch:
        patch.setattr("os.pwritev", write)
        with pytest.raises(OSError):
            file.write(second, b"")
    assert second.name not in file and equal(file.read(first.name), first)
    assert file.write(second, b"") and equal(file.read(second.name), second)


def test_a_disk_that_takes_nothing_more_keeps_what_it_has(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, frames = open_file(fd), [frame(number) for number in range(9)]
    for each in frames[:4]:
        file.write(each, b"")

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwritev", fail)
    for each in frames[4:]:
        with pytest.raises(OSError, match="No space"):
            file.write(each, b"")
    assert [equal(file.read(each.name), each) for each in frames[:4]] == [False, True, True, True], "one was tried"


def test_a_disk_that_is_full_keeps_the_newest_blocks_in_the_room_that_there_is(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, now = open_file(fd, slots=50), os.pwritev, count(10**18, 2 * 10**9)
    monkeypatch.setattr("time.time_ns", partial(next, now))

    def write_to_four(fd: int, buffers: Any, offset: int) -> int:
        if offset >= file._data_at + 4 * file._slot_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, buffers, offset)

    monkeypatch.setattr("os.pwritev", write_to_four)
    frames, written = [frame(number) for number in range(40)], list[Frame]()
    for each in frames:
        with suppress(OSError):
            file.write(each, b"")
            written.append(each)
    assert len(written) == 32, "one of five is tried where there is no room"
    assert all(equal(file.read(each.name), each) for each in written[-4:]) and len(file) == 4


@pytest.mark.parametrize(
    "changes", [{"fingerprint": b"1" * 32}, {"block_bytes": 500}, {"block_size": 8}, {"slots": 9}], ids=str
)
def test_blocks_of_another_kind_are_counted_and_forgotten(fd: int, changes: dict[str, Any]) -> None:
    file = open_file(fd)
    frames = [frame(number) for number in range(3)]
    for each in frames:
        file.write(each, b"")
    other = open_file(fd, **changes)
    assert other.num_foreign == 3 and len(other) == 0
    assert all(other.read(each.name) is None for each in frames)


@pytest.mark.parametrize("changes", [{"slots": 8}, {"fingerprint": b"1" * 32}], ids=str)
def test_a_file_that_begins_anew_gives_its_room_back(fd: int, changes: dict[str, Any]) -> None:
    file = open_file(fd, slots=200)
    for number in range(200):
        file.write(frame(number), b"")
    assert os.fstat(fd).st_blocks * 512 > 200 * BLOCK_BYTES
    again = open_file(fd, **{"slots": 200, **changes})
    assert again.num_foreign == 200
    assert os.fstat(fd).st_size == again._data_at <= 8192 + 52 * 200 + 4096
    assert again.write(frame(1), b"") and equal(again.read(frame(1).name), frame(1))


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_file_that_is_cut_while_it_is_used_begins_anew(fd: int, size: int, caplog: pytest.LogCaptureFixture) -> None:
    one, other = (open_file(fd, slots=200, part=part, num_parts=2) for part in (0, 1))
    frames = [frame(number) for number in range(4)]
    for each in frames[:3]:
        one.write(each, b"")
    other.refresh()
    os.ftruncate(fd, size)
    assert all(other.read(each.name) is None for each in frames[:3])
    assert other.write(frames[3], b"") and one.read(frames[0].name) is None
    assert one.write(frames[0], b"") and equal(one.read(frames[0].name), frames[0])
    one.refresh()
    again = open_file(fd, slots=200)
    assert equal(one.read(frames[3].name), frames[3]) and len(again) == 2 and again.num_foreign == 0
    assert caplog.messages == ["a file of KV blocks was cut by another program: it begins anew"]


def test_a_file_that_is_cut_on_a_full_disk_has_nothing(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, first = open_file(fd), frame(0)
    file.write(first, b"")
    os.ftruncate(fd, 0)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", fail)
        for work in (file.refresh, partial(file.read, first.name), partial(file.write, first, b"")):
            with pytest.raises(OSError, match="No space"):
                work()
            assert first.name not in file
            file.drop(first.name)
    assert file.write(first, b"") and equal(file.read(first.name), first)


def test_a_file_of_something_else_is_overwritten(fd: int) -> None:
    os.pwrite(fd, Random(1).randbytes(20_000), 0)
    file, written = open_file(fd), frame(0)
    assert len(file) == 0 and file.num_foreign == 0
    assert file.write(written, b"") and equal(file.read(written.name), written)


def test_a_tier_that_is_too_small_is_refused(fd: int) -> None:
    with pytest.raises(ConfigError, match="give it at least"):
        open_file(fd, slots=1, num_parts=2)


def test_readers_see_whole_blocks_while_slots_are_overwritten(fd: int) -> None:
    """Two slots, ten names: what is read is a block as it was written, or nothing, or not intact."""
    writer, reader = open_file(fd, slots=2), open_file(fd, slots=2)
    frames = {each.name: each for each in map(frame, range(10))}
    ended, seen = [], 0

    def write() -> None:
        for number in range(2000):
            writer.write([*frames.values()][number * 7 % 10], b"")
        ended.append(True)

    thread = Thread(target=write)
    thread.start()
    while not ended:
        reader.refresh()
        for name, written in frames.items():
            read = reader.read(name)
            if read is not None and read.is_intact:
                assert equal(read, written)
                seen += 1
    thread.join()
    assert seen
