"""Writes messages on a stream of bytes between two processes: a length of four bytes, then that many of MessagePack."""

from __future__ import annotations

import asyncio
import socket
import struct

_LENGTH = struct.Struct(">I")
HEADER_BYTES = _LENGTH.size
MAX_MESSAGE = 2**28
"""Most bytes of a message. A prompt of a million tokens takes five million."""
READ_AHEAD = 2**22
"""Bytes that are read of a connection before they are taken in."""
HANDSHAKE_SECONDS = 5.0
"""Longest time of a handshake."""
BEAT_SECONDS = 0.5
"""Seconds between two beats, by which the other side knows that a process lives."""


def frame(message: bytes) -> bytes:
    """Return a message as it goes over the wire."""
    return _LENGTH.pack(len(message)) + message


def message_length(header: bytes, *, most: int = MAX_MESSAGE) -> int:
    """Return the length of the message behind this header. Raises ValueError if it is longer than any message."""
    length: int = _LENGTH.unpack(header)[0]
    if length > most:
        raise ValueError(f"the message has {length} bytes, more than the {most} allowed")
    return length


async def read_message(reader: asyncio.StreamReader, *, most: int = MAX_MESSAGE) -> bytes:
    """Return the next message. Raises ValueError if it is too long, asyncio.IncompleteReadError if there is none."""
    length = message_length(await reader.readexactly(HEADER_BYTES), most=most)
    return await reader.readexactly(length)


def receive(connection: socket.socket) -> bytes | None:
    """Wait for the next message; return None if the other side has closed. Raises ValueError for a malformed header."""
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
