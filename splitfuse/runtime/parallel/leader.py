"""Leads a tensor-parallel group: starts the other ranks, tells them what to compute, and notices if one of them ends.

A group lives and dies as one: when a rank is lost the others end, and the engine with them.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection as connections
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from splitfuse import errors
from splitfuse.config.engine import EngineConfig, change_settings
from splitfuse.errors import EngineUnavailableError, RankLostError, SplitfuseError
from splitfuse.interrupts import held_back
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.group import PATIENCE, Group, Shard, SharedGroup, make_group_file
from splitfuse.models.sharding import RankDecoder
from splitfuse.runtime.parallel.distributed import DistributedGroup, await_ranks, connect_ranks, make_store
from splitfuse.runtime.parallel.link import connect
from splitfuse.runtime.parallel.messages import (
    ComputeHead,
    ComputeStep,
    FollowerSpec,
    RankFailed,
    Rendezvous,
    SharedMemory,
    Task,
    encode,
    receive_news,
)
from splitfuse.runtime.secret import read_secret
from splitfuse.version import __version__

FOLLOWER = "splitfuse.runtime.parallel.follower"
"""Module that the process of a follower runs."""

_logger = logging.getLogger(__name__)


@dataclass
class _Follower:
    name: str
    connection: Connection
    process: subprocess.Popen[bytes] | None
    """Process on this machine that the leader has started; None: the follower is on another machine."""
    is_ended: bool = False
    """Whether the leader has ended it."""
    is_ready: bool = False
    """Whether it has said that it has loaded its part."""

    def end(self) -> None:
        """End the process, also a stopped one. A process on another machine ends with the connection."""
        self.is_ended = True
        if self.process is not None:
            self.process.kill()
            return
        with (  # closing it would wait for the thread that reads from it
            suppress(OSError),
            socket.fromfd(self.connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as ours,
        ):
            ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> str:
        """Wait for the end, and return how it ended."""
        how = "its connection has ended"
        if self.process is not None:
            code = self.process.wait()
            how = f"it ended with {f'signal {-code} ({signal.Signals(-code).name})' if code < 0 else f'code {code}'}"
        with suppress(OSError):
            self.connection.close()
        return how


class Leader:
    """Owns the followers of an engine, whose process is rank 0."""

    group: Group

    def __init__(
        self,
        config: EngineConfig,
        *,
        shard: Shard,
        devices: Sequence[str],
        files: str,
        kernels: str,
        logit_bytes: int,
        step_bytes: int,
        num_blocks: int,
        max_model_len: int,
        patience: float = PATIENCE,
    ) -> None:
        """Start the followers, which load their parts of the model; those on other machines wait for us there. `shard`
        is the part of rank 0, and `devices` are those of the ranks of this machine. Where ranks share memory, logits
        and a step take so many bytes of it.

        Raises EngineUnavailableError if that cannot be done now, ConfigError if a rank elsewhere is none or has another
        key.
        """
        self.on_lost: Callable[[str], object] = lambda _: None
        """Called by a thread with the reason once a follower is lost."""
        self.num_blocks = num_blocks
        """Number of KV blocks of each follower."""
        self.num_local_ranks = config.model.num_local_ranks
        self._shard, self._devices = shard, devices
        self._files, self._kernels, self._patience, self._lost = files, kernels, patience, ""
        self._lock = threading.Lock()
        self._followers: list[_Follower] = []
        settings = change_settings(config.settings, {"num_blocks": num_blocks, "max_model_len": max_model_len})
        self._config = EngineConfig.from_settings(settings)
        try:
            if config.model.rank:
                self._join()
            elif shard.sums:
                self._start()
                self._meet("127.0.0.1")
            else:
                self._share_memory(logit_bytes, step_bytes)
        except OSError as error:
            self.close()
            raise EngineUnavailableError(f"the ranks of the engine could not be started: {error.strerror}") from error
        except BaseException:
            self.close()
            raise
        self._end = weakref.finalize(self, _end_all, self._followers)

    def _share_memory(self, logit_bytes: int, step_bytes: int) -> None:
        """Start processes of this machine, which share memory."""
        memory = make_group_file(logit_bytes=logit_bytes, step_bytes=step_bytes)
        try:
            self.group = SharedGroup(memory, self._shard, logit_bytes=logit_bytes, patience=self._patience)
            self._start(memory)
            self._tell_specs(SharedMemory(memory, logit_bytes))
        finally:
            os.close(memory)

    def _start(self, *inherited: int) -> None:
        """Start processes of this machine, which inherit these descriptors."""
        for rank in range(1, self._shard.size):
            ours, theirs = socket.socketpair()
            with theirs, held_back():
                connection = self._connection(ours)
                process = subprocess.Popen(
                    [sys.executable, "-m", FOLLOWER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno(), *inherited],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a library prints must not mix with our own output
                )
            self._followers.append(_Follower(f"rank {rank} (process {process.pid})", connection, process))

    def _join(self) -> None:
        """Connect to processes on other machines, and them to each other."""
        model = self._config.model
        assert model.rank_key_file is not None
        key, host = read_secret(model.rank_key_file).link_key, ""
        for rank, address in enumerate(model.rank, 1):
            ours = connect(address, key)
            host = host or ours.getsockname()[0]
            self._followers.append(_Follower(f"rank {rank} ({address})", self._connection(ours), None))
        self._meet(host)

    def _meet(self, host: str) -> None:
        """Connect processes to each other that add up, by a store at this address of ours."""
        device = torch.device(self._devices[0])
        store, in_order = make_store(host), device.type != "cuda" or self._config.model.batch_invariant
        self._tell_specs(Rendezvous(host, store.port, in_order))
        try:
            await_ranks(store, self._shard.size, device, self._listen)
            self.group = connect_ranks(
                lambda: DistributedGroup(
                    store, self._shard, address=host, device=device, in_order=in_order, patience=self._patience
                ),
                self._listen,
            )
        except RankLostError:
            self._listen(self._patience)  # if one of them knows why, that is raised
            raise

    def _tell_specs(self, link: SharedMemory | Rendezvous) -> None:
        """Tell the followers what they are, and on which device: on another machine the first of that kind."""
        elsewhere = torch.device(self._devices[0]).type
        for rank, follower in enumerate(self._followers, 1):
            device = elsewhere if follower.process is None else self._devices[rank]
            config = EngineConfig.from_settings(change_settings(self._config.settings, {"device": device}))
            spec = FollowerSpec(__version__, config, rank, link, self._patience, self._files, self._kernels)
            follower.connection.send_bytes(encode(spec))

    def _connection(self, ours: socket.socket) -> Connection:
        """Return a connection by which no sending waits without end: a follower that is stopped takes nothing."""
        seconds = max(self._patience, 0.001)
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return Connection(ours.detach())

    def wait(self) -> None:
        """Wait until all followers have loaded their parts. Raises the error with which one of them failed."""
        for follower in self._followers:
            if not follower.is_ready:
                self._hear(follower)
        for follower in self._followers:
            threading.Thread(target=_watch, args=(weakref.ref(self), follower), daemon=True).start()

    def _listen(self, seconds: float) -> None:
        """Wait for a follower that fails, for at most so many seconds, and raise its error."""
        others = [each for each in self._followers if not each.is_ready]
        heard = connections.wait([each.connection for each in others], seconds)
        for follower in others:
            if follower.connection in heard:
                self._hear(follower)

    def _hear(self, follower: _Follower) -> None:
        """Wait until a follower has loaded its part. Raises the error with which it failed."""
        try:
            news = receive_news(follower.connection)
        except (EOFError, OSError):
            news = RankFailed(f"{follower.name} was lost while it loaded the model: {follower.close()}")
        if isinstance(news, RankFailed):
            self.close()
            kind = getattr(errors, news.kind, EngineUnavailableError) if news.kind else EngineUnavailableError
            assert issubclass(kind, SplitfuseError)
            raise kind(news.error)
        follower.is_ready = True

    def lead(self, decoder: RankDecoder) -> None:
        """Let the followers compute what a decoder, which is rank 0, computes."""
        decoder.on_step = self._compute_step
        decoder.on_head = self._compute_head
        decoder.on_failed = self.lose  # one that was stopped does not end by itself

    def close(self) -> None:
        """End the followers."""
        with self._lock:
            self._lost = self._lost or "it was closed"
        _end_all(self._followers)
        if hasattr(self, "group"):  # else a rank has failed before they were connected
            self.group.end()

    @property
    def pids(self) -> list[int]:
        """Return the ids of the followers' processes on this machine."""
        return [follower.process.pid for follower in self._followers if follower.process is not None]

    def lose(self, why: str) -> None:
        """End the group, once."""
        with self._lock:
            if self._lost:
                return
            self._lost = why
        self.group.end()
        _logger.error("the tensor-parallel group ends: %s", why)
        _end_all(self._followers)
        self.on_lost(why)

    def _compute_step(self, batch: RaggedBatch, chooses: bool) -> None:
        self._tell(ComputeStep.of(batch, chooses))

    def _compute_head(self, hidden: Tensor) -> None:
        self._tell(ComputeHead(len(hidden)) if self._shard.sums else ComputeHead.of(hidden))

    def _tell(self, task: Task) -> None:
        """Give a task to all followers. Raises RankLostError."""
        message = encode(task)
        for follower in () if self._lost else self._followers:
            try:
                follower.connection.send_bytes(message)
            except (OSError, ValueError) as error:  # ValueError: its end was closed
                self.lose(f"{follower.name} takes no tasks: {error}")
        if self._lost:
            raise RankLostError(f"the tensor-parallel group has ended: {self._lost}")


def _watch(leader: weakref.ref[Leader], follower: _Follower) -> None:
    """Wait for the end of a follower, which is that of the group."""
    try:
        news = receive_news(follower.connection)
        why = f"{follower.name} failed: {news.error if isinstance(news, RankFailed) else news}"
    except (EOFError, OSError):
        why = f"{follower.name} was lost: {follower.close()}"
    if not follower.is_ended and (found := leader()) is not None:
        found.lose(why)


def _end_all(followers: list[_Follower]) -> None:
    for follower in followers:
        follower.end()
    for follower in followers:
        follower.close()
