"""Packs adapters for C++: see csrc/lora.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from splitfuse.kernels.cpu.memory import CACHE_LINE, allocate
from splitfuse.kernels.cpu.structs import INT4, INT8, Lora, LoraWeight, Weight, int32
from splitfuse.kernels.lora import TARGETS, Adapter, LoraUpdate, StepAdapters
from splitfuse.kernels.weights import LayerWeights, NetworkWeights

LANES = 16  # columns of a vector; a panel has two
RANKS, COLUMNS, QUANTIZED_COLUMNS = 8, 32, 8  # of a that lie side by side


class PackedLora:
    """Keeps an adapter as a table of its weights, LoraWeight [layers, targets]."""

    def __init__(self, adapter: Adapter, weights: NetworkWeights) -> None:
        self.table = (LoraWeight * (len(adapter) * len(TARGETS)))()
        self.most_ranks = 1
        packed: list[tuple[LoraWeight, tuple[Tensor, ...]]] = []
        for layer, (updates, layer_weights) in enumerate(zip(adapter, weights.layers, strict=True)):
            for number, target in enumerate(TARGETS):
                if target in updates:
                    entry = self.table[layer * len(TARGETS) + number]
                    packed.append((entry, _packed(updates[target], _weight(layer_weights, target))))
        self._keep(packed)

    def _keep(self, packed: Sequence[tuple[LoraWeight, tuple[Tensor, ...]]]) -> None:
        """Copy all tensors side by side, in the order in which they are read."""
        room = sum(_room(tensor) for _, tensors in packed for tensor in tensors)
        self._memory = free = allocate(room)
        for entry, tensors in packed:
            for name, tensor in zip(("vectors", "scales", "a", "b"), tensors, strict=True):
                free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
                setattr(entry, name, free.data_ptr())
                free = free[_room(tensor) :]
            entry.rank = len(tensors[1])
            self.most_ranks = max(self.most_ranks, entry.rank)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // CACHE_LINE) * CACHE_LINE


def _packed(updates: Sequence[LoraUpdate], weight: Weight) -> tuple[Tensor, ...]:
    """Return the vectors, scales, a and b of a weight."""
    for update in updates:
        assert update.a.shape == (update.b.shape[1], weight.columns)
        assert update.first_row + len(update.b) <= weight.rows
    stacked = torch.cat([update.a for update in updates]).float()
    columns = [update.b.float() for update in updates]
    ranks = torch.cat([torch.full((len(each.a),), each.scale) for each in updates])
    quantized = weight.format in (INT8, INT4)  # as x is: 8 bits read half as fast
    if quantized:
        stacked, scale = _quantized(stacked, dim=1)
        pairs = [_quantized(b, dim=0) for b in columns]
        columns = [b for b, _ in pairs]
        ranks = ranks * scale * torch.cat([scale for _, scale in pairs])
        a = _interleaved(stacked.add(128).to(torch.uint8), QUANTIZED_COLUMNS)
    else:
        a = _interleaved(stacked.bfloat16(), COLUMNS)
    scales = torch.zeros(len(a) * RANKS)
    scales[: len(ranks)] = ranks
    vectors, b = _in_vectors(updates, columns, _panel_rows(weight), torch.int8 if quantized else torch.bfloat16)
    assert (vectors.dtype, scales.dtype) == (torch.int32, torch.float32)
    return vectors, scales, a, b


def _quantized(matrix: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers from -127 to 127, and the scales of the ranks, whose values lie along `dim`; a scale is NaN
    where a value is no number or infinite.
    """
    most = matrix.abs().amax(dim)
    most = torch.where(most.isfinite(), most, torch.nan)
    inverse = torch.where(most > 0, 127 / most, 0.0)
    return (matrix * inverse.unsqueeze(dim)).nan_to_num().round(), most / 127


def _weight(layer: LayerWeights, target: str) -> Weight:
    """Return the packed weight of a target."""
    if target in ("up", "down"):
        assert layer.mlp is not None
        weight = layer.mlp.down if target == "down" else layer.mlp.gate_up or layer.mlp.up
    else:
        weight = getattr(layer, target)
    assert isinstance(weight, Weight)
    return weight


