"""What every backend does row by row, against its formula in fp64 on the same inputs, which lie on the grid of bf16.

Sums of products may be off by a share of the sum of their magnitudes (`sums`), and everything by one rounding
to the dtype it comes in. Quantized weights are in test_quantization.py, attention is in test_attention.py.
"""

from __future__ import annotations

import dataclasses
import math
from random import Random
from typing import Any

import backends
import pytest
import torch
from backends import CPU, BackendCase, pack_experts
from torch import Tensor

from splitfuse.kernels.drawing import GREEDY, Filter, exact_draw
from splitfuse.kernels.layers import NormSpec, RouterSpec
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ACTIVATIONS, GATED_ACTIVATIONS
from splitfuse.kernels.weights import WeightRole

SHAPES = [  # rows, K, N: nothing; single ones; odd, even and beyond every block, panel and slab of the kernels
    (0, 32, 32),
    (1, 1, 1),
    (1, 33, 31),
    (1, 2048, 17),
    (2, 64, 96),
    (3, 65, 33),
    (5, 2, 64),
    (13, 512, 64),
    (14, 513, 65),
    (15, 1023, 47),
    (16, 1025, 1),
    (29, 2049, 40),
    (57, 96, 130),
    (129, 31, 66),
]


def grid(*shape: int) -> Tensor:
    """Random numbers that bf16 holds, in fp64."""
    return torch.randn(shape).bfloat16().double()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear(case: BackendCase, rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = grid(rows, inputs), grid(outputs, inputs), grid(outputs)
    packed = case.backend.pack([weight.to(case.narrow)], role=WeightRole.O)
    exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T

    def linear(*options: Tensor | None) -> Tensor:
        return case.backend.linear(x.to(case.narrow), packed, *options)

    assert linear().dtype == case.wide
    case.near(linear(), exact, magnitude)
    case.near(linear(bias.to(case.narrow)), exact + bias, magnitude + bias.abs())


@pytest.mark.parametrize(
    ("rows", "heads", "inputs", "outputs"),
    [(0, 2, 4, 4), (1, 1, 1, 1), (5, 3, 33, 31), (300, 2, 40, 65), (2, 5, 64, 96)],
)
def test_linear_heads(case: BackendCase, rows: int, heads: int, inputs: int, outputs: int) -> None:
    x, weight = grid(rows, heads, inputs), grid(heads, outputs, inputs)
    packed = case.backend.pack([weight.to(case.narrow)], role=WeightRole.K_B)
    ours = case.backend.linear_heads(x.to(case.narrow), packed)
    exact, magnitude = (torch.einsum("thk,hnk->thn", *each) for each in ((x, weight), (x.abs(), weight.abs())))
    case.near(ours, exact, magnitude)


def test_pieces_are_packed_in_order(case: BackendCase) -> None:
    pieces = [grid(rows, 70) for rows in (50, 1, 16, 33)]
    x = grid(3, 70)
    whole = torch.cat(pieces)
    packed = case.backend.pack([piece.to(case.narrow) for piece in pieces], role=WeightRole.QKV)
    case.near(case.backend.linear(x.to(case.narrow), packed), x @ whole.T, x.abs() @ whole.abs().T)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_pieces_may_be_strided_and_of_another_dtype(case: BackendCase, stored: torch.dtype) -> None:
    x, weight = grid(3, 70), grid(40, 140).half().to(stored)[:, ::2]
    packed = case.backend.pack([weight[:33], weight[33:]], role=WeightRole.QKV, dtype=case.narrow)
    kept = weight.to(case.narrow).double()
    case.near(case.backend.linear(x.to(case.narrow), packed), x @ kept.T, x.abs() @ kept.abs().T)


@pytest.mark.parametrize(
    "role", [WeightRole.QKV, WeightRole.O, WeightRole.GATE_UP, WeightRole.DOWN, WeightRole.HEAD, WeightRole.ROUTER]
)
@pytest.mark.parametrize("shape", [(2, 1), (64, 96), (66, 127), (130, 1025)])
def test_weight_bytes_is_what_is_kept(case: BackendCase, role: WeightRole, shape: tuple[int, int]) -> None:
    plain = math.prod(shape) * case.narrow.itemsize
    packed = case.backend.pack([grid(*shape).to(case.narrow)], role=role)
    planned = case.backend.weight_bytes(shape, role=role, dtype=case.narrow)
    if isinstance(case.backend, OneDnnBackend):  # what oneDNN keeps cannot be asked for its size
        assert planned == plain * (2 if role is WeightRole.HEAD else 1)
    else:
        assert planned == (packed if isinstance(packed, Tensor) else packed.memory).nbytes
        assert planned >= plain
    assert case.backend.weight_bytes(shape, role=WeightRole.PLAIN, dtype=case.narrow) == plain


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "inputs", "inner", "biased"), [(0, 8, 8, True), (1, 64, 33, True), (6, 65, 15, False), (17, 130, 48, True)]
)
def test_activated(case: BackendCase, kind: str, rows: int, inputs: int, inner: int, biased: bool) -> None:
    x, weight, bias = grid(rows, inputs), grid(inner, inputs) / 4, grid(inner)
    packed = case.backend.pack([weight.to(case.narrow)], role=WeightRole.UP)
    ours = case.backend.activated(x.to(case.narrow), packed, bias.to(case.narrow) if biased else None, kind)
    product = x @ weight.T + biased * bias
    exact, summed = formula(kind, product), x.abs() @ weight.abs().T + biased * bias.abs()
    assert ours.dtype == case.narrow
    case.near(ours, exact, slope(kind, product) * summed + exact.abs() + 1e-3)


