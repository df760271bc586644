"""Keys and values in int8: whole numbers from -127 to 127 with a scale for each token and head, its largest magnitude /
127. Attention must be that over the numbers kept, as near as attention over a bf16 cache is to its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import backends
import pytest
import torch
from backends import BackendCase, Requests, attention, emulation_slow, poison, variants
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend

MIXED = [(0, 1), (0, 37), (12, 1), (31, 2), (63, 1), (100, 29), (510, 5), (600, 1), (1030, 20)]
ATTENTION = 2**-7  # the weights of the softmax are rounded to bf16, times the values' scales; so is the result


def int8_backend(variant: str) -> BackendCase:
    return BackendCase(
        CpuBackend(variant=variant, num_threads=2, kv_int8=True), torch.bfloat16, torch.float32, 2e-6, 2**-7
    )


def as_kept(x: Tensor) -> Tensor:
    """x [length, heads, D] as an int8 store keeps it, in fp64."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, 127.0)  # a tensor: a number would be multiplied with the reciprocal
    inverse = torch.where(largest > 0, most / largest, 0.0)
    return ((x * inverse).round().double()) * (largest * torch.tensor(1.0 / 127.0)).double()


def check(
    variant: str,
    chunks: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 32,
    spread: float = 1.0,
    **options: Any,
) -> None:
    case = int8_backend(variant)
    lengths = [before + count for before, count in chunks]
    requests = Requests.random(lengths, block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim)
    for x in requests.keys + requests.values:  # tokens of very different sizes in one block
        x *= torch.exp2(torch.randint(-3, 4, (len(x), 1, 1)).double() * spread)
    starts = [0, *accumulate(count for _, count in chunks)]
    q = torch.randn(starts[-1], heads, head_dim).bfloat16()
    options.setdefault("scale", head_dim**-0.5 / 4)
    ours = backends.attend(
        case.backend,
        q,
        requests.store(case),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=requests.block_tables,
        **options,
    )
    for (begin, end), keys, values in zip(pairwise(starts), requests.keys, requests.values, strict=True):
        kept_keys, kept_values = as_kept(keys), as_kept(values)
        exact, magnitude = attention(q[begin:end].double(), kept_keys, kept_values, **options)
        case.near(ours[begin:end], exact, magnitude, share=ATTENTION)
        # And against what was put in: a level is at most half a unit off. Values: their share of the largest in a head;
        # keys: what a score is off by, which the softmax at most doubles.
        options_off = {k: v for k, v in options.items() if k in ("window", "softcap", "sinks", "scale")}
        wanted, size = attention(q[begin:end].double(), keys, values, **options_off)
        unit = values.abs().amax() / 254
        score = options["scale"] * q[begin:end].double().abs().sum(-1).amax() * keys.abs().amax() / 254
        assert ((ours[begin:end].double() - wanted).abs() <= unit + 2 * score.clamp_max(1) * size + 2**-6 * size).all()


