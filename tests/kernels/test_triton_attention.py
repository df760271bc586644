"""The Triton kernels of attention in Triton's interpreter, over random ragged steps, against dense attention in fp64.

The suites of all backends run over them too, as slow tests (`triton-float32`). Kernels and work lists are changed here
on purpose, each by one position: every such fault must be found.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import backends
import pytest
import torch
from backends import BackendCase, Requests, attention, latent_spec, runnable
from torch import Tensor
from triton_faults import changed_copy

from splitfuse.kernels.triton import work_list
from splitfuse.kernels.triton.tuning import AttentionTiles
from splitfuse.kernels.triton.work_list import SHORTEST_SPLIT, Tiling, choose_split, make_work_list

pytestmark = [*runnable("triton-float32"), pytest.mark.usefixtures("seeded")]

TILES = AttentionTiles(head_dim=1024, single_rows=16, chunk_rows=32, keys=32)
"""Sizes of the tiles of these tests: steps are of many tiles, and contexts of many tiles of keys."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfuse.kernels.triton import backend

    monkeypatch.setattr(backend, "attention_tiles", lambda *_, **__: TILES)
    monkeypatch.setattr(work_list, "SHORTEST_SPLIT", 32)


def make_case(dtype: torch.dtype = torch.float32, *, processors: int = 1, kv_dtype: str = "auto") -> BackendCase:
    """Return the backend as if it had a GPU of so many multiprocessors: with more of them keys are divided."""
    from splitfuse.kernels.triton.backend import TritonBackend

    backend = TritonBackend(device="cpu", kv_dtype=kv_dtype)
    backend.processors = processors
    share = {torch.float32: 4e-6, torch.float16: 2e-3}[dtype]
    return BackendCase(backend, dtype, dtype, share, share)


def check(
    case: BackendCase,
    chunks: list[tuple[int, int]],  # positions before, and tokens, of each request
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    value_from: int = 0,
    **options: Any,
) -> Tensor:
    """Compute a step, and compare it with dense attention in fp64."""
    latent = latent_spec(head_dim, value_from) if value_from else None
    requests = Requests.random(
        [before + count for before, count in chunks],
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
    )
    starts = [0, *accumulate(count for _, count in chunks)]
    q = torch.randn(starts[-1], heads, head_dim).bfloat16().double()
    options.setdefault("scale", 1.3 * head_dim**-0.5)
    ours = backends.attend(
        case.backend,
        q.to(case.narrow),
        requests.store(case, pieces=64),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([before + count for before, count in chunks], dtype=torch.int32),
        block_tables=requests.block_tables,
        num_kv_heads=kv_heads,
        latent=latent,
        **options,
    )
    for (begin, end), keys, values in zip(pairwise(starts), requests.keys, requests.values, strict=True):
        exact, magnitude = attention(q[begin:end], keys, values, **options)
        case.near(ours[begin:end], exact, magnitude, share=case.attention)
    return ours


