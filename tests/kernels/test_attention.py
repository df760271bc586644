"""Keys and values written by `rope_store` and read by `attend`, on every backend, against dense attention in fp64.

Stores are full of NaN before, so that what was not written shows as soon as it is touched. Where the C++ kernels may
err is in positions: blocks of 32 tokens (pieces), tiles of 512 keys, 14 or 2 rows (token, head of the group) at once,
threads that share a long request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import backends
import pytest
import torch
from backends import CPU, Arrays, BackendCase, Requests, attention, latent_spec, poison
from torch import Tensor

from splitfuse.kernels.interface import Store
from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, LatentSpec, NormSpec, QueryScaling
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import LayerWeights, WeightRole


def attend(
    case: BackendCase, q: Tensor, store: Store, requests: Requests, chunks: Sequence[tuple[int, int]], **options: Any
) -> Tensor:
    """`chunks`: (positions before, tokens) of each request; q [all tokens, H, D]."""
    return backends.attend(
        case.backend,
        q.to(case.narrow),
        store,
        query_start=torch.tensor([0, *accumulate(count for _, count in chunks)], dtype=torch.int32),
        seq_lens=torch.tensor([before + count for before, count in chunks], dtype=torch.int32),
        block_tables=requests.block_tables,
        **options,
    )


def check(
    case: BackendCase,
    chunks: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 32,
    latent: LatentSpec | None = None,
    **options: Any,
) -> None:
    requests = Requests.random(
        [before + count for before, count in chunks],
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
    )
    q = torch.randn(sum(count for _, count in chunks), heads, head_dim).bfloat16().double()
    options.setdefault("scale", 1.3 * head_dim**-0.5)
    ours = attend(case, q, requests.store(case), requests, chunks, latent=latent, **options)
    assert ours.dtype == case.narrow
    starts = [0, *accumulate(count for _, count in chunks)]
    for (begin, end), keys, values in zip(pairwise(starts), requests.keys, requests.values, strict=True):
        exact, magnitude = attention(q[begin:end], keys, values, **options)
        case.near(ours[begin:end], exact, magnitude, share=case.attention)


MIXED = [(0, 1), (0, 37), (12, 1), (31, 2), (63, 1), (100, 29), (510, 5), (600, 1)]


@pytest.mark.parametrize("head_dim", [1, 2, 16, 31, 33, 64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [32, 64, 96])
def test_head_sizes(case: BackendCase, head_dim: int, block_size: int) -> None:
    check(case, MIXED, head_dim=head_dim, block_size=block_size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 3), (7, 1), (14, 2), (8, 1), (20, 1), (32, 4)])
def test_groups(case: BackendCase, heads: int, kv_heads: int) -> None:
    check(case, [(0, 9), (40, 1), (3, 2), (500, 20)], heads=heads, kv_heads=kv_heads, head_dim=16)


def test_the_largest_heads(case: BackendCase) -> None:
    check(case, [(0, 40), (70, 1)], heads=2, kv_heads=1, head_dim=1024)


@pytest.mark.parametrize(
    ("heads", "head_dim", "value_from"), [(1, 3, 2), (5, 63, 30), (20, 576, 64), (128, 96, 32), (3, 1023, 30)]
)
def test_values_that_are_parts_of_keys(case: BackendCase, heads: int, head_dim: int, value_from: int) -> None:
    latent, sinks = latent_spec(head_dim, value_from), torch.randn(heads)
    check(case, MIXED, heads=heads, kv_heads=1, head_dim=head_dim, latent=latent, block_size=64)
    options = {"window": 37, "softcap": 0.7, "sinks": sinks}
    check(case, [(0, 9), (40, 1), (500, 20)], heads=heads, kv_heads=1, head_dim=head_dim, latent=latent, **options)


@pytest.mark.parametrize("window", [None, 1, 2, 31, 32, 33, 300, 513, 5000])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_caps_and_sinks(case: BackendCase, window: int | None, softcap: float | None, sinks: bool) -> None:
    column = torch.tensor([-3.0, 0.0, 2.5, 8.0]) if sinks else None
    check(case, MIXED, window=window, softcap=softcap, sinks=column, head_dim=32)


@pytest.mark.parametrize(("chunk", "window"), [(1, None), (31, None), (64, 40), (500, None), (512, 40), (700, 513)])
def test_chunked(case: BackendCase, chunk: int, window: int | None) -> None:
    check(case, [*MIXED, (511, 3), (690, 22)], chunk=chunk, window=window, head_dim=32)


@pytest.mark.parametrize(
    ("heads", "options"),
    [(1, {}), (4, {"softcap": 0.7}), (7, {"window": 33}), (12, {"sinks": torch.linspace(-3, 3, 12)})],
)
def test_scores_that_fall_with_distance(case: BackendCase, heads: int, options: dict[str, Any]) -> None:
    check(case, MIXED, heads=heads, kv_heads=1, alibi=0.5, head_dim=32, **options)


@pytest.mark.parametrize("window", [None, 50, 700])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([(before, 1)], id=f"one-token-after-{before}")
        for before in (31, 32, 510, 511, 512, 513, 1022, 1023, 1024, 1025, 1535, 1600)
    ]
    + [
        pytest.param([(before, count)], id=f"{count}-tokens-after-{before}")
        for before, count in [(0, 1100), (509, 7), (511, 3), (1, 600), (1023, 2), (900, 300), (1535, 65)]
    ]
    + [pytest.param([(1030, 1), (0, 3), (515, 1), (1540, 9), (2, 1)], id="several")],
)
def test_long_contexts(case: BackendCase, chunks: list[tuple[int, int]], window: int | None) -> None:
    check(case, chunks, heads=2, kv_heads=1, head_dim=16, window=window)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 100.0])
def test_flat_and_sharp_scores(case: BackendCase, scale: float) -> None:
    """With large scores one key takes all, and which one must be right to the last digit of the score."""
    requests = Requests.random([700], block_size=32, num_kv_heads=1, head_dim=32)
    q = (torch.randn(3, 2, 32) * 2).round().double()  # whole numbers: scores of halves are exact everywhere
    for keys in requests.keys:
        keys.copy_((keys * 2).round() / 2)
    ours = attend(case, q, requests.store(case), requests, [(697, 3)], scale=scale)
    exact, magnitude = attention(q, requests.keys[0], requests.values[0], scale=scale)
    case.near(ours, exact, magnitude, share=case.attention)


def test_no_requests(case: BackendCase) -> None:
    requests = Requests.random([5], block_size=32, num_kv_heads=1, head_dim=8)
    empty = Requests(requests.keys, requests.values, requests.block_tables[:0], 32, requests.num_blocks)
    assert attend(case, torch.empty(0, 2, 8), requests.store(case), empty, [], scale=1.0).shape == (0, 2, 8)


def test_a_request_without_tokens_is_skipped(case: BackendCase) -> None:
    requests = Requests.random([40, 7, 70], block_size=32, num_kv_heads=1, head_dim=16)
    q, store = torch.randn(6, 2, 16).bfloat16().double(), requests.store(case)
    ours = attend(case, q, store, requests, [(36, 4), (7, 0), (68, 2)], scale=0.2)
    for rows, request in ((slice(4), 0), (slice(4, 6), 2)):
        exact, magnitude = attention(q[rows], requests.keys[request], requests.values[request], scale=0.2)
        case.near(ours[rows], exact, magnitude, share=case.attention)


# --- rope_store -------------------------------------------------------------------------------------------------------


def turned(x: Tensor, weight: Tensor | None, eps: float, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, heads, D], normed and rotated by angles [T, rotary_dim / 2], in fp64; a norm is rounded to `dtype`."""
    if weight is not None:
        normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        x = normed.to(dtype).double() if dtype == torch.bfloat16 else normed
    half = angles.shape[1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat((z.real, z.imag, rest), dim=-1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [
        (4, 2, 64, 64),
        (2, 2, 2, 2),
        (3, 1, 7, 4),
        (1, 1, 1, 0),
        (7, 1, 33, 32),
        (8, 1, 80, 20),
        (2, 1, 96, 96),
        (6, 3, 128, 64),
        (2, 1, 66, 66),
    ],
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])
def test_rotated_and_normed(
    case: BackendCase, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, normed: bool, block_size: int
) -> None:
    """Queries come back turned; keys go to the store turned, values as they are: seen through `attend`."""
    length, eps = 45, 0.02
    requests = Requests.random([length], block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim)
    positions = torch.randperm(100)[:length]
    angles = torch.rand(100, rotary_dim // 2, dtype=torch.float64) * 6
    q_norm, k_norm = (torch.randn(head_dim).bfloat16().double() for _ in range(2)) if normed else (None, None)
    qkv = torch.randn(length, heads + 2 * kv_heads, head_dim).bfloat16().double()
    store = backends.allocate_kv(
        case.backend,
        num_blocks=requests.num_blocks,
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=case.narrow,
        device=CPU,
    )
    poison(store)
    # The tables are fp32, or kernels in fp64 would get other angles than those of the formula.
    table = torch.float64 if case.wide == torch.float64 else torch.float32
    q = backends.rope_store(
        case.backend,
        qkv.flatten(1).to(case.wide),
        positions=positions.int(),
        slot_mapping=requests.slots(0, 0, length).int(),
        cos=angles.cos().to(table),
        sin=angles.sin().to(table),
        store=store,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        q_norm=None if q_norm is None else q_norm.to(case.narrow),
        k_norm=None if k_norm is None else k_norm.to(case.narrow),
        eps=eps,
    )
    q_in, k_in, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
    exact_q = turned(q_in, q_norm, eps, angles[positions], case.narrow)
    assert q.dtype == case.narrow
    # One rounding is in the last unit; the other, of a norm that rounds the other way, reaches both halves of a pair.
    case.near(q, exact_q, exact_q.norm(dim=-1, keepdim=True), share=max(case.sums, torch.finfo(q.dtype).eps / 2))
    keys = turned(k_in, k_norm, eps, angles[positions], case.narrow).to(case.narrow).double()
    ours = attend(case, q, store, requests, [(0, length)], scale=head_dim**-0.5)
    exact, magnitude = attention(q.double(), keys, values, scale=head_dim**-0.5)
    case.near(ours, exact, magnitude, share=2 * case.attention)


NORMS = [
    HeadNormSpec(norm=NormSpec(eps=0.02)),
    HeadNormSpec(norm=NormSpec(eps=0.02), own_weights=True),
    HeadNormSpec(norm=NormSpec(eps=0.02), whole_row=True),
    HeadNormSpec(norm=NormSpec(eps=0.02), weight=False),
    HeadNormSpec(norm=NormSpec(eps=0.02), weight=False, after_rope=True),
    HeadNormSpec(norm=NormSpec(eps=0.02), own_weights=True, after_rope=True),
    HeadNormSpec(norm=NormSpec(eps=0.02, centered=True)),
    HeadNormSpec(norm=NormSpec(eps=0.02, centered=True, bias=True), own_weights=True),
    HeadNormSpec(norm=NormSpec(eps=0.02, centered=True, bias=True), whole_row=True),
]


def normed(x: Tensor, spec: HeadNormSpec, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Heads [T, H, D] normed in fp64."""
    rows = x.flatten(1) if spec.whole_row else x
    if spec.norm.centered:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + spec.norm.eps)
    rows = rows if weight is None else rows * weight
    return (rows if bias is None else rows + bias).view_as(x)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim"), [(4, 2, 48, 0), (7, 1, 35, 20)])
@pytest.mark.parametrize("norms", [None, *NORMS])
def test_heads_in_every_form(
    case: BackendCase, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norms: HeadNormSpec | None
) -> None:
    """Norms of queries and keys before and after rope, of values, and queries scaled by position."""
    length, backend = 45, case.backend
    scaling = QueryScaling(beta=0.7, length=10, offset=1)
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=norms,
        v_norm=NormSpec(eps=0.1) if norms else None,
        query_scaling=scaling,
    )
    requests = Requests.random([length], block_size=32, num_kv_heads=kv_heads, head_dim=head_dim)
    store = backend.allocate_kv(spec, num_blocks=requests.num_blocks, block_size=32, dtype=case.narrow, device=CPU)
    poison(store)
    positions = torch.randperm(100)[:length]
    angles = torch.rand(100, rotary_dim // 2, dtype=torch.float64) * 6
    table = torch.float64 if case.wide == torch.float64 else torch.float32
    rope = (angles.cos().to(table), angles.sin().to(table)) if rotary_dim else None
    weights: dict[str, Tensor] = {}
    if norms is not None and norms.weight:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            shape = (count * head_dim,) if norms.whole_row else (count, head_dim) if norms.own_weights else (head_dim,)
            weights[name] = torch.randn(shape).bfloat16().double()
            if norms.norm.bias:
                weights[f"{name}_bias"] = torch.randn(shape).bfloat16().double()
    packed = {name: backend.pack([value.to(case.narrow)], role=WeightRole.NORM) for name, value in weights.items()}
    qkv = torch.randn(length, heads + 2 * kv_heads, head_dim).bfloat16().double()
    arrays = Arrays(positions=positions.int(), slot_mapping=requests.slots(0, 0, length).int())
    q = backend.rope_store(qkv.flatten(1).to(case.wide), store, spec, arrays, rope, LayerWeights(**packed))

    def exact(x: Tensor, name: str) -> Tensor:
        for turn in (False, True) if norms is None or not norms.after_rope else (True, False):
            if turn:
                x = turned(x, None, 0.0, angles[positions], torch.float64)
            elif norms is not None:
                x = normed(x, norms, weights.get(name), weights.get(f"{name}_bias"))
        return x

    q_in, k_in, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
    factors = 1 + scaling.beta * torch.log1p(((positions + scaling.offset) // scaling.length).double())
    exact_q = exact(q_in, "q_norm") * factors.view(-1, 1, 1)
    assert q.dtype == case.narrow
    largest = exact_q.flatten(1).norm(dim=-1).view(-1, 1, 1)
    case.near(q, exact_q, largest, share=max(case.sums, torch.finfo(q.dtype).eps / 2, 2e-7))  # factors are fp32
    if norms:
        values = values / torch.sqrt(values.square().mean(-1, keepdim=True) + 0.1)
    ours = backends.attend(
        backend,
        q,
        store,
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=requests.block_tables,
        scale=0.1 * head_dim**-0.5,
    )
    keys = exact(k_in, "k_norm").to(case.narrow).double()
    wanted, magnitude = attention(q.double(), keys, values, scale=0.1 * head_dim**-0.5)
    case.near(ours, wanted, magnitude, share=2 * case.attention)


def bits(store: Store) -> Tensor:
    memory = store if isinstance(store, Tensor) else store.memory
    return memory.view(torch.uint8).flatten().clone()


@pytest.mark.parametrize("head_dim", [16, 33, 128])
def test_slot_minus_one_is_not_written(case: BackendCase, head_dim: int) -> None:
    requests = Requests.random([50], block_size=32, num_kv_heads=2, head_dim=head_dim)
    store = requests.store(case)
    before = bits(store)
    options: dict[str, Any] = {
        "cos": torch.empty(1, 0),
        "sin": torch.empty(1, 0),
        "store": store,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": head_dim,
    }
    rows = torch.randn(9, 8 * head_dim).bfloat16().to(case.wide)
    nowhere, zeros = torch.full((9,), -1, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    q = backends.rope_store(case.backend, rows, positions=zeros, slot_mapping=nowhere, **options)
    assert torch.equal(bits(store), before)
    assert torch.equal(q.to(case.wide), rows.view(9, 8, head_dim)[:, :4])
    # Some of both: those that are written are as if they were alone.
    slots = torch.tensor([-1, 4, 5, -1, 9, -1, 10, 13, -1], dtype=torch.int32) + 32 * int(requests.block_tables[0, 0])
    slots = torch.where(nowhere.eq(slots.new_tensor([-1, 0, 0, -1, 0, -1, 0, 0, -1])), nowhere, slots)
    backends.rope_store(case.backend, rows, positions=zeros, slot_mapping=slots, **options)
    mixed, written = bits(store), slots >= 0
    again = requests.store(case)
    backends.rope_store(
        case.backend,
        rows[written],
        positions=zeros[written],
        slot_mapping=slots[written],
        **{**options, "store": again},
    )
    assert not torch.equal(mixed, before)
    q = torch.randn(1, 3 * 2, head_dim)
    outputs = [attend(case, q, each, requests, [(49, 1)], scale=0.3) for each in (store, again)]
    assert torch.equal(*outputs)


def test_writing_again_replaces(case: BackendCase) -> None:
    """A block comes back from another request: what it holds is replaced position by position."""
    old = Requests.random([64], block_size=32, num_kv_heads=2, head_dim=48)
    new = Requests(
        [torch.randn(41, 2, 48).bfloat16().double()],
        [torch.randn(41, 2, 48).bfloat16().double()],
        old.block_tables,
        32,
        old.num_blocks,
    )
    store = old.store(case)
    width = 2 * 48
    for begin, end in pairwise([0, 1, 2, 3, 6, 7, 32, 33, 40, 41]):
        span = slice(begin, end)
        backends.rope_store(
            case.backend,
            torch.cat(
                (torch.zeros(end - begin, width), new.keys[0][span].flatten(1), new.values[0][span].flatten(1)), 1
            ).to(case.wide),
            positions=torch.zeros(end - begin, dtype=torch.int32),
            slot_mapping=new.slots(0, begin, end).int(),
            cos=torch.empty(1, 0),
            sin=torch.empty(1, 0),
            store=store,
            num_heads=2,
            num_kv_heads=2,
            head_dim=48,
        )
        q = torch.randn(1, 4, 48).bfloat16().double()
        ours = attend(case, q, store, new, [(end - 1, 1)], scale=0.2)
        exact, magnitude = attention(q, new.keys[0][:end], new.values[0][:end], scale=0.2)
        case.near(ours, exact, magnitude, share=case.attention)


def test_no_tokens_are_written(case: BackendCase) -> None:
    requests = Requests.random([3], block_size=32, num_kv_heads=1, head_dim=8)
    store = requests.store(case)
    before, none = bits(store), torch.empty(0, dtype=torch.int32)
    q = backends.rope_store(
        case.backend,
        torch.empty(0, 4 * 8, dtype=case.wide),
        positions=none,
        slot_mapping=none,
        cos=torch.ones(3, 4),
        sin=torch.ones(3, 4),
        store=store,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    assert q.shape == (0, 2, 8)
    assert torch.equal(bits(store), before)


def test_block_sizes_that_each_backend_takes(case: BackendCase) -> None:
    case.backend.check_block_size(32)
    case.backend.check_block_size(96)
    if type(case.backend) is ReferenceBackend:
        case.backend.check_block_size(1)
