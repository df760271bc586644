"""Packs the linear weights of the reference once for oneDNN, which PyTorch ships: for a CPU that our C++ cannot run on,
or an installation without a compiler.

A head is kept twice, since the embedding may be tied to it. Guarantees no equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitfuse.kernels.interface import Capabilities
from splitfuse.kernels.lora import LoraRows
from splitfuse.kernels.reference import ReferenceBackend, add_lora
from splitfuse.kernels.weights import Weight, WeightRole

GELU = {"gelu": "none", "gelu_tanh": "tanh"}
"""Approximations of the activations that oneDNN computes as it stores a product, by their names."""


class OneDnnBackend(ReferenceBackend):
    """Computes PyTorch operations with oneDNN's prepacked linear layers, on the CPU alone, in the dtypes that its
    oneDNN can multiply.
    """

    capabilities = Capabilities(name="PyTorch's kernels", devices=("cpu",))

    def describe(self) -> str:
        lost = "no quantization, no int8 KV cache, no equal bits, and a fraction of the speed"
        return f"PyTorch kernels with oneDNN linears ({lost})" + (f": {self.why}" if self.why else "")

    def weight_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
        return super().weight_bytes(shape, role=role, dtype=dtype) * (2 if role is WeightRole.HEAD else 1)

    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Weight:
        weight = super().pack(pieces, role=role, dtype=dtype)
        return _Prepacked(weight, keep=role is WeightRole.HEAD) if role.linear and not role.by_head else weight

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        return super().embed(ids, table.plain if isinstance(table, _Prepacked) else table)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.blocked, bias, "none", [], "")
        return add_lora(y, x, lora)

    def activated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        if lora is not None or activation not in GELU:
            return super().activated(x, weight, bias, activation, lora)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.blocked, bias, "gelu", [], GELU[activation])
        return y


class _Prepacked:
    """Keeps a weight as oneDNN lays it out; a head, which may be the embedding too, also as it was."""

    def __init__(self, weight: Tensor, *, keep: bool) -> None:
        self.plain = weight if keep else None
        self.blocked: Any = torch.ops.mkldnn._reorder_linear_weight(weight)