def random_step(rng: Random) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Return chunks of a step and the attention of a layer."""
    kv_heads, group = rng.choice(((1, 1), (2, 2), (1, 7), (2, 4), (3, 1), (1, 12)))
    head_dim, value_from = rng.choice(((32, 0), (64, 0), (80, 0), (96, 0), (128, 0), (72, 8)))
    if value_from:
        kv_heads, group = 1, rng.choice((5, 16))
    chunks = []
    for _ in range(rng.randint(1, 5)):
        before = rng.choice((0, rng.randint(1, 40), rng.randint(60, 200)))
        chunks.append((before, rng.choice((1, 1, rng.randint(1, 9), rng.randint(20, 40)))))
    heads = kv_heads * group
    options: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_from": value_from,
        "block_size": rng.choice((1, 8, 16, 32, 48)),
        "window": rng.choice((None, None, 1, 33, 70)),
        "softcap": rng.choice((None, None, 0.7)),
        "sinks": torch.randn(heads) if rng.random() < 0.3 else None,
        "alibi": rng.choice((None, None, 0.5)),
        "chunk": rng.choice((None, None, None, 50)),
    }
    return chunks, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(each, marks=pytest.mark.slow) for each in range(2, 6))])
def test_random_ragged_steps(seed: int, dtype: torch.dtype) -> None:
    rng = Random(f"{seed} {dtype}")
    chunks, options = random_step(rng)
    check(make_case(dtype, processors=rng.choice((1, 1000))), chunks, **options)


@pytest.mark.parametrize(
    ("head_dim", "value_from"), [(256, 0), (512, 0), (576, 64)], ids=["256", "512", "latent attention"]
)
def test_large_heads(head_dim: int, value_from: int) -> None:
    check(make_case(), [(0, 5), (70, 1)], heads=3, kv_heads=1, head_dim=head_dim, value_from=value_from)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("processors", [1, 1000])
def test_caches_of_8_bits(kv_dtype: str, processors: int) -> None:
    """What is kept is as near as 8 bits can be, and attention to what is kept as exact as to any other cache."""
    case = make_case(processors=processors, kv_dtype=kv_dtype)
    requests = Requests.random([90], block_size=16, num_kv_heads=2, head_dim=32)
    store = requests.store(case, pieces=64)
    blocks = requests.block_tables[0].long()
    kept = store.values[:, blocks].double() * store.scales[:, blocks].double().unsqueeze(-1)
    keys, values = kept.flatten(1, 2)[:, :90]
    for ours, exact in ((keys, requests.keys[0]), (values, requests.values[0])):
        largest = exact.abs().amax(-1, keepdim=True)
        bound = largest / 253 if kv_dtype == "int8" else exact.abs() / 15.9 + largest / 448 / 500
        is_near = (ours - exact).abs() <= bound
        if kv_dtype == "fp8":  # the interpreter halves what it should round up to a power of two
            rounded = (exact / largest * 448).float().to(torch.float8_e4m3fn).float().frexp().mantissa.abs()
            is_near |= rounded == 0.5
        assert is_near.all()
    q, sinks = torch.randn(20, 4, 32).double(), torch.randn(4)
    ours = backends.attend(
        case.backend,
        q.to(case.narrow),
        store,
        query_start=torch.tensor([0, 20], dtype=torch.int32),
        seq_lens=torch.tensor([90], dtype=torch.int32),
        block_tables=requests.block_tables,
        scale=0.2,
        sinks=sinks,
    )
    exact, magnitude = attention(q.float().double(), keys, values, scale=0.2, sinks=sinks)
    case.near(ours, exact, magnitude, share=case.attention)


# --- faults -----------------------------------------------------------------------------------------------------------

WINDOWED = {"window": 20, "block_size": 16}
FAULTS = {
    "causal bound in the kernel": (
        "attention",
        "keys[None, :] <= queries[:, None]",
        "keys[None, :] < queries[:, None]",
    ),
    "future seen in the kernel": ("attention", "keys[None, :] <= queries", "keys[None, :] <= 1 + queries"),
    "window in the kernel": ("attention", "queries - window + 1", "queries - window"),
    "block walk": ("attention", "table + keys // BLOCK", "table + (keys + 1) // BLOCK"),
    "place in a block": ("attention", "keys % BLOCK", "(keys + 1) % BLOCK"),
    "position of a row": ("attention", "first_position + rows // GROUP  #", "first_position + 1 + rows // GROUP  #"),
    "last partial result": ("attention", "first_place + num_places)", "first_place + num_places - 1)"),
    "first partial result": ("attention", "range(first_place, first", "range(first_place + 1, first"),
    "causal bound of a tile": ("work_list", "last // group + 1\n", "last // group\n"),
    "first key of a tile": ("work_list", "// tiling.keys * tiling.keys\n", "// tiling.keys * tiling.keys + 1\n"),
    "end of a split": ("work_list", "(bound + 1) * split)", "(bound + 1) * split - 1)"),
    "begin of a split": ("work_list", "bound * split)", "bound * split + 1)"),
    "number of splits": ("work_list", "begin // split + 1\n", "begin // split\n"),
}


def with_fault(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the backend compute with a changed copy of the module of a fault."""
    from splitfuse.kernels.triton import attention as kernels
    from splitfuse.kernels.triton import backend

    changed, old, new = FAULTS[name]
    module: ModuleType = {"attention": kernels, "work_list": work_list}[changed]
    copy = changed_copy(module, old, new, folder, monkeypatch)
    if changed == "attention":
        monkeypatch.setattr(backend, "attention_kernel", copy.attention_kernel)
        monkeypatch.setattr(backend, "merge_kernel", copy.merge_kernel)
    else:
        monkeypatch.setattr(copy, "SHORTEST_SPLIT", 32)
        monkeypatch.setattr(backend, "AttentionWork", copy.AttentionWork)