@pytest.mark.parametrize("kind", GATED_ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "inner"), [(0, 8, 8), (1, 1, 1), (1, 64, 33), (6, 65, 15), (17, 130, 48)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated(case: BackendCase, kind: str, rows: int, inputs: int, inner: int, biased: bool) -> None:
    x, weight, bias = grid(rows, inputs), grid(2 * inner, inputs) / 4, grid(2 * inner)
    halves = weight.to(case.narrow).split(inner)
    packed = case.backend.pack(halves, role=WeightRole.GATE_UP)
    ours = case.backend.gated(x.to(case.narrow), packed, bias.to(case.narrow) if biased else None, kind)
    gate, up = (x @ weight.T + biased * bias).chunk(2, dim=-1)
    exact = gated(kind, gate, up)
    # An error of the gate reaches the result with the slope of the activation, one of `up` with the activation.
    of_gate, of_up = (x.abs() @ weight.abs().T + biased * bias.abs()).chunk(2, dim=-1)
    factor = gate.abs() * (gate.abs() if kind == "relu2" else 1) + 1
    assert ours.dtype == case.narrow
    case.near(ours, exact, (slope(kind, gate) * of_gate + 1e-3) * (up.abs() + 1) + factor * of_up + exact.abs())


def formula(kind: str, gate: Tensor) -> Tensor:
    if kind == "silu":
        return gate / (1 + torch.exp(-gate))
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-gate))
    if kind == "gelu":
        return gate * 0.5 * torch.erfc(-gate / math.sqrt(2))
    if kind in ("relu", "relu2"):
        return gate * (gate > 0) * (gate if kind == "relu2" else 1)
    assert kind == "gelu_tanh"
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


def slope(kind: str, gate: Tensor) -> Tensor:
    """At least how fast the activation rises here."""
    return 2 * gate.abs() if kind == "relu2" else torch.full_like(gate, 1.2)


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    if kind != "clamped_swiglu":
        return formula(kind, gate) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind != "sigmoid"])
def test_gates_far_from_zero(case: BackendCase, kind: str) -> None:
    gates = torch.tensor([-1e30, -3e4, -300.0, -100.0, 100.0, 300.0, 3e4], dtype=torch.float64).bfloat16().double()
    packed = case.backend.pack([torch.ones(1, 1, dtype=case.narrow)] * 2, role=WeightRole.GATE_UP)
    bias = torch.tensor([0.0, 1.0], dtype=case.narrow)
    x = gates.unsqueeze(1)
    ours = case.backend.gated(x.to(case.narrow), packed, bias, kind).double()
    up = x + 1
    assert (ours[:4].abs() <= 1e-30 * up[:4] ** 2).all()
    far = x[4:] ** 2 if kind == "relu2" else x[4:]
    torch.testing.assert_close(ours[4:], far * up[4:], rtol=2**-6, atol=0)


