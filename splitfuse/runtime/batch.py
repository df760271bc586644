"""Turn the chunks of a plan into tensors. It knows positions and blocks, not why the chunks are as they are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch

from splitfuse.core.plan import ZERO_STATE, Chunk, StateSlots
from splitfuse.kernels.batch import RaggedBatch

NO_STATE = StateSlots(ZERO_STATE, ZERO_STATE)


def build_batch(chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> RaggedBatch:
    """Return the batch of `chunks`, in their order; the last `num_logits` rows of each are in `logit_rows`."""
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
    slots_of_states = [chunk.state or NO_STATE for chunk in chunks]
    states = [*(each.read for each in slots_of_states), *(each.write for each in slots_of_states)]
    numbers = array("i", [*ids, *positions, *slots, *query_start, *seq_lens, *states, *tables, *logit_rows])
    packed = torch.frombuffer(numbers, dtype=torch.int32)
    if device.type != "cpu":
        packed = packed.to(device)
    return RaggedBatch(packed, len(ids), len(chunks), width, len(logit_rows))