def _panel_rows(weight: Weight) -> Tensor:
    """Return the row of a weight at each column of its panels, in their order; -1 where a panel is not full."""
    if weight.gated:
        half = _filled(0, weight.rows // 2, LANES).view(-1, 1, LANES)
        return torch.cat((half, torch.where(half < 0, half, half + weight.rows // 2)), dim=1).flatten()
    if not weight.parts:
        return _filled(0, weight.rows, 2 * LANES)
    parts = ctypes.cast(weight.parts, ctypes.POINTER(Weight))
    found, first = [], 0
    for number in range(weight.num_parts):
        found.append(_filled(first, parts[number].rows, 2 * LANES))
        first += parts[number].rows
    return torch.cat(found)


def _filled(first: int, count: int, multiple: int) -> Tensor:
    """Return `count` numbers from `first` on, filled up with -1 to a multiple."""
    rows = torch.full((-(-count // multiple) * multiple,), -1)
    rows[:count] = torch.arange(first, first + count)
    return rows


def _in_vectors(
    updates: Sequence[LoraUpdate], columns: Sequence[Tensor], rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return for each vector of 16 columns its first rank, how many it has and where they begin in b; and b, made of
    the `columns` of each update.
    """
    num_ranks, num_vectors = -(-_num_ranks(updates) // 2) * 2, len(rows) // LANES
    whole = torch.zeros(num_ranks, len(rows), dtype=dtype)
    firsts, ends = torch.full((num_vectors,), num_ranks), torch.zeros(num_vectors, dtype=torch.int64)
    rank = 0
    for update, b in zip(updates, columns, strict=True):
        last, end = update.first_row + len(b), rank + len(update.a)
        changed = ((rows >= update.first_row) & (rows < last)).nonzero().squeeze(1)
        whole[rank:end, changed] = b[rows[changed] - update.first_row].T.to(dtype)
        touched = torch.zeros(num_vectors, dtype=torch.bool)
        touched[changed // LANES] = True
        firsts[touched] = firsts[touched].clamp(max=rank)
        ends[touched] = ends[touched].clamp(min=end)
        rank = end
    firsts = torch.minimum(firsts, ends) // 2 * 2
    pairs = torch.arange(0, num_ranks, 2)
    kept = (pairs >= firsts.unsqueeze(1)) & (pairs < ends.unsqueeze(1))  # [vectors, pairs]
    counts = kept.sum(1)
    begins = counts.cumsum(0) - counts
    kept_b = whole.view(num_ranks // 2, 2, num_vectors, LANES).permute(2, 0, 3, 1)[kept].contiguous()
    return torch.stack((firsts, 2 * counts, begins), dim=1).int().contiguous(), kept_b


def _num_ranks(updates: Sequence[LoraUpdate]) -> int:
    return sum(len(update.a) for update in updates)


def _interleaved(a: Tensor, columns: int) -> Tensor:
    """Return a [R, K] as [R / RANKS, K / columns, RANKS, columns], filled up with zeros."""
    num_ranks, num_columns = -(-len(a) // RANKS), -(-a.shape[1] // columns)
    whole = torch.zeros(num_ranks * RANKS, num_columns * columns, dtype=a.dtype)
    whole[: len(a), : a.shape[1]] = a
    return whole.view(num_ranks, RANKS, num_columns, columns).transpose(1, 2).contiguous()


def step_lora(step: StepAdapters, num_tokens: int) -> Lora:
    """Return the adapters of a step of `num_tokens` rows."""
    of_row = int32(step.of_row)
    order = step.of_row.argsort(stable=True).int()
    assert of_row.shape == (num_tokens,) and all(isinstance(each, PackedLora) for each in step.adapters)
    tables = (c_void_p * len(step.adapters))(*(ctypes.addressof(each.table) for each in step.adapters))
    most_ranks = max(each.most_ranks for each in step.adapters)
    lora = Lora(of_row.data_ptr(), order.data_ptr(), ctypes.addressof(tables), len(step.adapters), most_ranks)
    lora.kept = (of_row, order, tables, step)
    return lora


def place_of(layer: int, target: str) -> int:
    """Return the place of a weight in the table of an adapter."""
    return layer * len(TARGETS) + TARGETS.index(target)
