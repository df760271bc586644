"""What the C++ kernels guarantee: a row gives the same bits alone and in any batch, however its request is cut, in
whatever blocks it lies and however many threads compute; and all layers in one call give those of one call each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import backends
import pytest
import torch
from backends import CPU, BackendCase, Requests, emulation_slow, pack_experts, poison, rms_norm, variants
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.drawing import GREEDY, Filter
from splitfuse.kernels.layers import RouterSpec
from splitfuse.kernels.weights import WeightRole

FORMATS = [(None, None), ("int8", None), ("int8", 128), ("int4", 64), ("int4", 128)]
CASES = [case for f in FORMATS for case in variants(*f, id="-".join(str(x) for x in f))]
CACHES = [case for kv_int8 in (False, True) for case in variants(kv_int8, id="int8-cache" if kv_int8 else "bf16-cache")]
THREADS = (1, 2, 3)


def teams(variant: str, **options: Any) -> list[CpuBackend]:
    return [CpuBackend(variant=variant, num_threads=threads, **options) for threads in THREADS]


def groups(rows: int, sizes: Sequence[int] = (2, 3, 6, 7, 13, 14, 15, 18, 19, 28, 29)) -> Iterator[list[int]]:
    """Some of the rows in any order: neighbours, positions in a block and numbers of blocks change."""
    rng = random.Random(rows)
    for size in sizes:
        yield rng.sample(range(rows), min(size, rows))
    yield list(range(rows))


@pytest.mark.parametrize(("inputs", "outputs"), [(33, 97), (300, 70), (1029, 40), (2050, 33), (64, 600)])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_linear(variant: str, quantization: str | None, group: int | None, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(45, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16()
    alone: Tensor | None = None
    for backend in teams(variant, quantization=quantization, group_size=group):
        packed = backend.pack([weight], role=WeightRole.O)
        if alone is None:
            alone = torch.cat([backend.linear(x[[r]], packed, bias) for r in range(45)])
        for rows in groups(45):
            assert torch.equal(backend.linear(x[rows], packed, bias), alone[rows])


@pytest.mark.parametrize("outputs", [40, 600])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_bands_of_rows(variant: str, quantization: str | None, group: int | None, outputs: int) -> None:
    """Each thread has a band of many rows, of fewer two of three have; narrow weights are claimed by parts of one."""
    x, weight = torch.randn(345, 300).bfloat16(), torch.randn(outputs, 300).bfloat16()
    few: Tensor | None = None
    for backend in teams(variant, quantization=quantization, group_size=group):
        packed = backend.pack([weight], role=WeightRole.O)
        if few is None:
            few = torch.cat([backend.linear(rows, packed, None) for rows in x.split(23)])
        for rows in (64, 110, 128, 223, 230, 345):
            assert torch.equal(backend.linear(x[:rows], packed, None), few[:rows])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("inputs", "inner"), [(130, 47), (1029, 24)])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_gated(variant: str, quantization: str | None, group: int | None, inputs: int, inner: int, kind: str) -> None:
    x, halves = torch.randn(33, inputs).bfloat16(), [torch.randn(inner, inputs).bfloat16() / 8 for _ in range(2)]
    bias = torch.randn(2 * inner).bfloat16()
    alone: Tensor | None = None
    for backend in teams(variant, quantization=quantization, group_size=group):
        packed = backend.pack(halves, role=WeightRole.GATE_UP)
        if alone is None:
            alone = torch.cat([backend.gated(x[[r]], packed, bias, kind) for r in range(33)])
        for rows in groups(33):
            assert torch.equal(backend.gated(x[rows], packed, bias, kind), alone[rows])


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_linear_heads(variant: str, quantization: str | None, group: int | None) -> None:
    """400 rows are more than a thread packs of a head at once."""
    x, weight = torch.randn(400, 3, 130).bfloat16(), torch.randn(3, 47, 130).bfloat16()
    whole: Tensor | None = None
    for backend in teams(variant, quantization=quantization, group_size=group):
        packed = backend.pack([weight], role=WeightRole.V_B)
        if whole is None:
            whole = backend.linear_heads(x, packed)
            each = [backend.pack([head], role=WeightRole.O) for head in weight]
            wanted = torch.stack([backend.linear(x[:, h].contiguous(), each[h]) for h in range(3)], dim=1)
            assert torch.equal(whole, wanted.bfloat16())
        for rows in ([0], [7, 3], list(range(100, 250)), list(range(400))):
            assert torch.equal(backend.linear_heads(x[rows], packed), whole[rows])


@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_experts(variant: str, quantization: str | None, group: int | None) -> None:
    """Which tokens visit the same expert, and how many, changes nothing."""
    x = torch.randn(40, 130).bfloat16()
    w13, w2 = torch.randn(6, 2 * 47, 130).bfloat16() / 8, torch.randn(6, 130, 47).bfloat16() / 8
    biases = torch.randn(6, 2 * 47).bfloat16(), torch.randn(6, 130).bfloat16()
    ids, weights = torch.stack([torch.randperm(6)[:3] for _ in range(40)]), torch.rand(40, 3)
    alone: Tensor | None = None
    for backend in teams(variant, quantization=quantization, group_size=group):
        packed = pack_experts(backend, w13, w2, *biases)
        if alone is None:
            each = [backends.experts(backend, x[[r]], ids[[r]], weights[[r]], packed) for r in range(40)]
            alone = torch.cat(each)
        for rows in groups(40):
            assert torch.equal(backends.experts(backend, x[rows], ids[rows], weights[rows], packed), alone[rows])


@pytest.mark.parametrize("variant", variants())
def test_experts_are_summed_in_the_order_of_ids(variant: str) -> None:
    """1e8 - 1e8 + 1 is 1 in fp32, in any other order 0: whichever expert it is that says what."""
    one, large = torch.ones(1, 1, dtype=torch.bfloat16), 1e8
    for backend in teams(variant):
        packed = pack_experts(backend, torch.tensor([[100.0], [0.01]]).expand(3, 2, 1), torch.ones(3, 1, 1))
        said = float(backends.experts(backend, one, torch.tensor([[0]]), torch.ones(1, 1), packed))
        for ids in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
            weights = torch.tensor([[large, -large, 1.0]]) / said
            ours = backends.experts(backend, one, torch.tensor([ids]), weights, packed)
            assert float(ours) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (61, 8), (128, 128)])
def test_route(variant: str, num_experts: int, top_k: int) -> None:
    scores = torch.randn(40, num_experts).bfloat16().float()  # with some that are equal
    for renormalize in (False, True):
        alone: list[Tensor] | None = None
        for backend in teams(variant):
            if alone is None:
                each = [backends.route(backend, scores[[r]], top_k, renormalize) for r in range(40)]
                alone = [torch.cat(parts) for parts in zip(*each, strict=True)]
            for rows in groups(40):
                found = backends.route(backend, scores[rows], top_k, renormalize)
                assert all(torch.equal(a, b[rows]) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("variant", variants())
def test_route_by_groups(variant: str) -> None:
    logits, bias = torch.randn(40, 60).bfloat16().float(), torch.randn(60).bfloat16().float()
    spec = RouterSpec(
        num_experts=60, top_k=7, renormalize=True, sigmoid=True, choice_bias=True, num_groups=6, top_groups=2, scale=2.5
    )
    alone: list[Tensor] | None = None
    for backend in teams(variant):
        if alone is None:
            each = [backend.route(logits[[r]], spec, bias) for r in range(40)]
            alone = [torch.cat(parts) for parts in zip(*each, strict=True)]
        for rows in groups(40):
            found = backend.route(logits[rows], spec, bias)
            assert all(torch.equal(a, b[rows]) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("columns", [33, 256, 1029])
def test_norm_embed_and_topk(variant: str, columns: int) -> None:
    x, weight = torch.randn(29, columns), torch.randn(columns)
    found = []
    for backend in teams(variant):
        head = backend.pack(
            [torch.randn(29, columns, generator=torch.Generator().manual_seed(1))], role=WeightRole.HEAD
        )
        for rows in groups(29):
            assert torch.equal(
                rms_norm(backend, x[rows], weight, 1e-5),
                torch.cat([rms_norm(backend, x[[r]], weight, 1e-5) for r in rows]),
            )
        ids = torch.arange(29)
        best, peaks = backend.topk(x, 4)
        assert backend.topk(x[5:6], 4) == (best[5:6], peaks[5:6])
        narrow, filters = x.bfloat16(), [GREEDY, *[Filter(0.7, top_p=0.9)] * 28]
        tokens, logits = backend.choose(narrow, head, None, filters, [0.6] * 29)
        assert backend.choose(narrow[5:6], head, None, filters[5:6], [0.6]) == (tokens[5:6], logits[5:6])
        drawn = backend.draw(x, range(29), [Filter(1.0), *[Filter(0.7, top_p=0.9)] * 28], [[0.1, 0.6]] * 29)
        assert backend.draw(x[5:6], [0], [Filter(0.7, top_p=0.9)], [[0.1, 0.6]]) == drawn[5:6]
        found.append(
            (
                rms_norm(backend, x, weight, 1e-5),
                backend.embed(ids, head),
                torch.tensor([*best, *peaks]),
                torch.tensor(drawn),
            )
        )
    for others in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(others, found[0], strict=True))


# --- attention --------------------------------------------------------------------------------------------------------

LENGTHS = (1600, 530, 45, 1)
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 130}, id="window"),
    pytest.param({"window": 700, "softcap": 3.0, "sinks": True}, id="long-window-cap-sinks"),
]


def cut(length: int, rng: random.Random, longest: int) -> list[int]:
    """Bounds of chunks that cover `length` positions."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + rng.randint(1, longest)))
    return bounds


