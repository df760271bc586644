"""The kernel backends that the suites run over, as pytest parameters. One that this machine cannot run is skipped, with
the reason and the number of its cases (conftest.py): it must be seen, so none is left out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfuse.errors import KernelError
from splitfuse.kernels.batch import Derivation, Numbers
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.library import LIBRARY, VARIANTS, supported_variants
from splitfuse.kernels.interface import Backend, Store
from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, LatentSpec, MlpSpec, NormSpec, RouterSpec
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.triton import capabilities as triton
from splitfuse.kernels.weights import LayerWeights, WeightRole

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BackendCase:
    """A backend, the dtypes that it wants, and how near to the exact result it must be."""

    backend: Backend
    narrow: torch.dtype
    """Of weights, norms and biases, and of what products and attention read."""
    wide: torch.dtype
    """Of the residual stream, and of what products give that is no activation."""
    sums: float
    """Largest error of a sum of products, as a share of the sum of the products' magnitudes."""
    attention: float
    """The same of attention, as a share of the weighted sum of the values' magnitudes."""

    def near(self, ours: Tensor, exact: Tensor, magnitude: Tensor, *, share: float | None = None) -> None:
        """Assert it of a result, which may be rounded to its dtype once more."""
        assert ours.shape == exact.shape
        bound = torch.finfo(ours.dtype).eps * exact.abs() + (self.sums if share is None else share) * magnitude
        error = (ours.double() - exact).abs()
        assert not error.isnan().any()
        worst = (error / bound.clamp_min(1e-300)).max() if error.numel() else torch.zeros(())
        assert worst <= 1, f"off by {float(worst):.3g} times what is allowed"


def _reference(dtype: torch.dtype, share: float) -> Callable[[], BackendCase]:
    return lambda: BackendCase(ReferenceBackend(), dtype, dtype, share, share)


def _prepacked() -> BackendCase:
    # Everything between two operations is rounded to bf16: 2**-9 each time, a few times within one.
    return BackendCase(OneDnnBackend(), torch.bfloat16, torch.bfloat16, 2**-6, 2**-7)


def _compiled(variant: str) -> BackendCase:
    # fp32 sums of at most a few thousand exact products, 2**-24 for each addition, which cancel; softmax weights are
    # rounded to bf16 (2**-9), and so are the keys that rope_store turned.
    return BackendCase(CpuBackend(variant=variant, num_threads=2), torch.bfloat16, torch.float32, 2e-6, 2**-7)


def _interpreted(dtype: torch.dtype, share: float) -> Callable[[], BackendCase]:
    def make() -> BackendCase:
        from splitfuse.kernels.triton.backend import TritonBackend

        return BackendCase(TritonBackend(device="cpu"), dtype, dtype, share, share)

    return make


MAKERS: dict[str, Callable[[], BackendCase]] = {
    "reference-float64": _reference(torch.float64, 1e-13),
    "reference-float32": _reference(torch.float32, 2e-6),
    "torch": _prepacked,
    "triton-float32": _interpreted(torch.float32, 4e-6),
    **{variant: functools.partial(_compiled, variant) for variant in VARIANTS},
}


@functools.cache
def make_case(name: str) -> BackendCase:
    """The backend of that name, the same one at every call."""
    return MAKERS[name]()


def why_not(variant: str) -> str | None:
    """Why this machine cannot run a variant of the C++ kernels. Raises KernelError if there is a library, or the
    environment names or requires one, and it cannot be loaded: then nothing may be skipped for that.
    """
    try:
        return None if variant in supported_variants() else f"this CPU cannot run the {variant} kernels"
    except KernelError as error:
        is_wanted = "SPLITFUSE_KERNEL_LIBRARY" in os.environ or os.environ.get("SPLITFUSE_KERNELS") == "required"
        if is_wanted or LIBRARY.exists():  # perhaps of older sources
            raise
        return str(error)


def variants(*values: Any, id: str | None = None) -> list[Any]:  # noqa: A002 - pytest's name for it
    """Parameters (variant, *values) for all C++ variants."""
    return [
        pytest.param(*(variant, *values), id=variant if id is None else f"{variant}-{id}", marks=runnable(variant))
        for variant in VARIANTS
    ]


def emulation_slow(cases: Sequence[Any], *kept: str) -> list[Any]:
    """Return the cases; those with emulated tiles are for the slow suite unless their id has one of these in it."""
    return [
        pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        if case.id.startswith("avx512_amx") and not any(part in case.id for part in kept)
        else case
        for case in cases
    ]


