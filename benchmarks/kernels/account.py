"""Measures what each operator takes within a step, and against its own limit: it shows where the rest of a step goes.

The kernels add up the time of every thread themselves (`OperatorTime` in csrc/interface.h), so that what the operators
take together, and what the call takes around them, is the step. The thread's work in what was split, such as norms,
packing and rotation, is shown apart, and so are its waits for other threads at the ends of sharings (csrc/team.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.limits import Limits, seconds
from benchmarks.kernels.steps import wanted_pairs
from splitfuse.core.plan import Chunk
from splitfuse.core.slo.cost_model import num_pairs
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.structs import OPERATORS, OperatorTime, Weight
from splitfuse.kernels.layers import AttentionSpec, MlpSpec
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.executor import Executor


@dataclass(frozen=True)
class Work:
    """Says how much an operator reads and computes in a step."""

    num_bytes: float
    operations: float
    in_bf16: bool = False
    """Whether it multiplies bf16 whatever the weights are, as attention does."""


@dataclass(frozen=True)
class Taken:
    """Milliseconds of an operator in one step, of the average thread, and what the machine needs at least."""

    whole: float
    split: float
    waiting: float
    limit: float


def account(executor: Executor, chunks: Sequence[Chunk], limits: Limits, *, int8: bool, turns: int) -> Iterator[Any]:
    """Yield for each operator its milliseconds, its share of the step, and its share of its own limit in percent:
    medians of several steps, each with limits of the same second.
    """
    decoder = executor.decoder
    backend, works = decoder.backend, works_of(executor, chunks)
    assert isinstance(backend, CpuBackend) and decoder.is_fused
    batch = BatchBuilder(executor.kv_cache.block_size, decoder.device).build(chunks)
    times = (OperatorTime * len(OPERATORS) * backend.num_threads)()

    def run() -> None:
        with torch.inference_mode():
            decoder.forward_and_choose(batch, executor.kv_cache)

    steps: list[float] = []
    calls: list[float] = []
    taken: dict[str, list[Taken]] = {name: [] for name in OPERATORS}
    run()
    backend.library.account_in(ctypes.addressof(times))
    try:
        for _ in range(turns):
            read, dots = limits.read(), {in_int8: limits.dots(int8=in_int8) for in_int8 in {int8, False}}
            ctypes.memset(times, 0, ctypes.sizeof(times))
            steps.append(seconds(run) * 1e3)
            for place, name in enumerate(OPERATORS):
                work = works.get(name, Work(0, 0))
                limit = max(work.num_bytes / read, work.operations / dots[int8 and not work.in_bf16])
                taken[name].append(average([thread[place] for thread in times], limit * 1e3))
            calls.append(steps[-1] - sum(each[-1].whole for each in taken.values()))
    finally:
        backend.library.account_in(None)
    step = median(steps)
    for name, each in taken.items():
        if not all(one.whole > 0 for one in each):
            continue  # the network has none
        whole, split = median(one.whole for one in each), median(one.split for one in each)
        waiting = median(one.waiting for one in each)
        share = median(100 * one.limit / one.whole for one in each) if name in works else ""
        yield row(name, whole, step, split, waiting, share)
    yield row("the call", median(calls), step, "", "", "")
    yield row("the step", step, step, "", "", "")


def average(threads: Sequence[OperatorTime], limit: float) -> Taken:
    """Return what the average thread has taken for an operator."""
    each = 1e6 * len(threads)
    split = sum(time.split for time in threads) / each
    waiting = sum(time.after_split + time.after_claimed for time in threads) / each
    return Taken(split + waiting + sum(time.claimed for time in threads) / each, split, waiting, limit)


def row(
    name: str, ms: float, step: float, split: float | str, waiting: float | str, share: float | str
) -> dict[str, Any]:
    return {
        "operator": name,
        "ms": ms,
        "of it split": split,
        "of it waiting": waiting,
        "% of the step": 100 * ms / step,
        "% of its limit": share,
    }


def works_of(executor: Executor, chunks: Sequence[Chunk]) -> dict[str, Work]:
    """Return what the operators of a step of attention and gated MLPs read and must compute, by name: of rows without
    logits keys and values alone in the last layer.
    """
    weights, spec = executor.decoder.weights, executor.decoder.spec.layers[0]
    attention, layers, stores = spec.mixer, weights.layers, executor.kv_cache.layers
    assert isinstance(attention, AttentionSpec) and isinstance(spec.mlp, MlpSpec)
    rows, wanted = sum(len(chunk.token_ids) for chunk in chunks), sum(chunk.num_logits for chunk in chunks)

    def product(weights: Sequence[Weight], left_out: float) -> Work:
        """Return the products of all rows, without some rows of the last weight."""
        sizes = [w.rows * w.columns for w in weights]
        return Work(sum(w.memory.nbytes for w in weights), 2.0 * (rows * sum(sizes) - left_out * sizes[-1]))

    token_bytes = stores[0].memory.nbytes / (stores[0].num_blocks * stores[0].block_size)
    seen = sum(num_pairs(chunk.start, len(chunk.token_ids)) for chunk in chunks)
    ends = sum(chunk.start + len(chunk.token_ids) for chunk in chunks)
    pairs = (len(layers) - 1) * seen + sum(map(wanted_pairs, chunks))
    attended = 4.0 * pairs * attention.num_heads * attention.head_dim
    queries = attention.num_heads / (attention.num_heads + 2 * attention.num_kv_heads)  # share of qkv
    mlps = [layer.mlp for layer in layers if layer.mlp is not None]
    return {
        "qkv": product([layer.qkv for layer in layers], (rows - wanted) * queries),
        "attention": Work(ends * token_bytes * len(layers), attended, in_bf16=True),
        "o": product([layer.o for layer in layers], rows - wanted),
        "gate and up": product([mlp.gate_up for mlp in mlps], rows - wanted),
        "down": product([mlp.down for mlp in mlps], rows - wanted),
        "head": product([weights.head], rows - wanted),
    }
