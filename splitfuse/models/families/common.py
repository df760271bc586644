"""Holds what the families share: the plain decoder that most are, the names of its weights, and readers of fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.kernels.interface import AttentionSpec, ExpertsSpec, LayerSpec, MlpSpec
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import extended_length, read_rope
from splitfuse.models.spec import ModelSpec

WeightNames: TypeAlias = Mapping[str, tuple[str, ...]]
"""Our name of a weight -> the checkpoint's tensors stacked to make it, with `{layer}` for the layer's number and
`{expert}` for the expert's.
"""

Windows: TypeAlias = tuple[int | None, ...]
"""Window of each layer: `AttentionSpec.window`."""


@dataclass(frozen=True)
class Family:
    """Describes an architecture: its config reader, its weight names, which of FOREIGN_FEATURES its reader honours."""

    model_type: str
    read: Callable[[ConfigJson], ModelSpec]
    names: WeightNames
    honours: frozenset[str] = frozenset()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

MAX_LAYERS = 10_000  # a spec has an entry for each

DECODER_NAMES: WeightNames = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attn_norm": ("model.layers.{layer}.input_layernorm.weight",),
    "qkv": tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv_bias": tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.bias" for part in "qkv"),
    "q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
    "o": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "o_bias": ("model.layers.{layer}.self_attn.o_proj.bias",),
    "mlp_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "gate_up": tuple(f"model.layers.{{layer}}.mlp.{part}_proj.weight" for part in ("gate", "up")),
    "gate_up_bias": tuple(f"model.layers.{{layer}}.mlp.{part}_proj.bias" for part in ("gate", "up")),
    "down": ("model.layers.{layer}.mlp.down_proj.weight",),
    "down_bias": ("model.layers.{layer}.mlp.down_proj.bias",),
}


def plain_decoder(
    config: ConfigJson,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
    windows: Windows | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    mlps: Sequence[MlpSpec | ExpertsSpec] | None = None,
) -> ModelSpec:
    """Return the network of a config. `num_kv_heads`, `head_dim`, `norm_eps` and `rope_theta` are defaults for a config
    that does not say; the others are the family's, `windows` and `mlps` with an entry for each layer.
    """
    count = num_layers(config)
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    if "head_dim" not in config and head_dim is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of its {num_heads} attention heads")
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads)
    mlps = mlps or (mlp(config, bias=mlp_bias),) * count
    rope = read_rope(config, head_dim=head_dim, theta=rope_theta)
    if rope.rotary_dim != head_dim:  # transformers rotates whole heads in these families, whatever is said
        raise UnsupportedModelError(
            f"config.json: a partial_rotary_factor that rotates {rope.rotary_dim} of {head_dim} elements of a head is "
            "not supported: use 1"
        )
    windows = (None,) * count if windows is None else windows
    if len(windows) != count:
        raise ModelError(f"config.json: layer_types describes {len(windows)} layers, num_hidden_layers is {count}")
    attentions = {
        window: AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.integer("num_key_value_heads", num_kv_heads or num_heads),
            head_dim=head_dim,
            window=window,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
        )
        for window in set(windows)
    }
    return ModelSpec(
        architecture=config.raw("architectures")[0],
        dtype=config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch."),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position=extended_length(rope, config.integer("max_position_embeddings")),
        norm_eps=config.number("rms_norm_eps", norm_eps),
        ropes=(rope,),
        layers=tuple(
            LayerSpec(attention=attentions[window], mlp=each) for window, each in zip(windows, mlps, strict=True)
        ),
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def mlp(config: ConfigJson, *, bias: bool = False) -> MlpSpec:
    """Return the dense MLP of a config."""
    return MlpSpec(intermediate_size=config.integer("intermediate_size"), activation=activation(config), bias=bias)


def activation(config: ConfigJson) -> str:
    """Return our name of the config's activation."""
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {name!r} is not one of those we know: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def num_layers(config: ConfigJson) -> int:
    """Return the number of layers."""
    return config.integer("num_hidden_layers", most=MAX_LAYERS)


def window(config: ConfigJson) -> int | None:
    """Return the sliding window: if absent it is 4096, as in transformers; only null says that there is none."""
    return None if config.is_null("sliding_window") else config.integer("sliding_window", 4096)


def num_experts(config: ConfigJson, default: int) -> int:
    """Return the number of experts; transformers 5 takes either name for the other."""
    return config.integer("num_local_experts" if "num_local_experts" in config else "num_experts", default)