def runnable(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test of a backend or variant: it is skipped where that cannot run."""
    why = why_not(name) if name in VARIANTS else None
    if name == "torch" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        why = "PyTorch's oneDNN does not multiply bf16 on this CPU"
    if name.startswith("triton"):
        why = None if triton.is_interpreted() else "there is a GPU: tests/engine/test_gpu.py has its tests"
        why = why or triton.obstacle("cpu", torch.float32)
    return [pytest.mark.skip(reason=why)] if why else []


def suite_marks(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of the suites of a backend: an interpreter takes minutes for them."""
    return [*runnable(name), *([pytest.mark.slow] if name.startswith("triton") else ())]


BACKENDS = [pytest.param(name, id=name, marks=suite_marks(name)) for name in MAKERS]


def pack_experts(backend: Backend, w13: Tensor, w2: Tensor, *biases: Tensor) -> LayerWeights:
    """w13 [E, 2I, C] and w2 [E, C, I] as `Backend.experts` takes them, and their biases [E, 2I] and [E, C] if given."""
    w1_bias, w2_bias = biases or ((), ())
    return LayerWeights(
        w13=[backend.pack(each.chunk(2), role=WeightRole.W13) for each in w13],
        w2=[backend.pack([each], role=WeightRole.W2) for each in w2],
        w1_bias=[backend.pack([each], role=WeightRole.PLAIN) for each in w1_bias],
        w2_bias=[backend.pack([each], role=WeightRole.PLAIN) for each in w2_bias],
    )


def experts(
    backend: Backend, x: Tensor, ids: Tensor, weights: Tensor, layer: LayerWeights, kind: str = "silu"
) -> Tensor:
    """`Backend.experts` of gated experts with this activation."""
    spec = MlpSpec(intermediate_size=1, activation=kind, bias=bool(layer.w1_bias))
    return backend.experts(x, ids, weights, spec, layer)


def route(backend: Backend, logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`Backend.route` by softmax over all experts."""
    return backend.route(logits, RouterSpec(num_experts=logits.shape[1], top_k=top_k, renormalize=renormalize))


def rms_norm(backend: Backend, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`Backend.norm` with a weight that any dtype holds."""
    return backend.norm(x, NormSpec(eps=eps), backend.pack([weight], role=WeightRole.NORM))


# --- blocked keys and values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """Arrays of a step, as far as an operation needs them."""

    positions: Any = None
    slot_mapping: Any = None
    query_start: Any = None
    seq_lens: Any = None
    block_tables: Any = None
    state_reads: Any = None
    state_writes: Any = None
    is_padded: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.host_query_start[-1])

    @property
    def num_requests(self) -> int:
        return len(self.seq_lens)

    @property
    def host_query_start(self) -> Numbers:
        return self.query_start.numpy()

    @property
    def host_seq_lens(self) -> Numbers:
        return self.seq_lens.numpy()

    @property
    def host_state_reads(self) -> Numbers:
        return self.state_reads.numpy()

    @property
    def host_state_writes(self) -> Numbers:
        return self.state_writes.numpy()

    def derived(self, derivation: Derivation) -> tuple[Tensor, ...]:
        """As `RaggedBatch.derived`, on the CPU."""
        return tuple(derivation(self))


def kv_spec(num_kv_heads: int, head_dim: int, latent: LatentSpec | None = None) -> AttentionSpec:
    """Attention whose keys and values are of this shape."""
    return AttentionSpec(num_heads=num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, latent=latent)


def latent_spec(head_dim: int, value_from: int) -> LatentSpec:
    """Latent attention whose values are the elements of keys from `value_from` on."""
    sizes = {"kv_rank": head_dim - value_from, "rope_dim": value_from, "nope_dim": 1, "v_dim": 1}
    return LatentSpec(norm=NormSpec(eps=1e-6), q_rank=None, **sizes)


def allocate_kv(
    backend: Backend, *, num_kv_heads: int, head_dim: int, latent: LatentSpec | None = None, **options: Any
) -> Store:
    """`Backend.allocate_kv` by the numbers."""
    return backend.allocate_kv(kv_spec(num_kv_heads, head_dim, latent), **options)


def kv_bytes(
    backend: Backend, *, num_kv_heads: int, head_dim: int, latent: LatentSpec | None = None, **options: Any
) -> int:
    """`Backend.kv_bytes` by the numbers."""
    return backend.kv_bytes(kv_spec(num_kv_heads, head_dim, latent), **options)


def rope_store(
    backend: Backend,
    qkv: Tensor,
    *,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    store: Store,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    latent: LatentSpec | None = None,
) -> Tensor:
    """`Backend.rope_store` by the numbers and arrays."""
    norms = None if q_norm is None else HeadNormSpec(norm=NormSpec(eps=eps))
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    spec = AttentionSpec(**shape, qk_norm=norms, latent=latent)
    weights = LayerWeights(
        q_norm=None if q_norm is None else backend.pack([q_norm], role=WeightRole.NORM),
        k_norm=None if k_norm is None else backend.pack([k_norm], role=WeightRole.NORM),
    )
    arrays = Arrays(positions=positions, slot_mapping=slot_mapping)
    return backend.rope_store(qkv, store, spec, arrays, (cos, sin), weights)


def attend(
    backend: Backend,
    q: Tensor,
    store: Store,
    *,
    query_start: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    num_kv_heads: int | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`Backend.attend` by the numbers and arrays; `options` are fields of AttentionSpec."""
    if num_kv_heads is None:
        num_kv_heads = store.shape[3] if isinstance(store, Tensor) else store.num_kv_heads
    spec = AttentionSpec(num_heads=q.shape[1], num_kv_heads=num_kv_heads, head_dim=q.shape[2], **options)
    arrays = Arrays(query_start=query_start, seq_lens=seq_lens, block_tables=block_tables)
    return backend.attend(q, store, spec, arrays, sinks)


def poison(store: Store) -> None:
    """Fill a store with NaN: in every format that there is, bytes of ones are NaN or a number that stands out."""
    memory = store if isinstance(store, Tensor) else store.memory
    memory.view(torch.uint8).fill_(0xFF)


@dataclass(frozen=True)
class Requests:
    """Keys and values [length, Hk, D] of some requests on the grid of bf16, and the blocks that are theirs. With
    `latent` values are parts of keys.
    """

    keys: list[Tensor]
    values: list[Tensor]
    block_tables: Tensor
    block_size: int
    num_blocks: int
    latent: LatentSpec | None = None

    @classmethod
    def random(
        cls,
        lengths: Sequence[int],
        *,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        latent: LatentSpec | None = None,
    ) -> Requests:
        def grid(length: int) -> Tensor:
            return torch.randn(length, num_kv_heads, head_dim).bfloat16().double()

        counts = [-(-length // block_size) for length in lengths]
        num_blocks = sum(counts) + 2
        order = torch.randperm(num_blocks, dtype=torch.int32)
        tables = torch.zeros(len(lengths), max(counts, default=0), dtype=torch.int32)
        for row, part in zip(tables, order[: sum(counts)].split(counts) if counts else (), strict=True):
            row[: len(part)] = part
        keys = [grid(n) for n in lengths]
        values = [grid(n) for n in lengths] if latent is None else [each[..., latent.rope_dim :] for each in keys]
        return cls(keys, values, tables, block_size, num_blocks, latent)

    def slots(self, request: int, begin: int, end: int) -> Tensor:
        """Where the positions begin to end - 1 of a request lie."""
        positions = torch.arange(begin, end)
        return self.block_tables[request, positions // self.block_size] * self.block_size + positions % self.block_size

    def store(self, case: BackendCase, *, pieces: int = 7) -> Store:
        """A store of NaN with these keys and values, written through `rope_store`, unturned, `pieces` of them at first
        and ever more.
        """
        num_kv_heads, head_dim = self.keys[0].shape[1:]
        store = allocate_kv(
            case.backend,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            latent=self.latent,
            dtype=case.narrow,
            device=CPU,
        )
        poison(store)
        for request, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            begin, step = 0, pieces
            while begin < len(keys):
                end = min(begin + step, len(keys))
                begin, step, span = end, 2 * step + 1, slice(begin, end)
                kept = (keys[span], values[span]) if self.latent is None else (keys[span],)
                rows = torch.cat((torch.zeros_like(keys[span]), *kept), dim=1).flatten(1)
                slots = self.slots(request, span.start, span.stop)
                rope_store(
                    case.backend,
                    rows.to(case.wide),
                    positions=torch.zeros(len(rows), dtype=torch.int32),
                    slot_mapping=slots.int(),
                    cos=torch.empty(1, 0),
                    sin=torch.empty(1, 0),
                    store=store,
                    num_heads=num_kv_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    latent=self.latent,
                )
        return store


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    alibi: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the last n positions of one request see, exactly: q [n, H, D], keys and values [L, Hk, D], all in fp64.

    Returns [n, H, D], and the same with the magnitudes of the values.
    """
    (rows, num_heads, _), length = q.shape, len(keys)
    group = num_heads // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("nhd,lhd->hnl", q, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = torch.arange(length - rows, length).unsqueeze(1), torch.arange(length)
    if alibi is not None:
        scores = scores - alibi * slopes(num_heads).view(-1, 1, 1) * (query - key)
    hidden = query < key
    if window is not None:
        hidden |= query - key >= window
    if chunk is not None:
        hidden |= query // chunk != key // chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, rows, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :length]
    return torch.einsum("hnl,lhd->nhd", weights, values), torch.einsum("hnl,lhd->nhd", weights, values.abs())


def slopes(num_heads: int) -> Tensor:
    """Those of ALiBi, in fp32: falling in equal steps to 2**-8, then every other one of twice as many."""
    most = 1 << (num_heads.bit_length() - 1)
    powers = [8 * (head + 1) / most for head in range(most)] + [4 * (2 * n + 1) / most for n in range(num_heads - most)]
    return torch.tensor([2.0**-power for power in powers], dtype=torch.float32).double()
