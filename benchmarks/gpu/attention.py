"""Tunes and times attention, and the other kernels of a layer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Setting, Table
from splitfuse.core.plan import Chunk
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.layers import AttentionSpec, NormSpec
from splitfuse.kernels.triton import backend as module
from splitfuse.kernels.triton.backend import TritonBackend
from splitfuse.kernels.triton.tuning import AttentionTiles
from splitfuse.kernels.weights import WeightRole
from splitfuse.runtime.batch import BatchBuilder

BLOCK = 32
SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128)
"""Attention of an 8B model."""
TUNING_SECONDS = 200
"""Seconds after which no more sizes are timed: most of them pass in compiling."""
CHUNK, BEFORE = 2048, 2048
"""Tokens of a chunk whose attention is timed, and positions before it."""


@dataclass
class Step:
    """Holds queries, a store full of random numbers, and the batch of a step."""

    q: Tensor
    store: Any  # a Tensor, unless keys and values have 8 bits
    batch: RaggedBatch
    chunks: Sequence[Chunk]

    def on_cpu(self) -> RaggedBatch:
        """Return the batch on the CPU."""
        return BatchBuilder(BLOCK, torch.device("cpu")).build(self.chunks)


def make_step(
    setting: Setting, spec: AttentionSpec, parts: Sequence[tuple[int, int]], backend: TritonBackend | None = None
) -> Step:
    """Return a step of chunks (positions before, tokens), whose blocks lie in random places."""
    backend = backend or setting.backend()
    counts = [-(-(before + count) // BLOCK) for before, count in parts]
    order = torch.randperm(sum(counts)).tolist()
    chunks, begin = [], 0
    for number, ((before, count), blocks) in enumerate(zip(parts, counts, strict=True)):
        table = tuple(order[begin : begin + blocks])
        chunks.append(Chunk(str(number), before, (1,) * count, table, 1, True))
        begin += blocks
    device = torch.device(setting.device)
    batch = BatchBuilder(BLOCK, device).build(chunks)
    q = torch.randn(batch.num_tokens, spec.num_heads, spec.head_dim, device=device, dtype=setting.dtype)
    store = backend.allocate_kv(spec, num_blocks=sum(counts), block_size=BLOCK, dtype=setting.dtype, device=device)
    if isinstance(store, Tensor):
        store.normal_()
    return Step(q, store, batch, chunks)


def attention_bytes(spec: AttentionSpec, parts: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Return the bytes of keys and values that a step must read."""
    kept = spec.head_dim + (0 if spec.value_from else spec.value_dim)
    return sum(before + count for before, count in parts) * spec.num_kv_heads * kept * itemsize


def attention_operations(spec: AttentionSpec, parts: Sequence[tuple[int, int]]) -> float:
    """Return the floating-point operations that a step must compute."""
    pairs = sum(count * before + count * (count + 1) / 2 for before, count in parts)
    return 2.0 * pairs * spec.num_heads * (spec.head_dim + spec.value_dim)


def tune(setting: Setting) -> bool:
    """Time sizes of tiles by head size, and print the best as a row of `tuning.TABLE`."""
    rows, keys = setting.few((64, 128), (16, 32)), setting.few((32, 64, 128), (32,))
    began = time.perf_counter()
    singles = [(60, 1)] * 3 if setting.is_rehearsal else [(4096, 1)] * 32
    chunk = [(20, 20)] if setting.is_rehearsal else [(BEFORE, CHUNK)]
    for head_dim in setting.few((128, 64, 256), (32,)):
        spec = replace(SPEC, head_dim=head_dim)
        best: dict[str, tuple[float, AttentionTiles]] = {}
        table = Table("head", "step   ", "rows", "keys", "warps", "stages", "    us")
        for name, parts, choices in (("singles", singles, (16,)), ("chunk", chunk, rows)):
            step = make_step(setting, spec, parts)
            for count, width, warps, stages in itertools.product(choices, keys, (4, 8), (2, 3)):
                if setting.is_rehearsal and (warps, stages) != (4, 2):
                    continue
                if time.perf_counter() - began > TUNING_SECONDS:
                    print(f"head {head_dim}, rows {count}, keys {width}, warps {warps}: left out, for lack of time")
                    continue
                tiles = AttentionTiles(head_dim, count, count, width, warps, stages)
                try:
                    seconds = timed(setting, spec, step, tiles)
                except Exception as error:  # too much shared memory, or too many registers
                    print(f"rows {count}, keys {width}, warps {warps}, stages {stages}: {str(error).splitlines()[0]}")
                    continue
                table.row(head_dim, name, count, width, warps, stages, seconds * 1e6)
                if name not in best or seconds < best[name][0]:
                    best[name] = (seconds, tiles)
        for name, (seconds, tiles) in best.items():
            print(f"best for {name}: {tiles}, {seconds * 1e6:.1f} us", flush=True)
    return True


