"""Holds the weights of a network as a backend keeps them, and says what each is for.

What a linear weight looks like inside is the backend's own affair: weights come out of `Backend.pack`, and only that
backend looks into them. Letters of sizes are those of interface.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from torch import Tensor

Weight: TypeAlias = Any
"""Linear weight as `Backend.pack` returns it."""


class WeightRole(Enum):
    """Says what a weight is for: a backend chooses the format by it. Values, but for "plain" and "norm", are fields of
    LayerWeights, MlpWeights and NetworkWeights.

    PLAIN is everything that is looked up or added rather than multiplied, such as biases; EMBED is an embedding that is
    no output head too. NORM is kept in fp32: norms, the small weights of recurrent layers, choice_bias, expert_scale
    and output_scale.
    """

    PLAIN = "plain"
    EMBED = "embed"
    NORM = "norm"
    QKV = "qkv"
    Q_B = "q_b"
    K_B = "k_b"
    V_B = "v_b"
    ATTN_GATE = "attn_gate"
    IN_PROJ = "in_proj"
    GATES = "gates"
    OUT_PROJ = "out_proj"
    O = "o"  # noqa: E741 - the field's name for the output projection
    GATE_UP = "gate_up"
    UP = "up"
    DOWN = "down"
    TOKEN_PROJECTION = "token_projection"
    TOKEN_GATE = "token_gate"
    TOKEN_OUT = "token_out"
    ROUTER = "router"
    SHARED_GATE = "shared_gate"
    W13 = "w13"
    W1 = "w1"
    W2 = "w2"
    HEAD = "head"

    @property
    def gated(self) -> bool:
        """Return whether the rows are a gate and an up half, multiplied by `Backend.gated` or `Backend.experts`."""
        return self in (WeightRole.GATE_UP, WeightRole.W13)

    @property
    def linear(self) -> bool:
        """Return whether the weight is multiplied, and packed for it."""
        return self not in (WeightRole.PLAIN, WeightRole.EMBED, WeightRole.NORM)

    @property
    def by_head(self) -> bool:
        """Return whether the weight is one of each head, [H, N, K], multiplied by `Backend.linear_heads`."""
        return self in (WeightRole.K_B, WeightRole.V_B)


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """Holds the weights of an MLP: of a layer, or of the expert that all tokens share."""

    gate_up: Weight = None  # [2I, C]
    up: Weight = None  # [I, C]: in place of gate_up, if it is not gated
    up_bias: Tensor | None = None  # of gate_up or up
    down: Weight = None  # [C, I]
    down_bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Holds the weights of one layer. Linear weights are packed; norms are vectors in fp32, biases plain vectors. What
    its LayerSpec does not have is None.
    """

    attn_norm: Tensor | None = None
    attn_norm_bias: Tensor | None = None
    qkv: Weight = None  # [(H + 2 Hk) D, C], or [H D, C] if keys and values are another layer's
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm: Tensor | None = None
    k_norm_bias: Tensor | None = None
    q_a_norm: Tensor | None = None  # [q_rank]: this and the next four of latent attention, whose qkv is
    q_b: Weight = None  # [H (rope_dim + nope_dim), q_rank]      [q_width + kv_rank + rope_dim, C]
    kv_a_norm: Tensor | None = None  # [kv_rank]
    k_b: Weight = None  # [H, kv_rank, nope_dim]
    v_b: Weight = None  # [H, v_dim, kv_rank]
    attn_gate: Weight = None  # [H D, C]
    sinks: Tensor | None = None  # [H]
    in_proj: Weight = None  # [channels and z; C] of a delta net or Mamba, [b, c, u; C] of a convolution
    in_proj_bias: Tensor | None = None
    gates: Weight = None  # of a delta net [betas, rates; C], of Mamba time steps [H, C]
    gates_bias: Tensor | None = None
    conv: Tensor | None = None  # [conv_size, channels] in fp32, the oldest token first
    conv_bias: Tensor | None = None  # [channels] in fp32
    decay: Tensor | None = None  # [Hv] in fp32, of Mamba [H], as is decay_bias:
    decay_bias: Tensor | None = None  # see `Backend.delta` and `Backend.mamba`
    skip: Tensor | None = None  # of Mamba [H] in fp32
    out_norm: Tensor | None = None  # of a delta net [Dv], of Mamba [H P]
    out_proj: Weight = None  # [C, Hv Dv], of Mamba [C, H P], of a convolution [C, channels]
    out_proj_bias: Tensor | None = None
    o: Weight = None  # [C, H D], of latent attention [C, H v_dim]
    o_bias: Tensor | None = None
    post_attn_norm: Tensor | None = None
    post_attn_norm_bias: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    mlp: MlpWeights | None = None
    router: Weight = None  # [E, C]: with w13 or w1, and w2, in place of mlp, in a layer with experts
    router_bias: Tensor | None = None  # [E]
    choice_bias: Tensor | None = None  # [E]
    w13: Sequence[Weight] = ()  # of each expert [2I, C]
    w1: Sequence[Weight] = ()  # of each expert [I, C], if they are not gated
    w1_bias: Sequence[Tensor] = ()  # of w13 or w1
    w2: Sequence[Weight] = ()  # of each expert [C, I]
    w2_bias: Sequence[Tensor] = ()
    expert_scale: Tensor | None = None  # [E]
    router_norm: Tensor | None = None
    expert_norm: Tensor | None = None
    post_expert_norm: Tensor | None = None
    shared: MlpWeights | None = None
    shared_gate: Weight = None  # [1, C]
    post_shared_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None
    post_mlp_norm_bias: Tensor | None = None
    token_gate: Weight = None  # [P, C]
    token_out: Weight = None  # [C, P]
    token_norm: Tensor | None = None
    output_scale: Tensor | None = None  # [1]


@dataclass(frozen=True, kw_only=True)
class NetworkWeights:
    """Holds all weights of a network."""

    embed: Weight  # [vocabulary, C]: a plain tensor, or the packed head if the two are tied
    positions: Tensor | None = None  # [positions, C], added to the embedding
    token_inputs: Tensor | None = None  # [rows, L P], of which each layer gets P elements
    token_projection: Weight = None  # [L P, C], of the embedding
    token_input_norm: Tensor | None = None  # [P]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    norm_bias: Tensor | None = None
    head: Weight  # [vocabulary, C]
    head_bias: Tensor | None = None
