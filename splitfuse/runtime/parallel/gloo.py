"""Adds up what ranks on several machines give, by torch.distributed's gloo over TCP."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from splitfuse.errors import RankLostError
from splitfuse.kernels.group import PATIENCE, Shard, SummingGroup

JOIN_SECONDS = 60.0
"""Longest time until all ranks are connected, in seconds: a process has to begin."""
Store: TypeAlias = Any
"""Place through which ranks find each other."""
_dist: Any = torch.distributed  # whose types say less than there is


def make_store(host: str) -> Store:
    """Return a store at a free port of this address. It lasts as long as the object."""
    return _dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS))


def open_store(host: str, port: int) -> Store:
    """Return the store of another rank. Raises RankLostError if it cannot be reached."""
    try:
        return _dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
    except RuntimeError as error:
        raise RankLostError(f"the store of the group at {host}:{port} cannot be reached: {error}") from error


class GlooGroup(SummingGroup):
    """Connects a rank to the others, which find each other through a store. `address` is that of this machine which
    they reach. Raises RankLostError if they do not come.
    """

    def __init__(self, store: Store, shard: Shard, *, address: str, patience: float = PATIENCE) -> None:
        self.shard = shard
        self._is_broken = False
        self._received = torch.empty(0)  # by the largest sum until now
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=address)]
        try:
            self._ranks = _dist.ProcessGroupGloo(store, shard.rank, shard.size, options)
        except RuntimeError as error:
            raise RankLostError(f"the ranks of the group cannot connect to each other: {error}") from error
        self._ranks._set_default_timeout(timedelta(seconds=patience))

    def add_up(self, numbers: Tensor) -> None:
        first, *others = self._of_all(numbers)
        for each in others:
            first += each
        numbers.copy_(first)

    def join_columns(self, own: Tensor, columns: int) -> Tensor:
        spans = [Shard(rank, self.shard.size).span(columns) for rank in range(self.shard.size)]
        padded = own.new_zeros(len(own), max(map(len, spans)))  # all must send as much
        padded[:, : own.shape[1]] = own
        parts = [each[:, : len(span)] for each, span in zip(self._of_all(padded), spans, strict=True)]
        return torch.cat(parts, dim=1)

    def _of_all(self, numbers: Tensor) -> Sequence[Tensor]:
        """Return what each rank has in its place, until the next call."""
        if self._is_broken:
            raise RankLostError("the tensor-parallel group has ended")
        size, count = self.shard.size, numbers.numel()
        if self._received.numel() < size * count:
            with torch.inference_mode(False):  # it may be used in either mode
                self._received = torch.empty(size * count)
        found = [self._received[rank * count :][:count].view(numbers.shape) for rank in range(size)]
        try:
            self._ranks.allgather([found], [numbers]).wait()
        except RuntimeError as error:
            self._is_broken = True
            raise RankLostError(f"a rank of the tensor-parallel group does not answer: {error}") from error
        return found

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    def end(self) -> None:
        """End the group for this rank: the others notice when its process ends."""
        self._is_broken = True
