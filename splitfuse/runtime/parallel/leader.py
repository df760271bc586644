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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from torch import Tensor

from splitfuse import errors
from splitfuse.config import EngineConfig, change_settings
from splitfuse.errors import EngineUnavailableError, RankLostError, SplitfuseError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.group import PATIENCE, Group, Shard, make_group_file
from splitfuse.models.sharding import RankDecoder
from splitfuse.runtime.parallel.messages import (
    ComputeHead,
    ComputeStep,
    FollowerSpec,
    RankFailed,
    Task,
    encode,
    receive_news,
)

FOLLOWER = "splitfuse.runtime.parallel.follower"
"""Module which the process of a follower runs."""

_logger = logging.getLogger(__name__)


@dataclass
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    is_ended: bool = False
    """Whether we have ended it."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"


class Leader:
    """Owns the followers of an engine, whose process is rank 0."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        digest: str,
        logit_bytes: int,
        step_bytes: int,
        num_blocks: int,
        max_model_len: int,
        patience: float = PATIENCE,
    ) -> None:
        """Start the followers, which load their parts of the model. Raises EngineUnavailableError if that cannot be
        done now.
        """
        self.on_lost: Callable[[str], object] = lambda _: None
        """Called by a thread with the reason once a follower is lost."""
        self.num_blocks = num_blocks
        """Number of KV blocks of each follower."""
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._followers: list[_Follower] = []
        size = config.model.tensor_parallel_size
        settings = change_settings(config.settings, {"num_blocks": num_blocks, "max_model_len": max_model_len})
        config = EngineConfig.from_settings(settings)
        try:
            memory = make_group_file(logit_bytes=logit_bytes, step_bytes=step_bytes)
            try:
                self.group = Group(memory, Shard(0, size), logit_bytes=logit_bytes, patience=patience)
                for rank in range(1, size):
                    spec = FollowerSpec(config, rank, memory, logit_bytes, patience, digest)
                    self._followers.append(_start(spec))
            finally:
                os.close(memory)
        except OSError as error:
            self.close()
            raise EngineUnavailableError(f"the ranks of the engine could not be started: {error.strerror}") from error
        self._end = weakref.finalize(self, _end_all, self._followers)

    def wait(self) -> None:
        """Wait until all followers have loaded their parts. Raises the error with which one of them failed."""
        for follower in self._followers:
            try:
                news = receive_news(follower.connection)
            except (EOFError, OSError):
                news = RankFailed(f"{follower.name} ended with {follower.process.wait()} while it loaded the model")
            if isinstance(news, RankFailed):
                self.close()
                kind = getattr(errors, news.kind, EngineUnavailableError) if news.kind else EngineUnavailableError
                assert issubclass(kind, SplitfuseError)
                raise kind(news.error)
        for follower in self._followers:
            threading.Thread(target=_watch, args=(weakref.ref(self), follower), daemon=True).start()

    def lead(self, decoder: RankDecoder) -> None:
        """Let the followers compute what a decoder, which is rank 0, computes."""
        decoder.on_step = self._compute_step
        decoder.on_head = self._compute_head

    def close(self) -> None:
        """End the followers."""
        with self._lock:
            self._lost = self._lost or "it was closed"
        _end_all(self._followers)

    @property
    def pids(self) -> list[int]:
        """Return the ids of the followers' processes."""
        return [follower.process.pid for follower in self._followers]

    def lose(self, why: str) -> None:
        """End the group, once."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = why
        self.group.end()
        _logger.error("the tensor-parallel group ends: %s", why)
        _end_all(self._followers)
        self.on_lost(why)

    def _compute_step(self, batch: RaggedBatch) -> None:
        self._tell(ComputeStep.of(batch))

    def _compute_head(self, hidden: Tensor) -> None:
        self._tell(ComputeHead.of(hidden))

    def _tell(self, task: Task) -> None:
        """Give a task to all followers. Raises RankLostError."""
        message = encode(task)
        for follower in self._followers if self._lost is None else ():
            try:
                follower.connection.send_bytes(message)
            except (OSError, ValueError) as error:  # ValueError: its end was closed
                self.lose(f"{follower.name} takes no tasks: {error}")
        if self._lost is not None:
            raise RankLostError(f"the tensor-parallel group has ended: {self._lost}")


def _start(spec: FollowerSpec) -> _Follower:
    """Start a follower. Raises OSError."""
    ours, theirs = socket.socketpair()
    seconds = max(spec.patience, 0.001)
    ours.setsockopt(  # one that is stopped takes nothing, and must not hold us up
        socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    )
    connection = Connection(ours.detach())
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", FOLLOWER, str(theirs.fileno())],
            pass_fds=[theirs.fileno(), spec.memory],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints must not mix with our own output
        )
    except BaseException:
        connection.close()
        raise
    finally:
        theirs.close()
    follower = _Follower(spec.rank, process, connection)
    try:
        connection.send_bytes(encode(spec))  # it fits into the socket's buffer
    except BaseException:
        _end_all([follower])
        raise
    return follower


def _watch(leader: weakref.ref[Leader], follower: _Follower) -> None:
    """Wait for the end of a follower, which is that of the group."""
    try:
        news = receive_news(follower.connection)
        why = f"{follower.name} failed: {news.error if isinstance(news, RankFailed) else news}"
    except (EOFError, OSError):
        why = f"{follower.name} ended with {_exit(follower.process.wait())}"
    if not follower.is_ended and (found := leader()) is not None:
        found.lose(why)


def _exit(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"code {code}"


def _end_all(followers: list[_Follower]) -> None:
    for follower in followers:
        follower.is_ended = True
        follower.process.kill()  # one that is stopped too
    for follower in followers:
        follower.process.wait()
        with suppress(OSError):
            follower.connection.close()
