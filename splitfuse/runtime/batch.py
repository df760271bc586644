"""Turn the chunks of a plan into tensors. It knows positions and blocks, not why the chunks are as they are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import ZERO_STATE, Chunk
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.lora import PackedAdapter, StepAdapters


class BatchBuilder:
    """Builds the batches of steps that are computed one after the other: a batch is good until the next one is built.

    Block tables stay where they are from step to step, and only those that have changed are written. `device` is that
    of the batches.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._numbers = np.empty(0, np.int32)  # of the last batch, and space behind it
        self._packed = torch.from_numpy(self._numbers)
        self._width = 0
        self._tables: list[Sequence[int]] = []  # that are written, a row for each

    def build(self, chunks: Sequence[Chunk], adapters: Sequence[PackedAdapter | None] = ()) -> RaggedBatch:
        """Return the batch of `chunks`, in their order; the last `num_logits` rows of each are in `logit_rows`. A chunk
        whose state is kept on the way is several in the batch, each of which reads what the one before has written.
        `adapters` has the adapter of each chunk, or nothing if none has one.
        """
        size = self._block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        query_start = [0]
        seq_lens: list[int] = []
        state_reads: list[int] = []
        state_writes: list[int] = []
        tables: list[Sequence[int]] = []
        for chunk in chunks:
            tokens, start, table = chunk.token_ids, chunk.start, chunk.block_table
            if len(tokens) == 1:  # most are, and all that follows for many tokens takes longer
                ids.append(tokens[0])
                positions.append(start)
                slots.append(table[start // size] * size + start % size)
            else:
                run = range(start, start + len(tokens))
                ids += tokens
                positions += run
                slots += [table[p // size] * size + p % size for p in run]
            if chunk.num_logits == 1:
                logit_rows.append(len(ids) - 1)
            else:
                logit_rows += range(len(ids) - chunk.num_logits, len(ids))
            if chunk.state is None:
                query_start.append(len(ids))
                seq_lens.append(start + len(tokens))
                tables.append(table)
                continue
            read, write, kept = chunk.state
            for end, slot in (*kept, (start + len(tokens), write)):
                query_start.append(query_start[-1] + end - start)
                seq_lens.append(end)
                state_reads.append(read)
                state_writes.append(slot)
                tables.append(table)
                start, read = end, slot
        if not state_reads:
            state_reads = state_writes = [ZERO_STATE] * len(seq_lens)
        per_request = [*query_start, *seq_lens, *state_reads, *state_writes]
        # array, not torch, reads the numbers: several times as fast for lists of this size
        numbers = array("i", [*ids, *positions, *slots, *per_request, *logit_rows])
        packed = self._write(tables, numbers)
        of_rows = _step_adapters(chunks, adapters, self._device) if any(each is not None for each in adapters) else None
        return RaggedBatch(
            packed if self._device.type == "cpu" else packed.to(self._device),
            *(len(ids), len(seq_lens), self._width, len(logit_rows)),
            adapters=of_rows,
            on_host=packed,
        )

    def _write(self, tables: list[Sequence[int]], numbers: array[int]) -> Tensor:
        """Return the numbers of a batch on the host: its tables, then the others."""
        width = max(map(len, tables), default=0)
        if width > self._width or 4 * width < self._width:
            self._width, self._tables = ceil_div(width, 4) * 4, []
        end = len(tables) * self._width
        if end + len(numbers) > len(self._numbers):
            self._numbers = np.zeros(2 * (end + len(numbers)), np.int32)
            self._packed, self._tables = torch.from_numpy(self._numbers), []
        rows = self._numbers[:end].reshape(len(tables), self._width)
        written, self._tables = self._tables, []  # none, if writing them fails
        for row in [n for n, table in enumerate(tables) if n >= len(written) or table != written[n]]:
            rows[row, : len(tables[row])] = tables[row]
        self._tables = tables
        self._numbers[end : end + len(numbers)] = numbers
        return self._packed[: end + len(numbers)]


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
