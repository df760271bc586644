"""Gated delta nets, Mamba-2 and short convolutions of every backend: near to the exact result, however a request is cut
into chunks and whichever slots its state goes through; on the C++ kernels the same bits, for any number of threads.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import CPU, Arrays, BackendCase, poison, variants
from specs import make_delta, make_mamba
from torch import Tensor

from splitfuse.core.plan import ZERO_STATE
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend, Store
from splitfuse.kernels.layers import ConvSpec, DeltaSpec, MambaSpec, RecurrentSpec
from splitfuse.kernels.weights import LayerWeights, WeightRole

LENGTHS = (1, 2, 150, 9)
NUM_SLOTS = 12


SPECS = [
    pytest.param(make_delta(2, 4, 16, 16), id="delta"),
    pytest.param(make_delta(1, 3, 10, 70, conv_size=2), id="delta-odd"),
    pytest.param(make_delta(3, 3, 33, 130), id="delta-wide"),
    pytest.param(make_mamba(2, 4, 16, 16), id="mamba"),
    pytest.param(make_mamba(1, 3, 10, 70, conv_size=2, conv_bias=True, dt_min=0.3, dt_max=0.9), id="mamba-odd"),
    pytest.param(make_mamba(3, 6, 33, 130, conv_bias=True), id="mamba-wide"),
    pytest.param(ConvSpec(num_channels=48, conv_size=3), id="conv"),
    pytest.param(ConvSpec(num_channels=270, conv_size=5, bias=True), id="conv-bias"),
]


@dataclass(frozen=True)
class Layer:
    """A layer, and the projected tokens of some requests: `gates` are those of a delta net, or time steps of Mamba."""

    spec: RecurrentSpec
    weights: dict[str, Tensor]
    rows: list[Tensor]
    gates: list[Tensor]

    @classmethod
    def random(cls, spec: RecurrentSpec) -> Layer:
        weights, width, gates_width = {"conv": torch.randn(spec.conv_size, spec.num_channels)}, 3 * spec.num_channels, 1
        if isinstance(spec, DeltaSpec):
            heads, width = spec.num_value_heads, spec.num_channels + spec.num_value_heads * spec.value_dim
            gates_width = 2 * heads
            weights |= {"decay": torch.rand(heads) * 3, "decay_bias": torch.randn(heads)}
            weights |= {"out_norm": torch.rand(spec.value_dim) + 0.5}
        elif isinstance(spec, MambaSpec):
            heads, width, gates_width = (
                spec.num_heads,
                spec.num_channels + spec.num_heads * spec.head_dim,
                spec.num_heads,
            )
            weights |= {"decay": torch.rand(heads), "decay_bias": torch.randn(heads), "skip": torch.randn(heads)}
            weights |= {"out_norm": torch.rand(heads * spec.head_dim) + 0.5}
        if spec.conv_bias if isinstance(spec, MambaSpec) else isinstance(spec, ConvSpec) and spec.bias:
            weights |= {"conv_bias": torch.randn(spec.num_channels)}
        rows, gates = ([torch.randn(length, n).bfloat16() for length in LENGTHS] for n in (width, gates_width))
        return cls(spec, weights, rows, gates)

    def exact(self, request: int) -> Tensor:
        """What it gives of a whole request, in fp64."""
        spec, rows = self.spec, self.rows[request].double()
        weights = {name: each.double() for name, each in self.weights.items()}

        def convolved(inputs: Tensor) -> Tensor:
            padded = F.pad(inputs.T.unsqueeze(0), (spec.conv_size - 1, 0))
            out = F.conv1d(padded, weights["conv"].T.unsqueeze(1), weights.get("conv_bias"), groups=spec.num_channels)
            return out[0].T

        if isinstance(spec, ConvSpec):
            b, c, u = rows.chunk(3, dim=1)
            return c * convolved(b * u)
        if isinstance(spec, MambaSpec):
            return self._exact_mamba(spec, rows, self.gates[request].double(), weights, convolved)
        heads, length = spec.num_value_heads, len(rows)
        channels, z = rows.split((spec.num_channels, heads * spec.value_dim), dim=1)
        mixed = F.silu(convolved(channels))
        keys = spec.num_key_heads * spec.key_dim
        q, k, v = mixed.split((keys, keys, heads * spec.value_dim), dim=1)
        group = heads // spec.num_key_heads
        q, k = (F.normalize(each.view(length, heads // group, -1), dim=-1) for each in (q, k))
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
        v = v.view(length, heads, -1)
        beta, rate = self.gates[request].double().chunk(2, dim=1)
        kept = (-weights["decay"] * torch.log1p(torch.exp(rate + weights["decay_bias"]))).exp()
        out = torch.empty_like(v)
        for head in range(heads):
            state = torch.zeros(spec.key_dim, spec.value_dim).double()
            for t in range(length):
                state *= kept[t, head]
                state += torch.outer(k[t, head], v[t, head] - k[t, head] @ state) * beta[t, head].sigmoid()
                out[t, head] = q[t, head] @ state / spec.key_dim**0.5
        out *= torch.rsqrt(out.square().mean(-1, keepdim=True) + spec.norm.eps) * weights["out_norm"]
        return out.flatten(1) * F.silu(z)

    @staticmethod
    def _exact_mamba(
        spec: MambaSpec, rows: Tensor, dt: Tensor, weights: dict[str, Tensor], convolved: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As sums over all tokens before, each decayed by the steps between: no state."""
        heads, length, group = spec.num_heads, len(rows), spec.num_heads // spec.num_groups
        shared, values = spec.num_groups * spec.state_dim, heads * spec.head_dim
        channels, z = rows.split((spec.num_channels, values), dim=1)
        c, b, v = F.silu(convolved(channels)).split((shared, shared, values), dim=1)
        c, b = (each.view(length, spec.num_groups, -1).repeat_interleave(group, dim=1) for each in (c, b))
        v, dt = v.view(length, heads, -1), torch.log1p(torch.exp(dt + weights["decay_bias"]))
        dt = dt.clamp(spec.dt_min, spec.dt_max)
        passed = torch.cumsum(dt * weights["decay"], dim=0)  # decay since the beginning, as a logarithm
        kept = torch.exp(-(passed.unsqueeze(1) - passed.unsqueeze(0)).clamp(min=0))  # [T, T, H]: from column to row
        kept = kept * torch.ones(length, length).tril().unsqueeze(-1)
        scores = torch.einsum("thn,shn->tsh", c, b) * kept * dt.unsqueeze(0)
        out = torch.einsum("tsh,shp->thp", scores, v) + weights["skip"].unsqueeze(-1) * v
        gated = (out.flatten(1) * F.silu(z)).view(length, spec.num_groups, -1)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + spec.norm.eps)
        return normed.flatten(1) * weights["out_norm"]

    def compute(self, backend: Backend, dtype: torch.dtype, states: Store, parts: list[Any]) -> list[Tensor]:
        """What a backend gives of parts (request, begin, end, slot to read, slot to write) in one step."""
        lengths = [end - begin for _, begin, end, _, _ in parts]
        batch: Any = Arrays(
            query_start=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            seq_lens=torch.tensor([end for _, _, end, _, _ in parts], dtype=torch.int32),
            state_reads=torch.tensor([part[3] for part in parts], dtype=torch.int32),
            state_writes=torch.tensor([part[4] for part in parts], dtype=torch.int32),
        )
        packed = LayerWeights(
            **{name: backend.pack([each], role=WeightRole.NORM) for name, each in self.weights.items()}
        )
        x, gates = (
            torch.cat([each[request][begin:end] for request, begin, end, _, _ in parts]).to(dtype)
            for each in (self.rows, self.gates)
        )
        if isinstance(self.spec, DeltaSpec):
            out = backend.delta(x, gates, states, self.spec, batch, packed)
        elif isinstance(self.spec, MambaSpec):
            out = backend.mamba(x, gates, states, self.spec, batch, packed)
        else:
            out = backend.conv(x, states, self.spec, batch, packed)
        return list(out.split(lengths))

    def states(self, backend: Backend) -> Store:
        """States of NaN."""
        states = backend.allocate_states(self.spec, num_slots=NUM_SLOTS, device=CPU)
        poison(states)
        return states

    def whole(self, backend: Backend, dtype: torch.dtype) -> list[Tensor]:
        """What it gives of all requests in one step."""
        parts = [(request, 0, length, ZERO_STATE, request) for request, length in enumerate(LENGTHS)]
        return self.compute(backend, dtype, self.states(backend), parts)

    def split(self, backend: Backend, dtype: torch.dtype, rng: random.Random) -> list[Tensor]:
        """The same in random chunks, or parts of chunks, and company, through random slots."""
        states, free = self.states(backend), list(range(NUM_SLOTS))
        done, slots, found = [0] * len(LENGTHS), [ZERO_STATE] * len(LENGTHS), [list[Tensor]() for _ in LENGTHS]
        while pending := [request for request, length in enumerate(LENGTHS) if done[request] < length]:
            parts, left = [], []
            for request in rng.sample(pending, rng.randint(1, len(pending))):
                end = min(LENGTHS[request], done[request] + rng.choice((1, 2, 5, 64, 90)))
                read = slots[request]
                if read == ZERO_STATE or rng.random() < 0.5:
                    left += [read] * (read != ZERO_STATE)
                    slots[request] = free.pop(rng.randrange(len(free)))
                if end - done[request] > 1 and rng.random() < 0.4:  # two parts of a chunk: one goes on from the other
                    middle, kept = rng.randint(done[request] + 1, end - 1), free.pop()
                    parts.append((request, done[request], middle, read, kept))
                    left.append(kept)
                    done[request], read = middle, kept
                parts.append((request, done[request], end, read, slots[request]))
                done[request] = end
            for part, rows in zip(parts, self.compute(backend, dtype, states, parts), strict=True):
                found[part[0]].append(rows)
            free += left
        return [torch.cat(each) for each in found]


