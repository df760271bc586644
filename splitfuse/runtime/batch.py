"""Turns the chunks of a plan into tensors. It knows positions and blocks, not why the chunks are as they are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import ZERO_STATE, Chunk
from splitfuse.kernels.batch import RaggedBatch, copied
from splitfuse.kernels.lora import PackedAdapter, StepAdapters


class BatchBuilder:
    """Builds the batches of steps that are computed one after the other: a batch is good until the next one is built.

    Block tables stay where they are from step to step, and only those that have changed are written. `device` is that
    of the batches.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device, self._on_host = device, device.type == "cpu"
        self._memory = torch.empty(0, dtype=torch.int32)  # numbers of the last batch, with space behind them
        self._address, self._numbers = 0, memoryview(array("i"))  # of the same
        self._width = 0
        self._tables: list[Sequence[int]] = []  # that are written, a row for each

    def build(self, chunks: Sequence[Chunk], adapters: Sequence[PackedAdapter | None] = ()) -> RaggedBatch:
        """Return the batch of `chunks`, in their order; the last `num_logits` rows of each are in `logit_rows`. A chunk
        whose state is kept on the way is several in the batch, each of which reads what the one before has written.
        `adapters` has the adapter of each chunk, or nothing if none has one.
        """
        if all(len(chunk.token_ids) == chunk.num_logits == 1 and chunk.state is None for chunk in chunks):
            tables, num_tokens, num_rows, numbers = self._decodes(chunks)
        else:
            tables, num_tokens, num_rows, numbers = self._any(chunks)
        length = self._write(tables, numbers)
        of_rows = _step_adapters(chunks, adapters, self._device) if any(each is not None for each in adapters) else None
        sizes = num_tokens, len(tables), self._width, num_rows
        if self._on_host:
            return RaggedBatch(self._memory, *sizes, of_rows, address=self._address)
        on_host = self._memory[:length]
        return RaggedBatch(copied(on_host, self._device), *sizes, of_rows, on_host)

    def _decodes(self, chunks: Sequence[Chunk]) -> tuple[list[Sequence[int]], int, int, array[int]]:
        """Return the same as `_any` for chunks of one token that has logits: most steps have no others."""
        size, count = self._block_size, len(chunks)
        starts = [chunk.start for chunk in chunks]
        tables: list[Sequence[int]] = [chunk.block_table for chunk in chunks]
        slots = [table[start // size] * size + start % size for table, start in zip(tables, starts, strict=True)]
        ids, lengths = [chunk.token_ids[0] for chunk in chunks], [start + 1 for start in starts]
        states = [ZERO_STATE] * (2 * count)
        numbers = array("i", [*ids, *starts, *slots, *range(count + 1), *lengths, *states, *range(count)])
        return tables, count, count, numbers

    def _any(self, chunks: Sequence[Chunk]) -> tuple[list[Sequence[int]], int, int, array[int]]:
        """Return the block tables of a batch, its numbers of tokens and of rows, and what follows its tables."""
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
        return tables, len(ids), len(logit_rows), numbers

    def _write(self, tables: list[Sequence[int]], numbers: array[int]) -> int:
        """Write the numbers of a batch: its tables, then the others. Returns how many there are."""
        width = max(map(len, tables), default=0)
        if width > self._width or 4 * width < self._width:
            self._width, self._tables = ceil_div(width, 4) * 4, []
        end = len(tables) * self._width
        length = end + len(numbers)
        if length > len(self._numbers):
            self._memory, self._tables = torch.zeros(2 * length, dtype=torch.int32), []
            self._address, self._numbers = self._memory.data_ptr(), self._memory.numpy().data
        written, self._tables = self._tables, []  # none, if writing them fails
        for row in [n for n, table in enumerate(tables) if n >= len(written) or table != written[n]]:
            first = row * self._width
            self._numbers[first : first + len(tables[row])] = array("i", tables[row])
        self._tables = tables
        self._numbers[end:length] = numbers
        return length


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
    return StepAdapters(tuple(different.values()), copied(rows, device))
