"""put, query, can_schedule and flush: transformers' logits however sequences grow, and refusals that change nothing."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from transformers import PreTrainedModel

from splitfuse.config.engine import EngineConfig
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.errors import InvalidRequestError, RequestTooLargeError

BUDGET, NUM_BLOCKS, BLOCK_SIZE, LIMIT = 24, 40, 4, tiny_models.MAX_POSITION


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    return tiny_models.make("llama-gqa")


@pytest.fixture
def engine(folder: Path) -> RaggedEngine:
    settings = {"max_num_batched_tokens": BUDGET, "num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
    return RaggedEngine.load(EngineConfig.from_settings({"model": str(folder), "dtype": "float32", **settings}))


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(count)]


def assert_same(logits: torch.Tensor, oracle: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> None:
    """Each row is what transformers computes after that context: within 1e-4 of the largest."""
    assert logits.shape == (len(contexts), tiny_models.VOCAB_SIZE) and logits.dtype == torch.float32
    for row, context in zip(logits, contexts, strict=True):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([context])).logits[0, -1]
        assert (row - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_sequences_grown_in_pieces_give_the_logits_of_transformers(
    engine: RaggedEngine, oracle: PreTrainedModel
) -> None:
    rng = Random(1)
    contexts: dict[int, list[int]] = {}
    longest = 0
    for _ in range(60):
        uids = rng.sample(range(5), rng.randint(1, 5))
        pieces = [random_tokens(rng, rng.choice((1, 1, 2, 7, 15))) for _ in uids]
        if not engine.can_schedule(uids, [len(piece) for piece in pieces]):
            if contexts and rng.random() < 0.4:
                uid = rng.choice(list(contexts))
                del contexts[uid]
                engine.flush(uid)
            continue
        logits = engine.put(uids, pieces)
        engine.check()
        for uid, piece in zip(uids, pieces, strict=True):
            contexts[uid] = contexts.get(uid, []) + piece
        assert_same(logits, oracle, [contexts[uid] for uid in uids])
        longest = max(longest, *map(len, contexts.values()))
    assert longest > 60
    for uid in contexts:
        engine.flush(uid)
    engine.check()
    assert engine.num_free_blocks == NUM_BLOCKS


def test_query_returns_the_tokens_that_blocks_would_hold(engine: RaggedEngine) -> None:
    assert engine.query(1, max_tokens=100, max_blocks=3) == (12, 3)
    assert engine.query(1, max_tokens=5, max_blocks=3) == (5, 2)
    assert engine.query(1, max_tokens=5, max_blocks=0) == (0, 0)
    assert engine.query(1, max_tokens=1000, max_blocks=1000) == (LIMIT, LIMIT // BLOCK_SIZE)
    engine.put([1], [[1] * 6])
    assert engine.query(1, max_tokens=100, max_blocks=0) == (2, 0)
    assert engine.query(1, max_tokens=100, max_blocks=1) == (6, 1)
    assert engine.query(1, max_tokens=1000, max_blocks=1000)[0] == LIMIT - 6
    assert engine.num_free_blocks == NUM_BLOCKS - 2


def fill(engine: RaggedEngine, uid: int, count: int) -> None:
    for start in range(0, count, BUDGET):
        engine.put([uid], [[start % 7] * min(BUDGET, count - start)])


@pytest.mark.parametrize(
    ("uids", "tokens", "message"),
    [
        pytest.param([], [], "there are 0 ids and 0 token lists: give at least one id", id="nothing"),
        pytest.param([7, 8], [[1]], "there are 2 ids and 1 token lists", id="fewer-lists-than-ids"),
        pytest.param([7, 7], [[1], [2]], r"the ids \[7, 7\] repeat one", id="duplicates"),
        pytest.param([7, 8], [[1], []], "sequence 8 gets 0 tokens: give at least one", id="no-token"),
        pytest.param([7], [[97]], "sequence 7 has the token id 97, but the model's are from 0 to 96", id="vocabulary"),
        pytest.param([7, 1], [[1], [-1]], "sequence 1 has the token id -1", id="negative-token"),
        pytest.param([7], [[True]], "sequence 7 has the token id True", id="bool"),
        pytest.param([7], [[1.0]], "sequence 7 has the token id 1.0", id="float"),
        pytest.param([7, 8], [[1] * 12, [1] * 13], "25 tokens in one step, max_num_batched_tokens is 24", id="budget"),
    ],
)
def test_a_refused_put_changes_nothing(
    engine: RaggedEngine, oracle: PreTrainedModel, uids: list[int], tokens: list[list[Any]], message: str
) -> None:
    engine.put([1], [[5, 6, 7]])
    with pytest.raises(InvalidRequestError, match=message):
        engine.put(uids, tokens)
    engine.check()
    assert engine.num_free_blocks == NUM_BLOCKS - 1
    assert_same(engine.put([1, 7], [[8], [9]]), oracle, [[5, 6, 7, 8], [9]])


def test_no_sequence_outgrows_the_model(engine: RaggedEngine) -> None:
    fill(engine, 1, LIMIT - 2)
    assert engine.can_schedule([1], [2]) and not engine.can_schedule([1], [3])
    with pytest.raises(RequestTooLargeError, match=f"sequence 1: {LIMIT + 1} tokens, the limit is {LIMIT}"):
        engine.put([1], [[1, 1, 1]])
    engine.put([1], [[1, 1]])
    assert not engine.can_schedule([1], [1])
    engine.check()


def test_a_flush_frees_blocks_when_none_are_left(engine: RaggedEngine) -> None:
    fill(engine, 1, 120)
    fill(engine, 2, 36)
    assert engine.num_free_blocks == 1
    assert engine.can_schedule([3], [4]) and not engine.can_schedule([3], [5])
    with pytest.raises(RequestTooLargeError, match="3 KV blocks are needed, 1 are free: flush a sequence"):
        engine.put([2, 3], [[1, 2], [1, 2, 3, 4, 5]])
    engine.check()
    engine.flush(2)
    engine.put([3], [[1, 2, 3, 4, 5]])
    engine.check()


def test_an_unknown_sequence_cannot_be_flushed(engine: RaggedEngine) -> None:
    engine.put([1], [[1]])
    engine.flush(1)
    for uid in (1, 2):
        with pytest.raises(InvalidRequestError, match=f"there is no sequence {uid} to flush"):
            engine.flush(uid)
    engine.check()


def test_a_flushed_id_begins_anew(engine: RaggedEngine, oracle: PreTrainedModel) -> None:
    engine.put([1], [[1, 2, 3]])
    engine.flush(1)
    assert_same(engine.put([1], [[4, 5]]), oracle, [[4, 5]])