def test_clamped_swiglu_far_from_zero(case: BackendCase) -> None:
    gate = [1e30, 1e30, -1e4, 7.5, 2.0, 1.0, torch.nan]
    up = [1e30, -1e30, 1e30, 9.0, -1.0, -50.0, 1.0]
    x = torch.tensor([gate, up]).T.contiguous().to(case.narrow)
    packed = case.backend.pack(
        [torch.tensor([side]).to(case.narrow) for side in ([1, 0], [0, 1])], role=WeightRole.GATE_UP
    )
    ours = case.backend.gated(x, packed, None, "clamped_swiglu")[:, 0].double()
    exact = gated("clamped_swiglu", *x.double().T)
    torch.testing.assert_close(ours, exact, rtol=2**-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 1), (1, 33), (3, 16), (7, 47), (40, 130)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norm(case: BackendCase, rows: int, columns: int, scale: float) -> None:
    x, weight, eps = grid(rows, columns).mul(scale).bfloat16().double(), grid(columns), 1e-5
    ours = backends.rms_norm(case.backend, x.to(case.wide), weight.to(case.narrow), eps)
    exact = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    assert ours.dtype == case.narrow
    case.near(ours, exact, exact.abs())


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 1), (1, 33), (3, 16), (7, 47), (40, 130)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm(case: BackendCase, rows: int, columns: int, biased: bool, mean: float) -> None:
    x, weight, bias = (grid(rows, columns) + mean).bfloat16().double(), grid(columns), grid(columns)
    packed, packed_bias = (case.backend.pack([each.to(case.narrow)], role=WeightRole.NORM) for each in (weight, bias))
    spec = NormSpec(eps=1e-5, centered=True, bias=biased)
    ours = case.backend.norm(x.to(case.wide), spec, packed, packed_bias if biased else None)
    centered = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-5)
    exact = centered / deviation * weight + biased * bias
    assert ours.dtype == case.narrow
    case.near(ours, exact, (x.abs() + mean) / deviation * weight.abs() + bias.abs())


def test_embed_picks_rows(case: BackendCase) -> None:
    for columns in (1, 33, 64):
        table = grid(70, columns)
        ids = torch.tensor([69, 0, 31, 32, 69, 16], dtype=torch.int32)
        plain = table.to(case.narrow)
        head = case.backend.pack([plain], role=WeightRole.HEAD)
        for ours in (case.backend.embed(ids, plain), case.backend.embed(ids, head)):
            assert ours.dtype == case.wide
            assert torch.equal(ours.double(), table[ids])
        none = ids[:0]
        assert case.backend.embed(none, plain).shape == case.backend.embed(none, head).shape == (0, columns)


@pytest.mark.parametrize("kind", GATED_ACTIVATIONS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "num_experts", "top_k"),
    [(0, 8, 4, 3, 2), (1, 1, 1, 1, 1), (6, 33, 17, 5, 2), (40, 64, 48, 4, 3), (3, 96, 16, 60, 4)],
)
def test_experts(
    case: BackendCase, kind: str, tokens: int, hidden: int, inner: int, num_experts: int, top_k: int
) -> None:
    x, w13, w2 = grid(tokens, hidden), grid(num_experts, 2 * inner, hidden) / 8, grid(num_experts, hidden, inner) / 8
    biased = kind in ("gelu", "clamped_swiglu")
    biases = [biased * grid(num_experts, 2 * inner), biased * grid(num_experts, hidden)]
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(max(1, tokens))])[:tokens]
    weights = torch.rand(tokens, top_k)
    exact, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (w13[expert] @ x[token] + biases[0][expert]).chunk(2)
            # Between its two products an expert's activations are rounded as the backend says.
            inside = gated(kind, gate, up).to(case.narrow).double()
            exact[token] += weight * (w2[expert] @ inside + biases[1][expert])
            magnitude[token] += weight * (w2[expert].abs() @ inside.abs() + biases[1][expert].abs())
    given = [each.to(case.narrow) for each in biases] if biased else []
    packed = pack_experts(case.backend, w13.to(case.narrow), w2.to(case.narrow), *given)
    ours = backends.experts(case.backend, x.to(case.narrow), ids, weights, packed, kind)
    assert ours.dtype == case.wide
    # An activation that rounds the other way than ours is off by a unit of its dtype.
    share = max(20 * case.sums, torch.finfo(case.narrow).eps)
    case.near(ours, exact, magnitude, share=share)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (33, 8), (128, 8), (20, 20)])
