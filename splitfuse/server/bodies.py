"""Bounds the memory of request bodies: of all together as their bytes come, and of what JSON makes of one."""

from __future__ import annotations

import re

from splitfuse.config.server import ServerConfig
from splitfuse.errors import OverloadedError
from splitfuse.server.errors import RefusedError

FREE_BYTES = 65536
"""Bytes of each body that are not counted: short requests are read whatever long ones hold."""
BODIES = 16
"""Number of bodies of the largest size that fit the budget."""
SHARE_OF_OLD = 4
"""Fraction, as 1 / this, of the budget that only bodies which are being read may use."""
MAX_VALUES = 2**20
"""Number of values in the JSON of a body; arrays and objects count four times."""
BYTES_PER_VALUE = 64
"""Memory of such a value."""
SLOWEST = 16384
"""Bytes that a client has to send in a second, after a fixed time."""

_PIECE = 2**16
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|(".*)', re.DOTALL)
"""Text in JSON, or the beginning of one that has no end, which is also the group then."""


class BodyBudget:
    """Counts the bytes of bodies, and of what they were decoded to, until their requests end.

    >>> budget = BodyBudget(2**28)
    >>> held = budget.hold(2**20, held=0)
    >>> budget.release(held)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0

    @classmethod
    def of(cls, config: ServerConfig) -> BodyBudget:
        """Return the budget of a server: for several of the largest bodies, and for the values of one. With several
        fronts, each of its processes has a part, with which it can read at least one of them.
        """
        body, values = int(config.max_body_mib * 2**20), MAX_VALUES * BYTES_PER_VALUE
        whole = BODIES * body + values
        return cls(whole if config.fronts == 1 else max(whole // (config.fronts + 1), 2 * (body + values)))

    def hold(self, size: int, *, held: int) -> int:
        """Return the bytes that a request of `size` bytes holds, which held `held` before. Raises OverloadedError if
        there is no room.
        """
        more = max(size - FREE_BYTES, 0) - held
        most = self.most if held else self.most - self.most // SHARE_OF_OLD
        if more > 0 and self.used + more > most:
            raise OverloadedError(
                f"the server holds {self.used} bytes of requests, at most {most} before it begins to read another; "
                "try again in 1 s",
                retry_after=1.0,
            )
        self.used += more
        return held + more

    def release(self, held: int) -> None:
        """Count the end of a request."""
        self.used -= held


def decoded_size(body: bytes) -> int:
    """Return the most memory that a body needs once it is decoded. Raises RefusedError (413) for too many values."""
    if (values := _num_values(body)) > MAX_VALUES:
        raise RefusedError(
            413, f"the body has more than {MAX_VALUES} values, the most this server decodes", code="body_too_large"
        )
    width = 1 if body.isascii() and b"\\u" not in body else 4  # Python's texts have one size of characters
    return width * len(body) + BYTES_PER_VALUE * values


def _num_values(body: bytes) -> int:
    """Return the number of values, or some number above MAX_VALUES."""
    most = sum(_num_separators(body[start : start + _PIECE]) for start in range(0, len(body), _PIECE))
    if most <= MAX_VALUES:
        return most
    count = start = 0
    while start < len(body) and count <= MAX_VALUES:  # commas in texts do not count
        piece = body[start : start + _PIECE]
        *others, last = _STRING.split(piece)  # in one call: a loop over millions of texts would stall other threads
        cut = others[-1] if others and others[-1] is not None else b""
        count += _num_separators(b"".join(others[::2]) + last)
        if len(cut) == len(piece):  # a text longer than a piece
            start = _STRING.match(body, start).end()  # type: ignore[union-attr]
        else:
            start += len(piece) - len(cut)
    return count


def _num_separators(piece: bytes) -> int:
    return piece.count(b",") + 4 * (piece.count(b"[") + piece.count(b"{"))