@pytest.mark.parametrize("spec", SPECS)
def test_near_to_the_exact_result(case: BackendCase, spec: RecurrentSpec) -> None:
    layer = Layer.random(spec)
    exact = [layer.exact(request) for request in range(len(LENGTHS))]
    for found in (
        layer.whole(case.backend, case.wide),
        layer.split(case.backend, case.wide, random.Random(1)),
    ):
        for ours, wanted in zip(found, exact, strict=True):
            # Rows of a delta net or Mamba are normed, whose error is that of the largest of a row.
            case.near(ours, wanted, wanted.abs().amax(dim=1, keepdim=True), share=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", variants())
def test_equal_bits_however_cut(variant: str, spec: RecurrentSpec) -> None:
    layer = Layer.random(spec)
    wanted = layer.whole(CpuBackend(variant=variant, num_threads=1), torch.float32)
    for threads in (1, 2, 3):
        backend = CpuBackend(variant=variant, num_threads=threads)
        for found in (
            layer.whole(backend, torch.float32),
            *(layer.split(backend, torch.float32, random.Random(seed)) for seed in range(3)),
        ):
            assert all(torch.equal(ours, each) for ours, each in zip(found, wanted, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_that_is_read_stays_as_it_is(case: BackendCase, spec: RecurrentSpec) -> None:
    """Several requests may go on from one state, in one step."""
    layer = Layer.random(spec)
    states = layer.states(case.backend)
    layer.compute(case.backend, case.wide, states, [(2, 0, 60, ZERO_STATE, 3)])
    for slots in ((0, 1), (5, 4)):
        first, second = layer.compute(
            case.backend, case.wide, states, [(2, 60, 80, 3, slots[0]), (2, 60, 80, 3, slots[1])]
        )
        torch.testing.assert_close(first, second)
    wanted = layer.whole(case.backend, case.wide)[2][60:80]
    torch.testing.assert_close(first, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("spec", SPECS)
def test_states_take_the_bytes_that_are_planned(case: BackendCase, spec: RecurrentSpec) -> None:
    states = case.backend.allocate_states(spec, num_slots=NUM_SLOTS, device=CPU)
    assert states.nbytes == NUM_SLOTS * case.backend.state_bytes(spec)


@pytest.mark.parametrize("slots", [(ZERO_STATE - 1, 0), (NUM_SLOTS, 0), (0, ZERO_STATE), (0, NUM_SLOTS)])
@pytest.mark.parametrize("variant", variants())
def test_slots_that_do_not_exist_are_refused(variant: str, slots: tuple[int, int]) -> None:
    backend, layer = CpuBackend(variant=variant, num_threads=1), Layer.random(make_delta(1, 1, 8, 8))
    with pytest.raises(IndexError, match="a state slot that does not exist"):
        layer.compute(backend, torch.float32, layer.states(backend), [(2, 0, 5, *slots)])
