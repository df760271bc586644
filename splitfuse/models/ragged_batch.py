"""The chunks of one step as flat tensors: everything the decoder needs to know about them.

Knows positions and blocks, no requests, and not why the chunks are as they are.
"""

from __future__ import annotations

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
    """T tokens of S chunks, R of them needing logits. Row i of every per-token tensor is the same token."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]: where keys and values go, block * block_size + offset; -1: nowhere
    query_start: Tensor  # [S + 1] int32: chunk s owns the rows query_start[s] to query_start[s + 1]
    seq_lens: Tensor  # [S] int32: positions of the request that exist after this step
    block_tables: Tensor  # [S, most blocks of a chunk] int32, filled up with 0, which is never read
    logit_rows: Tensor  # [R]

    @classmethod
    def build(cls, chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> RaggedBatch:
        """The batch of `chunks`, in their order; the last `num_logits` rows of each go to `logit_rows`."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + len(chunk.token_ids))
            table = chunk.block_table
            ids += chunk.token_ids
            positions += span
            slots += [table[p // block_size] * block_size + p % block_size for p in span]
            logit_rows += range(len(ids) - chunk.num_logits, len(ids))
        width = max((len(chunk.block_table) for chunk in chunks), default=0)
        tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]

        def tensor(values: Sequence[object], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            ids=tensor(ids, torch.int64),
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            query_start=tensor([0, *accumulate(len(chunk.token_ids) for chunk in chunks)], torch.int32),
            seq_lens=tensor([chunk.start + len(chunk.token_ids) for chunk in chunks], torch.int32),
            block_tables=tensor(tables, torch.int32).view(len(chunks), width),
            logit_rows=tensor(logit_rows, torch.int64),
        )
