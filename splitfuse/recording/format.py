"""Defines the file of a recording, and reads it: frames of MessagePack, each with its length and a checksum.

    for frame in Recording.open(Path("minute.rec")).frames():
        print(frame)

A file is complete in itself: it begins with its settings, and of each engine with the requests that were unfinished.
Files are data from outside: whatever is wrong with one is a RecordingError, or `fault` where only its end is missing.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, Self, TypeAlias

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.core.limits import EngineLimits
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.errors import RecordingError, SplitfuseError, unreadable

MAGIC = b"splitfuse recording\n"
"""Bytes at the beginning of each file."""
FORMAT = 1
"""Version of the format. A file of another one is refused."""

LAST_TIME = 253_402_300_799
"""Unix time of the end of the year 9999."""

_PREFIX = Struct("<II")  # size and CRC-32 of what follows


class Header(msgspec.Struct, frozen=True):
    """Holds what is true of a whole file."""

    format: int
    time: float
    """Unix time at which the file was begun."""
    monotonic: float
    """The same moment on the monotonic clock, which all other times are of."""
    settings: dict[str, Any]
    """Settings of the engines, flat, without adapters."""
    machine: dict[str, Any]
    has_texts: bool = False
    """True if stop strings are in the file. Compiled grammars always are: they decide tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.time <= LAST_TIME:
            raise ValueError(f"time {self.time} is no Unix time")

    @property
    def config(self) -> EngineConfig:
        """Return the settings, parsed. Raises ConfigError."""
        return EngineConfig.from_settings(self.settings)


class EngineStart(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """Records that an engine is ready, with an empty cache, or that it was when the file was begun."""

    engine: int
    time: float
    model: str
    identity: dict[str, str]
    """Texts that name what decides the tokens of a request: see runtime/fingerprint.py."""
    limits: EngineLimits
    adapters: dict[str, str]
    """Digests of the LoRA adapters that it loads at its start, by name."""


class EngineEnd(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """Records that an engine has died, or was closed. What was unfinished ends; numbers begin again."""

    engine: int
    time: float
    reason: str


class Tables(msgspec.Struct, frozen=True, array_like=True, tag="tables"):
    """Records the block tables of unfinished requests, by number, at the beginning of a file."""

    engine: int
    tables: dict[int, tuple[int, ...]]


class Records(msgspec.Struct, frozen=True, array_like=True, tag="records"):
    """Records what an engine has traced."""

    engine: int
    records: tuple[Recorded, ...]


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """Records the end of the file, and why it ends."""

    time: float
    reason: str
    num_dropped: int
    """Number of events that are missing after it, since they could not be written in time."""


Recorded: TypeAlias = RequestTrace | StepTrace | PreemptTrace | FinishTrace
Frame: TypeAlias = EngineStart | EngineEnd | Tables | Records | Close

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


def encode_frame(frame: Header | Frame) -> bytes:
    """Return a frame as it is in a file."""
    content = _encode(frame)
    return _PREFIX.pack(len(content), zlib.crc32(content)) + content


class _Content:
    """Reads a file as it was when it was opened: a server may go on writing it, and rename it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe, which is none, would wait
            weakref.finalize(self, os.close, self._fd)
            self.size = os.fstat(self._fd).st_size

    def read(self, size: int, start: int) -> bytes:
        with self._errors():
            return os.pread(self._fd, size, start)

    def next_frame(self, start: int) -> bytes | str:
        """Return the content of the frame at `start`, nothing at the end of the file, or a text why there is none."""
        left = self.size - start
        if left <= 0:
            return b""
        prefix = self.read(_PREFIX.size, start)
        if len(prefix) < _PREFIX.size:
            return f"{left} bytes from {start} on are too few for a frame"
        size, checksum = _PREFIX.unpack(prefix)
        if size > left - _PREFIX.size:
            return f"the frame at byte {start} has {left - _PREFIX.size} of {size} bytes"
        content = self.read(size, start + _PREFIX.size)
        if zlib.crc32(content) != checksum or not content:
            return f"the frame at byte {start} differs from its checksum"
        return content

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be read: {unreadable(error)}") from error


@dataclass
class Recording:
    """Reads the file of a recording, as often as wanted, as it was when it was opened."""

    path: Path
    header: Header
    _content: _Content
    _start: int
    fault: str = ""
    """What is wrong with the end of the file, once `frames` has come to it."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the beginning of a file. Raises RecordingError if it is no recording, or one of another format."""
        file = _Content(path)
        if file.read(len(MAGIC), 0) != MAGIC:
            raise RecordingError(f"{path} is no recording: splitfuse serve --record FILE makes one")
        content = file.next_frame(len(MAGIC))
        if not content or isinstance(content, str):
            raise RecordingError(f"{path} ends within its first frame: {content or 'it has none'}")
        try:
            version = msgspec.msgpack.decode(content, type=_Version).format
            if version != FORMAT:
                raise RecordingError(
                    f"{path} has the format {version}, which this version of splitfuse does not read: it reads {FORMAT}"
                )
            header = msgspec.msgpack.decode(content, type=Header)
            return cls(path, header, file, len(MAGIC) + _PREFIX.size + len(content))
        except (msgspec.MsgspecError, ValueError) as error:
            raise RecordingError(f"{path} has no valid header: {error}") from error

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in the order in which they were written, up to the end or to where the file is torn.

        Raises RecordingError for a frame that is none.
        """
        start = self._start
        while (content := self._content.next_frame(start)) != b"":
            if isinstance(content, str):
                self.fault = f"the file is torn, and read up to there: {content}"
                return
            start += _PREFIX.size + len(content)
            try:
                yield _decode(content)
            except (msgspec.MsgspecError, SplitfuseError, ValueError, RecursionError) as error:
                raise RecordingError(f"{self.path}: the frame before byte {start} is invalid: {error}") from error


def is_recording(path: Path) -> bool:
    """Return whether a file begins as a recording does: a pipe, from which nothing is taken, does not."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _Version(msgspec.Struct):
    format: int