def divided_step() -> None:
    """Check a step with chunks and single rows, whose keys are divided, with a window that ends in a tile."""
    check(make_case(processors=1000), [(70, 1), (40, 9), (0, 3)], **WINDOWED)
    check(make_case(processors=1000), [(70, 1), (40, 9), (0, 3)], block_size=16)


def test_the_step_with_faults_is_right_without_them() -> None:
    divided_step()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_position_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_fault(name, monkeypatch, tmp_path)
    with pytest.raises((AssertionError, IndexError)):
        divided_step()


# --- work lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_what_each_row_sees_once(seed: int) -> None:
    rng = Random(seed)
    counts = [rng.choice((0, 1, 1, rng.randint(2, 90))) for _ in range(rng.randint(0, 6))]
    lengths = [count + rng.choice((0, rng.randint(0, 300))) for count in counts]
    group, keys = rng.choice((1, 3, 4, 20)), rng.choice((16, 32))
    tiling = Tiling(rows=rng.choice((16, 32)), keys=keys, split=rng.choice((None, 2 * keys, 3 * keys)))
    seeing: dict[str, Any] = {"window": rng.choice((None, 1, 40)), "chunk": rng.choice((None, 50))}
    starts = [0, *accumulate(counts)]
    work = make_work_list(starts, lengths, group=group, tiling=tiling, **seeing)
    seen: dict[tuple[int, int], list[int]] = {}
    for request, query_start, num_rows, first, position, begin, end, place in work.tiles.tolist():
        assert (query_start, num_rows) == (starts[request], counts[request] * group)
        assert position == lengths[request] - counts[request]
        assert begin % keys == 0 and begin < end and (place < 0) == (tiling.split is None or not _divided(work, place))
        for row in range(first, min(first + tiling.rows, num_rows)):
            seen.setdefault((query_start + row // group, row % group), []).extend(range(begin, end))
    for request, (start, count) in enumerate(zip(starts, counts, strict=False)):
        for token in range(count):
            at = lengths[request] - count + token
            first = max(0, at - seeing["window"] + 1) if seeing["window"] else 0
            if seeing["chunk"]:
                first = max(first, at // seeing["chunk"] * seeing["chunk"])
            for head in range(group):
                found = seen.pop((start + token, head))
                assert found == sorted(set(found)) or sorted(found) == sorted(set(found))
                assert set(range(first, at + 1)) <= set(found)
    assert not seen
    lengths_of_tiles = [end - begin for *_, begin, end, _ in work.tiles.tolist()]
    assert lengths_of_tiles == sorted(lengths_of_tiles, reverse=True)


def _divided(work: work_list.WorkList, place: int) -> bool:
    """Return whether a partial result of this place is merged, once."""
    merged = [range(first, first + count) for *_, first, count in work.merges.tolist()]
    return sum(place in places for places in merged) == 1


def test_keys_are_divided_where_multiprocessors_have_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_list, "SHORTEST_SPLIT", SHORTEST_SPLIT)
    tiling = Tiling(rows=16, keys=64)
    choose: Callable[..., int | None] = choose_split
    shape: dict[str, Any] = {"group": 4, "num_kv_heads": 8, "tiling": tiling, "processors": 132}
    assert choose([0, 1], [32768], **shape) == 512  # 64 parts for each of 8 heads: 512 of 528 programs
    assert choose([0, 1], [1000], **shape) == SHORTEST_SPLIT
    assert choose(list(range(65)), [4096] * 64, **shape) is None
