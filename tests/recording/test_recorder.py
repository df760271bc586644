"""What a recording's file has in it, and what becomes of one that is torn, foreign, hostile, or has no room."""

import errno
import fcntl
import os
import resource
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from struct import Struct
from typing import Any

import msgspec
import pytest
import tiny_models
from patience import PATIENCE
from recorded_engine import SMALL, RecordedEngine, config_of, recorded

from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.errors import ConfigError, RecordingError
from splitfuse.recording import recorder as recorder_module
from splitfuse.recording.format import (
    FORMAT,
    MAGIC,
    Close,
    EngineStart,
    Frame,
    Recording,
    Records,
    Tables,
    encode_frame,
)
from splitfuse.recording.recorder import Recorder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of two requests, one of which is preempted."""
    path = tmp_path_factory.mktemp("recording") / "engine.rec"
    with recorded(path, config_of(folder, block_size=4, num_blocks=8)) as engine:
        salt = SchedulingOptions(cache_salt="digest of a key")
        for name in "ab":
            params = SamplingParams(max_tokens=10, logprobs=1, stop=("a secret",))
            engine.engine.add_request(name, range(3, 12), params, scheduling=salt)
        engine.run()
    return path


def records(frames: list[Frame], kind: type[Any]) -> list[Any]:
    return [each for frame in frames if isinstance(frame, Records) for each in frame.records if isinstance(each, kind)]


def test_file_has_settings_requests_steps_and_its_end(path: Path, folder: Path) -> None:
    recording = Recording.open(path)
    frames = list(recording.frames())
    assert recording.fault == "" and recording.header.config.model.model == str(folder)
    assert isinstance(frames[0], EngineStart) and frames[0].identity["version"] and frames[0].limits.num_blocks == 8
    assert frames[-1] == Close(frames[-1].time, "the test ended", 0)  # type: ignore[union-attr]
    assert [request.request_id for request in records(frames, RequestTrace)] == ["a", "b"]
    assert [end.num_output_tokens for end in records(frames, FinishTrace)] == [10, 10]
    assert sum(len(chunk.token_ids) for step in records(frames, StepTrace) for chunk in step.chunks) == 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_neither_texts_nor_digests_of_keys_are_in_a_file(path: Path, folder: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    assert b"a secret" not in content and b"digest of a key" not in content
    with recorded(tmp_path / "texts.rec", config_of(folder, **SMALL), keep_texts=True) as engine:
        engine.engine.add_request("a", (3, 4), SamplingParams(max_tokens=1, stop=("a secret",)))
        engine.run()
    assert b"a secret" in (tmp_path / "texts.rec").read_bytes()


def test_torn_file_is_read_up_to_where_it_is_torn(path: Path, tmp_path: Path) -> None:
    content, whole = path.read_bytes(), list(Recording.open(path).frames())
    torn = tmp_path / "torn.rec"
    first = len(MAGIC) + 8 + Struct("<I").unpack_from(content, len(MAGIC))[0]
    for size in (*range(first, len(content), 97), len(content) - 1):
        torn.write_bytes(content[:size])
        recording = Recording.open(torn)
        frames = list(recording.frames())
        assert frames == whole[: len(frames)] and len(frames) < len(whole)
        assert ("torn" in recording.fault) is (b"".join(map(encode_frame, frames)) != content[first:size])
    for size in (len(MAGIC), first - 1):
        torn.write_bytes(content[:size])
        with pytest.raises(RecordingError, match="first frame"):
            Recording.open(torn)
    flipped = bytearray(content)
    flipped[first + 100] ^= 1
    torn.write_bytes(flipped)
    recording = Recording.open(torn)
    assert list(recording.frames()) == [] and "checksum" in recording.fault


def test_file_is_read_as_it_was_when_it_was_opened(path: Path, tmp_path: Path) -> None:
    content, whole = path.read_bytes(), list(Recording.open(path).frames())
    file = tmp_path / "engine.rec"
    file.write_bytes(content[:-9])
    recording = Recording.open(file)
    frames = recording.frames()
    assert next(frames) == whole[0]
    with file.open("ab") as more:
        more.write(content[-9:])
    file.rename(tmp_path / "engine.rec.1")
    file.write_bytes(b"the next file")
    assert list(recording.frames()) == whole[:-1] and "torn" in recording.fault
    assert [*frames] == whole[1:-1]


def test_other_files_and_formats_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for content, match in (
        (b"", "is no recording"),
        (b"PK\x03\x04", "is no recording"),
        (MAGIC + framed({"format": FORMAT + 1, "new": []}), f"format {FORMAT + 1}, which this version"),
        (MAGIC + framed({"format": FORMAT}), "no valid header"),
        (MAGIC + framed([1, 2]), "no valid header"),
    ):
        other.write_bytes(content)
        with pytest.raises(RecordingError, match=match):
            Recording.open(other)
    with pytest.raises(RecordingError, match=r"absent\.rec cannot be read: No such file"):
        Recording.open(tmp_path / "absent.rec")
    with pytest.raises(RecordingError, match="cannot be read: Is a directory"):
        Recording.open(tmp_path)


def framed(content: Any) -> bytes:
    data = msgspec.msgpack.encode(content)
    return Struct("<II").pack(len(data), zlib.crc32(data)) + data


def test_hostile_frames_are_errors_of_the_file(path: Path, tmp_path: Path) -> None:
    head = path.read_bytes()[: len(MAGIC) + 8 + Struct("<I").unpack_from(path.read_bytes(), len(MAGIC))[0]]
    rng, hostile = Random(1), tmp_path / "hostile.rec"
    frames = [msgspec.msgpack.decode(msgspec.msgpack.encode(frame)) for frame in Recording.open(path).frames()]
    num_refused = 0
    for _ in range(300):
        frame = rng.choice(frames)
        data = bytearray(msgspec.msgpack.encode(frame))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        hostile.write_bytes(head + Struct("<II").pack(len(data), zlib.crc32(data)) + data)
        try:
            list(Recording.open(hostile).frames())
        except RecordingError as error:
            num_refused += "is invalid" in str(error)
    assert num_refused > 100


def test_rotated_files_begin_with_what_is_unfinished(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.rec"
    prompt = tuple(range(3, 33))
    with recorded(path, config_of(folder, **SMALL), max_mib=4 * 1500 / 2**20) as engine:
        for name in "ab":
            engine.engine.add_request(name, prompt, SamplingParams(max_tokens=60, ignore_eos=True))
        engine.run()
    files = [path.with_name(f"engine.rec.{number}") for number in (3, 2, 1)] + [path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size < 4500 for file in files)
    steps: list[StepTrace] = []
    for file in files:
        frames = list(Recording.open(file).frames())
        start, begun, tables = frames[:3]
        assert isinstance(start, EngineStart) and isinstance(begun, Records) and isinstance(tables, Tables)
        for request in begun.records:
            assert isinstance(request, RequestTrace) and request.detail is not None
            num_tokens = len(prompt) + len(request.detail.output_token_ids)
            (chunk,) = [c for c in records(frames, StepTrace)[0].chunks if c.number == request.number]
            assert chunk.start == num_tokens - 1
            num_blocks = len(tables.tables[request.number])
            assert num_blocks == -(-(num_tokens - 1) // 4)
            assert chunk.detail is None or chunk.detail.first_block == num_blocks
        steps += records(frames, StepTrace)
        assert isinstance(frames[-1], Close)
    numbers = [step.step for step in steps]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


def test_recording_that_is_there_is_kept_as_an_older_one(path: Path, folder: Path, tmp_path: Path) -> None:
    new, config = tmp_path / "engine.rec", config_of(folder, **SMALL)
    new.write_bytes(path.read_bytes())
    failed = Recorder(new, config, max_mib=1)
    failed.end_engine(0, "it did not start")
    failed.close()
    assert [*tmp_path.iterdir()] == [new] and new.read_bytes() == path.read_bytes()
    with recorded(new, config) as engine:
        add(engine, 1)
        engine.run()
    assert (tmp_path / "engine.rec.1").read_bytes() == path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [new, tmp_path / "engine.rec.1"]


def wait_until_written(engine: RecordedEngine) -> None:
    """Wait until the file has its first frame."""
    while not engine.recorder.num_bytes or not list(Recording.open(engine.recorder._path).frames()):
        time.sleep(0.01)


def test_paths_that_cannot_be_recorded_to_are_refused(path: Path, folder: Path, tmp_path: Path) -> None:
    def refused(path: Path | str) -> str:
        with pytest.raises(ConfigError) as error:
            Recorder(Path(path), config_of(folder, **SMALL), max_mib=1)
        return str(error.value)

    for text in (".", "/", "..", str(tmp_path)):
        assert refused(text).endswith("is a folder; it must be the path of a file, such as server.rec")
    assert refused(tmp_path / "absent" / "engine.rec").endswith(
        "engine.rec cannot be written: No such file or directory"
    )
    assert refused(path / "engine.rec").endswith("engine.rec cannot be written: Not a directory")
    assert refused(tmp_path / ("x" * 254)).endswith("cannot be written: File name too long")
    assert refused("/dev/full").endswith("would replace /dev/full, which is no recording: choose another path")
    log = tmp_path / "log"
    for number in range(4):
        other = tmp_path / (f"log.{number}" if number else "log")
        other.write_text("lines of another program")
        assert refused(log).endswith(f"would replace {other}, which is no recording: choose another path")
        other.unlink()
    written = tmp_path / "written.rec"
    written.write_bytes(path.read_bytes())
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(written).endswith("is being written by another server: choose another path")
    Recorder(written, config_of(folder, **SMALL), max_mib=1).close()
    with recorded(written, config_of(folder, **SMALL)) as engine:
        wait_until_written(engine)
        assert "is being written by another server" in refused(written)


def test_file_that_cannot_be_rotated_is_closed_once(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.rec"
    with recorded(path, config_of(folder, **SMALL), max_mib=4 * 3000 / 2**20) as engine:
        wait_until_written(engine)
        (tmp_path / "engine.rec.1").mkdir()
        closed: list[int] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(recorder_module.os, "close", lambda fd, close=os.close: (closed.append(fd), close(fd)))
            add(engine, 50)
            engine.run()
            engine.recorder._thread.join(PATIENCE)
        assert "engine.rec.1, which is no recording" in engine.recorder.ended
    assert len(closed) == len(set(closed)) == 1
    *_, close = Recording.open(path).frames()
    assert isinstance(close, Close) and close.reason == "the next file goes on"


def test_many_unfinished_requests_do_not_rotate_at_each_event(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.rec"
    config = config_of(folder, block_size=4, num_blocks=512, max_num_batched_tokens=64)
    with recorded(path, config, max_mib=4 * 4000 / 2**20) as engine:
        for number in range(16):
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            engine.engine.add_request(str(number), range(3, 60), params)
        engine.run()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ConfigError, match=r"record_max_mib must be at least 4, not 0\.0001"):
        ServerConfig(record_max_mib=0.0001)


def test_events_that_wait_when_writing_fails_are_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, may_fail = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        at_work.set()
        may_fail.wait(PATIENCE)
        raise OSError(errno.EIO, "Input/output error")

    with recorded(tmp_path / "engine.rec", config_of(folder, **SMALL)) as engine:
        wait_until_written(engine)
        monkeypatch.setattr(Recorder, "_write", fail)
        engine.recorder.take(0, [PreemptTrace(number=0, time=1.0)])
        assert at_work.wait(PATIENCE)
        for _ in range(7):
            engine.recorder.take(0, [])
        may_fail.set()
        engine.recorder._thread.join(PATIENCE)
        engine.recorder.take(0, [])
        assert engine.recorder.num_dropped == 9 and engine.recorder._queue.empty()
        assert engine.recorder.ended == "the file cannot be written: Input/output error"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond fails, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_ends_the_recording_alone(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "engine.rec"
    with recorded(path, config_of(folder, **SMALL)) as engine:
        with largest_file(20_000):
            add(engine, 50)
            assert len(engine.run()["a"]) == 50
            engine.recorder._thread.join(PATIENCE)
        assert "file cannot be written: File too large" in engine.recorder.ended
        add(engine, 3)
        assert len(engine.run()["a"]) == 3 and engine.recorder.num_dropped >= 3
    warnings = [each.getMessage() for each in caplog.records if each.name == recorder_module.__name__]
    assert len(warnings) == 1 and "ends, and the server goes on" in warnings[0]
    recording = Recording.open(path)
    assert records(list(recording.frames()), StepTrace) and "torn" in recording.fault


def test_file_that_cannot_be_ended_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with recorded(tmp_path / "engine.rec", config_of(folder, **SMALL)) as engine:
        wait_until_written(engine)
        monkeypatch.setattr(Recorder, "_write", fail)
    assert "has no end: the file cannot be written: Input/output error" in caplog.text
    assert (engine.recorder.ended, engine.recorder.num_dropped) == ("the test ended", 0)


def test_too_slow_a_disk_ends_the_recording_and_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(tmp_path / "engine.rec", config_of(folder, **SMALL)) as engine:
        monkeypatch.setattr(recorder_module, "MAX_QUEUED", 0)
        add(engine, 5)
        assert len(engine.run()["a"]) == 5
    *_, close = Recording.open(tmp_path / "engine.rec").frames()
    assert isinstance(close, Close) and "the disk is too slow" in close.reason
    assert close.num_dropped >= 1


def add(engine: RecordedEngine, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, logprobs=40)
    engine.engine.add_request("a", (3, 4, 5), params)
