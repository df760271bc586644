"""Writes a recording in a thread of its own, from a bounded queue: see format.py for the file.

The file is begun when the first engine is ready: a server that cannot start leaves recordings as they are.

It decides which texts are left out, when a file is rotated, and that a recording ends, and nothing else does, when it
cannot be written as fast as it comes, or at all.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import stat
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.engine.messages import EngineInfo
from splitfuse.engine.trace import (
    FinishTrace,
    PreemptTrace,
    RequestTrace,
    StepTrace,
    TraceRecord,
)
from splitfuse.errors import ConfigError, unreadable
from splitfuse.recording.format import (
    FORMAT,
    MAGIC,
    Close,
    EngineEnd,
    EngineStart,
    Frame,
    Header,
    Recorded,
    Records,
    Tables,
    encode_frame,
    is_recording,
)
from splitfuse.runtime.environment import environment_info

MAX_QUEUED = 4096
"""Number of events that wait to be written: those of some seconds of the shortest steps."""
NUM_FILES = 4
"""Number of files that a recording has at most: FILE, and FILE.1 to FILE.3, the oldest."""
WRITE_SECONDS = 0.2
"""Time from one writing to the next: a thread that wakes for each step takes several times as much of the processor,
since the step has replaced what it needs in the caches.
"""
LAST_SECONDS = 10.0
"""Time at the end of a process to write what is left."""
SETTINGS_LEFT_OUT = ("lora",)
"""Settings that are not in a file: they have paths of this machine, and digests name adapters better."""

_logger = logging.getLogger(__name__)


class _Unfinished:
    """Holds a request as a new file must begin with it."""

    def __init__(self, request: RequestTrace) -> None:
        self.request = request
        self.token_ids = list(request.detail.output_token_ids) if request.detail else []
        self.table: list[int] = []

    @property
    def trace(self) -> RequestTrace:
        """Return its record, with the tokens that it has now."""
        assert self.request.detail is not None
        detail = msgspec.structs.replace(self.request.detail, output_token_ids=tuple(self.token_ids))
        return msgspec.structs.replace(self.request, detail=detail)


class Recorder:
    """Records engines, by index, to a file of at most `max_mib` with those before it. Its methods neither wait nor
    raise, and belong to one thread.
    """

    def __init__(self, path: Path, config: EngineConfig, *, max_mib: float, keep_texts: bool = False) -> None:
        """Check that the file can be written; raises ConfigError if not. A recording of that name is kept as an older
        one, and other files are left alone.
        """
        self.num_dropped = 0
        """Number of events that were not written, since the recording had ended."""
        self.num_bytes = 0
        """Number of bytes that were written."""
        self.ended = ""
        """Why the recording has ended; empty while it goes on."""
        self._path = path
        self._most = max(1, int(max_mib * 2**20 / NUM_FILES))
        self._keep_texts = keep_texts
        self._settings = {name: each for name, each in config.settings.items() if name not in SETTINGS_LEFT_OUT}
        self._machine = environment_info()["machine"]
        self._salts: dict[str, str] = {"": ""}
        self._starts: dict[int, EngineStart] = {}
        self._unfinished: dict[int, dict[int, _Unfinished]] = {}
        self._queue: queue.SimpleQueue[Frame | tuple[int, Sequence[TraceRecord]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Held to put an event and to end: what is put after the end is counted, and not kept."""
        self._has_ended = threading.Event()
        self._fd = -1  # no file yet
        _check_files(path)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def start_engine(self, engine: int, info: EngineInfo) -> None:
        """Record that an engine is ready."""
        adapters = dict(info.adapters)
        self._put(EngineStart(engine, time.monotonic(), info.model, info.identity, info.limits, adapters))

    def end_engine(self, engine: int, reason: str) -> None:
        """Record that an engine has died."""
        self._put(EngineEnd(engine, time.monotonic(), reason))

    def take(self, engine: int, records: Sequence[TraceRecord]) -> None:
        """Record what an engine has traced."""
        self._put((engine, records))

    def close(self, reason: str = "the server ended") -> None:
        """Write what is left, and end."""
        with self._lock:
            self._end(reason)
        self._thread.join(LAST_SECONDS)

    def _put(self, event: Frame | tuple[int, Sequence[TraceRecord]]) -> None:
        with self._lock:
            if not self.ended and self._queue.qsize() >= MAX_QUEUED:
                self._end(f"{MAX_QUEUED} events wait to be written: the disk is too slow", is_fault=True)
            if self.ended:
                self.num_dropped += 1
            else:
                self._queue.put(event)

    def _end(self, reason: str, *, is_fault: bool = False) -> None:
        """End the recording, with the lock held."""
        if not self.ended:
            self.ended = reason
            if is_fault:
                _logger.warning("the recording %s ends, and the server goes on: %s", self._path, reason)
            self._queue.put(None)
            self._has_ended.set()

    # The thread that writes -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        num_unwritten = 0
        try:
            while (event := self._queue.get()) is not None:
                num_unwritten = 1
                self._write_event(event)
                num_unwritten = 0
                if self._fd >= 0 and self._size - self._size_at_first > self._most:
                    self._write(Close(time.monotonic(), "the next file goes on", 0))
                    self._close_file()
                    self._begin_file()
                if self._queue.empty():
                    self._has_ended.wait(WRITE_SECONDS)
            if self._fd >= 0:
                self._write(Close(time.monotonic(), self.ended, self.num_dropped))
        except OSError as error:
            self._fail(f"the file cannot be written: {unreadable(error)}", num_unwritten)
        except ConfigError as error:
            self._fail(str(error), num_unwritten)
        except Exception as error:
            _logger.exception("a recorder failed")
            self._fail(f"the recorder failed: {error!r}", num_unwritten)
        finally:
            self._close_file()

    def _fail(self, reason: str, num_unwritten: int) -> None:
        """End the recording, and count what was to be written."""
        with self._lock:
            if self.ended:
                _logger.warning("the recording %s has no end: %s", self._path, reason)
            self._end(reason, is_fault=True)
            while not self._queue.empty():
                num_unwritten += self._queue.get() is not None
            self.num_dropped += num_unwritten

    def _write_event(self, event: Frame | tuple[int, Sequence[TraceRecord]]) -> None:
        if self._fd < 0:
            if not isinstance(event, EngineStart):
                return  # an engine could not start
            self._begin_file()
        if isinstance(event, tuple):
            engine, traced = event
            records = tuple(self._follow(engine, each) for each in traced if isinstance(each, Recorded))
            if records:
                self._write(Records(engine, records))
        else:
            if isinstance(event, EngineStart):
                self._starts[event.engine] = event
            elif isinstance(event, EngineEnd):
                self._starts.pop(event.engine, None)
                self._unfinished.pop(event.engine, None)
            self._write(event)

    def _follow(self, engine: int, record: Recorded) -> Recorded:
        """Return a record as it is written, and note what it changes of the unfinished requests."""
        unfinished = self._unfinished.setdefault(engine, {})
        match record:
            case RequestTrace():
                record = self._without_secrets(record)
                unfinished[record.number] = _Unfinished(record)
            case StepTrace():
                for chunk in record.chunks:
                    request = unfinished.get(chunk.number)
                    if request is None:
                        continue
                    request.token_ids += chunk.token_ids
                    if chunk.detail is not None and chunk.detail.blocks:
                        request.table[chunk.detail.first_block :] = chunk.detail.blocks
            case PreemptTrace():
                if (request := unfinished.get(record.number)) is not None:
                    request.table.clear()
            case FinishTrace():
                unfinished.pop(record.number, None)
        return record

    def _without_secrets(self, request: RequestTrace) -> RequestTrace:
        """Return a request without what is derived from keys, and without stop strings unless they are wanted."""
        detail = request.detail
        if detail is None:
            return request
        salt = detail.scheduling.cache_salt
        scheduling = replace(detail.scheduling, cache_salt=self._salts.setdefault(salt, str(len(self._salts))))
        params = detail.params if self._keep_texts else replace(detail.params, stop=())
        detail = msgspec.structs.replace(detail, scheduling=scheduling, params=params)
        return msgspec.structs.replace(request, detail=detail)

    def _begin_file(self) -> None:
        _check_files(self._path)  # again: minutes have passed since
        for number in reversed(range(NUM_FILES - 1)):
            with suppress(FileNotFoundError):
                _numbered(self._path, number).replace(_numbered(self._path, number + 1))
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # there are file systems without locks
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._size = 0
        header = Header(FORMAT, time.time(), time.monotonic(), self._settings, self._machine, self._keep_texts)
        self._write_bytes(MAGIC + encode_frame(header))
        for engine, start in self._starts.items():
            self._write(start)
            requests = self._unfinished.get(engine, {})
            if requests:
                self._write(Records(engine, tuple(each.trace for each in requests.values())))
                self._write(Tables(engine, {number: tuple(each.table) for number, each in requests.items()}))
        self._size_at_first = self._size

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, frame: Frame) -> None:
        self._write_bytes(encode_frame(frame))

    def _write_bytes(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]
        self._size += len(data)
        self.num_bytes += len(data)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _check_files(path: Path) -> None:
    """Raise a ConfigError if `path` cannot be recorded to, or if a file that would be moved or deleted is no recording,
    or is being written.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"record {path} is a folder; it must be the path of a file, such as server.rec")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        for file in (_numbered(path, number) for number in range(NUM_FILES)):
            with suppress(FileNotFoundError):
                about = os.lstat(file)
                if not stat.S_ISREG(about.st_mode) or (about.st_size and not is_recording(file)):
                    raise ConfigError(f"record {path} would replace {file}, which is no recording: choose another path")
        if _is_locked(path):
            raise ConfigError(f"record {path} is being written by another server: choose another path")
    except (OSError, ValueError) as error:
        raise ConfigError(f"record {path} cannot be written: {unreadable(error)}") from error


def _is_locked(path: Path) -> bool:
    """Return whether a recorder writes the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