def test_route(case: BackendCase, num_experts: int, top_k: int, renormalize: bool) -> None:
    scores = torch.stack([torch.randperm(num_experts).double() / 8 - 2 for _ in range(9)])
    ids, weights = backends.route(case.backend, scores.to(case.wide), top_k, renormalize)
    assert ids.tolist() == scores.argsort(dim=-1, descending=True)[:, :top_k].tolist()
    exact = scores.softmax(-1).sort(dim=-1, descending=True).values[:, :top_k]
    if renormalize:
        exact = exact / exact.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)
    assert backends.route(case.backend, scores[:0].to(case.wide), top_k, renormalize)[0].shape == (0, top_k)


ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid": {"sigmoid": True, "renormalize": False},
    "softmax-bias": {"choice_bias": True, "renormalize": True},
    "sigmoid-bias-scale": {"sigmoid": True, "choice_bias": True, "scale": 2.5, "min_sum": 1e-20},
    "groups": {"sigmoid": True, "choice_bias": True, "num_groups": 6, "top_groups": 3},
    "groups-by-one": {"num_groups": 6, "top_groups": 2, "group_best": 1, "scale": 16.0, "renormalize": False},
    "groups-of-one": {"num_groups": 24, "top_groups": 6, "sigmoid": True},
    "large-sum": {"sigmoid": True, "min_sum": 3.0},
}


