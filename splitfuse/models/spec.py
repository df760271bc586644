"""What describes a network completely: sizes and switches, no tensors, no names of models.

Two checkpoints with equal specs are the same network with other weights. Knows neither config files (families.py) nor
weights (weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from splitfuse.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """The base grows with the length beyond `original_max_position` ("NTK-aware", arXiv 2309.00071)."""

    factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1, arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """NTK by parts and a factor on queries and keys (YaRN: Peng et al., arXiv 2309.00071).

    A pair of elements that turns more than `beta_fast` times over `original_max_position` keeps its frequency, one that
    turns less than `beta_slow` times has it divided by `factor`; `truncate` rounds the borders outward to whole pairs.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_position: int


RopeScaling: TypeAlias = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding over the first `rotary_dim` elements of every head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A mixture of experts in place of the MLP: each token visits the `top_k` experts of highest probability.

    Raises ModelError where it could not visit so many.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # whether the chosen probabilities are scaled to add up to 1
    dense_layers: frozenset[int] = frozenset()  # those that have an MLP all the same

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ModelError(f"a token cannot visit {self.top_k} experts where there are {self.num_experts}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One decoder-only network. Raises ModelError where sizes contradict each other."""

    architecture: str  # as config.json names it: the key of the weight-name table, and for messages
    dtype: str  # of the checkpoint
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    activation: str
    rope: RopeSpec
    windows: tuple[int | None, ...]  # of each layer: how many positions a query sees, itself included; None: all
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: MoESpec | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot be shared evenly by {self.num_kv_heads} key/value heads"
            )
        if self.rope.rotary_dim % 2 or not 2 <= self.rope.rotary_dim <= self.head_dim:
            raise ModelError(
                f"the rotary part of a head must be an even number from 2 to head_dim {self.head_dim}, "
                f"not {self.rope.rotary_dim}"
            )
        if len(self.windows) != self.num_layers:
            raise ModelError(f"{len(self.windows)} layers are described for a network of {self.num_layers}")

    def moe_of(self, layer: int) -> MoESpec | None:
        """The experts of a layer, if it has some in place of an MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by."""
        return float(self.head_dim**-0.5)
