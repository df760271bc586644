"""Runs a follower: `python -m splitfuse.runtime.parallel.follower FD [MODEL]`, started by leader.py or rank_server.py.

FD is a connected socket that it inherits. The first message on it is a FollowerSpec; tasks follow, of which each gives
this rank's part of what the leader computes at the same time. It ends with the leader. MODEL is the path of the model
here, if it is not the leader's.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import msgspec
import torch
from torch import Tensor

from splitfuse import interrupts
from splitfuse.config.engine import EngineConfig, change_settings
from splitfuse.errors import ConfigError, RankLostError, SplitfuseError
from splitfuse.kernels.group import Group, Shard, SharedGroup
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.sharding import RankDecoder
from splitfuse.runtime.device import device_of
from splitfuse.runtime.loading import load_rank, parse_device
from splitfuse.runtime.memory_ahead import MemoryAhead
from splitfuse.runtime.parallel.distributed import DistributedGroup, announce, open_store
from splitfuse.runtime.parallel.messages import (
    ComputeHead,
    ComputeStep,
    FollowerSpec,
    RankFailed,
    RankReady,
    SharedMemory,
    Task,
    encode,
    receive_task,
)
from splitfuse.version import __version__


def main() -> None:
    """Compute what the leader asks for until it closes the connection."""
    interrupts.ignore()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # the leader says the rest
    connection = Connection(int(sys.argv[1]))
    try:
        spec = msgspec.msgpack.decode(connection.recv_bytes(), type=FollowerSpec)
        threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
        _follow(connection, spec, *sys.argv[2:])
    except (EOFError, ConnectionError):  # the leader has ended
        pass
    except RankLostError as error:  # which the leader knows, or will notice by our end
        connection.send_bytes(encode(RankFailed(str(error))))
    except SplitfuseError as error:
        connection.send_bytes(encode(RankFailed(str(error), type(error).__name__)))
    except BaseException as error:
        traceback.print_exc()
        connection.send_bytes(encode(RankFailed(repr(error))))
    os._exit(0)


def _follow(connection: Connection, spec: FollowerSpec, model: str | None = None) -> None:
    if spec.version != __version__:
        raise ConfigError(f"a rank is splitfuse {__version__}, and its leader {spec.version}: use the same version")
    config = spec.config
    if model is not None:
        config = EngineConfig.from_settings(change_settings(config.settings, {"model": model}))
    group = _join(connection, spec, config)
    try:
        executor = RankExecutor(*load_rank(config, group, files=spec.files, kernels=spec.kernels))
        connection.send_bytes(encode(RankReady()))
        with torch.inference_mode():
            while True:
                executor.execute(receive_task(connection))
    finally:
        group.end()  # the others wait for us in vain


class RankExecutor:
    """Executes the tasks of a follower."""

    def __init__(self, decoder: RankDecoder, kv_cache: KVCache) -> None:
        self._decoder, self._kv_cache = decoder, kv_cache
        self._ahead = MemoryAhead(kv_cache)
        self._last_block, self._seconds = -1, 0.0  # of the last step

    def execute(self, task: Task) -> None:
        """Compute this rank's part of a task. Raises RankLostError."""
        decoder = self._decoder
        if not isinstance(task, ComputeStep):
            with decoder.on_device():
                decoder.head_products(self._rows(task))
            self._follow()
            return
        batch, began = task.batch, time.monotonic()
        slots = batch.slot_mapping
        with decoder.on_device():
            compute = decoder.forward_and_choose if task.chooses else decoder.forward
            compute(batch.on_device(decoder.device), self._kv_cache)
        self._last_block = int(slots.max()) // self._kv_cache.block_size
        self._seconds = time.monotonic() - began
        if task.chooses or not batch.num_rows:  # else the leader asks for the head at once, and is not to wait
            self._follow()

    def _rows(self, task: ComputeHead) -> Tensor:
        """Return the rows of a task, or space for those that the leader broadcasts."""
        decoder = self._decoder
        if isinstance(decoder.group, SharedGroup):
            return task.hidden
        return torch.empty(task.num_rows, decoder.spec.hidden_size, dtype=decoder.dtype, device=decoder.device)

    def _follow(self) -> None:
        self._ahead.use(self._last_block)
        self._ahead.follow(self._seconds)
        self._seconds = 0.0


def _join(connection: Connection, spec: FollowerSpec, config: EngineConfig) -> Group:
    """Return our place in the group. Raises RankLostError."""
    link, size = spec.link, config.model.tensor_parallel_size
    if isinstance(link, SharedMemory):
        group = SharedGroup(link.fd, Shard(spec.rank, size), logit_bytes=link.logit_bytes, patience=spec.patience)
        os.close(link.fd)
        return group
    device, store = parse_device(device_of(config)), open_store(link.host, link.port)
    announce(store, spec.rank, device)
    return DistributedGroup(
        store,
        Shard(spec.rank, size, sums=True),
        address=_own_address(connection) if config.model.rank else link.host,
        device=device,
        in_order=link.in_order,
        patience=spec.patience,
    )


def _own_address(connection: Connection) -> str:
    """Return the address of this machine which the leader has reached."""
    with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as ours:
        address: str = ours.getsockname()[0]
    return address


def _end_with(connection: int) -> None:
    """End this process when the leader does, whatever it is doing."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    poller.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
