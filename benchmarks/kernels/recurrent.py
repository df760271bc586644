"""Times the recurrence of gated delta nets against fp32 products in registers, and against the layer that it is in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.limits import Limits, seconds
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.bindings import Delta, Step
from splitfuse.kernels.interface import DeltaSpec, LayerWeights, NormSpec, Role

ROWS = ((1, 1), (8, 1), (1, 64), (1, 512), (8, 64))  # requests, and tokens of each
SLOTS = 16


@dataclass(frozen=True)
class DeltaShape:
    """The sizes of a layer with a gated delta net."""

    hidden_size: int
    intermediate_size: int
    key_heads: int
    value_heads: int
    head_dim: int

    @property
    def spec(self) -> DeltaSpec:
        """Return the delta net."""
        return DeltaSpec(
            num_key_heads=self.key_heads,
            num_value_heads=self.value_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            conv_size=4,
            norm=NormSpec(eps=1e-6),
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Return [N, K] of the linear layers."""
        values, hidden, inner = self.value_heads * self.head_dim, self.hidden_size, self.intermediate_size
        return (self.spec.num_channels + values, hidden), (hidden, values), (2 * inner, hidden), (hidden, inner)


DELTA_SHAPES = {
    "4096": DeltaShape(4096, 12288, 16, 32, 128),  # Qwen3.5-9B's
    "1024": DeltaShape(1024, 3584, 16, 16, 128),  # Qwen3.5-0.8B's
    "512, heads of 64": DeltaShape(512, 1536, 4, 8, 64),
}


def delta(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time chunks against arithmetic, single tokens against bandwidth, and the products of the layer in int8."""
    backend = CpuBackend(variant=arguments.variant, num_threads=arguments.threads, quantization="int8")
    limits = Limits(backend)
    for name, shape in DELTA_SHAPES.items():
        spec, heads = shape.spec, shape.value_heads
        weights = LayerWeights(
            conv=torch.randn(spec.conv_size, spec.num_channels),
            decay=torch.rand(heads),
            decay_bias=torch.randn(heads),
            out_norm=torch.ones(shape.head_dim),
        )
        layer = [backend.pack([torch.randn(n, k).mul_(0.02).bfloat16()], role=Role.O) for n, k in shape.linears]
        states = backend.allocate_states(spec, num_slots=SLOTS, device=torch.device("cpu"))
        states.memory.zero_()
        settings = Delta.of(spec, weights)
        for requests, rows in ROWS:
            tokens = requests * rows
            slots = torch.arange(requests, dtype=torch.int32)
            step = Step.of(
                tokens,
                query_start=torch.arange(0, tokens + 1, rows, dtype=torch.int32),
                state_reads=slots,
                state_writes=slots,
            )
            x, gates = torch.randn(tokens, shape.linears[0][0]), torch.randn(tokens, 2 * heads)
            out = torch.empty(tokens, heads * shape.head_dim, dtype=torch.bfloat16)
            products = [(w, torch.randn(tokens, w.columns).bfloat16(), torch.empty(tokens, w.rows)) for w in layer]

            def run(step: Any = step, x: Any = x, gates: Any = gates, out: Any = out) -> None:
                backend.library.delta(
                    step.address, settings.address, states.address, x.data_ptr(), gates.data_ptr(), out.data_ptr()
                )

            def run_products(products: Any = products) -> None:
                for w, x, y in products:
                    backend.library.linear(w.address, x.data_ptr(), len(x), None, None, y.data_ptr())

            # What its key finds in the state, what is added to it and what its query reads: three products an element.
            operations = 6.0 * tokens * heads * shape.head_dim**2
            timing = limits.compare(
                run,
                num_bytes=requests * backend.state_bytes(spec) if rows == 1 else 0,
                operations=operations if rows > 1 else 0,
                int8=False,
                turns=arguments.turns,
            )
            run_products()
            rest = sorted(seconds(run_products) for _ in range(arguments.turns))[arguments.turns // 2]
            yield {
                "layer": name,
                "requests": requests,
                "rows each": rows,
                "us a row": timing.seconds / tokens * 1e6,
                "limit": "arithmetic" if rows > 1 else "bandwidth",
                "% of limit": timing.share * 100,
                "% of the layer": timing.seconds / (timing.seconds + rest) * 100,
            }
