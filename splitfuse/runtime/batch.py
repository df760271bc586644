"""Turn the chunks of a plan into tensors. It knows positions and blocks, not why the chunks are as they are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from splitfuse.core.plan import ZERO_STATE, Chunk, StateSlots
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.lora import PackedAdapter, StepAdapters

NO_STATE = StateSlots(ZERO_STATE, ZERO_STATE, ())


def build_batch(
    chunks: Sequence[Chunk],
    *,
    block_size: int,
    device: torch.device,
    adapters: Sequence[PackedAdapter | None] = (),
) -> RaggedBatch:
    """Return the batch of `chunks`, in their order; the last `num_logits` rows of each are in `logit_rows`. A chunk
    whose state is kept on the way is several in the batch, each of which reads what the one before has written.
    `adapters` has the adapter of each chunk, or nothing if none has one.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    query_start = [0]
    seq_lens: list[int] = []
    state_reads: list[int] = []
    state_writes: list[int] = []
    tables: list[int] = []
    width = max((len(chunk.block_table) for chunk in chunks), default=0)
    for chunk in chunks:
        start, chunk_end = chunk.start, chunk.start + len(chunk.token_ids)
        table = chunk.block_table
        ids += chunk.token_ids
        positions += range(start, chunk_end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, chunk_end)]
        logit_rows += range(len(ids) - chunk.num_logits, len(ids))
        padding = [0] * (width - len(table))
        read, write, kept = chunk.state or NO_STATE
        for end, slot in (*kept, (chunk_end, write)):
            query_start.append(query_start[-1] + end - start)
            seq_lens.append(end)
            state_reads.append(read)
            state_writes.append(slot)
            tables += table
            tables += padding
            start, read = end, slot
    # array, not torch, reads the numbers: several times as fast for lists of this size
    per_request = [*query_start, *seq_lens, *state_reads, *state_writes, *tables]
    packed = torch.frombuffer(array("i", [*ids, *positions, *slots, *per_request, *logit_rows]), dtype=torch.int32)
    if device.type != "cpu":
        packed = packed.to(device)
    of_rows = _step_adapters(chunks, adapters, device) if any(each is not None for each in adapters) else None
    return RaggedBatch(packed, len(ids), len(seq_lens), width, len(logit_rows), of_rows)


def _step_adapters(
    chunks: Sequence[Chunk], adapters: Sequence[PackedAdapter | None], device: torch.device
) -> StepAdapters:
    """Return which rows have which adapter."""
    different: dict[int, PackedAdapter] = {id(each): each for each in adapters if each is not None}
    numbers = {key: number for number, key in enumerate(different)}
    of_row = array("i")
    for chunk, adapter in zip(chunks, adapters, strict=True):
        of_row.extend([numbers.get(id(adapter), -1)] * len(chunk.token_ids))
    rows = torch.frombuffer(of_row, dtype=torch.int32)
    return StepAdapters(tuple(different.values()), rows.to(device))