def route_exactly(logits: list[float], spec: RouterSpec, bias: list[float]) -> tuple[list[int], list[float]]:
    """One token's experts and weights, in Python's numbers."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    scores = [1 / (1 + math.exp(-x)) for x in logits] if spec.sigmoid else [p / sum(powers) for p in powers]
    choice = [score + more for score, more in zip(scores, bias, strict=True)]
    size = spec.num_experts // spec.num_groups
    groups = [range(first, first + size) for first in range(0, spec.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[: spec.group_best]))
    allowed = sorted(expert for group in groups[: spec.top_groups] for expert in group)
    ids = sorted(allowed, key=lambda expert: -choice[expert])[: spec.top_k]
    total = max(sum(scores[expert] for expert in ids), spec.min_sum) if spec.renormalize else 1
    return ids, [scores[expert] / total * spec.scale for expert in ids]


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
def test_routers(case: BackendCase, fields: dict[str, Any]) -> None:
    spec = RouterSpec(**{"num_experts": 24, "top_k": 5, "renormalize": True} | fields)
    logits = torch.stack([torch.randperm(24).double() / 4 - 3 for _ in range(9)])
    bias = torch.randn(24).double() if spec.choice_bias else torch.zeros(24).double()
    packed = case.backend.pack([bias], role=WeightRole.NORM, dtype=case.narrow) if spec.choice_bias else None
    ids, weights = case.backend.route(logits.to(case.wide), spec, packed)
    exact = [route_exactly(row, spec, bias.tolist()) for row in logits.tolist()]
    assert ids.tolist() == [chosen for chosen, _ in exact]
    torch.testing.assert_close(weights.double(), torch.tensor([w for _, w in exact]).double(), rtol=2e-6, atol=0)
    assert case.backend.route(logits[:0].to(case.wide), spec, packed)[0].shape == (0, 5)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("num_experts", [12, 40, 128])
def test_of_equal_scores_the_lower_expert_comes_first(case: BackendCase, num_experts: int, sigmoid: bool) -> None:
    logits = torch.zeros(1, num_experts)
    spec = RouterSpec(num_experts=num_experts, top_k=3, renormalize=True, sigmoid=sigmoid)
    assert case.backend.route(logits.to(case.wide), spec)[0].tolist() == [[0, 1, 2]]
    logits[0, [4, 9]] = 2.0
    assert case.backend.route(logits.to(case.wide), spec)[0].tolist() == [[4, 9, 0]]
    grouped = dataclasses.replace(spec, num_groups=4, top_groups=2)
    second = num_experts // 4
    logits[0] = 0.0
    logits[0, [second, -1]] = 2.0
    expected = [second, num_experts - 1, second + 1]
    assert case.backend.route(logits.to(case.wide), grouped)[0].tolist() == [expected]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sigmoid_router_of_nan(case: BackendCase, value: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 7] = value
    spec = RouterSpec(num_experts=20, top_k=4, renormalize=True, sigmoid=True, num_groups=4, top_groups=2)
    ids, weights = case.backend.route(logits.to(case.wide), spec)
    assert weights[1].isnan().all() if math.isnan(value) else weights[1, 0] == weights[1].max()
    assert weights[[0, 2]].isfinite().all()
    assert all(len({*row}) == 4 and set(row) <= {*range(20)} for row in ids.tolist())


def test_route_of_nan(case: BackendCase) -> None:
    """The row alone becomes NaN, and its experts are some that there are."""
    scores = torch.randn(3, 20)
    for where, value in ((slice(None), torch.nan), (7, torch.nan), (7, torch.inf)):
        scores[1, where] = value
        for renormalize in (False, True):
            ids, weights = backends.route(case.backend, scores.to(case.wide), 4, renormalize)
            assert weights[1].isnan().all()
            assert weights[[0, 2]].isfinite().all()
            assert all(len({*row}) == 4 and set(row) <= {*range(20)} for row in ids.tolist())
        scores[1] = 0.0


def largest(row: list[float], k: int) -> list[int]:
    """The indices of the k largest in falling order, equal ones by index; any are right where one is NaN."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("k", [1, 2, 16])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 97, 512, 3071])
def test_topk(case: BackendCase, width: int, k: int) -> None:
    scores = torch.randn(11, width)
    scores[1] = 0.5  # all equal
    scores[2] = -torch.inf
    scores[3, width // 2 :] = scores[3].max() + 1  # many equal
    scores[4, width - 1] = torch.inf
    scores[5] = -5.0
    scores[5, width - 1] = -4.0
    scores[6, width // 2] = -torch.inf
    scores[7] = -3e38
    scores[8] = torch.arange(width)
    scores[9] = -torch.arange(width)
    scores[10] = (scores[10] * 2).round()  # some equal
    ids, values = case.backend.topk(scores, k)
    assert ids == [largest(row, k) for row in scores.tolist()]
    assert values == [sorted(row, reverse=True)[:k] for row in scores.tolist()]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 97, 512])
def test_topk_of_nan_is_nan(case: BackendCase, width: int, k: int) -> None:
    for place in {0, width // 2, width - 1}:
        scores = torch.randn(3, width)
        scores[1, place] = torch.nan
        scores[1, (place + 1) % width] = torch.inf if width > 1 else torch.nan
        ids, values = case.backend.topk(scores, k)
        assert [math.isnan(row[0]) for row in values] == [False, True, False]
        assert all(0 <= index < width for index in ids[1]) and len(ids[1]) == min(k, width)
        assert [ids[0], ids[2]] == [largest(row, k) for row in scores[[0, 2]].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 8, 255, 257, 1000, 3071])
