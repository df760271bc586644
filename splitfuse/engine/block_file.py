"""Keeps KV blocks in a file that the engines of a machine share: in memory, or on a disk, where it outlives them.

    header    what the blocks are of: sizes, and the fingerprint of their names
    table     for each slot a sequence number, a name, that of the block before, when it was used, and a checksum
    slots     tokens and bytes of a block each

Each engine writes the slots of its own part, and reads all: there is nothing to lock, and an engine that is stopped or
dies makes no other wait. What is written to a slot comes before its entry in the table, whose sequence number is odd
meanwhile. A reader copies the slot, looks at the entry again, and compares the checksum: a block that was overwritten,
torn or changed is not there.

The table is mapped, its place on the disk taken when the file is opened; slots are read and written by system calls, so
that a full disk, or full memory, is an error of theirs and nothing worse.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import threading
import time
from array import array

import numpy as np
import numpy.typing as npt

from splitfuse.core.kv.fetching import Data, Frame
from splitfuse.core.kv.names import NAME_BYTES
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import PLACEHOLDER
from splitfuse.errors import ConfigError

_MAGIC = b"sfblock1"
_HEADER = struct.Struct("<8sQQQ32s")  # magic, bytes of a block, its tokens, number of slots, fingerprint
_PAGE = 4096
_ENTRY_BYTES = 8 + 8 + 2 * NAME_BYTES + 4
RECENT = 1_000_000_000
"""Nanoseconds within which a use of a block is as good as now."""
_NONE = bytes(NAME_BYTES)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk that is full, or of a limit that is reached."""

_logger = logging.getLogger(__name__)


