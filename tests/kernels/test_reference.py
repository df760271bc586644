"""Each reference kernel against its formula written as plain loops in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import backends
import pytest
import torch
from backends import pack_experts
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels import reference
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import LayerWeights, WeightRole

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)

backend = ReferenceBackend()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_near(ours: Tensor, naive: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), naive, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# --- rows by themselves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 3, 2), (1, 1, 1), (5, 7, 3)])
def test_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, bias = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    naive = torch.zeros(rows, outputs, dtype=torch.float64)
    for row in range(rows):
        for out in range(outputs):
            naive[row, out] = sum(float(x[row, i]) * float(weight[out, i]) for i in range(inputs))
    packed = backend.pack([weight], role=WeightRole.O)
    assert_near(backend.linear(x, packed), naive, dtype)
    assert_near(backend.linear(x, packed, bias), naive + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (2, 3, 7)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, eps = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), 0.01
    naive = torch.zeros(shape, dtype=torch.float64)
    for row, out in zip(x.view(-1, shape[-1]).tolist(), naive.view(-1, shape[-1]), strict=True):
        root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        for i, v in enumerate(row):
            out[i] = v / root * float(weight[i])
    assert_near(backends.rms_norm(backend, x, weight, eps), naive, dtype)


def gelu(x: float) -> float:
    return x * 0.5 * math.erfc(-x / math.sqrt(2))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


NAIVE_ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def test_every_activation_has_a_formula() -> None:
    assert NAIVE_ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NAIVE_ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(0, 2), (1, 1), (4, 5)])
def test_gated(dtype: torch.dtype, kind: str, rows: int, width: int) -> None:
    gate_up = 2 * torch.randn(rows, 2 * width, dtype=dtype)
    naive = torch.zeros(rows, width, dtype=torch.float64)
    for row in range(rows):
        for i in range(width):
            naive[row, i] = NAIVE_ACTIVATIONS[kind](float(gate_up[row, i])) * float(gate_up[row, width + i])
    identity = backend.pack([torch.eye(2 * width, dtype=dtype)], role=WeightRole.GATE_UP)
    assert_near(backend.gated(gate_up, identity, None, kind), naive, dtype)


def test_embed_picks_rows() -> None:
    table = torch.randn(7, 3)
    picked = backend.embed(torch.tensor([6, 0, 6]), table)
    assert picked.tolist() == [table[6].tolist(), table[0].tolist(), table[6].tolist()]
    assert backend.embed(torch.tensor([], dtype=torch.int64), table).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(0, 3, 2), (1, 1, 1), (6, 5, 2), (4, 3, 3)])
def test_experts(dtype: torch.dtype, tokens: int, num_experts: int, top_k: int) -> None:
    hidden, inner = 5, 3
    x = torch.randn(tokens, hidden, dtype=dtype)
    w13 = torch.randn(num_experts, 2 * inner, hidden, dtype=dtype) / 2
    w2 = torch.randn(num_experts, hidden, inner, dtype=dtype) / 2
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    ids, weights = ids.long(), torch.rand(tokens, top_k)
    naive = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate_up = w13[expert].double() @ x[token].double()
            inside = [silu(float(gate_up[i])) * float(gate_up[inner + i]) for i in range(inner)]
            naive[token] += weight * (w2[expert].double() @ torch.tensor(inside, dtype=torch.float64))
    assert_near(
        backends.experts(backend, x, ids, weights, pack_experts(backend, w13, w2)),
        naive,
        dtype,
    )


def test_experts_do_not_see_other_tokens() -> None:
    x, w13, w2 = torch.randn(8, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    ids, weights = torch.randint(3, (8, 1)), torch.rand(8, 1)
    layer = LayerWeights(w13=list(w13), w2=list(w2))
    together = backends.experts(backend, x, ids, weights, layer, "gelu")
    for token in range(8):
        row = slice(token, token + 1)
        alone = backends.experts(backend, x[row], ids[row], weights[row], layer, "gelu")
        torch.testing.assert_close(together[row], alone)


# --- blocked KV -------------------------------------------------------------------------------------------------------


@dataclass
class Blocked:
    """Requests with keys and values per position, and the same in a store whose every other element is NaN."""

    keys: list[Tensor]  # per request [length, Hk, D]
    values: list[Tensor]
    block_tables: Tensor
    store: Tensor


def blocked(lengths: Sequence[int], *, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Blocked:
    num_blocks = [-(-length // block_size) for length in lengths]
    free = list(range(sum(num_blocks) + 3))
    random.Random(0).shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in num_blocks]
    store = backends.allocate_kv(
        backend,
        num_blocks=sum(num_blocks) + 3,
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
    )
    store.fill_(float("nan"))
    keys = [torch.randn(length, kv_heads, head_dim, dtype=dtype) for length in lengths]
    values = [torch.randn(length, kv_heads, head_dim, dtype=dtype) for length in lengths]
    for table, key, value in zip(tables, keys, values, strict=True):
        for position in range(len(key)):
            block, offset = table[position // block_size], position % block_size
            store[0, block, offset], store[1, block, offset] = key[position], value[position]
    width = max(num_blocks, default=0)
    padded = [table + [0] * (width - len(table)) for table in tables]
    return Blocked(keys, values, torch.tensor(padded, dtype=torch.int32).view(len(lengths), width), store)


def naive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One query [H, D] at `position` of one request, a head and a key at a time."""
    group = query.shape[0] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    first = 0 if window is None else max(0, position - window + 1)
    for head in range(query.shape[0]):
        scores = []
        for key in keys[first : position + 1, head // group]:
            score = sum(float(a) * float(b) for a, b in zip(query[head], key, strict=True)) * scale
            scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
        total = sum(map(math.exp, scores)) + (0 if sinks is None else math.exp(float(sinks[head])))
        for score, value in zip(scores, values[first : position + 1, head // group], strict=True):
            out[head] += math.exp(score) / total * value.double()
    return out


def check_attention(
    chunks: Sequence[tuple[int, int]],  # (positions before the chunk, tokens in it) of each request
    *,
    block_size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    lengths = [before + count for before, count in chunks]
    kv = blocked(lengths, block_size=block_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    starts = [0]
    for _, count in chunks:
        starts.append(starts[-1] + count)
    q = torch.randn(starts[-1], heads, head_dim, dtype=dtype)
    scale = 1.3 * head_dim**-0.5
    ours = backends.attend(
        backend,
        q,
        kv.store,
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=kv.block_tables,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    naive = torch.zeros(q.shape, dtype=torch.float64)
    for request, (before, count) in enumerate(chunks):
        for i in range(count):
            row = starts[request] + i
            naive[row] = naive_attention(
                q[row],
                kv.keys[request],
                kv.values[request],
                before + i,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
    assert_near(ours, naive, dtype)


MIXED = [(0, 1), (0, 9), (12, 1), (5, 4), (3, 1), (16, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attend_mixed_chunks(dtype: torch.dtype, window: int | None) -> None:
    check_attention(MIXED, dtype=dtype, window=window)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_attend_head_shapes(head_dim: int, heads: int, kv_heads: int) -> None:
    check_attention([(0, 3), (4, 1), (2, 2)], head_dim=head_dim, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("window", [None, 4])
def test_attend_block_sizes(block_size: int, window: int | None) -> None:
    check_attention(MIXED, block_size=block_size, window=window)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attend_caps_and_sinks(softcap: float | None, window: int | None) -> None:
    check_attention(MIXED, softcap=softcap, window=window, sinks=torch.randn(4))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("limit", [("QUERY_TILE", 3), ("MAX_SCORES", 100), ("MAX_SCORES", 1)], ids=str)
def test_attend_in_tiles(window: int | None, limit: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, *limit)
    check_attention([(0, 10), (7, 1), (2, 8)], window=window)


def test_attend_no_requests_and_unowned_rows() -> None:
    kv = blocked([2], block_size=2, kv_heads=1, head_dim=4, dtype=torch.float32)
    for starts, lengths, tables, rows in [([0], [], kv.block_tables[:0], 0), ([0, 0], [0], kv.block_tables, 3)]:
        out = backends.attend(
            backend,
            torch.randn(rows, 1, 4),
            kv.store,
            query_start=torch.tensor(starts),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tables,
            scale=1.0,
        )
        assert out.tolist() == torch.zeros(rows, 1, 4).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 6, 6), (2, 2, 2, 2), (3, 1, 7, 4), (1, 1, 1, 0), (2, 1, 8, 2)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, normed: bool
) -> None:
    num_tokens, block_size, eps = 5, 2, 0.02
    positions = torch.tensor([0, 1, 2, 9, 5])
    slots = [7, -1, 0, 3, 4]
    angles = torch.rand(10, rotary_dim // 2) * 6
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q_norm, k_norm = (torch.randn(head_dim, dtype=dtype) for _ in range(2)) if normed else (None, None)
    store = backends.allocate_kv(
        backend, num_blocks=4, block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=CPU
    )
    store.fill_(-77)
    q = backends.rope_store(
        backend,
        qkv,
        positions=positions,
        slot_mapping=torch.tensor(slots),
        cos=angles.cos(),
        sin=angles.sin(),
        store=store,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )

    def turned(head: Tensor, weight: Tensor | None, position: int) -> list[float]:
        x = [float(v) for v in head]
        if weight is not None:
            root = math.sqrt(sum(v * v for v in x) / len(x) + eps)
            x = [v / root * float(w) for v, w in zip(x, weight, strict=True)]
        half = rotary_dim // 2
        for i in range(half):
            z = complex(x[i], x[half + i]) * complex(math.cos(angles[position, i]), math.sin(angles[position, i]))
            x[i], x[half + i] = z.real, z.imag
        return x

    rope_tolerance = max(TOLERANCE[dtype], 1e-6)  # the tables are fp32

    def check(ours: Tensor, naive: list[float]) -> None:
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), torch.tensor(naive, dtype=torch.float64), rtol=rope_tolerance, atol=rope_tolerance
        )

    split = qkv.view(num_tokens, -1, head_dim)
    for token, (position, slot) in enumerate(zip(positions.tolist(), slots, strict=True)):
        for head in range(heads):
            check(q[token, head], turned(split[token, head], q_norm, position))
        for head in range(kv_heads) if slot >= 0 else ():
            stored = store[:, slot // block_size, slot % block_size, head]
            check(stored[0], turned(split[token, heads + head], k_norm, position))
            assert stored[1].tolist() == split[token, heads + kv_heads + head].tolist()
    for slot in set(range(4 * block_size)) - set(slots):
        assert (store[:, slot // block_size, slot % block_size] == -77).all()


def test_rope_store_without_tokens() -> None:
    store = torch.zeros(2, 1, 1, 1, 2)
    none = torch.tensor([], dtype=torch.int64)
    q = backends.rope_store(
        backend,
        torch.empty(0, 8),
        positions=none,
        slot_mapping=none,
        cos=torch.ones(3, 1),
        sin=torch.ones(3, 1),
        store=store,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
    )
    assert q.shape == (0, 2, 2)
    assert store.sum() == 0


def test_kv_bytes_is_what_is_allocated() -> None:
    for dtype in DTYPES:
        shape = {"block_size": 3, "num_kv_heads": 2, "head_dim": 5, "dtype": dtype}
        store = backends.allocate_kv(backend, num_blocks=7, device=CPU, **shape)
        assert store.nbytes == 7 * backends.kv_bytes(backend, **shape)


def test_block_size_is_checked() -> None:
    backend.check_block_size(1)
    with pytest.raises(ConfigError, match="block_size=0 is not a positive multiple of 1"):
        backend.check_block_size(0)