def test_draw(case: BackendCase, width: int, dtype: torch.dtype) -> None:
    random = Random(width)
    scores = ((torch.randn(24, width, generator=torch.Generator().manual_seed(width)) * 12).round() / 4).to(dtype)
    scores[1, 1:] = -torch.inf
    scores[2] = -5.0
    scores[3, width // 2] += 60.0
    rows = sorted(random.sample(range(24), 17))
    filters = [
        Filter(
            random.choice((0.3, 1.0, 2.5, 100.0)),
            random.choice((0, 0, 1, 3, 40, width + 5)),
            random.choice((1.0, 1.0, 0.05, 0.6, 0.97)),
            random.choice((0.0, 0.0, 0.02, 0.5, 1.0)),
        )
        for _ in rows
    ]
    numbers = [[random.random() for _ in range(40)] for _ in rows]
    drawn = case.backend.draw(scores, rows, filters, numbers)
    assert drawn == exact_draw(scores, rows, filters, numbers)
    for row, each, some, tokens in zip(rows, filters, numbers, drawn, strict=True):  # as if each row were alone
        assert case.backend.draw(scores[[row]], [0], [each], [some]) == [tokens]


def test_topk_of_no_rows(case: BackendCase) -> None:
    assert case.backend.topk(torch.empty(0, 7), 1) == ([], [])


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("rows", "inputs", "width"), [(1, 33, 1), (1, 64, 130), (7, 65, 31), (33, 48, 1000)])
def test_choose(case: BackendCase, rows: int, inputs: int, width: int, drawn: bool) -> None:
    """Tokens as if logits were made, and chosen from, one operation after the other."""
    backend, random = case.backend, Random(width)
    weight, bias = grid(width, inputs), grid(width).to(case.narrow)
    weight[width // 2 :] = weight[0]  # equal logits, in greedy choice without a bias
    head, x = backend.pack([weight.to(case.narrow)], role=WeightRole.HEAD), grid(rows, inputs).to(case.narrow)
    x[rows // 2, 0] = torch.nan  # a row that no token can be chosen from
    kinds = (GREEDY, Filter(0.7), Filter(1.5, top_k=4), Filter(1.0, top_p=0.8, min_p=0.01))
    filters = [kinds[row % len(kinds)] for row in range(rows)] if drawn else []
    numbers = [random.random() for _ in filters]
    for each in (None, bias):
        logits = backend.linear(x, head, each).float()
        tokens, peaks = backend.choose(x, head, each, filters, numbers)
        for row, largest_logit in enumerate(logits.amax(-1).tolist()):
            if row == rows // 2:
                assert math.isnan(peaks[row]) and 0 <= tokens[row] < width
                continue
            assert peaks[row] == largest_logit
            if filters and filters[row] is not GREEDY:
                assert [[tokens[row]]] == exact_draw(logits, [row], [filters[row]], [[numbers[row]]])
            else:
                assert tokens[row] == int((logits[row] == largest_logit).nonzero()[0])
    assert backend.choose(x[:0], head) == ([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_stays_in_its_row(case: BackendCase, value: float) -> None:
    x, weight = grid(5, 40), grid(33, 40)
    x[2, 7] = value
    packed = case.backend.pack([weight.to(case.narrow)], role=WeightRole.O)
    ours = case.backend.linear(x.to(case.narrow), packed)
    assert not ours[2].isfinite().any()
    rest = [0, 1, 3, 4]
    case.near(ours[rest], (x @ weight.T)[rest], (x.abs() @ weight.abs().T)[rest])
    normed = backends.rms_norm(case.backend, x.to(case.wide), torch.ones(40, dtype=case.narrow), 1e-5)
    assert normed[rest].isfinite().all()
    assert not (normed[2].isfinite().all() and normed[2].abs().sum() > 0)


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 1), (2, 33), (3, 64), (8, 128), (1, 512)])
def test_kv_bytes_is_what_is_allocated(case: BackendCase, block_size: int, num_kv_heads: int, head_dim: int) -> None:
    shape: dict[str, Any] = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    store = backends.allocate_kv(case.backend, num_blocks=7, dtype=case.narrow, device=CPU, **shape)
    assert store.nbytes == 7 * backends.kv_bytes(case.backend, dtype=case.narrow, **shape)
    assert store.nbytes >= 7 * 2 * block_size * num_kv_heads * head_dim * case.narrow.itemsize