class BlockFile:
    """Reads and writes blocks in the file behind `fd`. Threads may share it.

    It has as many slots as fit `num_bytes`, and writes those of `part` of `num_parts`, the least recently used first. A
    file with another number of slots, blocks of other sizes or another fingerprint is cleared, and gives back its room;
    `num_foreign` says how many blocks it had. Raises ConfigError if not a single slot for each part fits, OSError if
    there is no room for the table.
    """

    def __init__(
        self,
        fd: int,
        *,
        num_bytes: int,
        block_bytes: int,
        block_size: int,
        fingerprint: bytes,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self._fd = fd
        self._block_bytes, self._block_size = block_bytes, block_size
        self._slot_bytes = ceil_div(4 * block_size + block_bytes, 64) * 64
        self.num_slots = max(num_bytes - 2 * _PAGE, 0) // (self._slot_bytes + _ENTRY_BYTES)
        if self.num_slots < num_parts:
            least = 2 * _PAGE + num_parts * (self._slot_bytes + _ENTRY_BYTES)
            raise ConfigError(
                f"a KV tier of {num_bytes} bytes is too small for blocks of {block_bytes} bytes: give it at least "
                f"{ceil_div(least, 2**20)}MiB"
            )
        self._data_at = ceil_div(_HEADER.size + self.num_slots * _ENTRY_BYTES, _PAGE) * _PAGE
        self._own = slice(part, None, num_parts)
        self.num_own_slots = len(range(self.num_slots)[self._own])
        self._part, self._num_parts = part, num_parts
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._index: dict[bytes, int] = {}  # name -> slot
        self._can_overwrite = True  # on a full disk, as far as is known
        header = self._header = _HEADER.pack(_MAGIC, block_bytes, block_size, self.num_slots, fingerprint)
        before = os.pread(fd, _HEADER.size, 0)
        os.posix_fallocate(fd, 0, self._data_at)
        self._map = mmap.mmap(fd, self._data_at)
        at = _HEADER.size
        count = self.num_slots
        self._names, at = self._words(at, 2 * count).reshape(count, 2), at + NAME_BYTES * count
        self._before, at = self._words(at, 2 * count).reshape(count, 2), at + NAME_BYTES * count
        self._sequences, at = self._words(at, count), at + 8 * count
        self._used, at = self._words(at, count), at + 8 * count
        self._checksums: npt.NDArray[np.uint32] = np.frombuffer(self._map, np.uint32, count, at)
        self._named: dict[int, bytes] = {}  # slot -> its name in the index
        self.num_foreign = 0
        if before != header:
            self.num_foreign = self._clear(before)
        self._sequences[self._own] += self._sequences[self._own] % 2  # what a writer has left that died
        self._seen = np.zeros(self.num_slots, np.int64)
        self.refresh()

    def _words(self, offset: int, count: int) -> npt.NDArray[np.int64]:
        return np.frombuffer(self._map, np.int64, count, offset)

    def _clear(self, before: bytes) -> int:
        """Forget all blocks. Returns how many there were, if the file began with `before`."""
        num_blocks = 0
        if len(before) == _HEADER.size and before.startswith(_MAGIC):
            num_before = min(_HEADER.unpack(before)[3], os.fstat(self._fd).st_size // NAME_BYTES)
            names = os.pread(self._fd, NAME_BYTES * num_before, _HEADER.size)
            names = names[: len(names) // NAME_BYTES * NAME_BYTES]
            num_blocks = int(np.frombuffer(names, np.int64).reshape(-1, 2).any(axis=1).sum())
        os.ftruncate(self._fd, self._data_at)  # else it would stay as large as it was, with what users wrote
        self._map[_HEADER.size :] = bytes(len(self._map) - _HEADER.size)
        self._map[: _HEADER.size] = self._header
        return num_blocks

    def _begin_anew_if_cut(self) -> None:
        """Forget all blocks if another program has cut the file: to touch the table would end the process.

        Raises OSError if there is no room for a new one.
        """
        if os.fstat(self._fd).st_size < self._data_at:
            with self._lock:
                self._index.clear()
                self._named.clear()
            os.posix_fallocate(self._fd, 0, self._data_at)
            self._clear(b"")
            _logger.warning("a file of KV blocks was cut by another program: it begins anew")

    def __len__(self) -> int:
        """Return how many blocks are there, as far as this process has seen."""
        return len(self._index)

    def __contains__(self, name: bytes) -> bool:
        return name in self._index

    def refresh(self) -> None:
        """Look at what other processes have written since."""
        self._begin_anew_if_cut()
        with self._lock:
            changed = np.flatnonzero(self._sequences != self._seen)
            for slot in changed.tolist():
                self._note(slot)

    def _note(self, slot: int) -> None:
        """Take the entry of a slot into the index."""
        sequence, name = int(self._sequences[slot]), self._names[slot].tobytes()
        self._seen[slot] = sequence
        former = self._named.pop(slot, None)
        if former is not None and self._index.get(former) == slot:
            del self._index[former]
        if sequence % 2 == 0 and name != _NONE:
            self._index[name] = slot
            self._named[slot] = name

    def write(self, frame: Frame, before: bytes) -> bool:
        """Write a block into the slot that was used least recently; `before` is the name of the block before it, if it
        is not the first. Returns False if it is there already. Raises OSError if there is no room: the next ones take
        the places of blocks that are there, then.
        """
        missing = self._block_size - len(frame.token_ids)  # of a block that is not full
        written = array("i", [*frame.token_ids, *[PLACEHOLDER] * missing]).tobytes(), frame.data
        with self._writing:
            return self._write(frame, before, written)

    def _write(self, frame: Frame, before: bytes, written: tuple[bytes, Data]) -> bool:
        self.refresh()  # another engine may have computed the same
        with self._lock:
            if frame.name in self._index:
                return False
            slot = self._least_recently_used()
            is_empty = not self._names[slot].any()
            writing = int(self._sequences[slot]) + 1 | 1  # odd, whatever was left there
            self._sequences[slot] = writing
            self._names[slot], self._used[slot] = 0, 0
            self._note(slot)
        try:
            num_written = os.pwritev(self._fd, written, self._data_at + slot * self._slot_bytes)
            if num_written != 4 * self._block_size + self._block_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except Exception as error:
            with self._lock:
                self._sequences[slot] = writing + 1
                is_full = isinstance(error, OSError) and error.errno in _NO_ROOM
                self._can_overwrite = self._can_overwrite and is_empty
                if is_full and self._can_overwrite:  # empty slots are tried again once the others were used since
                    self._used[self._own][~self._names[self._own].any(axis=1)] = time.time_ns()
            raise
        with self._lock:
            self._names[slot], self._before[slot] = _as_words(frame.name), _as_words(before or _NONE)
            self._checksums[slot] = frame.checksum
            self._sequences[slot] = writing + 1
            self._note(slot)
        self.touch(frame.name)
        return True

    def _least_recently_used(self) -> int:
        """Return the own slot that was used least recently. Where the clock has gone back, slots count as used now:
        else what is written from now on would go before all of them.
        """
        used, now = self._used[self._own], time.time_ns()
        used[used > now] = now
        return self._part + self._num_parts * int(used.argmin())

    def read(self, name: bytes) -> Frame | None:
        """Return the block of a name; None if it is not there, or was overwritten meanwhile. It may not be intact: see
        `drop`. Raises OSError if it cannot be read.
        """
        self._begin_anew_if_cut()
        with self._lock:
            slot = self._index.get(name)
            if slot is None:
                return None
            sequence, checksum = int(self._sequences[slot]), int(self._checksums[slot])
        tokens, data = array("i", bytes(4 * self._block_size)), np.empty(self._block_bytes, np.uint8)
        num_read = os.preadv(self._fd, [tokens, data.data], self._data_at + slot * self._slot_bytes)
        if sequence % 2 or sequence != int(self._sequences[slot]) or self._names[slot].tobytes() != name:
            with self._lock:
                self._note(slot)  # dropped, it would be taken to be there, and not be written again
            return None
        if num_read != 4 * self._block_size + self._block_bytes:
            data = data[:0]  # which has another checksum
        num_tokens = tokens.index(PLACEHOLDER) if tokens[-1] == PLACEHOLDER else self._block_size
        return Frame(name, tuple(tokens[:num_tokens]), data, checksum)

    def drop(self, name: bytes) -> None:
        """Forget a block whose bytes are not those that were written."""
        with self._lock:
            slot = self._index.get(name)
            if slot is not None:
                if self._names[slot].tobytes() == name:
                    self._names[slot], self._used[slot] = 0, 0
                self._note(slot)

    def close(self) -> None:
        """Let the file go; the object is of no use then."""
        with self._lock:
            self._index.clear()
            nothing = np.zeros(0, np.int64)
            self._names = self._before = nothing.reshape(0, 2)
            self._sequences = self._used = nothing
            self._checksums = np.zeros(0, np.uint32)
            self._map.close()

    def touch(self, name: bytes) -> None:
        """Note that a block is used, and those before it in the same text: without them it is of no use."""
        now = time.time_ns()
        with self._lock:
            while (slot := self._index.get(name)) is not None:
                if 0 <= now - int(self._used[slot]) < RECENT:
                    return
                self._used[slot] = now
                name = self._before[slot].tobytes()


def _as_words(name: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(name, np.int64)
