"""Layers with recurrent states on the Triton kernels, in the interpreter: delta nets, Mamba-2 and short convolutions
over random ragged steps, against the reference. Kernels are changed here on purpose: every such fault must be found.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, product
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
SMALL = pytest.mark.usefixtures("small_chunks")
QUICK = (0, 3)
"""Numbers of the random steps in chunks that `make test` computes: a delta net in fp32, and Mamba in fp16."""
OF_STATES = [name for name, spec in WIDE.items() if not isinstance(spec, ConvSpec)]


def make_backend(*, invariant: bool = False) -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu", invariant=invariant)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks have 16 tokens at most, which is quicker in the interpreter."""
    from splitfuse.kernels.triton import backend, chunks

    for module in (backend, chunks):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(chunks, "FEWEST_TOKENS", 8)


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


def arrays(lengths: list[int], reads: list[int], writes: list[int], begins: list[int] | None = None) -> Any:
    """Return a step of parts that begin at these positions of their requests, or at the first ones."""
    ends = [begin + length for begin, length in zip(begins or [0] * len(lengths), lengths, strict=True)]
    numbers = {"query_start": [0, *accumulate(lengths)], "seq_lens": ends, "state_reads": reads, "state_writes": writes}
    return Arrays(**{name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()})


def check(
    spec: RecurrentSpec,
    lengths: list[int],
    reads: list[int],
    writes: list[int],
    dtype: torch.dtype,
    begins: list[int] | None = None,
) -> None:
    """Compute a step on both backends, from random states, and compare what it gives, and all states after it."""
    weights, (x, gates) = random_weights(spec), inputs(spec, sum(lengths), dtype)
    batch = arrays(lengths, reads, writes, begins)
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


def random_step(rng: Random, longest: int = 7) -> tuple[list[int], list[int], list[int]]:
    """Return lengths of parts, and the slots that each reads and writes: some go on in place, some from another one's
    state or from nothing, some are several of one request.
    """
    free, (lengths, reads, writes) = rng.sample(range(NUM_SLOTS), NUM_SLOTS), ([], [], [])  # type: ignore[var-annotated]
    for _ in range(rng.randint(1, 3)):
        read = rng.choice((ZERO_STATE, free.pop()))
        for part in range(rng.choice((1, 1, 2))):
            in_place = read != ZERO_STATE and part == 0 and rng.random() < 0.5
            write = read if in_place else free.pop()
            lengths.append(rng.choice((1, 1, 2, rng.randint(3, longest))))
            reads.append(read)
            writes.append(write)
            read = write
    return lengths, reads, writes


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", [*SPECS, *(pytest.param(each, marks=pytest.mark.slow) for each in WIDE)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 6))])
def test_random_ragged_steps(seed: int, name: str, dtype: torch.dtype) -> None:
    check((SPECS | WIDE)[name], *random_step(Random(f"{seed} {name} {dtype}")), dtype)


CHUNKED = [
    pytest.param(name, dtype, seed, marks=() if number in QUICK else pytest.mark.slow)
    for number, (seed, name, dtype) in enumerate(product(range(6), ("delta", "mamba", *OF_STATES), TOLERANCE))
]


@pytest.mark.parametrize(("name", "dtype", "seed"), CHUNKED)
def test_random_steps_of_prompts_in_chunks(
    name: str, dtype: torch.dtype, seed: int, request: pytest.FixtureRequest
) -> None:
    from splitfuse.kernels.triton import chunks

    if not seed:
        request.getfixturevalue("small_chunks")
    rng = Random(f"chunks {seed} {name} {dtype}")
    longest = 2 * chunks.CHUNK + 6
    lengths, reads, writes = random_step(rng, longest)
    lengths.append(rng.randint(chunks.CHUNK + 1, longest))  # one has chunks for certain
    reads.append(ZERO_STATE)
    writes.append(next(slot for slot in range(NUM_SLOTS) if slot not in (*reads, *writes)))
    check((SPECS | WIDE)[name], lengths, reads, writes, dtype, [rng.randrange(100) for _ in lengths])


