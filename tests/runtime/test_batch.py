"""What the chunks of a step become."""

from __future__ import annotations

import torch
from ragged_requests import Chunk

from splitfuse.core.plan import ZERO_STATE, StateSlots
from splitfuse.runtime.batch import build_batch

CPU = torch.device("cpu")


def test_tensors_of_a_mixed_step() -> None:
    chunks = [
        Chunk(start=0, token_ids=(10, 11, 12), block_table=(4, 2), num_logits=0),
        Chunk(start=5, token_ids=(20,), block_table=(7, 0, 3), num_logits=1),
        Chunk(start=1, token_ids=(30, 31), block_table=(5, 6), num_logits=2),
    ]
    batch = build_batch(chunks, block_size=2, device=CPU)
    assert batch.ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.positions.tolist() == [0, 1, 2, 5, 1, 2]
    assert batch.slot_mapping.tolist() == [8, 9, 4, 7, 11, 12]
    assert batch.query_start.tolist() == [0, 3, 4, 6]
    assert batch.seq_lens.tolist() == [3, 6, 3]
    assert [row[: len(c.block_table)] for row, c in zip(batch.block_tables.tolist(), chunks, strict=True)] == [
        [4, 2],
        [7, 0, 3],
        [5, 6],
    ]
    assert batch.logit_rows.tolist() == [3, 4, 5]
    assert (batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows) == (6, 3, 3, 3)


def test_a_step_is_one_tensor_with_its_parts_in_their_order() -> None:
    batch = build_batch([Chunk(2, (10, 11), (4, 2), 1), Chunk(0, (9,), (7,), 1)], block_size=2, device=CPU)
    parts = (
        *(batch.ids, batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens),
        *(batch.state_reads, batch.state_writes, batch.block_tables, batch.logit_rows),
    )
    assert batch.packed.tolist() == [number for part in parts for number in part.flatten().tolist()]
    assert batch.packed.dtype == torch.int32
    assert batch.packed.is_contiguous()


def test_a_chunk_whose_state_is_kept_on_the_way_is_two() -> None:
    chunks = [
        Chunk(3, range(10, 18), (4, 2, 9, 1, 6, 3), 2, StateSlots(5, 5, ((4, 7), (8, 0)))),
        Chunk(0, (20, 21), (8,), 0, StateSlots(ZERO_STATE, 1)),
    ]
    batch = build_batch(chunks, block_size=2, device=CPU)
    assert batch.query_start.tolist() == [0, 1, 5, 8, 10]
    assert batch.seq_lens.tolist() == [4, 8, 11, 2]
    assert batch.state_reads.tolist() == [5, 7, 0, ZERO_STATE]
    assert batch.state_writes.tolist() == [7, 0, 5, 1]
    assert batch.block_tables.tolist() == [[4, 2, 9, 1, 6, 3]] * 3 + [[8, 0, 0, 0, 0, 0]]
    assert batch.logit_rows.tolist() == [6, 7]
    assert (batch.num_tokens, batch.num_requests) == (10, 4)


def test_an_empty_step() -> None:
    batch = build_batch([], block_size=2, device=CPU)
    assert batch.query_start.tolist() == [0]
    for tensor in (
        batch.ids,
        batch.positions,
        batch.slot_mapping,
        batch.seq_lens,
        batch.block_tables,
        batch.logit_rows,
    ):
        assert tensor.numel() == 0
    assert (batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows) == (0, 0, 0, 0)
    assert batch.packed.tolist() == [0]