def timed(setting: Setting, spec: AttentionSpec, step: Step, tiles: AttentionTiles) -> float:
    """Return the seconds of attention with these sizes."""
    chosen = module.attention_tiles
    batch = step.batch if setting.is_rehearsal else BatchBuilder(BLOCK, torch.device(setting.device)).build(step.chunks)
    try:
        module.attention_tiles = lambda *_, **__: tiles
        backend = setting.backend()
        return setting.seconds(lambda: backend.attend(step.q, step.store, spec, batch))
    finally:
        module.attention_tiles = chosen


def kernels(setting: Setting) -> bool:
    """Time each kernel as a fraction of the bandwidth, or of the rate of products, of this minute."""
    table = Table("kernel                     ", "      us", "of bandwidth", "of rate")
    backend = setting.backend()
    for count, context in setting.few(
        [(1, 4096), (1, 32768), (8, 4096), (32, 4096), (64, 4096), (256, 1024), (256, 4096)], [(1, 40), (3, 40)]
    ):
        parts = [(context - 1, 1)] * count
        step = make_step(setting, SPEC, parts)
        seconds = setting.seconds(lambda step=step: backend.attend(step.q, step.store, SPEC, step.batch))
        share = attention_bytes(SPEC, parts, setting.dtype.itemsize) / seconds / setting.bandwidth
        table.row(f"attention {count} x {context}", seconds * 1e6, share, "")
    for before, count in setting.few([(0, 2048), (2048, 2048), (30720, 2048)], [(0, 20)]):
        step = make_step(setting, SPEC, [(before, count)])
        seconds = setting.seconds(lambda step=step: backend.attend(step.q, step.store, SPEC, step.batch))
        share = attention_operations(SPEC, [(before, count)]) / seconds / setting.rate
        table.row(f"chunk {count} after {before}", seconds * 1e6, "", share)
    hidden, inner = (64, 128) if setting.is_rehearsal else (4096, 14336)
    for count in setting.few((1, 16, 64, 256, 2048), (1, 3)):
        x = torch.randn(count, hidden, device=setting.device, dtype=setting.dtype)
        weight = torch.ones(hidden, device=setting.device)
        moved = count * hidden * setting.dtype.itemsize
        seconds = setting.seconds(lambda x=x, w=weight: backend.add_norm(x, x, 1.0, NormSpec(eps=1e-6), w))
        table.row(f"sum and norm of {count}", seconds * 1e6, 4 * moved / seconds / setting.bandwidth, "")
        wide = torch.randn(2 * inner, hidden, device=setting.device, dtype=setting.dtype)
        for name, options in (("", {}), (" int8", {"quantization": "int8"}), (" int4", {"quantization": "int4"})):
            kind = setting.backend(**options)
            packed = kind.pack([wide], role=WeightRole.GATE_UP)
            seconds = setting.seconds(lambda x=x, kind=kind, packed=packed: kind.gated(x, packed, None, "silu"))
            read = kind.weight_bytes(wide.shape, role=WeightRole.GATE_UP, dtype=setting.dtype)
            work = 2.0 * count * wide.numel()
            shares = (read / seconds / setting.bandwidth, work / seconds / setting.rate)
            table.row(f"gate and up{name} of {count}", seconds * 1e6, *shares)
    return True
