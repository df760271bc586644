"""Adds up what ranks give that share no memory, by torch.distributed: gloo over TCP, and NCCL between GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from splitfuse.errors import ConfigError, RankLostError
from splitfuse.kernels.group import PATIENCE, Shard, SummingGroup

JOIN_SECONDS = 60.0
"""Longest time until all ranks have come, and then until they are connected, in seconds: a process has to begin."""
LISTEN_SECONDS = 0.05
"""Seconds between two looks at which ranks have connected."""
CPU = torch.device("cpu")
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


def announce(store: Store, rank: int, device: torch.device) -> None:
    """Tell the first rank that this one is about to connect to the others, and where its tensors are."""
    store.set(_key(rank), device.type)


def await_ranks(
    store: Store, size: int, device: torch.device, listen: Callable[[float], None], *, seconds: float = JOIN_SECONDS
) -> None:
    """Wait until all other ranks have announced themselves: NCCL would wait for one that has failed without end.
    `listen` waits for at most so many seconds, and raises the error of a rank that has failed.

    Raises RankLostError if one does not come in time, ConfigError if it computes on another kind of device.
    """
    deadline = time.monotonic() + seconds
    for rank in range(1, size):
        while not store.check([_key(rank)]):
            if time.monotonic() > deadline:
                raise RankLostError(f"rank {rank} of the group has not come within {seconds:.0f} s")
            listen(LISTEN_SECONDS)
        if (theirs := store.get(_key(rank)).decode()) != device.type:
            raise ConfigError(
                f"rank {rank} computes on a device of kind {theirs}, and its leader on {device.type}: name a device "
                "that all ranks have, such as device=cpu"
            )


def connect_ranks(
    connect: Callable[[], DistributedGroup], listen: Callable[[float], None], *, seconds: float = JOIN_SECONDS
) -> DistributedGroup:
    """Return the group that `connect` makes, in a thread of its own: NCCL waits without end for a rank that has ended
    since it announced itself, and nothing breaks that off but the end of this process. `listen` is that of
    `await_ranks`.

    Raises RankLostError if they are not connected in time.
    """
    group: Future[DistributedGroup] = Future()

    def run() -> None:
        try:
            group.set_result(connect())
        except BaseException as error:
            group.set_exception(error)

    threading.Thread(target=run, name="connecting ranks", daemon=True).start()
    deadline = time.monotonic() + seconds
    while not wait([group], LISTEN_SECONDS).done:
        if time.monotonic() > deadline:
            raise RankLostError(f"the ranks of the group are not connected to each other after {seconds:.0f} s")
        listen(0)
    return group.result()


def _key(rank: int) -> str:
    return f"device of rank {rank}"


class DistributedGroup(SummingGroup):
    """Connects a rank to the others, which find each other through a store. `address` is that of this machine which
    they reach, and `device` that of the tensors: on a GPU NCCL connects them, elsewhere gloo.

    Numbers are added `in_order` of the ranks, in fp32: so their sums do not depend on what else is added. Otherwise the
    library chooses an order, which is faster with more than two ranks.

    Raises RankLostError if the others do not come, ConfigError if PyTorch has no NCCL.
    """

    def __init__(
        self,
        store: Store,
        shard: Shard,
        *,
        address: str,
        device: torch.device = CPU,
        in_order: bool = True,
        patience: float = PATIENCE,
    ) -> None:
        self.shard = shard
        self._device, self._in_order = device, in_order
        self._is_broken = False
        self._received = torch.empty(0, dtype=torch.uint8, device=device)  # by the largest sum until now
        try:
            if device.type == "cuda":
                self._ranks = _connect_gpus(store, shard, device)
            else:
                self._ranks = _connect(store, shard, address, patience)
        except RuntimeError as error:
            raise RankLostError(f"the ranks of the group cannot connect to each other: {error}") from error

    def add_up(self, numbers: Tensor) -> None:
        if not self._in_order:
            self._wait(lambda: self._ranks.allreduce([numbers]))
            return
        first, *others = self._of_all(numbers)
        total = first.float()
        for each in others:
            total += each
        numbers.copy_(total)

    def broadcast(self, numbers: Tensor) -> None:
        options = _dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(lambda: self._ranks.broadcast([numbers.view(torch.uint8)], options))

    def join_columns(self, own: Tensor, columns: int) -> Tensor:
        spans = [Shard(rank, self.shard.size).span(columns) for rank in range(self.shard.size)]
        padded = own.new_zeros(len(own), max(map(len, spans)))  # all must send as much
        padded[:, : own.shape[1]] = own
        parts = [each[:, : len(span)] for each, span in zip(self._of_all(padded), spans, strict=True)]
        joined = torch.cat(parts, dim=1)
        if self._device.type == "cuda":  # what a lost rank has left undone ends without an error
            torch.cuda.current_stream(self._device).synchronize()
            self.check()
        return joined

    def _of_all(self, numbers: Tensor) -> Sequence[Tensor]:
        """Return what each rank has in its place, until the next call."""
        num_bytes = self.shard.size * numbers.nbytes
        if self._received.numel() < num_bytes:
            with torch.inference_mode(False):  # it may be used in either mode
                self._received = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        found = self._received[:num_bytes].view(numbers.dtype)
        self._wait(lambda: self._ranks._allgather_base(found, numbers.view(-1)))
        return found.view(self.shard.size, *numbers.shape).unbind()

    def _wait(self, start: Callable[[], Any]) -> None:
        """Do what all ranks do: on a GPU, what is launched later waits for it. Raises RankLostError."""
        self.check()
        try:
            start().wait()
        except RuntimeError as error:
            self.end()
            raise RankLostError(f"a rank of the tensor-parallel group does not answer: {error}") from error

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    def end(self) -> None:
        """End the group for this rank: the others notice when its process ends. What waits on a GPU is broken off."""
        was_broken, self._is_broken = self._is_broken, True
        if self._device.type == "cuda" and not was_broken:
            self._ranks.abort()


def _connect(store: Store, shard: Shard, address: str, patience: float) -> Any:
    """Return what connects processes by gloo."""
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=JOIN_SECONDS)
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=address)]
    ranks = _dist.ProcessGroupGloo(store, shard.rank, shard.size, options)
    ranks._set_default_timeout(timedelta(seconds=patience))
    return ranks


def _connect_gpus(store: Store, shard: Shard, device: torch.device) -> Any:
    """Return what connects GPUs by NCCL. How long a rank may take is left to it, which ends the process then: a rank
    may have to compile kernels, and one whose process ends is noticed by its leader.
    """
    if not _dist.is_nccl_available():
        raise ConfigError("tensor_parallel_size needs NCCL on GPUs, and this PyTorch was built without: use device=cpu")
    ranks = _dist.ProcessGroupNCCL(store, shard.rank, shard.size, _dist.ProcessGroupNCCL.Options())
    ranks.eager_connect_single_device(torch.device("cuda", device.index or 0))
    return ranks
