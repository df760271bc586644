"""Describes a network completely: sizes and switches, no tensors.

Two checkpoints with equal specs are the same network with other weights. Layers are described in kernels/layers.py,
since a backend that computes all of them in one call reads the same description. Knows neither config files (families/)
nor weights (weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from splitfuse.errors import ModelError
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec, NormSpec

MAX_EXPERTS = 100_000
"""Number of experts that all layers may have together: each has weights of its own, which are listed."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides positions by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Raises the base with the length beyond `original_max_position` ("NTK-aware", arXiv 2309.00071)."""

    factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Stretches long waves by `factor`, keeps short ones, blends those between (Llama 3.1, arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Scales NTK by parts, with a factor on queries and keys (YaRN: Peng et al., arXiv 2309.00071).

    A pair of elements that turns more than `beta_fast` times over `original_max_position` keeps its frequency, one that
    turns less than `beta_slow` times has it divided by `factor`; `truncate` rounds the borders outward to whole pairs.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """Divides each pair's frequency by a factor of its own, with a factor on queries and keys (LongRoPE: Ding et al.,
    arXiv 2402.13753): by `short_factors` in a network of at most `original_max_position` positions, by `long_factors`
    in a longer one.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """Rotates the first `share` of the pairs of elements as if all were rotated, with positions divided by `factor`;
    the others stay (Gemma 4).
    """

    share: float
    factor: float


RopeScaling: TypeAlias = (
    ProportionalScaling | LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
)


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Describes rotary position embedding over the first `rotary_dim` elements of every head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Describes one decoder-only network: an embedding, layers, a last norm and a head.

    Raises ModelError where sizes contradict each other.
    """

    architecture: str  # as config.json names it: the key of the weight-name table, and for messages
    dtype: str  # of the checkpoint
    vocab_size: int
    hidden_size: int
    max_position: int
    norm: NormSpec  # of all layers and the last
    ropes: tuple[RopeSpec, ...]  # `AttentionSpec.rope` is an index into it
    layers: tuple[LayerSpec, ...]
    embed_scale: float = 1.0
    learned_positions: bool = False  # a row for each position is added to the embedding
    position_offset: int = 0  # row of position 0
    token_input_rows: int = 0  # of the embedding that gives each layer an input of its own
    tied_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    further_layers: int = 0  # that predict further tokens: a checkpoint may hold them, and they are not computed

    def __post_init__(self) -> None:
        experts = [layer.mlp.router.num_experts for layer in self.layers if isinstance(layer.mlp, ExpertsSpec)]
        if sum(experts) > MAX_EXPERTS:
            raise ModelError(
                f"{max(experts)} experts in {len(experts)} layers are {sum(experts)} in all; at most {MAX_EXPERTS} are "
                "supported"
            )
        mixers = {layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionSpec)}
        if not mixers:
            raise ModelError("no layer keeps keys and values: at least one must be full or sliding attention")
        for number, layer in enumerate(self.layers):
            if isinstance(layer.mixer, AttentionSpec) and layer.mixer.kv_layer is not None:
                self._check_reuse(number, layer.mixer, layer.mixer.kv_layer)
        for rope, head_dim in {(mixer.rope, mixer.head_dim) for mixer in mixers if mixer.rope is not None}:
            rotary_dim = self.ropes[rope].rotary_dim
            if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
                raise ModelError(
                    f"the rotary part of a head must be an even number from 2 to head_dim {head_dim}, not {rotary_dim}"
                )

    def _check_reuse(self, number: int, mixer: AttentionSpec, source: int) -> None:
        """Refuse a layer that takes the keys and values of one that keeps none, or keeps others than it reads."""
        kept = self.layers[source].mixer if 0 <= source < number else None
        if not isinstance(kept, AttentionSpec) or kept.kv_layer is not None:
            raise ModelError(
                f"layer {number} takes the keys and values of layer {source}, which must be one before it that has some"
            )
        sizes, wanted = (kept.num_kv_heads, kept.head_dim), (mixer.num_kv_heads, mixer.head_dim)
        if sizes != wanted:
            raise ModelError(
                f"layer {number} takes the keys and values of layer {source}, which has {sizes[0]} key/value heads of "
                f"{sizes[1]}: it must have as many, not {wanted[0]} of {wanted[1]}"
            )

    @property
    def last_storing(self) -> int:
        """Return the number of the last layer that stores something of each token: keys and values, or a state."""
        mixers = [layer.mixer for layer in self.layers]
        borrows = [isinstance(mixer, AttentionSpec) and mixer.kv_layer is not None for mixer in mixers]
        return max(number for number, mixer in enumerate(mixers) if mixer is not None and not borrows[number])

    @property
    def token_input_size(self) -> int:
        """Return the size of the input that each layer has of its own, 0 if it has none."""
        return max((layer.token_input.size for layer in self.layers if layer.token_input is not None), default=0)
