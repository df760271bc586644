"""Records which requests are in the step in flight, where the record outlives the engine's process.

The front makes a file in memory, the process inherits its descriptor. What was written with one system call is there
however the process ends, and it costs a step some microseconds: a message through the socket may be lost on its way.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import msgspec

from splitfuse.engine.remote.transport import HEADER_BYTES, frame, message_length

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[str]).decode


class InFlightRecord:
    """Holds the ids of the requests in the step in flight, or in the last one between two steps."""

    def __init__(self, fd: int | None = None) -> None:
        """Use the file behind `fd`, or make one. Raises OSError if there can be none."""
        self.fd = _file_in_memory() if fd is None else fd
        self._written: Sequence[str] = ()

    def write(self, request_ids: Sequence[str]) -> None:
        """Replace the record. Called before each step and after it; many have the requests of the one before."""
        if request_ids != self._written:
            os.pwrite(self.fd, frame(_encode(request_ids)), 0)
            self._written = request_ids

    def clear(self) -> None:
        """Empty the record, which another process may have written."""
        os.pwrite(self.fd, frame(_encode([])), 0)
        self._written = ()

    def read(self) -> list[str]:
        """Return the record; it is empty if it was being written when the process ended."""
        try:
            return _decode(os.pread(self.fd, message_length(os.pread(self.fd, HEADER_BYTES, 0)), HEADER_BYTES))
        except (ValueError, msgspec.DecodeError):
            return []

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def _file_in_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("splitfuse-step")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
