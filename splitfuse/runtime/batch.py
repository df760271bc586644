"""Turn the chunks of a plan into tensors. It knows positions and blocks, not why the chunks are as they are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from splitfuse.core.plan import ZERO_STATE, Chunk
from splitfuse.kernels.batch import RaggedBatch


class _Part(NamedTuple):
    """Describes tokens of a chunk as a chunk of the batch, with the slots of its state."""

    start: int
    end: int
    block_table: Sequence[int]
    read: int
    write: int


def build_batch(chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> RaggedBatch:
    """Return the batch of `chunks`, in their order; the last `num_logits` rows of each are in `logit_rows`. Where a
    chunk's state is kept on the way, the batch has a chunk for each part.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    tables: list[int] = []
    for chunk in chunks:
        span = range(chunk.start, chunk.start + len(chunk.token_ids))
        table = chunk.block_table
        ids += chunk.token_ids
        positions += span
        slots += [table[p // block_size] * block_size + p % block_size for p in span]
        logit_rows += range(len(ids) - chunk.num_logits, len(ids))
    parts = [part for chunk in chunks for part in _parts(chunk)]
    width = max((len(part.block_table) for part in parts), default=0)
    for part in parts:
        tables += part.block_table
        tables += [0] * (width - len(part.block_table))
    query_start = [0, *accumulate(part.end - part.start for part in parts)]
    seq_lens = [part.end for part in parts]
    states = [*(part.read for part in parts), *(part.write for part in parts)]
    # array, not torch, reads the numbers: several times as fast for lists of this size
    numbers = array("i", [*ids, *positions, *slots, *query_start, *seq_lens, *states, *tables, *logit_rows])
    packed = torch.frombuffer(numbers, dtype=torch.int32)
    if device.type != "cpu":
        packed = packed.to(device)
    return RaggedBatch(packed, len(ids), len(parts), width, len(logit_rows))


def _parts(chunk: Chunk) -> Iterator[_Part]:
    """Yield the parts of a chunk that its state is kept between, each of which reads what the one before has written;
    the chunk itself if there are none.
    """
    read, write, kept = chunk.state or (ZERO_STATE, ZERO_STATE, ())
    start = chunk.start
    for end, slot in (*kept, (chunk.start + len(chunk.token_ids), write)):
        yield _Part(start, end, chunk.block_table, read, slot)
        start, read = end, slot
