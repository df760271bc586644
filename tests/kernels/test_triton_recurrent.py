"""Layers with recurrent states on the Triton kernels, in the interpreter: delta nets, Mamba-2 and short convolutions
over random ragged steps, against the reference. Kernels are changed here on purpose: every such fault must be found.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from backends import CPU, Arrays, poison, runnable
from specs import make_delta, make_mamba
from torch import Tensor
from triton_faults import changed_copy

from splitfuse.core.plan import ZERO_STATE
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import ConvSpec, DeltaSpec, MambaSpec, RecurrentSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import LayerWeights

pytestmark = [*runnable("triton-float32"), pytest.mark.usefixtures("seeded")]

TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3}
NUM_SLOTS = 10
SPECS: dict[str, RecurrentSpec] = {
    "delta": make_delta(1, 2, 10, 20),
    "mamba": make_mamba(1, 2, 12, 10, conv_size=3, conv_bias=True, dt_min=0.1, dt_max=0.9),
    "conv": ConvSpec(num_channels=150, conv_size=3, bias=True),
}
WIDE: dict[str, RecurrentSpec] = {
    "delta-wide": make_delta(2, 4, 33, 130, conv_size=2),
    "mamba-groups": make_mamba(2, 4, 16, 40),
    "mamba-free": make_mamba(3, 3, 64, 70, conv_bias=True),
    "conv-long": ConvSpec(num_channels=20, conv_size=6),
}


def make_backend() -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu")


def random_weights(spec: RecurrentSpec) -> LayerWeights:
    """Return weights that let states keep something over many tokens."""
    bias = spec.conv_bias if isinstance(spec, MambaSpec) else isinstance(spec, ConvSpec) and spec.bias
    options: dict[str, Any] = {"conv": torch.randn(spec.conv_size, spec.num_channels)}
    options["conv_bias"] = torch.randn(spec.num_channels) if bias else None
    if isinstance(spec, DeltaSpec | MambaSpec):
        heads = spec.num_value_heads if isinstance(spec, DeltaSpec) else spec.num_heads
        width = spec.value_dim if isinstance(spec, DeltaSpec) else heads * spec.head_dim
        options |= {"decay": torch.rand(heads) / 2, "decay_bias": torch.randn(heads), "skip": torch.randn(heads)}
        options["out_norm"] = torch.rand(width) + 0.5
    return LayerWeights(**options)


def inputs(spec: RecurrentSpec, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random projections of tokens, and their gates or time steps."""
    width, gates = 3 * spec.num_channels, 0
    if isinstance(spec, DeltaSpec):
        width, gates = spec.num_channels + spec.num_value_heads * spec.value_dim, 2 * spec.num_value_heads
    elif isinstance(spec, MambaSpec):
        width, gates = spec.num_channels + spec.num_heads * spec.head_dim, spec.num_heads
    return torch.randn(num_tokens, width).to(dtype), torch.randn(num_tokens, gates).to(dtype)


def compute(
    backend: Backend, spec: RecurrentSpec, weights: LayerWeights, x: Tensor, gates: Tensor, *step: Any
) -> Tensor:
    states, batch = step
    if isinstance(spec, DeltaSpec):
        return backend.delta(x, gates, states, spec, batch, weights)
    if isinstance(spec, MambaSpec):
        return backend.mamba(x, gates, states, spec, batch, weights)
    return backend.conv(x, states, spec, batch, weights)


def check(spec: RecurrentSpec, lengths: list[int], reads: list[int], writes: list[int], dtype: torch.dtype) -> None:
    """Compute a step on both backends, from random states, and compare what it gives, and all states after it."""
    weights, (x, gates) = random_weights(spec), inputs(spec, sum(lengths), dtype)
    batch = Arrays(
        query_start=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        seq_lens=lengths,
        state_reads=torch.tensor(reads, dtype=torch.int32),
        state_writes=torch.tensor(writes, dtype=torch.int32),
    )
    reference = ReferenceBackend()
    before = reference.allocate_states(spec, num_slots=NUM_SLOTS, device=CPU)
    poison(before)
    known = [slot for slot in reads if slot != ZERO_STATE]
    before[known] = torch.randn(len(known), before.shape[1])
    found = []
    for backend in (make_backend(), reference):
        states = before.clone()
        found.append((compute(backend, spec, weights, x, gates, states, batch), states))
    (ours, our_states), (wanted, states) = found
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))}
    torch.testing.assert_close(ours, wanted, **limits)
    torch.testing.assert_close(our_states, states, equal_nan=True, rtol=3e-5, atol=3e-5)


def random_step(rng: Random) -> tuple[list[int], list[int], list[int]]:
    """Return lengths of chunks, and the slots that each reads and writes: some go on in place, some from another one's
    state or from nothing, some are several parts.
    """
    free, (lengths, reads, writes) = rng.sample(range(NUM_SLOTS), NUM_SLOTS), ([], [], [])  # type: ignore[var-annotated]
    for _ in range(rng.randint(1, 3)):
        read = rng.choice((ZERO_STATE, free.pop()))
        for part in range(rng.choice((1, 1, 2))):
            in_place = read != ZERO_STATE and part == 0 and rng.random() < 0.5
            write = read if in_place else free.pop()
            lengths.append(rng.choice((1, 1, 2, rng.randint(3, 7))))
            reads.append(read)
            writes.append(write)
            read = write
    return lengths, reads, writes


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", [*SPECS, *(pytest.param(each, marks=pytest.mark.slow) for each in WIDE)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 6))])
def test_random_ragged_steps(seed: int, name: str, dtype: torch.dtype) -> None:
    check((SPECS | WIDE)[name], *random_step(Random(f"{seed} {name} {dtype}")), dtype)


