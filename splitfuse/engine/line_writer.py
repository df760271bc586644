"""Writes lines to standard output or error in a thread of its own: a pipe that is full holds up nothing but its lines.

Decides how many lines are kept for a reader that is slow. Further ones are dropped, and their number is written once
there is room again.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self, TextIO

MAX_QUEUED_BYTES = 2**22
"""Size of the lines that wait to be written. A larger line is written if it is the only one."""
LAST_SECONDS = 2.0
"""Time at the end of a process to write what is left."""


def note_dropped(count: int) -> str:
    """Return the line about lines that were dropped."""
    return f"warning: {count} lines were dropped here, which could not be written"


class LineWriter:
    """Writes lines to a stream, in order; a stream that fails, or that nothing reads, loses lines but raises nothing.

    The stream's own buffer is passed by: the interpreter would wait for it at its end.
    """

    def __init__(self, stream: TextIO, *, note: Callable[[int], str] = note_dropped) -> None:
        self.num_dropped = 0
        """Number of lines that were not written."""
        self._stream = stream
        self._note = note
        try:
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError):  # not a file, as in tests, or closed
            self._fd = None
        self._lines: list[bytes] = []
        self._size = 0  # of the lines that are not written yet
        self._noted = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Write text, of a whole line or several, soon."""
        line = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
        with self._changed:
            if self._size and self._size + len(line) > MAX_QUEUED_BYTES:
                self.num_dropped += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout: float = LAST_SECONDS) -> None:
        """Write the lines that are left, for at most `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                lines, self._lines = self._lines, []
            if not lines:
                return
            succeeded = self._put(b"".join(lines))
            with self._changed:
                self._size -= sum(map(len, lines))
                self.num_dropped += 0 if succeeded else len(lines)
                new = self.num_dropped - self._noted
            if succeeded and new and self._put(f"{self._note(new)}\n".encode()):
                self._noted += new

    def _put(self, data: bytes) -> bool:
        """Write all of it; return False if the stream has failed: closed, or on a disk that is full."""
        if self._fd is None:
            with suppress(OSError, ValueError):
                self._stream.write(data.decode(self._stream.encoding or "utf-8"))
                self._stream.flush()
                return True
            return False
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # another process has made the pipe so
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                return False
        return True
