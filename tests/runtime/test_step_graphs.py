"""Buckets of CUDA graphs, and that padding changes nothing: without a GPU, where no graph can be captured."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tiny_models
import torch
from backends import poison, runnable
from ragged_requests import Chunk

import splitfuse
from splitfuse.errors import ConfigError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import load_spec
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.step_graphs import Bucket, StepGraphs, pad, round_up

CPU = torch.device("cpu")
BLOCK = 4
SLOW_HYBRIDS = [
    pytest.param(family, marks=[*runnable("triton-float32"), pytest.mark.slow])
    for family in ("lfm2", "qwen3.5-moe", "nemotron-h")
]


def test_sizes_of_buckets() -> None:
    sizes = sorted({round_up(size) for size in range(2049)})
    assert sizes[:14] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20] and sizes[-1] == 2048
    assert all(round_up(size) == size for size in sizes)
    assert all(size <= round_up(size) <= 1.25 * size for size in range(1, 3000))


def build(*parts: tuple[int, int]) -> RaggedBatch:
    """Return the batch of requests (positions before, tokens), with blocks one after the other."""
    chunks, begin = [], 0
    for before, count in parts:
        blocks = range(begin, begin + -(-(before + count) // BLOCK))
        chunks.append(Chunk(before, [(7 * begin + n) % 50 + 1 for n in range(count)], tuple(blocks), 1))
        begin = blocks.stop
    return BatchBuilder(BLOCK, CPU).build(chunks)


def test_a_step_of_single_tokens_stays_one() -> None:
    assert Bucket.of(build((3, 1), (0, 1))) == Bucket(2, 2, 4, 2)
    nine = Bucket.of(build(*[(3, 1)] * 9))
    assert nine.tokens == nine.requests == 10
    mixed = Bucket.of(build(*[(3, 1)] * 8, (0, 2)))
    assert mixed.tokens > mixed.requests


def make_backend(name: str) -> Backend:
    if name == "reference":
        return ReferenceBackend()
    from splitfuse.kernels.triton.backend import TritonBackend

    backend = TritonBackend(device="cpu")
    backend.processors = 50
    return backend


@pytest.mark.parametrize(
    "name", ["reference", pytest.param("triton", marks=[*runnable("triton-float32"), pytest.mark.slow])]
)
def test_padded_steps_give_the_same_and_write_the_same(name: str, tmp_path: Path) -> None:
    tiny_models.save("gpt-oss", tmp_path)
    weights, spec = ModelFolder(tmp_path).weights(), load_spec(ModelFolder(tmp_path))
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=CPU, backend=make_backend(name))
    found = []
    for is_padded in (False, True):
        sizes = {"num_blocks": 12, "block_size": BLOCK, "dtype": torch.float32, "device": CPU}
        cache = KVCache(spec, **sizes, backend=decoder.backend)
        for store in cache.layers:
            poison(store)
        for step in (build((0, 9), (0, 2)), build((9, 1), (2, 9))):
            batch = pad(step, Bucket(14, 3, 5, 4)) if is_padded else step
            hidden = decoder.forward(batch, cache)[: step.num_rows]
        found.append([hidden, *(store.nan_to_num(99.0) for store in cache.layers)])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SLOW_HYBRIDS)
def test_states_are_as_if_a_step_were_computed_once(family: str, tmp_path: Path) -> None:
    """A graph computes the step again that its kernels were compiled by: states must go on from where they were."""
    tiny_models.save(family, tmp_path)
    weights, spec = ModelFolder(tmp_path).weights(), load_spec(ModelFolder(tmp_path))
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=CPU, backend=make_backend("triton"))
    sizes = {"num_blocks": 12, "block_size": BLOCK, "dtype": torch.float32, "device": CPU, "num_states": 4}
    found = []
    for is_captured in (False, True):
        cache = KVCache(spec, **sizes, backend=decoder.backend)
        graphs = StepGraphs(decoder, cache)
        for step in (build_hybrid((0, 18, -1, 0), (0, 2, -1, 1)), build_hybrid((18, 1, 0, 0), (2, 17, 1, 1))):
            batch, bucket = step, Bucket(24, 3, 8, 4)
            if is_captured:
                graphs._prepare(pad(step, bucket))
                batch = pad(step, bucket)
            hidden = decoder.forward(batch, cache)[: step.num_rows]
        found.append([hidden, *(store[:2] for store in cache.layers if store is not None and store.dim() == 2)])
    for plain, captured in zip(*found, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-5, atol=1e-5)


def build_hybrid(*parts: tuple[int, int, int, int]) -> RaggedBatch:
    """Return the batch of requests (positions before, tokens, slot to read, slot to write)."""
    batch = build(*((before, count) for before, count, *_ in parts))
    for part, number in ((batch.state_reads, 2), (batch.state_writes, 3)):
        part.copy_(torch.tensor([each[number] for each in parts]))
    return batch


@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_lists_of_tiles_have_one_shape_in_a_bucket(name: str) -> None:
    from splitfuse.kernels.triton.tuning import INTERPRETED
    from splitfuse.kernels.triton.work_list import AttentionWork

    del name
    rng, bucket = Random(0), Bucket(40, 6, 80, 6)
    for split in (None, 64):
        work = AttentionWork(INTERPRETED, 3, 2, rng.choice((None, 20)), None, 20, BLOCK, split)
        shapes = set()
        for _ in range(50):
            parts = [(rng.randint(0, 280), rng.choice((1, 1, 8))) for _ in range(rng.randint(1, 5))]
            tiles, merges = work(pad(build(*parts), bucket))
            shapes.add((tiles.shape, merges.shape))
            if split is not None:  # else it depends on how many tiles there could be
                assert torch.equal(tiles[tiles[:, 2] > 0], work(build(*parts))[0])
        assert len(shapes) == 1


def test_derived_tensors_are_written_again() -> None:
    first, second = (pad(build(*parts), Bucket(12, 3, 4, 3)) for parts in ([(0, 5)], [(3, 1), (0, 9)]))
    derivation = lambda batch: (torch.from_numpy(batch.host_seq_lens),)  # noqa: E731
    (kept,) = first.derived(derivation)
    first.write(second)
    assert torch.equal(first.packed, second.packed)
    assert kept.tolist() == second.host_seq_lens.tolist() == [4, 9, 0]


def test_a_capture_that_fails_is_the_last_and_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    weights, spec = ModelFolder(tmp_path).weights(), load_spec(ModelFolder(tmp_path))
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=CPU, backend=ReferenceBackend())
    sizes = {"num_blocks": 12, "block_size": BLOCK, "dtype": torch.float32, "device": CPU}
    cache = KVCache(spec, **sizes, backend=decoder.backend)
    graphs, captures = StepGraphs(decoder, cache), list[RaggedBatch]()

    def capture(padded: RaggedBatch) -> None:
        captures.append(padded)
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(graphs, "_capture", capture)
    for step in (build((0, 9), (0, 2)), build((0, 9), (0, 2)), build((0, 3))):
        assert torch.equal(graphs.forward(step), decoder.forward(step, cache))
    assert len(captures) == 1 and "no memory is left" in caplog.text


def test_where_steps_cannot_be_captured_the_setting_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="cuda_graphs cannot be used: the reference kernels on cpu cannot be captured"
    ):
        splitfuse.pipeline(kernels="reference", dtype="float32", device="cpu", cuda_graphs=True)
