"""What the C++ functions are given: tensors as addresses, checked, and the structs that stand for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.kernels.cpu import bindings
from splitfuse.kernels.cpu.bindings import BROKEN_RULES, Library


@dataclass
class PackedWeight:
    """A linear weight [rows, columns] in panels, and where it lies."""

    struct: bindings.Weight
    memory: Tensor

    @property
    def rows(self) -> int:
        return int(self.struct.rows)

    @property
    def columns(self) -> int:
        return int(self.struct.columns)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class Mixture:
    """The experts of a layer, side by side for C++; the caller keeps the weights alive. A whole network wants `router`
    and `renormalize` too.
    """

    def __init__(
        self,
        w13: Sequence[PackedWeight],
        w2: Sequence[PackedWeight],
        *,
        top_k: int,
        activation: int,
        router: PackedWeight | None = None,
        renormalize: bool = False,
    ) -> None:
        self.num_experts, self.hidden = len(w13), w2[0].rows
        assert len(w2) == self.num_experts >= top_k and (router is None or router.rows == self.num_experts)
        for first, second in zip(w13, w2, strict=True):
            assert first.struct.gated and (first.rows, first.columns) == (2 * w2[0].columns, self.hidden)
            assert not second.struct.gated and (second.rows, second.columns) == (self.hidden, w2[0].columns)
        self._arrays = [(bindings.Weight * len(each))(*(weight.struct for weight in each)) for each in (w13, w2)]
        self.struct = bindings.Mixture(
            None if router is None else router.address,
            *(ctypes.addressof(array) for array in self._arrays),
            self.num_experts,
            top_k,
            renormalize,
            activation,
        )

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


@dataclass
class KVStore:
    """The packed keys and values of one layer."""

    struct: bindings.Store
    memory: Tensor

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class Step:
    """The arrays of a step as C++ reads them, as far as one operation needs them."""

    def __init__(
        self,
        *,
        positions: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        query_start: Tensor | None = None,
        seq_lens: Tensor | None = None,
        block_tables: Tensor | None = None,
        num_tokens: int,
    ) -> None:
        given = (None, positions, slot_mapping, query_start, seq_lens, block_tables, None)
        self._tensors = [None if tensor is None else int32(tensor) for tensor in given]  # kept alive
        assert all(tensor is None or len(tensor) == num_tokens for tensor in (positions, slot_mapping))
        requests = 0 if seq_lens is None else len(seq_lens)
        assert query_start is None or len(query_start) == requests + 1
        assert block_tables is None or len(block_tables) == requests
        width = 0 if block_tables is None else block_tables.shape[1]
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self.struct = bindings.Step(num_tokens, requests, width, 0, *pointers)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    def check(self, kernels: Library, store: bindings.Store, *, max_position: int) -> None:
        check_step(kernels, self.struct, store, max_position=max_position, vocabulary=0)


def check_step(
    kernels: Library, step: bindings.Step, store: bindings.Store, *, max_position: int, vocabulary: int
) -> None:
    """Raise IndexError if a number of the step would lead a kernel out of the store or a table."""
    broken = kernels.check_step(ctypes.addressof(step), max_position, store.num_blocks, store.block_size, vocabulary)
    if broken:
        raise IndexError(f"a step that cannot be computed: {BROKEN_RULES[broken]}")


def check(tensor: Tensor, dtype: torch.dtype) -> None:
    """Assert what C++ takes for granted of a tensor whose address it gets."""
    assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu", (
        f"the CPU kernels want a contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device}"
    )


def address(vector: Tensor | None, length: int) -> int | None:
    """Of a bias or a norm's weight [length] in bf16, if there is one."""
    if vector is None:
        return None
    check(vector, torch.bfloat16)
    assert len(vector) == length
    return vector.data_ptr()


def int32(tensor: Tensor) -> Tensor:
    """The numbers as C++ reads them; no copy if they are so already."""
    return tensor.to(torch.int32).contiguous()


def heads_of(
    num_heads: int, cos: Tensor, sin: Tensor, *, eps: float, scale: float = 0.0, softcap: float = 0.0
) -> bindings.Heads:
    """How heads are turned and attended; the caller keeps `cos` and `sin` [max_position, rotary_dim / 2] alive."""
    check(cos, torch.float32)
    check(sin, torch.float32)
    assert cos.shape == sin.shape
    return bindings.Heads(num_heads, 2 * cos.shape[1], len(cos), cos.data_ptr(), sin.data_ptr(), eps, scale, softcap)