def test_steps_without_tokens_and_of_no_request() -> None:
    """Requests that fill a batch up have no tokens and no slots, and tokens of no request write nothing."""
    for spec in SPECS.values():
        weights, (x, gates) = random_weights(spec), inputs(spec, 4, torch.float32)
        numbers = {"query_start": [0, 3, 3], "state_reads": [2, -1], "state_writes": [4, -1]}
        tensors = {name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()}
        batch = Padded(**tensors, seq_lens=[3, 0], is_padded=True)
        states = make_backend().allocate_states(spec, num_slots=NUM_SLOTS, device=CPU).normal_()
        before, alone = states.clone(), states.clone()
        ours = compute(make_backend(), spec, weights, x, gates, states, batch)
        real = Arrays(**{name: each[:-1] for name, each in tensors.items()}, seq_lens=[3])
        wanted = compute(ReferenceBackend(), spec, weights, x[:3], gates[:3], alone, real)
        torch.testing.assert_close(ours[:3], wanted, rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(states, alone, rtol=3e-5, atol=3e-5)
        others = [slot for slot in range(NUM_SLOTS) if slot != 4]
        assert torch.equal(states[others], before[others]) and ours.isfinite().all()


class Padded(Arrays):
    """A batch whose last token is no request's."""

    @property
    def num_tokens(self) -> int:
        return self.host_query_start[-1] + 1


@pytest.mark.parametrize("name", SPECS)
def test_a_token_has_the_same_bits_however_its_prompt_is_cut(name: str) -> None:
    spec, backend = SPECS[name], make_backend()
    weights, (x, gates) = random_weights(spec), inputs(spec, 6, torch.float32)

    def cut(*bounds: int) -> Tensor:
        states, rows, read = backend.allocate_states(spec, num_slots=1, device=CPU), [], ZERO_STATE
        for begin, end in zip((0, *bounds), (*bounds, 6), strict=True):
            numbers = {"query_start": [0, end - begin], "state_reads": [read], "state_writes": [0]}
            batch = Arrays(**{name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()})
            rows.append(compute(backend, spec, weights, x[begin:end], gates[begin:end], states, batch))
            read = 0
        return torch.cat(rows)

    assert torch.equal(cut(1, 3), cut())


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "window of the convolution": ("conv", "tokens - (SIZE - 1 - number)", "tokens - (SIZE - number)"),
    "first row of a request": ("conv", "is_token & (rows >= first)", "is_token & (rows > first)"),
    "place in the kept inputs": (
        "conv",
        "(SIZE - 1 + rows - first) * channels",
        "(SIZE - 2 + rows - first) * channels",
    ),
    "slot of the kept inputs": ("conv", "at = slot.to(tl.int64)", "at = (slot + 1).to(tl.int64)"),
    "inputs that are kept": ("conv", "old - (SIZE - 1) + begin", "old - SIZE + begin"),
    "slot of the inputs that are kept": ("conv", "states + read.to(tl.int64)", "states + target.to(tl.int64)"),
    "parts of a request": ("delta", "tl.load(writes + request - 1", "tl.load(writes + request"),
    "end of a chunk": ("delta", "tl.load(query_start + request + 1)):", "tl.load(query_start + request + 1) - 1):"),
    "begin of a chunk": (
        "delta",
        "range(tl.load(query_start + request), ",
        "range(tl.load(query_start + request) + 1, ",
    ),
    "slot of the matrices": ("delta", "matrix + slot.to(tl.int64)", "matrix + (slot + 1).to(tl.int64)"),
    "slot that is written": ("delta", "matrix + target.to(tl.int64)", "matrix + (target - 1).to(tl.int64)"),
    "state without a slot": ("delta", "inside & (slot >= 0)", "inside & (slot > 0)"),
}
"""Faults by what they change: the layer that finds it, and what is replaced by what."""
STEPS = {
    "conv": ([3, 1, 1, 6], [0, 4, ZERO_STATE, 5], [4, 6, 2, 5]),
    "delta": ([2, 1, 1, 2], [0, 4, ZERO_STATE, 5], [4, 6, 2, 5]),
}
"""Lengths, reads and writes: two parts of one request, one without a state, and one whose state is written in place."""


@pytest.mark.parametrize("name", STEPS)
def test_the_step_with_faults_is_right_without_them(name: str) -> None:
    check(SPECS[name], *STEPS[name], torch.float32)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_position_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from splitfuse.kernels.triton import backend, recurrent

    layer, old, new = FAULTS[name]
    copy = changed_copy(recurrent, old, new, tmp_path, monkeypatch)
    for kernel in ("convolve_kernel", "tail_kernel", "matrix_kernel"):
        monkeypatch.setattr(backend, kernel, getattr(copy, kernel))
    with pytest.raises((AssertionError, IndexError)):
        check(SPECS[layer], *STEPS[layer], torch.float32)
