"""Messages on a stream of bytes between two processes: a length of four bytes, and that many bytes of MessagePack."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct(">I")
HEADER_BYTES = _LENGTH.size
MAX_MESSAGE = 2**28
"""Bytes. A prompt of a million tokens takes five million."""


def frame(message: bytes) -> bytes:
    """A message as it goes over the wire."""
    return _LENGTH.pack(len(message)) + message


def message_length(header: bytes) -> int:
    """Of the message behind this header. Raises ValueError if no message is as long."""
    length: int = _LENGTH.unpack(header)[0]
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes, of at most {MAX_MESSAGE}")
    return length


def receive(connection: socket.socket) -> bytes | None:
    """The next message, waiting for it; None if the other side has gone. Raises ValueError for what is none."""
    header = _receive_exactly(connection, HEADER_BYTES)
    return None if header is None else _receive_exactly(connection, message_length(header))


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = connection.recv(min(count - len(parts), 2**20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
