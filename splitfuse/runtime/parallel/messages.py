"""Defines what the ranks of a group tell each other, in MessagePack: the leader what is to be computed, a follower that
it can compute.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import TypeAlias

import msgspec
import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.kernels.batch import RaggedBatch


class SharedMemory(msgspec.Struct, frozen=True, tag="memory"):
    """Names the memory of a group on one machine."""

    fd: int
    logit_bytes: int


class Rendezvous(msgspec.Struct, frozen=True, tag="store"):
    """Names the store through which ranks that share no memory find each other."""

    host: str
    port: int
    in_order: bool
    """Whether they add up in their order."""


class FollowerSpec(msgspec.Struct, frozen=True):
    """Holds everything that a follower is started with."""

    version: str
    config: EngineConfig
    """Settings, of which the memory plan has settled the sizes."""
    rank: int
    link: SharedMemory | Rendezvous
    patience: float
    files: str
    """Name of the model's files, which must be those of the leader."""
    kernels: str
    """Kernels of the leader, which all must have."""


class ComputeStep(msgspec.Struct, frozen=True, tag="step"):
    """Asks for a step."""

    num_tokens: int
    num_requests: int
    table_width: int
    num_rows: int
    packed: bytes
    chooses: bool = False
    """Whether tokens are chosen in the same call."""

    @classmethod
    def of(cls, batch: RaggedBatch, chooses: bool = False) -> ComputeStep:
        """Return the message for a batch, which has neither adapters nor loans."""
        assert batch.adapters is None and not batch.loans
        sizes = (batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows)
        return cls(*sizes, batch.host_numbers.tobytes(), chooses)

    @property
    def batch(self) -> RaggedBatch:
        """Return the batch, on the host."""
        packed = torch.frombuffer(bytearray(self.packed), dtype=torch.int32)
        return RaggedBatch(packed, self.num_tokens, self.num_requests, self.table_width, self.num_rows)


class ComputeHead(msgspec.Struct, frozen=True, tag="head"):
    """Asks for the logits of rows of hidden states. Ranks that share memory are given the rows, in bf16; among others
    the leader broadcasts them.
    """

    num_rows: int
    rows: bytes = b""

    @classmethod
    def of(cls, hidden: torch.Tensor) -> ComputeHead:
        """Return the message with the rows."""
        return cls(len(hidden), hidden.contiguous().view(torch.uint8).numpy().tobytes())

    @property
    def hidden(self) -> torch.Tensor:
        """Return the rows of the message."""
        return torch.frombuffer(bytearray(self.rows), dtype=torch.bfloat16).view(self.num_rows, -1)


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """Says that a follower can compute."""


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Says why a follower ends."""

    error: str
    kind: str = ""
    """Class of the error, if it is one of errors.py."""


Task: TypeAlias = ComputeStep | ComputeHead
News: TypeAlias = RankReady | RankFailed

encode = msgspec.msgpack.Encoder().encode
_decode_task = msgspec.msgpack.Decoder(Task).decode
_decode_news = msgspec.msgpack.Decoder(News).decode


def receive_task(connection: Connection) -> Task:
    """Wait for the next task. Raises EOFError if the leader has ended."""
    return _decode_task(connection.recv_bytes())


def receive_news(connection: Connection) -> News:
    """Wait for the next news. Raises EOFError if the follower has ended."""
    return _decode_news(connection.recv_bytes())
