"""Describes the compiled library as Python sees it: its structs and functions, and which instruction sets this CPU has.

csrc/interface.h and csrc/variant.h are the other side of every line here. A struct borrows the memory that it points
to: its caller keeps the tensors alive, except those in its own attributes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import threading
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_uint8, c_uint64, c_void_p
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitfuse.errors import ConfigError, KernelError, RankLostError
from splitfuse.kernels import reference
from splitfuse.kernels.cpu.nodes import NodePlan
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group, SharedGroup, SummingGroup
from splitfuse.kernels.interface import RopeTable
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    ExpertsSpec,
    LatentSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    RecurrentSpec,
    RouterSpec,
    TokenInputSpec,
)
from splitfuse.kernels.loans import TILE, Channel, RequestLoan
from splitfuse.kernels.weights import LayerWeights, MlpWeights

_logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
"""Folder of what the library is compiled from."""
AMX = "avx512_amx"
VARIANTS = (AMX, "avx512_bf16", "avx512", "avx2")
"""Instruction sets that the kernels are compiled for, best first. AVX-512 includes VNNI here, AVX2 includes FMA."""
AMX_OBSTACLES = {
    2: "the system does not save its tile registers",
    3: "the system does not permit its use",
    4: "its instructions fail, as in a virtual machine that does not pass them on",
    5: "the compiler of the kernels did not know it",
}
"""Reasons of csrc/amx.cpp why AMX cannot be used on a CPU that announces it, by number."""

BF16, INT8, INT4, GROUPED, FP8 = range(5)
NONE, F32, F16, BFLOAT16, U8, I8, E8M0, LOW_BITS, HIGH_BITS = range(9)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "sigmoid": 5, "clamped_swiglu": 6}
PANEL = 32
"""Number of rows of a panel, and of elements that sizes of values are padded to. It is in csrc/multiply.h too."""
MAX_GROUPS = 64
"""Number of groups of experts that a router can choose among. It is in csrc/experts.h too."""
MOST_TAPS = 16
"""Number of tokens that a convolution can see, the newest included. It is in csrc/states.h too."""
LARGEST = 2**31 - 1
"""Largest number that C++ counts positions with."""

BROKEN_RULES = {
    1: "a position lies outside the rotary tables",
    2: "a slot lies outside the KV store",
    3: "query_start does not rise from 0 to the number of tokens",
    4: "a request has fewer positions than tokens, or more than its block table holds",
    5: "a block table names a block that does not exist",
    6: "a token id outside the vocabulary",
    7: "a logit row outside the step",
    8: "a state slot that does not exist",
    9: "a row with an adapter that is not there",
}
"""Rules of csrc/cpu.cpp that a step can break, by number."""


def check(tensor: Tensor, dtype: torch.dtype) -> None:
    """Assert what C++ takes for granted of a tensor whose address it gets."""
    assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu", (
        f"the C++ kernels want a contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device}"
    )


def vector_address(vector: Tensor | None, length: int, dtype: torch.dtype = torch.bfloat16) -> int | None:
    """Return the address of a bias [length], or of a norm's weight in fp32, if there is one."""
    if vector is None:
        return None
    check(vector, dtype)
    assert vector.numel() == length
    return vector.data_ptr()


