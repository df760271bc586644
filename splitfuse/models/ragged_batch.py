"""The chunks of one step as flat tensors: everything the decoder needs to know about them.

Knows positions and blocks, no requests, and not why the chunks are as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class Chunk(Protocol):
    """A run of one request's tokens: `token_ids[i]` has position `start + i`."""

    @property
    def start(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def num_logits(self) -> int: ...


@dataclass(frozen=True)
class RaggedBatch:
    """T tokens of S chunks, R of them needing logits. Row i of every per-token tensor is the same token.

    `packed` is int32 and holds all of them, one behind the other in the order of the properties here: a step is one
    transfer to its device, and one address for kernels that take it whole.
    """

    packed: Tensor
    num_tokens: int
    num_requests: int
    table_width: int  # most blocks of a chunk
    num_rows: int

    @classmethod
    def build(cls, chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> RaggedBatch:
        """The batch of `chunks`, in their order; the last `num_logits` rows of each go to `logit_rows`."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        tables: list[int] = []
        width = max((len(chunk.block_table) for chunk in chunks), default=0)
        for chunk in chunks:
            span = range(chunk.start, chunk.start + len(chunk.token_ids))
            table = chunk.block_table
            ids += chunk.token_ids
            positions += span
            slots += [table[p // block_size] * block_size + p % block_size for p in span]
            logit_rows += range(len(ids) - chunk.num_logits, len(ids))
            tables += table
            tables += [0] * (width - len(table))
        query_start = [0, *accumulate(len(chunk.token_ids) for chunk in chunks)]
        seq_lens = [chunk.start + len(chunk.token_ids) for chunk in chunks]
        # array, not torch, reads the numbers: several times as fast for lists of this size
        numbers = array("i", [*ids, *positions, *slots, *query_start, *seq_lens, *tables, *logit_rows])
        packed = torch.frombuffer(numbers, dtype=torch.int32)
        if device.type != "cpu":
            packed = packed.to(device)
        return cls(packed, len(ids), len(chunks), width, len(logit_rows))

    @property
    def ids(self) -> Tensor:
        """[T]"""
        return self.packed[: self.num_tokens]

    @property
    def positions(self) -> Tensor:
        """[T]"""
        return self.packed[self.num_tokens : 2 * self.num_tokens]

    @property
    def slot_mapping(self) -> Tensor:
        """[T]: where keys and values go, block * block_size + offset; -1: nowhere."""
        return self.packed[2 * self.num_tokens : 3 * self.num_tokens]

    @property
    def query_start(self) -> Tensor:
        """[S + 1]: chunk s owns the rows query_start[s] to query_start[s + 1]."""
        return self._after_tokens(0, self.num_requests + 1)

    @property
    def seq_lens(self) -> Tensor:
        """[S]: positions of the request that exist after this step."""
        return self._after_tokens(self.num_requests + 1, self.num_requests)

    @property
    def block_tables(self) -> Tensor:
        """[S, most blocks of a chunk], filled up with 0, which is never read."""
        size = self.num_requests * self.table_width
        return self._after_tokens(2 * self.num_requests + 1, size).view(self.num_requests, self.table_width)

    @property
    def logit_rows(self) -> Tensor:
        """[R]"""
        return self.packed[len(self.packed) - self.num_rows :]

    def _after_tokens(self, begin: int, size: int) -> Tensor:
        begin += 3 * self.num_tokens
        return self.packed[begin : begin + size]
