"""Describes decoder layers as plain data: what a model family says of a network, and what decoder and backends compute.

Letters of sizes are those of interface.py. `reference.py` gives the meaning of each in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from splitfuse.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """Describes a norm over the last dimension: RMS (Zhang and Sennrich, arXiv 1910.07467), or with `centered` layer
    norm (Ba et al., arXiv 1607.06450), which subtracts the mean first.
    """

    eps: float
    centered: bool = False
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class HeadNormSpec:
    """Describes the norms of queries and keys: of each head, or with `whole_row` of all heads of a token together.

    Weights are [D] for all heads alike, [H, D] with `own_weights`, [H D] of a whole row; without `weight` there are
    none.
    """

    norm: NormSpec
    whole_row: bool = False
    own_weights: bool = False
    weight: bool = True
    after_rope: bool = False

    def __post_init__(self) -> None:
        if (self.whole_row or self.own_weights) and not self.weight:
            raise ModelError("norms of queries and keys without weights are those of single heads")


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Scales the query at position p by `1 + beta * log(1 + floor((p + offset) / length))`."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Describes attention to one key for all heads, of `rope_dim` rotated elements and a latent vector of `kv_rank`,
    which is the value too (multi-head latent attention, absorbed: DeepSeek-V2, arXiv 2405.04434).

    Queries come from a vector of `q_rank`, without it from the hidden states. Of each head `rope_dim` elements are
    rotated; `nope_dim` others are projected to `kv_rank`, and what the head gives is projected from `kv_rank` to
    `v_dim`. The vectors of `q_rank` and `kv_rank` are normed.
    """

    norm: NormSpec
    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int

    def q_width(self, num_heads: int) -> int:
        """Return how many elements of queries are projected from the hidden states."""
        return self.q_rank or num_heads * (self.rope_dim + self.nope_dim)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Describes the attention of one layer. Its keys and values are [Hk, D] for each token; with `latent` it keeps one
    key, [1, D], which ends with the value.

    Raises ModelError if the query heads cannot be divided among the key/value heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: LatentSpec | None = None
    rope: int | None = 0  # index into the network's rope tables; None: positions are not rotated
    window: int | None = None  # positions that a query sees, its own included; None: all before it
    chunk: int | None = None  # a query sees no key before the last multiple of it
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: HeadNormSpec | None = None
    v_norm: NormSpec | None = None  # of each head's value, without weights
    value_is_key: bool = False  # values are projected by the keys' rows, which are kept twice
    kv_layer: int | None = None  # keys and values are those of this layer before it; it has none of its own
    gate: bool = False  # the output is multiplied by the sigmoid of a projection of the layer's input
    sinks: bool = False  # each head has the score of a key without a value
    alibi: float | None = None  # scores fall with distance, by this times a slope per head (arXiv 2108.12409)
    scale: float | None = None  # factor of query-key products; None: the size of a query as projected ** -0.5
    query_scaling: QueryScaling | None = None
    softcap: float | None = None  # scores, scaled, become softcap * tanh(score / softcap)

    def __post_init__(self) -> None:
        if (latent := self.latent) is not None:
            assert (self.num_kv_heads, self.head_dim) == (1, latent.rope_dim + latent.kv_rank)
            without = (self.qk_norm, self.v_norm, self.kv_layer, self.query_scaling)
            assert without == (None,) * 4 and not self.gate
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot be shared evenly by {self.num_kv_heads} key/value heads"
            )

    @property
    def score_scale(self) -> float:
        """Return the factor of query-key products."""
        size = self.head_dim if self.latent is None else self.latent.rope_dim + self.latent.nope_dim
        return float(size**-0.5) if self.scale is None else self.scale

    @property
    def value_from(self) -> int:
        """Return the element of a key that its value begins at; 0: values are kept apart from keys."""
        return 0 if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Return the size of a value."""
        return self.head_dim - self.value_from


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """Describes the gated delta net of one layer (Yang et al., arXiv 2412.06464), which keeps a state of one size for
    each request in place of keys and values: for each value head a matrix [Dk, Dv], and the last `conv_size - 1` inputs
    of a convolution over tokens, through which queries, keys and values go first.

    Raises ModelError if the value heads cannot be divided among the key heads.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int
    conv_size: int  # tokens that the convolution sees, the newest included
    norm: NormSpec  # of each head's output

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ModelError(
                f"{self.num_value_heads} value heads of a delta net cannot be shared evenly by {self.num_key_heads} "
                "key heads"
            )

    @property
    def num_channels(self) -> int:
        """Return the number of elements of a token's queries, keys and values: what is convolved."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """Describes the gated short convolution of one layer of LFM2, whose state is its last inputs."""

    num_channels: int
    conv_size: int  # tokens that the convolution sees, the newest included
    bias: bool = False  # of the projections and the convolution


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """Describes the Mamba-2 mixer of one layer (Dao and Gu, arXiv 2405.21060), whose state is a matrix [N, P] for each
    head and the last inputs of a convolution. Heads of a group share what is read from a state, and where it is
    written.

    Raises ModelError if the heads cannot be divided among the groups.
    """

    num_heads: int
    num_groups: int
    state_dim: int  # N
    head_dim: int  # P
    conv_size: int  # tokens that the convolution sees, the newest included
    norm: NormSpec  # of each group's output, which is gated first
    bias: bool = False  # of the projections
    conv_bias: bool = False
    dt_min: float = 0.0  # of time steps
    dt_max: float | None = None  # None: they may be of any length

    def __post_init__(self) -> None:
        if self.num_heads % self.num_groups:
            raise ModelError(f"{self.num_heads} heads of a Mamba cannot be shared evenly by {self.num_groups} groups")

    @property
    def num_channels(self) -> int:
        """Return the number of elements of a token that are convolved."""
        return 2 * self.num_groups * self.state_dim + self.num_heads * self.head_dim


RecurrentSpec: TypeAlias = DeltaSpec | ConvSpec | MambaSpec
"""Mixers that keep a state of one size for each request in place of keys and values."""

Mixer: TypeAlias = AttentionSpec | RecurrentSpec
"""Part of a layer that mixes the tokens of a request."""


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """Describes an MLP: `down(activation(gate) * up)`, or `down(activation(up))` if it is not gated. `activation` is a
    key of `reference.ACTIVATIONS`, or if it is gated of `reference.GATED_ACTIVATIONS`.
    """

    intermediate_size: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Describes how a token chooses its `top_k` experts of `num_experts`, and what weights they get.

    Each expert has a score, the softmax over all or the sigmoid of its logit. With `num_groups` a token chooses
    among the `top_groups` groups of neighbouring experts whose `group_best` best scores have the largest sum.
    `choice_bias` is added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437). Of equal scores, and of
    equal groups, the lower comes first. Weights are the scores of the chosen, with `renormalize` divided by their sum
    or by `min_sum` if that is larger, times `scale`.

    Raises ModelError if there are fewer experts than a token visits.
    """

    num_experts: int
    top_k: int
    renormalize: bool
    sigmoid: bool = False
    bias: bool = False  # of the logits
    choice_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    min_sum: float = 0.0
    scale: float = 1.0
    scales_input: bool = False  # a weight multiplies what its expert reads, not what it gives
    expert_scale: bool = False  # the weight of an expert is multiplied by a stored number of its own

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ModelError(f"a token cannot visit {self.top_k} experts: there are {self.num_experts}")
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise ModelError(
                f"{self.num_experts} experts do not form {self.num_groups} equal groups of which {self.top_groups} are "
                "chosen"
            )
        if self.top_k > self.num_experts // self.num_groups * self.top_groups:
            raise ModelError(
                f"a token cannot visit {self.top_k} experts: {self.top_groups} of {self.num_groups} groups have "
                f"{self.num_experts // self.num_groups * self.top_groups}"
            )


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """Describes a mixture of experts in place of an MLP: the weighted sum over the experts that a token chooses, and
    with `shared` an MLP that every token visits, with `shared_gate` times the sigmoid of a projection to one number.

    With `own_norm` experts and router read the layer's input by norms of their own, and what the experts and what the
    shared MLP gives is normed before both are added (Gemma 4).
    """

    router: RouterSpec
    expert: MlpSpec
    shared: MlpSpec | None = None
    shared_gate: bool = False
    own_norm: NormSpec | None = None

    def __post_init__(self) -> None:
        assert self.own_norm is None or (self.shared is not None and not self.shared_gate)


class NormPlace(Enum):
    """Says where the norms of a layer stand: on what a block reads, on what it gives, or on both."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"

    @property
    def before(self) -> bool:
        """Return whether a block reads normed hidden states."""
        return self is not NormPlace.AFTER

    @property
    def after(self) -> bool:
        """Return whether what a block gives is normed before it is added."""
        return self is not NormPlace.BEFORE


@dataclass(frozen=True, kw_only=True)
class TokenInputSpec:
    """Describes what a layer adds from an embedding of its own, of `size` elements for each token, after the MLP:
    `x += norm(out(activation(gate(x)) * input))`.
    """

    size: int
    activation: str


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Describes a decoder layer: `x += mixer(norm(x))`, then `x += mlp(norm(x))`; a block that is None is not there.

    With `parallel` both read the layer's input, `x += mixer(norm(x)) + mlp(norm(x))`: by norms of their own, or with
    `shared_norm` by one. What a block gives is multiplied by `residual_scale`, and with `output_scale` the layer's
    output by a stored number.
    """

    mixer: Mixer | None
    mlp: MlpSpec | ExpertsSpec | None
    norms: NormPlace = NormPlace.BEFORE
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    token_input: TokenInputSpec | None = None
    output_scale: bool = False
