"""Describes tensor-parallel groups: processes (ranks) that compute one network together. See csrc/group.h.

Ranks of the C++ kernels on one machine gather: they share the memory that all read, and meet there. Others, on several
machines or on GPUs, add up partial sums.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.errors import RankLostError

HEADER_BYTES = 4096
"""Bytes of a group's memory before its data."""
BROKEN_AT = 192
"""Place of the number that ends a group. It is in csrc/group.h too."""
PATIENCE = 10.0
"""Longest time that a rank waits for the others to come to a meeting, in seconds. Ranks divide the work of a step
evenly, so one that takes so much longer than another has stopped."""

_BROKEN = struct.Struct("<I")


@dataclass(frozen=True)
class Shard:
    """Names the part of a network that one of `size` ranks computes. With `sums`, what o and down give are partial sums
    over the columns of a rank, which are added; else they give rows of a rank, over all columns.
    """

    rank: int
    size: int
    sums: bool = False

    def span(self, length: int) -> range:
        """Return which of `length` rows are this rank's.

        >>> Shard(1, 2).span(5)
        range(2, 5)
        """
        return range(length * self.rank // self.size, length * (self.rank + 1) // self.size)


WHOLE = Shard(0, 1)
"""Part of a network that one process computes alone: all of it."""


class Group(ABC):
    """Connects a rank to the others. It ends when one of them does, or waits too long for another."""

    shard: Shard

    @property
    @abstractmethod
    def is_broken(self) -> bool:
        """Return whether the group has ended."""

    def check(self) -> None:
        """Raise RankLostError if the group has ended."""
        if self.is_broken:
            raise RankLostError("the tensor-parallel group has ended")

    @abstractmethod
    def end(self) -> None:
        """End the group, so that no rank waits for this one."""


class SharedGroup(Group):
    """Maps the memory that the ranks of a group on one machine share, a file that all have open: `logits` of some rows,
    and buffers of a step.

    >>> file = make_group_file(logit_bytes=2**10, step_bytes=2**20)
    >>> SharedGroup(file, WHOLE, logit_bytes=2**10).is_broken
    False
    """

    def __init__(self, fd: int, shard: Shard, *, logit_bytes: int, patience: float = PATIENCE) -> None:
        self.shard = shard
        self.patience = patience
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)
        """Address of the meeting."""
        self.logits_address = self.address + HEADER_BYTES
        self.logit_bytes = logit_bytes
        self.buffers_address = self.logits_address + _aligned(logit_bytes)
        self.buffer_bytes = self.address + len(self._map) - self.buffers_address

    def logits(self, rows: int, vocabulary: int) -> Tensor:
        """Return the logits in the memory: [rows, vocabulary] in fp32."""
        flat = torch.frombuffer(self._map, dtype=torch.float32, count=rows * vocabulary, offset=HEADER_BYTES)
        return flat.view(rows, vocabulary)

    @property
    def is_broken(self) -> bool:
        return bool(_BROKEN.unpack_from(self._map, BROKEN_AT)[0])

    def end(self) -> None:
        """End the group for all ranks: a meeting that one waits for fails within some hundredths of a second."""
        _BROKEN.pack_into(self._map, BROKEN_AT, 1)


class SummingGroup(Group):
    """Connects ranks that share no memory. Each calls the same methods in the same order, with contiguous tensors on
    its device. All raise RankLostError; on a GPU, which computes later, a rank that is lost may be noticed by
    `join_columns` and `check` alone.
    """

    @abstractmethod
    def add_up(self, numbers: Tensor) -> None:
        """Replace numbers by their sums over all ranks."""

    @abstractmethod
    def broadcast(self, numbers: Tensor) -> None:
        """Replace numbers by those of the first rank."""

    @abstractmethod
    def join_columns(self, own: Tensor, columns: int) -> Tensor:
        """Return the columns of all ranks side by side, [R, columns] in fp32, from those of this one."""


def make_group_file(*, logit_bytes: int, step_bytes: int) -> int:
    """Return the descriptor of a new file in memory for a group: it takes as much memory as is used. Raises OSError."""
    fd = os.memfd_create("splitfuse-group")
    try:
        os.ftruncate(fd, HEADER_BYTES + _aligned(logit_bytes) + _aligned(step_bytes))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // HEADER_BYTES) * HEADER_BYTES
