"""Finds server-sent events in a stream, for the clients and for the load generator."""

from __future__ import annotations

DONE = b"[DONE]"
"""Data of the event after which nothing comes, in OpenAI's streams."""


class EventParser:
    r"""Finds the data of events in a stream of bytes, wherever it is cut. The data of an event is one line.

    >>> parser = EventParser()
    >>> parser.feed(b'data: {"a": 1}\n\ndata: [DO')
    [b'{"a": 1}']
    >>> parser.feed(b"NE]\n\n")
    [b'[DONE]']
    """

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that are complete with the next piece."""
        *lines, self._held = (self._held + piece).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
