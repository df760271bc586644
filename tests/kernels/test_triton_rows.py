"""What the Triton kernels do row by row in Triton's interpreter, against the reference, over random shapes."""

from __future__ import annotations

from random import Random
from typing import Any

import backends
import pytest
import torch
from backends import CPU, Arrays, runnable
from torch import Tensor

from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, NormSpec, QueryScaling
from splitfuse.kernels.reference import GATED_ACTIVATIONS, ReferenceBackend
from splitfuse.kernels.weights import LayerWeights, WeightRole

pytestmark = [*runnable("triton-float32"), pytest.mark.usefixtures("seeded")]

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def backend() -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu")


def assert_near(ours: Tensor, wanted: Tensor, *, units: float = 1.0) -> None:
    tolerance = units * TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 5), (2, 257)])
def test_norm_and_sum(rows: int, width: int, centered: bool, dtype: torch.dtype) -> None:
    x, branch = (torch.randn(rows, width, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(width) for _ in range(2))
    spec = NormSpec(eps=0.01, centered=centered, bias=centered)
    given = (spec, weight, bias if centered else None)
    assert_near(backend().norm(x, *given), ReferenceBackend().norm(x, *given), units=4)
    ours, wanted = (each.add_norm(x, branch, 0.5, *given) for each in (backend(), ReferenceBackend()))
    assert_near(ours[0], wanted[0], units=2)
    assert_near(ours[1], wanted[1], units=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATED_ACTIVATIONS)
def test_gated(kind: str, dtype: torch.dtype) -> None:
    x = 4 * torch.randn(3, 70, dtype=dtype)
    weight = torch.eye(70, dtype=dtype)
    assert_near(backend().gated(x, weight, None, kind), ReferenceBackend().gated(x, weight, None, kind), units=4)
    assert backend().gated(x[:0], weight, None, kind).shape == (0, 35)


def test_the_first_of_the_largest_is_the_best() -> None:
    scores = (torch.randn(9, 5000) * 2).round()
    scores[1, 77] = float("nan")
    scores[2] = float("-inf")
    scores[3, 4999] = float("inf")
    ours, wanted = backend().topk(scores, 1), ReferenceBackend().topk(scores, 1)
    assert [row for n, row in enumerate(ours[0]) if n != 1] == [row for n, row in enumerate(wanted[0]) if n != 1]
    assert str(ours[1]) == str(wanted[1])
    assert backend().topk(scores, 3) == ReferenceBackend().topk(scores, 3) or scores[1].isnan().any()


def random_heads(rng: Random) -> dict[str, Any]:
    """Return fields of an AttentionSpec: every way in which queries, keys and values are made."""
    kv_heads = rng.choice((1, 2, 3))
    fields: dict[str, Any] = {"num_heads": kv_heads * rng.choice((1, 3)), "num_kv_heads": kv_heads}
    fields["head_dim"] = rng.choice((1, 7, 32, 80, 130))
    if rng.random() < 0.7:
        centered = rng.random() < 0.3
        weight = rng.random() < 0.8
        fields["qk_norm"] = HeadNormSpec(
            norm=NormSpec(eps=0.02, centered=centered, bias=centered and weight),
            weight=weight,
            own_weights=weight and rng.random() < 0.3,
            whole_row=weight and rng.random() < 0.3,
            after_rope=rng.random() < 0.3,
        )
    if rng.random() < 0.3:
        fields["query_scaling"] = QueryScaling(beta=0.1, length=7, offset=1)
    if rng.random() < 0.3:
        fields["v_norm"] = NormSpec(eps=0.02, centered=rng.random() < 0.5)
    return fields


def norm_weights(spec: AttentionSpec) -> LayerWeights:
    norms, given = spec.qk_norm, {}
    if norms is not None and norms.weight:
        for name, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads)):
            shape = (heads * spec.head_dim,) if norms.whole_row else (heads, spec.head_dim)
            given[f"{name}_norm"] = torch.randn(shape if norms.own_weights or norms.whole_row else shape[1:])
            if norms.norm.bias:
                given[f"{name}_norm_bias"] = torch.randn(given[f"{name}_norm"].shape)
    return LayerWeights(**given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(each, marks=pytest.mark.slow) for each in range(5, 16))])
def test_heads_are_normed_rotated_and_kept(seed: int, dtype: torch.dtype) -> None:
    rng = Random(f"{seed} {dtype}")
    spec = AttentionSpec(**random_heads(rng))
    tokens, block_size, num_blocks = rng.choice((1, 5, 40)), rng.choice((4, 16)), 12
    half = rng.choice((0, spec.head_dim // 2, spec.head_dim // 4))
    angles = torch.rand(60, half) * 6
    rope = None if not half else (angles.cos(), angles.sin())
    slots = torch.randperm(num_blocks * block_size)[:tokens].int()
    slots[rng.randrange(tokens)] = -1
    arrays = Arrays(positions=torch.randint(60, (tokens,), dtype=torch.int32), slot_mapping=slots)
    weights = norm_weights(spec)
    qkv = torch.randn(tokens, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, dtype=dtype)
    found = []
    for each in (backend(), ReferenceBackend()):
        options: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size, "dtype": dtype, "device": CPU}
        store = each.allocate_kv(spec, **options)
        backends.poison(store)
        q = each.rope_store(qkv.clone(), store, spec, arrays, rope, weights)
        found.append((q, store.nan_to_num(99.0)))
    for ours, wanted in zip(*found, strict=True):
        assert_near(ours, wanted, units=8)  # the reference rounds between a norm and a rotation


def test_blocks_of_8_bits_are_copied_with_their_scales() -> None:
    from splitfuse.kernels.triton.backend import TritonBackend

    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8)
    for kv_dtype in ("int8", "fp8"):
        ours = TritonBackend(device="cpu", kv_dtype=kv_dtype)
        sizes: dict[str, Any] = {"num_blocks": 3, "block_size": 4, "dtype": torch.float32, "device": CPU}
        source, target = ours.allocate_kv(spec, **sizes), ours.allocate_kv(spec, **sizes)
        source.memory.copy_(torch.randint(100, source.memory.shape))
        ours.fill_kv(target, 0)
        data = torch.empty(ours.kv_bytes(spec, block_size=4, dtype=torch.float32), dtype=torch.uint8)
        assert 3 * len(data) == source.memory.nbytes
        ours.read_block(source, 2, data)
        ours.write_block(target, 1, data)
        assert torch.equal(target.values[:, 1].view(torch.uint8), source.values[:, 2].view(torch.uint8))
        assert torch.equal(target.scales[:, 1], source.scales[:, 2])
        assert not target.values[:, [0, 2]].view(torch.uint8).any()


def test_packed_heads_are_looked_up() -> None:
    table = torch.randn(7, 3)
    head = backend().pack([table], role=WeightRole.HEAD)
    assert torch.equal(backend().embed(torch.tensor([6, 0]), head), table[[6, 0]])
