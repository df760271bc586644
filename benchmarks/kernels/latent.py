"""Times latent attention over its compressed cache in turns with the same heads kept as ordinary keys and values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.limits import Limits, seconds
from benchmarks.kernels.steps import scattered_steps
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.layer_structs import Heads
from splitfuse.kernels.cpu.structs import Store
from splitfuse.kernels.layers import AttentionSpec, LatentSpec, NormSpec

LATENTS = {  # heads, and sizes of their queries, but for the rotated elements, and values
    "DeepSeek-V2-Lite": (16, 128, 128),
    "GLM-4.7-Flash": (20, 192, 256),
}
ROWS = ((1, 1, 512), (1, 1, 4096), (1, 1, 32768), (8, 1, 4096), (1, 256, 512), (1, 256, 4096))
NUM_BLOCKS = 1024


def specs(name: str) -> dict[str, AttentionSpec]:
    """Return the attention of a layer, with its cache compressed and expanded."""
    heads, nope, values = LATENTS[name]
    latent = LatentSpec(norm=NormSpec(eps=1e-6), q_rank=None, kv_rank=512, rope_dim=64, nope_dim=nope, v_dim=values)
    return {
        "compressed": AttentionSpec(num_heads=heads, num_kv_heads=1, head_dim=576, latent=latent),
        "expanded": AttentionSpec(num_heads=heads, num_kv_heads=heads, head_dim=max(64 + nope, values)),
    }


def latent(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the attention of requests with so many tokens in a step, each of so many positions."""
    backend = CpuBackend(variant=arguments.variant, num_threads=arguments.threads)
    limits = Limits(backend)
    for name in LATENTS:
        found = [(spec, allocated(backend, spec)) for spec in specs(name).values()]
        for requests, rows, context in ROWS:
            (run, count), (other, _) = (attention_of(backend, *each, requests, rows, context) for each in found)
            pairs = requests * sum(context - rows + i + 1 for i in range(rows)) * count
            operations = 2.0 * pairs * found[0][0].num_heads * (576 + 512)
            timing = limits.compare(run, num_bytes=0, operations=operations, int8=False, turns=arguments.turns)
            other()
            ratios = sorted(seconds(other) / seconds(run) for _ in range(arguments.turns))
            yield {
                "layer": name,
                "requests": requests,
                "rows each": rows,
                "context": context,
                "us": timing.seconds / count * 1e6,
                "% of dots": timing.share * 100,
                "expanded / compressed": ratios[len(ratios) // 2],
            }


def allocated(backend: CpuBackend, spec: AttentionSpec) -> Store:
    """Return a store of zeros."""
    cpu = torch.device("cpu")
    store = backend.allocate_kv(spec, num_blocks=NUM_BLOCKS, block_size=32, dtype=torch.bfloat16, device=cpu)
    backend.fill_kv(store, 0)
    return store


def attention_of(
    backend: CpuBackend, spec: AttentionSpec, store: Store, requests: int, rows: int, context: int
) -> tuple[Callable[[], None], int]:
    """Return a function that computes the attention of some steps, and how many."""
    steps, heads = scattered_steps(rows, [context] * requests, NUM_BLOCKS), Heads.of(spec)
    q = torch.randn(requests * rows, spec.num_heads, spec.head_dim).bfloat16()
    out = torch.empty(requests * rows, spec.num_heads, spec.value_dim, dtype=torch.bfloat16)

    def run() -> None:
        for step in steps:
            backend.library.attend(step.address, heads.address, store.address, q.data_ptr(), out.data_ptr())

    return run, len(steps)
