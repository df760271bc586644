"""Holds low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) as plain data, and which rows of a step they change.

An adapter adds `scale * b @ a` to rows of a weight. The weight stays as it is: a row x of a step that has the adapter
gets `scale * b @ (a @ x)` on top of what the weight gives, before an activation. A backend keeps adapters in its own
form, `Backend.pack_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

TARGETS = ("qkv", "attn_gate", "o", "up", "down")
"""Weights of a layer that adapters may change, as fields of LayerWeights and of its MlpWeights; "up" is gate_up where
the MLP is gated.
"""


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """Describes `scale * b @ a`, of `a` [rank, K] and `b` [N, rank], which is added to N rows of a weight."""

    first_row: int
    a: Tensor
    b: Tensor
    scale: float


LayerUpdates: TypeAlias = Mapping[str, Sequence[LoraUpdate]]
"""Updates of the weights of a layer by target; those of one weight change different rows."""
Adapter: TypeAlias = Sequence[LayerUpdates]
"""Updates of all layers of a network."""
PackedAdapter: TypeAlias = Any
"""Adapter as `Backend.pack_adapter` returns it."""


@dataclass(frozen=True)
class StepAdapters:
    """Says which rows of a step have which adapter: row i has `adapters[of_row[i]]`, or none if that is -1. `of_row` is
    int32 [T].
    """

    adapters: tuple[PackedAdapter, ...]
    of_row: Tensor

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """Return the rows of each adapter: on a GPU the host waits for these, once a step."""
        return tuple((self.of_row == number).nonzero().squeeze(1) for number in range(len(self.adapters)))

    def at(self, layer: int, target: str) -> LoraRows:
        """Return what the adapters add to the products of one weight."""
        return LoraRows(self, layer, target)


@dataclass(frozen=True)
class LoraRows:
    """Names the weight that the adapters of a step change: a target of a layer."""

    step: StepAdapters
    layer: int
    target: str