def attend(
    backend: CpuBackend,
    q: Sequence[Tensor],
    requests: Requests,
    store: Any,
    spans: Sequence[tuple[int, int, int]],
    **o: Any,
) -> list[Tensor]:
    """Rows begin to end - 1 of requests, all in one call: (request, begin, end)."""
    tables = requests.block_tables[[request for request, _, _ in spans]]
    y = backends.attend(
        backend,
        torch.cat([q[request][begin:end] for request, begin, end in spans]),
        store,
        query_start=torch.tensor([0, *accumulate(end - begin for _, begin, end in spans)], dtype=torch.int32),
        seq_lens=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
        block_tables=tables.contiguous(),
        scale=0.25,
        **o,
    )
    return list(y.split([end - begin for _, begin, end in spans]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (7, 1, 33)])
@pytest.mark.parametrize(("variant", "kv_int8"), emulation_slow(CACHES, "bf16"))
def test_attend(variant: str, kv_int8: bool, heads: int, kv_heads: int, head_dim: int, options: dict[str, Any]) -> None:
    """Every row of a request in one chunk, in chunks cut anywhere, and some rows as single tokens, with one to three
    threads, which share the tiles of the longest, and in blocks of 32, 64 and 96.
    """
    options = options | ({"sinks": torch.randn(heads)} if "sinks" in options else {})
    shape = {"num_kv_heads": kv_heads, "head_dim": head_dim}
    contents = Requests.random(LENGTHS, block_size=32, **shape)
    q = [torch.randn(length, heads, head_dim).bfloat16() for length in LENGTHS]
    rng = random.Random(0)
    whole: list[Tensor] = []
    for backend, block_size in [(team, size) for team in teams(variant, kv_int8=kv_int8) for size in (32, 64, 96)]:
        tables = Requests.random(LENGTHS, block_size=block_size, **shape)
        requests = Requests(contents.keys, contents.values, tables.block_tables, block_size, tables.num_blocks)
        case = BackendCase(backend, torch.bfloat16, torch.float32, 0, 0)
        store = requests.store(case, pieces=rng.randint(1, 40))
        if not whole:
            for request, length in enumerate(LENGTHS):
                whole += attend(backend, q, requests, store, [(request, 0, length)], **options)
        together = attend(backend, q, requests, store, [(r, 0, n) for r, n in enumerate(LENGTHS)], **options)
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(together, whole, strict=True))
        spans = [
            (request, begin, end)
            for request, length in enumerate(LENGTHS)
            for begin, end in pairwise(cut(length, rng, rng.choice((20, 300))))
        ]
        rng.shuffle(spans)
        ends = [(0, n - 1, n) for n in (1, 511, 512, 513, 1023, 1024, 1025, 1300, 1536, 1537, 1600)]
        # All pieces at once, a few at once, the longest alone, and single tokens, alone and with others.
        steps = [spans, *([span] for span in spans[:5]), spans[5:8], *([one] for one in ends), ends]
        steps += [[(0, 1599, 1600), (1, 529, 530)], [(0, 1590, 1600)], [(2, 44, 45), (3, 0, 1), (0, 1000, 1007)]]
        for chosen in steps:
            for (request, begin, end), ours in zip(
                chosen, attend(backend, q, requests, store, chosen, **options), strict=True
            ):
                assert torch.equal(ours, whole[request][begin:end]), (backend.num_threads, block_size, chosen[:3])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (33, 20), (96, 32)])