def int32(tensor: Tensor) -> Tensor:
    """Return the numbers as C++ reads them: the tensor itself if it is so already."""
    return tensor.to(torch.int32).contiguous()


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of one type."""
    return [(name, kind) for name in names]


class Struct(ctypes.Structure):
    """Mirrors a struct of csrc/interface.h. Its address is good while the object lives; attributes that are no
    fields keep alive what it points to.
    """

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Weight(Struct):
    """Describes a linear weight [rows, columns] in panels, which lie in `memory`; of a weight of each head that of the
    first, which the others follow.
    """

    memory: Tensor
    num_heads: int
    kept: tuple[Any, ...]
    """What else the struct points to, and parts of it."""
    _fields_ = [
        *_fields(c_int32, "format", "gated"),
        *_fields(c_int64, "rows", "columns", "group"),
        ("data", c_void_p),
        ("qvalues", c_uint8 * 16),
        *_fields(c_int32, "bits", "bias", "scale_type", "offset_type", "zeros", "two_level"),
        *_fields(c_void_p, "order", "parts"),
        ("num_parts", c_int64),
    ]

    @property
    def num_panels(self) -> int:
        """Return the number of panels."""
        rows: int = self.rows
        return -(-rows // PANEL)  # gated too: of either half a panel has half as many rows

    def is_packed_as(self, other: Weight) -> bool:
        """Return whether a weight of the same shape has panels of the same layout, and neither is of parts."""
        names = ("format", "group", "bits", "bias", "scale_type", "offset_type", "zeros", "two_level")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and bytes(self.qvalues) == bytes(other.qvalues) and not self.parts and not other.parts


class Stored(Struct):
    """Points to rows of a weight as a checkpoint holds them, which it keeps alive."""

    num_rows: int
    tensors: tuple[Tensor | None, ...]
    _fields_ = _fields(c_void_p, "levels", "scales", "offsets", "scale_units", "offset_units")

    @classmethod
    def of(cls, levels: Tensor, *others: Tensor | None) -> Stored:
        """Return the struct of tensors in the order of its fields."""
        tensors = (levels, *others)
        whole = tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
        stored = cls(*(None if tensor is None else tensor.data_ptr() for tensor in whole))
        stored.num_rows, stored.tensors = len(levels), whole
        return stored


class Store(Struct):
    """Describes the packed keys and values of one layer, which lie in `memory`."""

    memory: Tensor
    _fields_ = [
        ("data", c_void_p),
        ("num_blocks", c_int64),
        *_fields(c_int32, "block_size", "num_kv_heads", "head_dim", "int8", "value_from"),
    ]

    def block(self, block: int) -> Tensor:
        """Return the bytes of a block, which lie side by side. Raises IndexError if there is no such block."""
        return self.memory.view(self.num_blocks, -1)[block]

    def fits(self, spec: AttentionSpec) -> bool:
        """Return whether the store has the shape that the attention of a layer reads."""
        return (self.num_kv_heads, self.head_dim, self.value_from) == (
            spec.num_kv_heads,
            spec.head_dim,
            spec.value_from,
        )

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class States(Struct):
    """Describes the recurrent states of one layer, which lie in `memory`."""

    memory: Tensor
    _fields_ = [("data", c_void_p), *_fields(c_int64, "num_slots", "slot_floats")]

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class LoraWeight(Struct):
    """Describes what an adapter adds to one weight; without ranks, nothing."""

    _fields_ = [*_fields(c_void_p, "a", "scales", "vectors", "b"), ("rank", c_int64)]


class Lora(Struct):
    """Describes the adapters of a step, and keeps alive what it points to."""

    kept: tuple[Any, ...]
    _fields_ = [*_fields(c_void_p, "of_row", "order", "tables"), *_fields(c_int64, "num_adapters", "most_ranks")]


class Loan(Struct):
    """Describes the loan of a request of a step."""

    _fields_ = [
        *_fields(c_int32, "request", "tiles"),
        ("channel", c_void_p),
        ("capacity", c_int64),
        *_fields(c_int32, "lost", "asked", "awaits", "patience"),
    ]

    @classmethod
    def of(cls, channel: Channel, request: int = 0, num_tokens: int = 0) -> Loan:
        """Return the loan of `num_tokens` leading tokens; the caller keeps the channel alive."""
        patience = int(1000 * channel.patience)
        return cls(request, num_tokens // TILE, channel.address, channel.capacity, 0, 0, 0, patience)


class Loans(Struct):
    """Lists the loans of a step, which it keeps alive."""

    array: Any
    numbers: Any
    _fields_ = [*_fields(c_void_p, "of", "of_request"), ("count", c_int64)]

    @classmethod
    def of_step(cls, loans: Sequence[RequestLoan], starts: Sequence[int]) -> Loans:
        """Return the loans of requests, of which each begins in the step at one of the positions `starts`. Raises
        IndexError for a loan that C++ cannot compute with.
        """
        numbers = array("i", [-1] * len(starts))
        for place, loan in enumerate(loans):
            if numbers[loan.request] >= 0 or not 0 < loan.num_tokens <= starts[loan.request] or loan.num_tokens % TILE:
                raise IndexError("a step that cannot be computed: a loan that is not of leading tiles of its request")
            numbers[loan.request] = place
        each = (Loan * len(loans))(*(Loan.of(loan.channel, loan.request, loan.num_tokens) for loan in loans))
        struct = cls(ctypes.addressof(each), numbers.buffer_info()[0], len(loans))
        struct.array, struct.numbers = each, numbers
        return struct


class Step(Struct):
    """Points to the arrays of a step; null where an operation does not need one."""

    tensors: list[Tensor | None]
    _fields_ = [
        *_fields(c_int32, "tokens", "requests", "table_width", "num_rows"),
        *_fields(c_void_p, "ids", "positions", "slots", "query_start", "seq_lens"),
        *_fields(c_void_p, "state_reads", "state_writes", "tables", "rows", "lora", "loans"),
    ]

    @classmethod
    def of(cls, num_tokens: int, **arrays: Tensor) -> Step:
        """Return the step of one operation with the arrays that it needs, by their names in RaggedBatch; it keeps them
        alive.
        """
        per_request = ("query_start", "seq_lens", "state_reads", "state_writes", "block_tables")
        names = (None, "positions", "slot_mapping", *per_request, None)
        tensors = [int32(arrays[name]) if name in arrays else None for name in names]
        _, positions, slots, query_start, seq_lens, reads, writes, tables, _ = tensors
        assert all(len(each) == num_tokens for each in (positions, slots) if each is not None)
        num_requests, width = 0 if query_start is None else len(query_start) - 1, 0
        if tables is not None:
            width = tables.shape[1]
        assert all(len(each) == num_requests for each in (seq_lens, reads, writes, tables) if each is not None)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        step = cls(num_tokens, num_requests, width, 0, *pointers)
        step.tensors = tensors
        return step

    def check(
        self, library: Library, store: Store | None, *, max_position: int = 0, states: States | None = None
    ) -> None:
        """Raise IndexError if a number of the step would lead a kernel out of a store, the states or a table."""
        num_blocks, block_size = (0, 1) if store is None else (store.num_blocks, store.block_size)
        num_states = -1 if states is None else states.num_slots
        check_rules(library.check_step(self.address, max_position, num_blocks, block_size, 0, num_states))


class PackedStep(Struct):
    """Points to the numbers of a RaggedBatch on the host, for a whole network."""

    _fields_ = [
        ("numbers", c_void_p),
        *_fields(c_int32, "tokens", "requests", "table_width", "num_rows"),
        *_fields(c_void_p, "lora", "loans"),
    ]


def check_rules(broken: int) -> None:
    """Raise IndexError if a check of a step has returned the number of a rule."""
    if broken:
        raise IndexError(f"a step that cannot be computed: {BROKEN_RULES[broken]}")


class Norm(Struct):
    """Describes a norm; without a weight there is none."""

    _fields_ = [*_fields(c_void_p, "weight", "bias"), ("eps", c_float), ("centered", c_int32)]

    @classmethod
    def of(cls, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, length: int) -> Norm:
        """Return the norm with a weight and a bias of `length` elements; the caller keeps them alive."""
        addresses = (vector_address(vector, length, torch.float32) for vector in (weight, bias))
        return cls(*addresses, spec.eps, spec.centered)


def projected_heads(spec: AttentionSpec) -> int:
    """Return how many heads of queries, keys and values `rope_store` takes."""
    kept = 0 if spec.kv_layer is not None else 1 if spec.value_from else 2
    return spec.num_heads + kept * spec.num_kv_heads


class Heads(Struct):
    """Says how the heads of a layer are normed, rotated and attended."""

    max_position: int
    """Number of positions that the rope table has, or LARGEST without one."""
    vectors: list[Tensor]
    _fields_ = [
        *_fields(c_int32, "num_heads", "rotary_dim"),
        *_fields(c_void_p, "cos", "sin"),
        *_fields(Norm, "q_norm", "k_norm", "v_norm"),
        *_fields(c_int32, "own_norms", "whole_rows", "norms_last", "foreign_kv", "window", "chunk"),
        *_fields(c_float, "scale", "softcap"),
        *_fields(c_int32, "query_length", "query_offset"),
        ("query_beta", c_double),
        *_fields(c_void_p, "sinks", "slopes"),
    ]

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        *,
        rope: RopeTable | None = None,
        weights: LayerWeights | None = None,
        sinks: Tensor | None = None,
    ) -> Heads:
        """Return the heads of a layer, which are rotated with a table, and normed with weights; the caller keeps those
        alive.
        """
        heads = cls(num_heads=spec.num_heads, scale=spec.score_scale, softcap=spec.softcap or 0.0)
        heads.window, heads.chunk = (min(number or 0, LARGEST) for number in (spec.window, spec.chunk))
        heads.vectors, heads.max_position, heads.foreign_kv = [], LARGEST, spec.kv_layer is not None
        if rope is not None:
            heads._set_rope(*rope, spec.head_dim)
        if weights is not None:
            heads._set_norms(spec, weights)
        if (scaling := spec.query_scaling) is not None:
            heads.query_beta, heads.query_length, heads.query_offset = scaling.beta, scaling.length, scaling.offset
        if sinks is not None:
            heads.sinks = heads._keep(sinks, spec.num_heads)
        if spec.alibi is not None:
            heads.slopes = heads._keep(reference.alibi_slopes(spec), spec.num_heads)
        return heads

    def _set_rope(self, cos: Tensor, sin: Tensor, head_dim: int) -> None:
        self.max_position, self.rotary_dim = len(cos), 2 * cos.shape[1]
        assert cos.shape == sin.shape and self.rotary_dim <= head_dim
        for table in (cos, sin):
            check(table, torch.float32)
            self.vectors.append(table)
        self.cos, self.sin = cos.data_ptr(), sin.data_ptr()

    def _set_norms(self, spec: AttentionSpec, weights: LayerWeights) -> None:
        dim, norms = spec.head_dim, spec.qk_norm
        ones = torch.ones(dim)  # in place of no weight: the same numbers
        if norms is not None:
            self.own_norms, self.whole_rows = norms.whole_row or norms.own_weights, norms.whole_row
            self.norms_last = norms.after_rope
            counts = {"q_norm": spec.num_heads} | ({} if self.foreign_kv else {"k_norm": spec.num_kv_heads})
            for name, count in counts.items():
                weight = getattr(weights, name) if norms.weight else ones
                assert weight is not None
                length = count * dim if self.own_norms else dim
                setattr(self, name, Norm.of(norms.norm, weight, getattr(weights, f"{name}_bias"), length))
        if spec.v_norm is not None:
            self.v_norm = Norm.of(spec.v_norm, ones, None, dim)
        self.vectors.append(ones)

    def _keep(self, vector: Tensor, length: int) -> int:
        """Return the address of a copy in fp32."""
        wide = vector.float().contiguous()
        assert wide.shape == (length,)
        self.vectors.append(wide)
        return wide.data_ptr()


class Latent(Struct):
    """Describes latent attention."""

    _fields_ = [
        *_fields(c_void_p, "q_b", "k_b", "v_b"),
        *_fields(Norm, "q_norm", "kv_norm"),
        *_fields(c_int32, "q_width", "kv_rank", "rope_dim", "nope_dim", "v_dim"),
    ]

    @classmethod
    def of(cls, spec: LatentSpec, num_heads: int, weights: LayerWeights) -> Latent:
        """Return the latent attention of a layer; the caller keeps the weights alive."""
        k_b, v_b, q_width = weights.k_b, weights.v_b, spec.q_width(num_heads)
        assert (k_b.num_heads, k_b.rows, k_b.columns) == (num_heads, spec.kv_rank, spec.nope_dim)
        assert (v_b.num_heads, v_b.rows, v_b.columns) == (num_heads, spec.v_dim, spec.kv_rank)
        assert weights.qkv.rows == q_width + spec.kv_rank + spec.rope_dim
        latent = cls(
            k_b=k_b.address,
            v_b=v_b.address,
            kv_norm=Norm.of(spec.norm, weights.kv_a_norm, None, spec.kv_rank),
            **{name: getattr(spec, name) for name in ("kv_rank", "rope_dim", "nope_dim", "v_dim")},
            q_width=q_width,
        )
        if spec.q_rank is not None:
            q_b = weights.q_b
            assert (q_b.rows, q_b.columns) == (num_heads * (spec.rope_dim + spec.nope_dim), spec.q_rank)
            latent.q_b, latent.q_norm = q_b.address, Norm.of(spec.norm, weights.q_a_norm, None, spec.q_rank)
        return latent


class TokenInput(Struct):
    """Describes what a layer adds from an input of its own."""

    _fields_ = [*_fields(c_void_p, "gate", "out"), ("norm", Norm), ("activation", c_int32)]

    @classmethod
    def of(cls, spec: TokenInputSpec, norm: NormSpec, weights: LayerWeights, hidden: int) -> TokenInput:
        """Return what a layer adds; the caller keeps the weights alive."""
        gate, out = weights.token_gate, weights.token_out
        assert (gate.rows, gate.columns) == (out.columns, out.rows) == (spec.size, hidden)
        norms = Norm.of(norm, weights.token_norm, None, hidden)
        return cls(gate.address, out.address, norms, ACTIVATIONS[spec.activation])


class Mlp(Struct):
    """Describes an MLP."""

    _fields_ = [*_fields(c_void_p, "up", "up_bias", "down", "down_bias"), ("activation", c_int32)]

    @classmethod
    def of(cls, spec: MlpSpec, weights: MlpWeights, hidden: int, ranks: int = 1) -> Mlp:
        """Return the MLP with these weights, which the caller keeps alive: those of one of `ranks` that gather."""
        up: Weight = weights.gate_up if spec.gated else weights.up
        down: Weight = weights.down
        assert spec.gated or spec.activation in reference.ACTIVATIONS
        assert bool(up.gated) == spec.gated and up.rows == spec.intermediate_size * (2 if spec.gated else 1)
        assert down.columns == ranks * spec.intermediate_size and up.columns == ranks * down.rows == hidden
        return cls(
            up.address,
            vector_address(weights.up_bias, up.rows),
            down.address,
            vector_address(weights.down_bias, down.rows),
            ACTIVATIONS[spec.activation],
        )


class Delta(Struct):
    """Describes a gated delta net."""

    _fields_ = [
        *_fields(c_void_p, "conv", "decay", "decay_bias", "norm"),
        *_fields(c_int32, "key_heads", "value_heads", "key_dim", "value_dim", "taps"),
        ("eps", c_float),
    ]

    @classmethod
    def of(cls, spec: DeltaSpec, weights: LayerWeights) -> Delta:
        """Return the delta net of a layer; the caller keeps the weights alive. Its sizes need none."""
        delta = cls(
            key_heads=spec.num_key_heads,
            value_heads=spec.num_value_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            taps=spec.conv_size,
            eps=spec.norm.eps,
        )
        delta.conv = _taps_address(weights.conv, spec)
        delta.decay = vector_address(weights.decay, spec.num_value_heads, torch.float32)
        delta.decay_bias = vector_address(weights.decay_bias, spec.num_value_heads, torch.float32)
        delta.norm = vector_address(weights.out_norm, spec.value_dim, torch.float32)
        return delta


class ShortConv(Struct):
    """Describes a gated short convolution."""

    _fields_ = [*_fields(c_void_p, "conv", "bias"), *_fields(c_int32, "channels", "taps")]

    @classmethod
    def of(cls, spec: ConvSpec, weights: LayerWeights) -> ShortConv:
        """Return the convolution of a layer; the caller keeps the weights alive. Its sizes need none."""
        conv = cls(channels=spec.num_channels, taps=spec.conv_size)
        conv.conv = _taps_address(weights.conv, spec)
        conv.bias = vector_address(weights.conv_bias, spec.num_channels, torch.float32)
        return conv


class Mamba(Struct):
    """Describes a Mamba-2 mixer."""

    _fields_ = [
        *_fields(c_void_p, "conv", "conv_bias", "decay", "decay_bias", "skip", "norm"),
        *_fields(c_int32, "groups", "heads", "state_dim", "head_dim", "taps"),
        *_fields(c_float, "eps", "dt_min", "dt_max"),
    ]

    @classmethod
    def of(cls, spec: MambaSpec, weights: LayerWeights) -> Mamba:
        """Return the mixer of a layer; the caller keeps the weights alive. Its sizes need none."""
        assert not (spec.norm.centered or spec.norm.bias)
        mamba = cls(
            groups=spec.num_groups,
            heads=spec.num_heads,
            state_dim=spec.state_dim,
            head_dim=spec.head_dim,
            taps=spec.conv_size,
            eps=spec.norm.eps,
            dt_min=spec.dt_min,
            dt_max=math.inf if spec.dt_max is None else spec.dt_max,
        )
        mamba.conv = _taps_address(weights.conv, spec)
        mamba.conv_bias = vector_address(weights.conv_bias, spec.num_channels, torch.float32)
        for name in ("decay", "decay_bias", "skip"):
            setattr(mamba, name, vector_address(getattr(weights, name), spec.num_heads, torch.float32))
        mamba.norm = vector_address(weights.out_norm, spec.num_heads * spec.head_dim, torch.float32)
        return mamba


def _taps_address(taps: Tensor | None, spec: RecurrentSpec) -> int | None:
    if taps is None:
        return None
    check(taps, torch.float32)
    assert taps.shape == (spec.conv_size, spec.num_channels) and spec.conv_size <= MOST_TAPS
    return taps.data_ptr()


class Recurrent(Struct):
    """Describes a mixer with a state; what it does not have is null."""

    _fields_ = [
        *_fields(c_void_p, "in_proj", "in_proj_bias", "gates", "gates_bias", "out_proj", "out_proj_bias"),
        ("delta", Delta),
        ("conv", ShortConv),
        ("mamba", Mamba),
        ("states", States),
    ]

    @classmethod
    def of(cls, spec: RecurrentSpec, weights: LayerWeights, hidden: int) -> Recurrent:
        """Return the mixer of a layer without its states; the caller keeps the weights alive."""
        in_proj, out_proj = weights.in_proj, weights.out_proj
        assert in_proj.columns == out_proj.rows == hidden
        mixer = cls(in_proj=in_proj.address, out_proj=out_proj.address)
        mixer.in_proj_bias = vector_address(weights.in_proj_bias, in_proj.rows)
        mixer.out_proj_bias = vector_address(weights.out_proj_bias, hidden)
        if isinstance(spec, ConvSpec):
            assert (in_proj.rows, out_proj.columns) == (3 * spec.num_channels, spec.num_channels)
            mixer.conv = ShortConv.of(spec, weights)
            return mixer
        if isinstance(spec, DeltaSpec):
            values, gates = spec.num_value_heads * spec.value_dim, 2 * spec.num_value_heads
            mixer.delta = Delta.of(spec, weights)
        else:
            values, gates = spec.num_heads * spec.head_dim, spec.num_heads
            mixer.mamba = Mamba.of(spec, weights)
        assert (in_proj.rows, out_proj.columns) == (spec.num_channels + values, values)
        assert (weights.gates.rows, weights.gates.columns) == (gates, hidden)
        assert weights.gates.format == BF16  # packed as in_proj is, if that is in bf16
        mixer.gates, mixer.gates_bias = weights.gates.address, vector_address(weights.gates_bias, gates)
        return mixer


class Router(Struct):
    """Says how tokens choose among experts by their scores."""

    _fields_ = [
        ("choice_bias", c_void_p),
        *_fields(c_int32, "num_experts", "top_k", "sigmoid", "renormalize", "num_groups", "top_groups", "group_best"),
        *_fields(c_float, "min_sum", "scale"),
    ]

    @classmethod
    def of(cls, spec: RouterSpec, choice_bias: Tensor | None) -> Router:
        """Return the router of a layer; the caller keeps the bias alive."""
        assert spec.num_groups <= MAX_GROUPS and spec.group_best in (1, 2)
        return cls(
            vector_address(choice_bias, spec.num_experts, torch.float32),
            *(spec.num_experts, spec.top_k, spec.sigmoid, spec.renormalize),
            *(spec.num_groups, spec.top_groups, spec.group_best, spec.min_sum, spec.scale),
        )


class Mixture(Struct):
    """Lists the experts of a layer, packed alike and side by side. Only a whole network reads the router and the shared
    expert.
    """

    arrays: list[Any]
    choice: Router
    _fields_ = [
        ("choice", Router),
        *_fields(c_void_p, "router", "router_bias", "up", "down", "up_bias", "down_bias"),
        ("activation", c_int32),
        ("shared", Mlp),
        *_fields(c_void_p, "shared_gate", "expert_scale"),
        *_fields(c_int32, "scales_input", "one_order"),
        *_fields(Norm, "router_norm", "expert_norm", "post_expert_norm", "post_shared_norm"),
    ]

    @classmethod
    def of(cls, layer: LayerWeights, spec: MlpSpec, *, top_k: int, ranks: int = 1) -> Mixture:
        """Return the mixture of a layer's experts; the caller keeps the weights alive: those of one of `ranks` that
        gather.
        """
        up, down = layer.w13 if spec.gated else layer.w1, layer.w2
        num_experts, (hidden, inner) = len(up), (ranks * down[0].rows, down[0].columns // ranks)
        assert len(down) == num_experts >= top_k and (spec.gated or spec.activation in reference.ACTIVATIONS)
        for first, second in zip(up, down, strict=True):
            assert bool(first.gated) == spec.gated and first.columns == hidden
            assert first.rows == inner * (2 if spec.gated else 1)
            assert not second.gated and (ranks * second.rows, second.columns) == (hidden, ranks * inner)
            assert first.is_packed_as(up[0]) and second.is_packed_as(down[0])
        mixture = cls(activation=ACTIVATIONS[spec.activation], one_order=len({weight.order for weight in up}) == 1)
        mixture.choice.num_experts, mixture.choice.top_k = num_experts, top_k
        mixture.arrays = [(Weight * num_experts)(*each) for each in (up, down)]
        if spec.bias:
            for biases, weights in ((layer.w1_bias, up), (layer.w2_bias, down)):
                assert len(biases) == num_experts
                mixture.arrays.append((c_void_p * num_experts)(*(vector_address(b, weights[0].rows) for b in biases)))
        for name, each in zip(("up", "down", "up_bias", "down_bias"), mixture.arrays, strict=False):
            setattr(mixture, name, ctypes.addressof(each))
        return mixture

    def set_block(self, layer: LayerWeights, spec: ExpertsSpec, hidden: int, ranks: int = 1) -> None:
        """Give the mixture what a whole network reads of the layer."""
        router, gate = layer.router, layer.shared_gate
        assert router.rows == spec.router.num_experts == self.choice.num_experts and router.columns == hidden
        self.choice = Router.of(spec.router, layer.choice_bias)
        self.router, self.router_bias = router.address, vector_address(layer.router_bias, router.rows)
        if spec.shared is not None:
            assert layer.shared is not None
            self.shared = Mlp.of(spec.shared, layer.shared, hidden, ranks)
        if spec.shared_gate:
            assert (gate.rows, gate.columns) == (1, hidden)
            self.shared_gate = gate.address
        self.scales_input = spec.router.scales_input
        self.expert_scale = vector_address(layer.expert_scale, spec.router.num_experts, torch.float32)
        if spec.own_norm is not None:
            for name in ("router_norm", "expert_norm", "post_expert_norm", "post_shared_norm"):
                setattr(self, name, Norm.of(spec.own_norm, getattr(layer, name), None, hidden))


class Layer(Struct):
    """Describes a decoder layer; what it does not have is null."""

    _fields_ = [
        *_fields(Norm, "attn_norm", "post_attn_norm"),
        *_fields(c_void_p, "qkv", "qkv_bias", "attn_gate", "o", "o_bias"),
        ("latent", Latent),
        ("heads", Heads),
        ("store", Store),
        ("recurrent", Recurrent),
        *_fields(Norm, "mlp_norm", "post_mlp_norm"),
        ("mlp", Mlp),
        ("mixture", c_void_p),
        ("token_input", TokenInput),
        ("parallel", c_int32),
        *_fields(c_float, "residual_scale", "output_scale"),
    ]


_Reduce = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64)
_ANY_FLOATS = c_float * 2**40  # one type for all lengths: types of arrays are never freed


class Rank(Struct):
    """Describes this process as a rank of a group, which it keeps alive. It is `Group` in C++."""

    group: Group
    callback: Any
    _fields_ = [
        *_fields(c_int32, "rank", "size"),
        *_fields(c_void_p, "meeting", "shared"),
        *_fields(c_int64, "shared_bytes", "patience"),
        ("reduce", c_void_p),
        ("failed", c_int32),
    ]

    @classmethod
    def of(cls, group: Group) -> Rank:
        """Return the rank of this process."""
        rank = cls(group.shard.rank, group.shard.size)
        rank.group = group
        if isinstance(group, SharedGroup):
            rank.meeting, rank.shared, rank.shared_bytes = group.address, group.buffers_address, group.buffer_bytes
            rank.patience = int(1000 * group.patience)
        else:
            assert isinstance(group, SummingGroup)
            rank.callback = _Reduce(partial(_add_up, group))
            rank.reduce = ctypes.cast(rank.callback, c_void_p)
        return rank


def _add_up(group: SummingGroup, address: int, count: int) -> int:
    """Add numbers up over all ranks, for C++. Returns whether that failed."""
    try:
        group.add_up(torch.frombuffer(_ANY_FLOATS.from_address(address), dtype=torch.float32, count=count))
    except RankLostError:
        return 1
    except BaseException:  # C++ would go on with what was not added
        _logger.exception("sums of ranks could not be added")
        return 1
    return 0


class Network(Struct):
    """Describes all of a network but its head."""

    _fields_ = [
        ("layers", c_void_p),
        *_fields(c_int64, "num_layers", "hidden", "vocabulary"),
        *_fields(c_void_p, "table", "packed_table", "positions"),
        ("embed_scale", c_float),
        ("norm", Norm),
        *_fields(c_void_p, "token_inputs", "token_projection"),
        ("token_input_norm", Norm),
        ("token_input_size", c_int64),
        ("group", c_void_p),
        *_fields(c_int64, "first_id", "num_ids", "num_positions", "num_blocks", "block_size", "num_states"),
    ]


def _address(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


class Choices(Struct):
    """Says how a token is chosen for each of some rows, and has room for these and the largest logits."""

    arrays: tuple[array[Any], ...]
    _fields_ = [
        *_fields(c_void_p, "head", "bias", "filters", "numbers", "ids", "peaks"),
        *_fields(c_int64, "vocabulary", "first_id"),
        ("logits", c_void_p),
    ]

    @classmethod
    def of(
        cls, head: Weight, bias: Tensor | None, count: int, filters: Sequence[Filter], numbers: Sequence[float]
    ) -> Choices:
        """Return the choices of `count` rows, drawn by filters and numbers if there are any; it keeps all of it."""
        assert not head.gated and len(filters) == len(numbers) in (0, count)
        ids, peaks = array("i", bytes(4 * count)), array("f", bytes(4 * count))
        places = None, None, _address(ids), _address(peaks)
        choices = cls(head.address, vector_address(bias, head.rows), *places, head.rows)
        choices.arrays = ids, peaks
        if filters:
            kept, wanted = array("d", chain.from_iterable(filters)), array("d", numbers)
            choices.filters, choices.numbers = _address(kept), _address(wanted)
            choices.arrays = ids, peaks, kept, wanted
        return choices

    def share(self, group: SharedGroup, vocabulary: int) -> None:
        """Let this be the part of a rank, which has its rows of the head: the first one chooses."""
        ids, count = group.shard.span(vocabulary), len(self.arrays[0])
        assert 4 * count * vocabulary <= group.logit_bytes
        self.vocabulary, self.first_id, self.logits = vocabulary, ids.start, group.logits_address

    @property
    def result(self) -> tuple[list[int], list[float]]:
        """Return the chosen tokens and the largest logits."""
        ids, peaks, *_ = self.arrays
        return ids.tolist(), peaks.tolist()


FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "weight_bytes": ([c_void_p], c_int64),
    "store_bytes": ([c_void_p], c_int64),
    "delta_floats": ([c_void_p], c_int64),
    "conv_floats": ([c_void_p], c_int64),
    "mamba_floats": ([c_void_p], c_int64),
    "pack": ([c_void_p, c_void_p, c_void_p, c_int64, c_int64], None),
    "pack_stored": ([c_void_p, c_void_p, c_void_p, c_int64, c_int64], None),
    "linear": ([*[c_void_p] * 3, c_int64, *[c_void_p] * 3, c_int64, c_void_p], c_int32),
    "linear_heads": ([c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p], c_int32),
    "activated": ([*[c_void_p] * 3, c_int64, c_void_p, c_int32, c_void_p, c_int64, c_void_p], c_int32),
    "norm": ([c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p], None),
    "embed": ([c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p], None),
    "rope_store": ([c_void_p] * 6, None),
    "attend": ([c_void_p] * 6, c_int32),
    "delta": ([c_void_p] * 7, c_int32),
    "conv": ([c_void_p] * 6, None),
    "mamba": ([c_void_p] * 7, c_int32),
    "network": ([c_void_p] * 5, c_int32),
    "head": ([*[c_void_p] * 5, c_int64, c_void_p, c_int64], c_int32),
    "lend": ([c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64], c_int32),
    "deposit": ([c_void_p, c_int64, c_void_p, c_int64], c_int32),
    "route": ([c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p], None),
    "experts": ([c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p], c_int32),
    "take_units": ([c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p], None),
    "read_all": ([c_void_p, c_void_p, c_int64], None),
    "dots_only": ([c_void_p, c_int32, c_int64], c_float),
    "topk": ([c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p], None),
    "draw": (
        [c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p],
        c_int32,
    ),
    "choose": ([c_void_p, c_void_p, c_void_p, c_int64], c_int32),
}


NEEDS_MEMORY = {
    *("linear", "linear_heads", "activated", "attend", "delta", "mamba", "network", "head", "lend"),
    *("experts", "draw", "choose"),
}
"""Functions that return 1 without it, and some 2 if a rank of their group did not come."""
PURE = {"weight_bytes", "store_bytes", "delta_floats", "conv_floats", "mamba_floats", "deposit"}
"""Functions that need no workspace."""


class Library:
    """Calls the functions of one variant, `library.linear(...)` and so on, as csrc/variant.h declares them, without the
    workspace that is their first argument: it belongs to this object, and serves one call at a time.
    """

    def __init__(self, variant: str, num_threads: int) -> None:
        shared = _load()
        self.lock = threading.RLock()
        self._workspace = None
        for name, (arguments, result) in FUNCTIONS.items():
            function = getattr(shared, f"sf_{name}_{variant}")
            function.argtypes, function.restype = arguments, result
            setattr(self, name, function if name in PURE else self._in_workspace(function, name in NEEDS_MEMORY))
        shared.sf_check_step.argtypes = [c_void_p, *(c_int64,) * 5]
        shared.sf_check_packed.argtypes = [c_void_p, c_void_p]
        shared.sf_check_ids.argtypes = [c_void_p, c_int64, c_int64]
        self.check_step, self.check_packed = shared.sf_check_step, shared.sf_check_packed
        self.check_ids = shared.sf_check_ids
        self._set_nodes = shared.sf_set_nodes
        self._set_nodes.argtypes, self._set_nodes.restype = [c_int32, c_void_p, c_void_p, c_int64], None
        create = getattr(shared, f"sf_create_{variant}")
        create.argtypes, create.restype = [c_int32], c_void_p
        self._destroy = getattr(shared, f"sf_destroy_{variant}")
        self._destroy.argtypes = [c_void_p]
        self._workspace = create(num_threads)
        if self._workspace is None:
            raise RuntimeError("no memory for the kernels' workspace")

    def __del__(self) -> None:
        if getattr(self, "_workspace", None) is not None:
            self._destroy(self._workspace)

    def __getattr__(self, name: str) -> Any:  # for type checkers: __init__ sets them all
        raise AttributeError(name)

    def set_nodes(self, plan: NodePlan | None) -> None:
        """Divide the teams of this process that have as many threads as a plan among its NUMA nodes, to which these are
        bound; None: divide none. No team may compute meanwhile.
        """
        if plan is None:
            plan = NodePlan((0,), ((),), (0, 0))
        words = max((max(cores, default=0) for cores in plan.cores), default=0) // 64 + 1
        first_thread, masks = array("i", plan.first_thread), array("Q", bytes(8 * words * len(plan.nodes)))
        for place, cores in enumerate(plan.cores):
            for core in cores:
                masks[place * words + core // 64] |= 1 << core % 64
        with self.lock:
            self._set_nodes(len(plan.nodes), _address(first_thread), _address(masks), words)

    def _in_workspace(self, function: Any, needs_memory: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self.lock:
                result = function(self._workspace, *arguments)
            if needs_memory and result == 2:
                raise RankLostError("a rank of the tensor-parallel group has ended, or does not answer")
            if needs_memory and result:
                raise RuntimeError("no memory for the kernels' workspace: choose a smaller max_num_batched_tokens")
            return result

        return call


def supported_variants() -> tuple[str, ...]:
    """Return the variants this CPU can run, best first. Raises KernelError if there is no library to ask.

    With SPLITFUSE_EMULATE_AMX=1 any CPU with AVX-512 and bf16 can run avx512_amx, slowly: for tests.
    """
    shared = _load()
    supported = [variant for variant in VARIANTS if getattr(shared, f"sf_supports_{variant}")()]
    if {"avx512_bf16", "avx512"} <= set(supported) and not shared.sf_prefers_avx512_bf16():
        supported.remove("avx512_bf16")
        supported.insert(supported.index("avx512") + 1, "avx512_bf16")
    return tuple(supported)


def choose_variant(wanted: str | None = None) -> str:
    """Return the best variant, or the wanted one. Logs why AMX is not chosen if the CPU announces it in vain.

    Raises KernelError if this CPU can run none, ConfigError if it cannot run the wanted one.
    """
    if wanted is not None and wanted != AMX and getattr(_load(), f"sf_supports_{wanted}")():
        return wanted  # without trying AMX
    supported = supported_variants()
    if not supported:
        raise KernelError("this CPU has neither AVX-512 (with VNNI) nor AVX2 (with FMA)")
    obstacle = None if AMX in supported else AMX_OBSTACLES.get(_load().sf_amx_state())
    if wanted is not None and wanted not in supported:
        why = f" ({obstacle})" if wanted == AMX and obstacle else ""
        raise ConfigError(f"this CPU cannot run the {wanted} kernels{why}; it can run {' and '.join(supported)}")
    by_default = [variant for variant in supported if not is_emulated(variant)]
    if wanted is None and obstacle:
        _warn_once(f"this CPU announces AMX, but {obstacle}: the {by_default[0]} kernels run instead")
    return wanted or by_default[0]


@cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def is_emulated(variant: str) -> bool:
    """Return whether a variant's instructions are emulated: those of AMX, with SPLITFUSE_EMULATE_AMX=1."""
    return variant == AMX and bool(_load().sf_emulates_amx())


@cache
def _load() -> ctypes.CDLL:
    named = os.environ.get("SPLITFUSE_KERNEL_LIBRARY")  # another build of it, such as that of `make test-sanitize`
    path = Path(named) if named else Path(__file__).with_name("libsplitfuse_cpu.so")
    if not path.is_file():
        raise KernelError(
            f"the C++ kernels were not compiled ({path.name} is missing): installing needs a C++ compiler"
        )
    try:  # after torch, whose OpenMP it then shares: see the import above
        shared = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the C++ kernels cannot be loaded: {error}") from error
    if (compiled_from := getattr(shared, "sf_sources", None)) is not None:
        compiled_from.restype = c_uint64
    if compiled_from is None or compiled_from() != _hash_of_sources():
        raise KernelError(
            f"the C++ kernels ({path.name}) were compiled from other sources than those in {SOURCES}: "
            "compile them again with python setup.py build_ext --inplace --force"
        )
    return shared


def _hash_of_sources() -> int:
    """Return the number that setup.py compiles into a library of these sources."""
    files = [path for pattern in ("*.cpp", "*.h") for path in sorted(SOURCES.glob(pattern))]
    return int(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16], 16)
