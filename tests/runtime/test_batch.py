"""What the chunks of a step become."""

from __future__ import annotations

import random

import pytest
import torch
from ragged_requests import Chunk

from splitfuse.core.plan import ZERO_STATE, StateSlots
from splitfuse.runtime.batch import BatchBuilder

CPU = torch.device("cpu")


def test_tensors_of_a_mixed_step() -> None:
    chunks = [
        Chunk(start=0, token_ids=(10, 11, 12), block_table=(4, 2), num_logits=0),
        Chunk(start=5, token_ids=(20,), block_table=(7, 0, 3), num_logits=1),
        Chunk(start=1, token_ids=(30, 31), block_table=(5, 6), num_logits=2),
    ]
    batch = BatchBuilder(2, CPU).build(chunks)
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
    assert (batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows) == (6, 3, 4, 3)


def test_a_step_is_one_tensor_with_its_parts_in_their_order() -> None:
    batch = BatchBuilder(2, CPU).build([Chunk(2, (10, 11), (4, 2), 1), Chunk(0, (9,), (7,), 1)])
    parts = (
        *(batch.block_tables, batch.ids, batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens),
        *(batch.state_reads, batch.state_writes, batch.logit_rows),
    )
    assert batch.packed.tolist() == [number for part in parts for number in part.flatten().tolist()]
    assert batch.packed.dtype == torch.int32
    assert batch.packed.is_contiguous()


def test_a_chunk_whose_state_is_kept_on_the_way_is_two() -> None:
    chunks = [
        Chunk(3, range(10, 18), (4, 2, 9, 1, 6, 3), 2, StateSlots(5, 5, ((4, 7), (8, 0)))),
        Chunk(0, (20, 21), (8,), 0, StateSlots(ZERO_STATE, 1)),
    ]
    batch = BatchBuilder(2, CPU).build(chunks)
    assert batch.query_start.tolist() == [0, 1, 5, 8, 10]
    assert batch.seq_lens.tolist() == [4, 8, 11, 2]
    assert batch.state_reads.tolist() == [5, 7, 0, ZERO_STATE]
    assert batch.state_writes.tolist() == [7, 0, 5, 1]
    tables = batch.block_tables.tolist()
    assert [row[:6] for row in tables[:3]] == [[4, 2, 9, 1, 6, 3]] * 3 and tables[3][0] == 8
    assert batch.logit_rows.tolist() == [6, 7]
    assert (batch.num_tokens, batch.num_requests) == (10, 4)


def test_batch_of_the_rows_that_need_logits() -> None:
    chunks = [
        Chunk(0, (10, 11, 12), (4, 2), 0, StateSlots(ZERO_STATE, 4)),
        Chunk(5, (20,), (7, 0, 3), 1, StateSlots(2, 2)),
        Chunk(0, (30, 31, 32, 33), (5, 6), 3, StateSlots(ZERO_STATE, 1, ((2, 8),))),
    ]
    batch = BatchBuilder(2, CPU).build(chunks)
    left = batch.logit_batch
    assert left.ids.tolist() == [20, 31, 32, 33]
    assert left.positions.tolist() == [5, 1, 2, 3]
    assert left.slot_mapping.tolist() == [-1] * 4
    assert left.query_start.tolist() == [0, 1, 2, 4]
    assert left.seq_lens.tolist() == [6, 2, 4]
    assert torch.equal(left.block_tables, batch.block_tables[1:])
    assert left.state_reads.tolist() == [2, ZERO_STATE, 8]
    assert left.state_writes.tolist() == [2, 8, 1]
    assert left.logit_rows.tolist() == [0, 1, 2, 3]
    assert (left.num_tokens, left.num_requests, left.table_width, left.num_rows) == (4, 3, 4, 4)
    assert left.logit_batch is left and batch.logit_batch is left


def test_batch_of_no_row_that_needs_logits() -> None:
    left = BatchBuilder(2, CPU).build([Chunk(0, (1, 2), (5,), 0), Chunk(0, (3,), (6,), 0)]).logit_batch
    assert (left.num_tokens, left.num_requests, left.num_rows) == (0, 0, 0)
    assert left.query_start.tolist() == [0]


def test_an_empty_step() -> None:
    batch = BatchBuilder(2, CPU).build([])
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


@pytest.mark.parametrize("seed", range(4))
def test_what_stays_from_step_to_step_is_what_a_new_batch_has(seed: int) -> None:
    """Requests come, grow, shrink and leave, get other blocks, and take other places in the step."""
    rng, builder, tables = random.Random(seed), BatchBuilder(2, CPU), list[tuple[int, ...]]()
    for _ in range(200):
        if rng.random() < 0.3:
            tables.insert(rng.randint(0, len(tables)), (rng.randrange(99),) * rng.choice((1, 2, 40)))
        if len(tables) > 1 and rng.random() < 0.3:
            tables.pop(rng.randrange(len(tables)))
        if tables and rng.random() < 0.5:
            place = rng.randrange(len(tables))
            table = tables[place]
            tables[place] = rng.choice(((*table, rng.randrange(99)), table[:1], tuple(rng.sample(range(99), 3))))
        chunks = []
        for table in tables:
            end = 2 * len(table)
            count = rng.randint(1, min(end, 3))
            chunks.append(Chunk(end - count, range(count), table, rng.randint(0, count)))
        batch, fresh = builder.build(chunks), BatchBuilder(2, CPU).build(chunks)
        names = ("ids", "positions", "slot_mapping", "query_start", "seq_lens", "state_reads", "state_writes")
        assert all(torch.equal(getattr(batch, name), getattr(fresh, name)) for name in (*names, "logit_rows"))
        rows = zip(batch.block_tables.tolist(), tables, strict=True)
        assert all(tuple(row[: len(table)]) == table for row, table in rows)


def test_a_table_that_cannot_be_written_is_not_taken_for_written() -> None:
    builder, good = BatchBuilder(2, CPU), [Chunk(0, (1,), (5,), 1), Chunk(0, (1,), (6,), 1)]
    builder.build(good)
    with pytest.raises(OverflowError):
        builder.build([Chunk(0, (1,), (7, 0), 1), Chunk(0, (1,), (8, 2**40), 1)])
    assert builder.build(good).block_tables[:, 0].tolist() == [5, 6]
