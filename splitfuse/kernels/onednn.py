"""The reference with linear weights laid out once for oneDNN, which PyTorch brings along: for a CPU that our C++ cannot
run on, or was not compiled for.

A head is kept twice, as the embedding may be the same. Promises no equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitfuse.kernels.reference import Kernels, Weight


class PrepackedKernels(Kernels):
    def describe(self) -> str:
        lost = "no quantization, no int8 KV cache, no equal bits, and a fraction of the speed"
        return f"PyTorch kernels with oneDNN linears ({lost})" + (f": {self.why}" if self.why else "")

    def weight_bytes(self, shape: Sequence[int], *, role: str, dtype: torch.dtype) -> int:
        return super().weight_bytes(shape, role=role, dtype=dtype) * (2 if role == "head" else 1)

    def pack(self, pieces: Sequence[Tensor], *, role: str, dtype: torch.dtype | None = None) -> Weight:
        weight = super().pack(pieces, role=role, dtype=dtype)
        return weight if role == "plain" else _Prepacked(weight, keep=role == "head")

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        return super().embed(ids, table.plain if isinstance(table, _Prepacked) else table)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.blocked, bias, "none", [], "")
        return y if residual is None else y + residual


class _Prepacked:
    """A weight as oneDNN lays it out; a head, which may be the embedding too, also as it was."""

    def __init__(self, weight: Tensor, *, keep: bool) -> None:
        self.plain = weight if keep else None
        self.blocked: Any = torch.ops.mkldnn._reorder_linear_weight(weight)
