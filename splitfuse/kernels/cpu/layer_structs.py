"""Describes layers of networks, and whole networks, as structs for the compiled library.

csrc/interface.h is the other side of every line here. A struct borrows the memory that it points to: its caller keeps
the tensors alive, except those in its own attributes.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from splitfuse.kernels import reference
from splitfuse.kernels.cpu.structs import BF16, States, Store, Struct, Weight, check, fields, vector_address
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
from splitfuse.kernels.weights import LayerWeights, MlpWeights

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "sigmoid": 5, "clamped_swiglu": 6}
MAX_GROUPS = 64
"""Number of groups of experts that a router can choose among. It is in csrc/experts.h too."""
MOST_TAPS = 16
"""Number of tokens that a convolution can see, the newest included. It is in csrc/states.h too."""
LARGEST = 2**31 - 1
"""Largest number that C++ counts positions with."""


class Norm(Struct):
    """Describes a norm; without a weight there is none."""

    _fields_ = (*fields(c_void_p, "weight", "bias"), ("eps", c_float), ("centered", c_int32))

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
    _fields_ = (
        *fields(c_int32, "num_heads", "rotary_dim"),
        *fields(c_void_p, "cos", "sin"),
        *fields(Norm, "q_norm", "k_norm", "v_norm"),
        *fields(c_int32, "own_norms", "whole_rows", "norms_last", "foreign_kv", "window", "chunk"),
        *fields(c_float, "scale", "softcap"),
        *fields(c_int32, "query_length", "query_offset"),
        ("query_beta", c_double),
        *fields(c_void_p, "sinks", "slopes"),
    )

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

    _fields_ = (
        *fields(c_void_p, "q_b", "k_b", "v_b"),
        *fields(Norm, "q_norm", "kv_norm"),
        *fields(c_int32, "q_width", "kv_rank", "rope_dim", "nope_dim", "v_dim"),
    )

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

    _fields_ = (*fields(c_void_p, "gate", "out"), ("norm", Norm), ("activation", c_int32))

    @classmethod
    def of(cls, spec: TokenInputSpec, norm: NormSpec, weights: LayerWeights, hidden: int) -> TokenInput:
        """Return what a layer adds; the caller keeps the weights alive."""
        gate, out = weights.token_gate, weights.token_out
        assert (gate.rows, gate.columns) == (out.columns, out.rows) == (spec.size, hidden)
        norms = Norm.of(norm, weights.token_norm, None, hidden)
        return cls(gate.address, out.address, norms, ACTIVATIONS[spec.activation])


class Mlp(Struct):
    """Describes an MLP."""

    _fields_ = (*fields(c_void_p, "up", "up_bias", "down", "down_bias"), ("activation", c_int32))

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

    _fields_ = (
        *fields(c_void_p, "conv", "decay", "decay_bias", "norm"),
        *fields(c_int32, "key_heads", "value_heads", "key_dim", "value_dim", "taps"),
        ("eps", c_float),
    )

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

    _fields_ = (*fields(c_void_p, "conv", "bias"), *fields(c_int32, "channels", "taps"))

    @classmethod
    def of(cls, spec: ConvSpec, weights: LayerWeights) -> ShortConv:
        """Return the convolution of a layer; the caller keeps the weights alive. Its sizes need none."""
        conv = cls(channels=spec.num_channels, taps=spec.conv_size)
        conv.conv = _taps_address(weights.conv, spec)
        conv.bias = vector_address(weights.conv_bias, spec.num_channels, torch.float32)
        return conv


class Mamba(Struct):
    """Describes a Mamba-2 mixer."""

    _fields_ = (
        *fields(c_void_p, "conv", "conv_bias", "decay", "decay_bias", "skip", "norm"),
        *fields(c_int32, "groups", "heads", "state_dim", "head_dim", "taps"),
        *fields(c_float, "eps", "dt_min", "dt_max"),
    )

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

    _fields_ = (
        *fields(c_void_p, "in_proj", "in_proj_bias", "gates", "gates_bias", "out_proj", "out_proj_bias"),
        ("delta", Delta),
        ("conv", ShortConv),
        ("mamba", Mamba),
        ("states", States),
    )

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

    _fields_ = (
        ("choice_bias", c_void_p),
        *fields(c_int32, "num_experts", "top_k", "sigmoid", "renormalize", "num_groups", "top_groups", "group_best"),
        *fields(c_float, "min_sum", "scale"),
    )

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
    _fields_ = (
        ("choice", Router),
        *fields(c_void_p, "router", "router_bias", "up", "down", "up_bias", "down_bias"),
        ("activation", c_int32),
        ("shared", Mlp),
        *fields(c_void_p, "shared_gate", "expert_scale"),
        *fields(c_int32, "scales_input", "one_order"),
        *fields(Norm, "router_norm", "expert_norm", "post_expert_norm", "post_shared_norm"),
    )

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

    _fields_ = (
        *fields(Norm, "attn_norm", "post_attn_norm"),
        *fields(c_void_p, "qkv", "qkv_bias", "attn_gate", "o", "o_bias"),
        ("latent", Latent),
        ("heads", Heads),
        ("store", Store),
        ("recurrent", Recurrent),
        *fields(Norm, "mlp_norm", "post_mlp_norm"),
        ("mlp", Mlp),
        ("mixture", c_void_p),
        ("token_input", TokenInput),
        ("parallel", c_int32),
        *fields(c_float, "residual_scale", "output_scale"),
    )


class Network(Struct):
    """Describes all of a network but its head."""

    _fields_ = (
        ("layers", c_void_p),
        *fields(c_int64, "num_layers", "hidden", "vocabulary"),
        *fields(c_void_p, "table", "packed_table", "positions"),
        ("embed_scale", c_float),
        ("norm", Norm),
        *fields(c_void_p, "token_inputs", "token_projection"),
        ("token_input_norm", Norm),
        ("token_input_size", c_int64),
        ("group", c_void_p),
        *fields(c_int64, "first_id", "num_ids", "num_positions", "num_blocks", "block_size", "num_states"),
    )
