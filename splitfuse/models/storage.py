"""Says how the tensors of a checkpoint are stored, and what becomes of them, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from splitfuse.kernels.interface import Backend
from splitfuse.kernels.quantized import Fp8Format, QuantizedFormat
from splitfuse.kernels.weights import WeightRole
from splitfuse.models.parameters import Part
from splitfuse.models.sources.source import WeightSource
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import kept_parameters, parameter_bytes

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Dtypes as files call them."""


@dataclass(frozen=True)
class TensorGroup:
    """Describes tensors that are stored alike and kept alike: `exact` if no number of them is rounded."""

    stored: str  # "BF16", "GPTQ int4"
    kept: str  # "kept as stored", "as bfloat16"
    exact: bool
    count: int
    num_bytes: int  # in memory


def tensor_groups(weights: WeightSource, spec: ModelSpec, backend: Backend, dtype: torch.dtype) -> list[TensorGroup]:
    """Return what becomes of the tensors of a checkpoint, the largest group first."""
    names: dict[tuple[str, str, bool], set[str]] = {}
    sizes: Counter[tuple[str, str, bool]] = Counter()
    for parameter, formats in kept_parameters(weights, spec, backend):
        size, num_rows = parameter_bytes(parameter, formats, dtype, backend), parameter.shape[0]
        for part, kept in zip(parameter.parts, formats, strict=True):
            kind = (weights.stored_as(part.piece.name), "kept as stored", True)
            if kept is None:
                kind = _kind(weights, part, parameter.role, backend, dtype)
            names.setdefault(kind, set()).add(part.piece.name)
            sizes[kind] += size * part.shape[0] // num_rows
    return [TensorGroup(*kind, count=len(names[kind]), num_bytes=size) for kind, size in sizes.most_common()]


def _kind(
    weights: WeightSource, part: Part, role: WeightRole, backend: Backend, dtype: torch.dtype
) -> tuple[str, str, bool]:
    """Return how a tensor that is not kept as stored is stored, how it is kept, and whether that is exact."""
    name = part.piece.name
    stored, quantized = weights.stored_as(name), weights.quantization(name) is not None
    if backend.quantization is not None and role.linear:
        return stored, f"quantized to {backend.quantization}", False
    kept = torch.float32 if role is WeightRole.NORM else dtype
    how = "dequantized to" if quantized else "as"
    exact = kept in (torch.float32, None if quantized else DTYPES.get(stored))
    return stored, f"{how} {str(kept).removeprefix('torch.')}", exact


def describe_quantization(weights: WeightSource) -> str:
    """Return how many tensors of a checkpoint are quantized in which formats; empty if none is."""
    counts = Counter(stored.name for stored in _formats(weights))
    return ", ".join(f"{count} tensors in {name}" for name, count in counts.most_common())


def may_be_quantized(weights: WeightSource, quantization: str) -> bool:
    """Return whether weights may be kept in `quantization`: those that are dense, and to int8 those in FP8."""
    return all(quantization == "int8" and isinstance(stored, Fp8Format) for stored in _formats(weights))


def _formats(weights: WeightSource) -> Iterator[QuantizedFormat]:
    return (stored for name in weights.names() if (stored := weights.quantization(name)) is not None)


def describe_kept(weights: WeightSource, spec: ModelSpec, backend: Backend, dtype: torch.dtype) -> list[str]:
    """Return a line on what becomes of the tensors that are quantized, if any is, and what else is not as they say."""
    if next(_formats(weights), None) is None:  # dense, as most are: without a plan of all weights
        return []
    kinds: Counter[tuple[str, bool]] = Counter()
    for parameter, formats in kept_parameters(weights, spec, backend):
        for part, kept in zip(parameter.parts, formats, strict=True):
            if part.piece.name in weights and (stored := weights.quantization(part.piece.name)) is not None:
                kinds[stored.name, kept is not None] += 1
    if not kinds:
        return []
    dense = f"dequantized to {str(dtype).removeprefix('torch.')}"
    if backend.quantization is not None:
        dense = f"quantized anew to {backend.quantization} from what they mean"
    parts = [f"{count} of {name} {'kept as stored' if same else dense}" for (name, same), count in kinds.most_common()]
    return [f"quantized weights: {', '.join(parts)}", *weights.remarks()]