@pytest.mark.parametrize("head_dim", [1, 2, 16, 33, 64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_head_sizes(variant: str, head_dim: int, block_size: int) -> None:
    check(variant, MIXED, head_dim=head_dim, block_size=block_size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (7, 1), (14, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("variant", variants())
def test_groups(variant: str, heads: int, kv_heads: int) -> None:
    check(variant, [(0, 9), (40, 1), (3, 2), (500, 20)], heads=heads, kv_heads=kv_heads, head_dim=16)


@pytest.mark.parametrize("window", [None, 1, 33, 300, 513])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_windows_caps_and_sinks(variant: str, window: int | None, softcap: float | None, sinks: bool) -> None:
    column = torch.tensor([-3.0, 0.0, 2.5, 8.0]) if sinks else None
    check(variant, MIXED, window=window, softcap=softcap, sinks=column, head_dim=32)


@pytest.mark.parametrize(
    "chunks", [[(1600, 1)], [(511, 1)], [(512, 1)], [(0, 1100)], [(1023, 2), (3, 1), (700, 40)]], ids=str
)
@pytest.mark.parametrize("variant", variants())
def test_long_contexts(variant: str, chunks: list[tuple[int, int]]) -> None:
    check(variant, chunks, heads=2, kv_heads=1, head_dim=16)


@pytest.mark.parametrize("variant", variants())
def test_single_tokens_come_back_as_they_are_kept(variant: str) -> None:
    """A window of one token gives its value: quantized values and their scales, exactly, to bf16's rounding."""
    case = int8_backend(variant)
    requests = Requests.random([45], block_size=32, num_kv_heads=2, head_dim=48)
    requests.values[0][7] = 0
    requests.values[0][8, 1] *= 1e4
    ours = backends.attend(
        case.backend,
        torch.zeros(45, 2, 48, dtype=torch.bfloat16),
        requests.store(case),
        query_start=torch.tensor([0, 45]),
        seq_lens=torch.tensor([45]),
        block_tables=requests.block_tables,
        scale=1.0,
        window=1,
    )
    exact = as_kept(requests.values[0])
    case.near(ours, exact, exact.abs(), share=2**-8)  # the scale is rounded to bf16 before values are quantized


@pytest.mark.parametrize("variant", variants())
def test_a_token_changes_no_other(variant: str) -> None:
    """Scales are of a token and head: writing a large neighbour changes no bit of what was written before."""
    case = int8_backend(variant)
    requests = Requests.random([40], block_size=32, num_kv_heads=2, head_dim=32)
    requests.keys[0][-1] *= 1000
    requests.values[0][-1] *= 1000
    store = requests.store(case)
    without = dataclasses.replace(requests, keys=[requests.keys[0][:-1]], values=[requests.values[0][:-1]])
    q = torch.randn(5, 4, 32).bfloat16()

    def attend(store: Any) -> Tensor:
        return backends.attend(
            case.backend,
            q,
            store,
            query_start=torch.tensor([0, 5]),
            seq_lens=torch.tensor([39]),
            block_tables=requests.block_tables,
            scale=0.3,
        )

    assert torch.equal(attend(store), attend(without.store(case)))


@pytest.mark.parametrize("variant", variants())
def test_slot_minus_one_is_not_written(variant: str) -> None:
    case = int8_backend(variant)
    requests = Requests.random([40], block_size=32, num_kv_heads=2, head_dim=33)
    store = requests.store(case)
    before = store.memory.clone()
    backends.rope_store(
        case.backend,
        torch.randn(3, 8 * 33),
        positions=torch.zeros(3, dtype=torch.int32),
        slot_mapping=torch.full((3,), -1),
        cos=torch.ones(1, 16),
        sin=torch.zeros(1, 16),
        store=store,
        num_heads=4,
        num_kv_heads=2,
        head_dim=33,
    )
    assert torch.equal(store.memory, before)


@pytest.mark.parametrize("variant", variants())
def test_nan_stays_in_its_request(variant: str) -> None:
    case = int8_backend(variant)
    requests = Requests.random([40, 40], block_size=32, num_kv_heads=1, head_dim=32)
    requests.keys[0][3, 0, 5] = torch.nan
    requests.values[0][20, 0, 5] = torch.inf
    store = requests.store(case)
    ours = backends.attend(
        case.backend,
        torch.randn(80, 2, 32).bfloat16(),
        store,
        query_start=torch.tensor([0, 40, 80]),
        seq_lens=torch.tensor([40, 40]),
        block_tables=requests.block_tables,
        scale=0.3,
    ).isfinite()
    assert ours[:3].all() and not ours[3:40].any() and ours[40:].all()


@pytest.mark.parametrize("variant", variants())
def test_bytes_of_a_block(variant: str) -> None:
    backend = int8_backend(variant).backend
    for block_size, heads, head_dim, padded in [(32, 2, 64, 64), (64, 3, 33, 64), (96, 1, 128, 128)]:
        shape: dict[str, Any] = {"block_size": block_size, "num_kv_heads": heads, "head_dim": head_dim}
        size = backends.kv_bytes(backend, dtype=torch.bfloat16, **shape)
        assert size == 2 * block_size * heads * (padded + 4)  # quantized values, and a scale in fp32
        store = backends.allocate_kv(backend, num_blocks=5, dtype=torch.bfloat16, device=torch.device("cpu"), **shape)
        poison(store)
        assert store.nbytes == 5 * size