@SMALL
def test_steps_without_tokens_and_of_no_request() -> None:
    """Requests that fill a batch up have no tokens and no slots, and tokens of no request write nothing."""
    for spec, count in product(SPECS.values(), (3, 9)):
        weights, (x, gates) = random_weights(spec), inputs(spec, count + 1, torch.float32)
        real = arrays([count], [2], [4])
        numbers = {"query_start": [0, count, count], "state_reads": [2, -1], "state_writes": [4, -1]}
        numbers["seq_lens"] = [count, 0]
        tensors = {name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()}
        batch = Padded(**tensors, is_padded=True)
        states = make_backend().allocate_states(spec, num_slots=NUM_SLOTS, device=CPU).normal_()
        before, alone = states.clone(), states.clone()
        ours = compute(make_backend(), spec, weights, x, gates, states, batch)
        wanted = compute(ReferenceBackend(), spec, weights, x[:count], gates[:count], alone, real)
        torch.testing.assert_close(ours[:count], wanted, rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(states, alone, rtol=3e-5, atol=3e-5)
        others = [slot for slot in range(NUM_SLOTS) if slot != 4]
        assert torch.equal(states[others], before[others]) and ours.isfinite().all()


class Padded(Arrays):
    """A batch whose last token is no request's."""

    @property
    def num_tokens(self) -> int:
        return int(self.host_query_start[-1]) + 1


def test_the_lists_of_padded_steps_have_one_shape() -> None:
    """Of steps of as many tokens and requests. Chunks end at multiples of their size, and with parts of a request."""
    from splitfuse.kernels.triton.chunks import CHUNK, state_chunks

    def lists(*parts: list[int]) -> list[list[list[int]]]:
        return [each.tolist() for each in state_chunks(replace(arrays(*parts), is_padded=True))]

    size = CHUNK
    one, other = lists([70, 1, 0], [3, 1, -1], [3, 1, -1], [30, 9, 0]), lists([1, 30, 40], [4, 5, 2], [4, 2, 6])
    assert one == [
        [1, 0, 0],
        [[0, 0, 4], [0, 0, 0], [0, 0, 0]],
        [[0, size - 30, -1], [size - 30, 2 * size - 30, -1], [2 * size - 30, 3 * size - 30, -1], [66, 70, 0]]
        + [[0, 0, 0]] * 4,
    ]
    assert other[0] == [0, 1, 1] and other[1][0] == [1, 0, 3] and [len(each) for each in other] == [3, 3, 8]
    assert other[2][:3] == [[1, 31, 1], [31, 31 + size, -1], [31 + size, 71, 2]]


@SMALL
@pytest.mark.parametrize(
    ("name", "invariant", "bounds", "length"),
    [
        *((name, False, (1, 3), 6) for name in SPECS),
        *((name, True, (2, 12), 13) for name in SPECS),
        *((name, False, (16,), 25) for name in ("delta", "mamba")),
    ],
)
def test_a_token_has_the_same_bits_however_its_prompt_is_cut(
    name: str, invariant: bool, bounds: tuple[int, ...], length: int
) -> None:
    """Of few tokens and with `invariant`; prompts in chunks where they are cut between two of them."""
    spec, backend = SPECS[name], make_backend(invariant=invariant)
    weights, (x, gates) = random_weights(spec), inputs(spec, length, torch.float32)

    def cut(*bounds: int) -> Tensor:
        states, rows, read = backend.allocate_states(spec, num_slots=1, device=CPU), [], ZERO_STATE
        for begin, end in zip((0, *bounds), (*bounds, length), strict=True):
            batch = arrays([end - begin], [read], [0], [begin])
            rows.append(compute(backend, spec, weights, x[begin:end], gates[begin:end], states, batch))
            read = 0
        return torch.cat(rows)

    assert torch.equal(cut(*bounds), cut())


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
CHUNK_FAULTS = {
    "tokens that a token reads": ("places[:, None] >= places[None, :]", "places[:, None] > places[None, :]"),
    "tokens that a token takes back": ("is_later = places[:, None] >", "is_later = places[:, None] - 1 >"),
    "rows of the inverse": ("range(1, CHUNK)", "range(1, CHUNK - 1)"),
    "decay of what a row adds": ("rows + 1, rows + 1 < end", "rows, rows < end"),
    "last row of what a row adds": ("rows + 1 < end", "rows + 1 <= end"),
    "end of a chunk": ("begin + places, begin + places < end", "begin + places, begin + places < end - 1"),
    "first row of a chunk": ("np.maximum(bounds, starts[part])", "np.maximum(bounds, starts[part] + 1)"),
    "chunks of a request": ("range(first, first + count)", "range(first, first + count - 1)"),
    "first chunk of a request": ("np.cumsum(of_request) - of_request", "np.zeros_like(of_request)"),
    "state that is read": ("slot.to(tl.int64)", "(slot + 1).to(tl.int64)"),
    "state that is written": ("target.to(tl.int64)", "(target - 1).to(tl.int64)"),
    "end of a part": ("index == num_chunks[part] - 1", "index == num_chunks[part]"),
    "state without a slot": ("(slot >= 0)", "(slot > 0)"),
}
"""Faults of chunks: what is replaced by what."""
QUICK_FAULTS = [
    *("tokens that a token reads", "tokens that a token takes back", "decay of what a row adds"),
    *("first row of a chunk", "chunks of a request", "state that is written"),
]
"""Those that `make test` looks for."""
STEPS = {
    "conv": ([3, 1, 1, 6], [0, 4, ZERO_STATE, 5], [4, 6, 2, 5]),
    "delta": ([2, 1, 1, 2], [0, 4, ZERO_STATE, 5], [4, 6, 2, 5]),
}
"""Lengths, reads and writes: two parts of one request, one without a state, and one whose state is written in place."""
CHUNK_STEP = ([1, 18, 9, 20], [1, 0, 4, ZERO_STATE], [1, 4, 6, 2])
"""A single token, two parts of one request, and one without a state."""


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


@SMALL
def test_chunks_with_faults_are_right_without_them() -> None:
    check(make_delta(1, 1, 10, 20), *CHUNK_STEP, torch.float32, [3, 5, 23, 0])


@pytest.mark.parametrize(
    "name", [each if each in QUICK_FAULTS else pytest.param(each, marks=pytest.mark.slow) for each in CHUNK_FAULTS]
)
def test_a_fault_of_one_position_in_chunks_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from splitfuse.kernels.triton import backend, chunks

    copy = changed_copy(chunks, *CHUNK_FAULTS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(copy, "CHUNK", 16)
    monkeypatch.setattr(copy, "FEWEST_TOKENS", 8)
    for each in ("CHUNK", "state_chunks", "within_kernel", "between_kernel"):
        monkeypatch.setattr(backend, each, getattr(copy, each))
    with pytest.raises((AssertionError, IndexError)):
        check(make_delta(1, 1, 10, 20), *CHUNK_STEP, torch.float32, [3, 5, 23, 0])