@pytest.mark.parametrize(("variant", "kv_int8"), emulation_slow(CACHES))
def test_rope_store(variant: str, kv_int8: bool, head_dim: int, rotary_dim: int, normed: bool) -> None:
    """Whatever the chunks in which a request comes: equal queries, and keys and values that read equal."""
    length, heads, kv_heads = 70, 6, 2
    qkv = torch.randn(length, (heads + 2 * kv_heads) * head_dim)
    angles = torch.rand(length, rotary_dim // 2) * 6
    norms = [torch.randn(head_dim).bfloat16() if normed else None for _ in range(2)]
    rng = random.Random(0)
    found = []
    for backend, block_size, longest in [
        (t, s, n) for t in teams(variant, kv_int8=kv_int8) for s in (32, 64) for n in (1, 9, 70)
    ]:
        requests = Requests.random([length], block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim)
        store = backends.allocate_kv(
            backend,
            num_blocks=requests.num_blocks,
            block_size=block_size,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            device=CPU,
        )
        poison(store)
        q = [
            backends.rope_store(
                backend,
                qkv[begin:end],
                positions=torch.arange(begin, end),
                slot_mapping=requests.slots(0, begin, end),
                cos=angles.cos(),
                sin=angles.sin(),
                store=store,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                q_norm=norms[0],
                k_norm=norms[1],
                eps=1e-5,
            )
            for begin, end in pairwise(cut(length, rng, longest) if longest < 70 else [0, 70])
        ]
        found.append((torch.cat(q), *attend(backend, [torch.cat(q)], requests, store, [(0, 0, length)])))
    for others in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(others, found[0], strict=True))
