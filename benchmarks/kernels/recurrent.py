"""Times the recurrence of gated delta nets and of Mamba-2 against fp32 products in registers, and against the layer
that it is in.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.limits import Limits, seconds
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.layer_structs import Delta, Mamba
from splitfuse.kernels.cpu.structs import Step
from splitfuse.kernels.layers import DeltaSpec, MambaSpec, NormSpec
from splitfuse.kernels.weights import LayerWeights, WeightRole

ROWS = ((1, 1), (8, 1), (1, 64), (1, 512), (8, 64))  # requests, and tokens of each
SLOTS = 16
NORM = NormSpec(eps=1e-6)


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer with a state: its mixer, and the inner size of its MLP, 0 if it has none."""

    hidden_size: int
    intermediate_size: int
    spec: DeltaSpec | MambaSpec

    @property
    def heads(self) -> int:
        """Return the number of states of a request."""
        return self.spec.num_value_heads if isinstance(self.spec, DeltaSpec) else self.spec.num_heads

    @property
    def elements(self) -> int:
        """Return the elements of a state."""
        spec = self.spec
        return spec.key_dim * spec.value_dim if isinstance(spec, DeltaSpec) else spec.state_dim * spec.head_dim

    @property
    def values(self) -> int:
        """Return how many values a token has in all heads."""
        return self.heads * (self.spec.value_dim if isinstance(self.spec, DeltaSpec) else self.spec.head_dim)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Return [N, K] of the linear layers but that of gates."""
        hidden, inner = self.hidden_size, self.intermediate_size
        mlp = ((2 * inner, hidden), (hidden, inner)) if inner else ()
        return (self.spec.num_channels + self.values, hidden), (hidden, self.values), *mlp

    @property
    def weights(self) -> LayerWeights:
        """Return the weights of the recurrence."""
        is_delta = isinstance(self.spec, DeltaSpec)
        return LayerWeights(
            conv=torch.randn(self.spec.conv_size, self.spec.num_channels),
            decay=torch.rand(self.heads),
            decay_bias=torch.randn(self.heads),
            skip=torch.ones(self.heads),
            out_norm=torch.ones(self.values // self.heads if is_delta else self.values),
        )


def _delta(hidden: int, inner: int, key_heads: int, value_heads: int, head_dim: int) -> Shape:
    sizes = {"num_key_heads": key_heads, "num_value_heads": value_heads, "key_dim": head_dim, "value_dim": head_dim}
    return Shape(hidden, inner, DeltaSpec(**sizes, conv_size=4, norm=NORM))


def _mamba(hidden: int, inner: int, groups: int, heads: int, state_dim: int, head_dim: int) -> Shape:
    sizes = {"num_groups": groups, "num_heads": heads, "state_dim": state_dim, "head_dim": head_dim}
    return Shape(hidden, inner, MambaSpec(**sizes, conv_size=4, norm=NORM))


SHAPES = {
    "delta 4096": _delta(4096, 12288, 16, 32, 128),  # Qwen3.5-9B's
    "delta 1024": _delta(1024, 3584, 16, 16, 128),  # Qwen3.5-0.8B's
    "delta 512, heads of 64": _delta(512, 1536, 4, 8, 64),
    "mamba 4096": _mamba(4096, 0, 8, 128, 128, 64),  # Nemotron-H-8B's, whose layers are a mixer or an MLP
    "mamba 2048": _mamba(2048, 8192, 1, 64, 128, 64),  # Granite 4 H 1B's and 3B's
}


def recurrent(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time chunks against arithmetic, single tokens against bandwidth, and the products of the layer in int8."""
    backend = CpuBackend(variant=arguments.variant, num_threads=arguments.threads, quantization="int8")
    limits = Limits(backend)
    for name, shape in SHAPES.items():
        spec, weights = shape.spec, shape.weights
        layer = [backend.pack([torch.randn(n, k).mul_(0.02).bfloat16()], role=WeightRole.O) for n, k in shape.linears]
        states = backend.allocate_states(spec, num_slots=SLOTS, device=torch.device("cpu"))
        states.memory.zero_()
        is_delta = isinstance(spec, DeltaSpec)
        settings = Delta.of(spec, weights) if isinstance(spec, DeltaSpec) else Mamba.of(spec, weights)
        function = backend.library.delta if is_delta else backend.library.mamba
        for requests, rows in ROWS:
            tokens = requests * rows
            slots = torch.arange(requests, dtype=torch.int32)
            step = Step.of(
                tokens,
                query_start=torch.arange(0, tokens + 1, rows, dtype=torch.int32),
                state_reads=slots,
                state_writes=slots,
            )
            x, gates = torch.randn(tokens, shape.linears[0][0]), torch.randn(tokens, shape.heads * (1 + is_delta))
            out = torch.empty(tokens, shape.values, dtype=torch.bfloat16)
            products = [(w, torch.randn(tokens, w.columns).bfloat16(), torch.empty(tokens, w.rows)) for w in layer]
            pointers = (states.address, x.data_ptr(), gates.data_ptr(), out.data_ptr())

            def run(function: Any = function, step: Any = step, settings: Any = settings, rest: Any = pointers) -> None:
                function(step.address, settings.address, *rest)

            def run_products(products: Any = products) -> None:
                for w, x, y in products:
                    backend.library.linear(w.address, x.data_ptr(), len(x), None, None, None, 0, y.data_ptr())

            # Products an element: what is added to it and what is read of it, of a delta net also what its key finds.
            operations = 2.0 * (2 + is_delta) * tokens * shape.heads * shape.elements
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
