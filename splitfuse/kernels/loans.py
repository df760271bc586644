"""Holds the memory through which the two engines of a loan talk: see csrc/loans.h.

A creditor keeps the keys and values of a request's leading tiles for a debtor, and merges them for its queries.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass

TILE = 512
"""Number of tokens of a tile, of which loans consist. It is in csrc/loans.h too."""
HEADER_BYTES = 4096
"""Bytes of a channel before its data. The number is in csrc/loans.h too."""
PATIENCE = 2.0
"""Longest time that a creditor may take without any progress, in seconds; then its loan is lost."""
CLOSED_AT = 256
"""Place in a channel of the number that ends a loan. It is in csrc/loans.h too."""
STATE_AT = HEADER_BYTES - 8
"""Place in a channel of a number by which a creditor says whether it lends."""
OPEN, GRANTED, REFUSED = range(3)

_NUMBER, _STATE, _CLOSED = struct.Struct("<Q"), struct.Struct("<q"), struct.Struct("<I")


class Channel:
    """Maps the memory of one loan, a file that both engines have open. Raises OSError or ValueError for a file that is
    not such memory, or of another loan.

    >>> fd = make_channel(7, 2**20)
    >>> Channel(fd, 7).state == OPEN
    True
    """

    def __init__(self, fd: int, number: int, *, patience: float = PATIENCE) -> None:
        size = os.fstat(fd).st_size
        if size <= HEADER_BYTES:
            raise ValueError(f"a file of {size} bytes is no channel of a loan")
        self.number = number
        self.patience = patience
        self.capacity = size - HEADER_BYTES
        """Bytes of its data."""
        self._map = mmap.mmap(fd, size)
        if _NUMBER.unpack_from(self._map) != (number,):
            raise ValueError(f"the file is not the channel of loan {number}")
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)

    @property
    def state(self) -> int:
        """Return OPEN until the creditor has answered, then GRANTED or REFUSED."""
        state: int = _STATE.unpack_from(self._map, STATE_AT)[0]
        return state

    @state.setter
    def state(self, state: int) -> None:
        _STATE.pack_into(self._map, STATE_AT, state)

    @property
    def is_closed(self) -> bool:
        """Return whether the loan has ended."""
        return bool(_CLOSED.unpack_from(self._map, CLOSED_AT)[0])

    def close(self) -> None:
        """End the loan, for both engines: they notice within some hundredths of a second."""
        _CLOSED.pack_into(self._map, CLOSED_AT, 1)


def close_channel(fd: int) -> None:
    """End the loan of a channel that is not mapped."""
    os.pwrite(fd, _CLOSED.pack(1), CLOSED_AT)


def make_channel(number: int, capacity: int) -> int:
    """Return the descriptor of a new file in memory for a loan, with room for so many bytes: it takes as much memory as
    is used. No engine can change its size, since the other would die of that. Raises OSError.
    """
    fd = os.memfd_create(f"splitfuse-loan-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, HEADER_BYTES + capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.pwrite(fd, _NUMBER.pack(number), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass
class RequestLoan:
    """Says which leading positions of a request in a batch a creditor holds: whole tiles."""

    request: int  # of the batch
    num_tokens: int
    channel: Channel
    is_lost: bool = False
    """Set by the network if the creditor did not answer: what it gives for the request is of no use."""
