"""Holds what the families share: the plain decoder that most are, the names of its weights, and readers of fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.kernels.layers import (
    AttentionSpec,
    ExpertsSpec,
    HeadNormSpec,
    LayerSpec,
    Mixer,
    MlpSpec,
    NormSpec,
    RouterSpec,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Layout, Place, Stored, interleaved_norm, interleaved_rope, of_expert
from splitfuse.models.families.rope_config import extended_length, read_rope
from splitfuse.models.spec import ModelSpec, RopeSpec

WeightNames: TypeAlias = Mapping[str, Layout | Callable[[Place], Layout]]
"""Our name of a weight -> the checkpoint's tensors stacked to make it, with `{layer}` for the layer's number and
`{expert}` for the expert's. One tensor in place of several holds all their rows.
"""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Family:
    """Describes an architecture: its config reader and its weight names.

    One with `text_types` is a vision-language model, of which the text is computed: the reader gets its `text_config`,
    which has one of these model types. `alternatives` are names in place of some of `names`, for checkpoints that are
    stored in another way.
    """

    model_type: str
    read: Callable[[ConfigJson], ModelSpec]
    names: WeightNames
    alternatives: tuple[WeightNames, ...] = ()
    text_types: tuple[str, ...] = ()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

LEGACY_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
"""Kinds of layers as files from before transformers 5 name them -> as they are named since."""

MAX_LAYERS = 10_000  # a spec has an entry for each

DECODER_NAMES: Mapping[str, Layout] = {
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
    "mlp.gate_up": tuple(f"model.layers.{{layer}}.mlp.{part}_proj.weight" for part in ("gate", "up")),
    "mlp.up": ("model.layers.{layer}.mlp.up_proj.weight",),
    "mlp.up_bias": tuple(f"model.layers.{{layer}}.mlp.{part}_proj.bias" for part in ("gate", "up")),
    "mlp.down": ("model.layers.{layer}.mlp.down_proj.weight",),
    "mlp.down_bias": ("model.layers.{layer}.mlp.down_proj.bias",),
}


EXPERT_NAMES: Mapping[str, Layout] = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.mlp.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up")),
    "w2": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
    "choice_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
    "shared.gate_up": tuple(f"model.layers.{{layer}}.mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up")),
    "shared.up_bias": tuple(f"model.layers.{{layer}}.mlp.shared_experts.{part}_proj.bias" for part in ("gate", "up")),
    "shared.down": ("model.layers.{layer}.mlp.shared_experts.down_proj.weight",),
    "shared.down_bias": ("model.layers.{layer}.mlp.shared_experts.down_proj.bias",),
}

POST_NORM_NAMES: Mapping[str, Layout] = {
    **DECODER_NAMES,
    "post_attn_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "post_mlp_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
}

FUSED_EXPERT_NAMES: WeightNames = {
    "router": ("model.layers.{layer}.mlp.gate.weight",),
    "w13": (of_expert(Stored("model.layers.{layer}.mlp.experts.gate_up_proj")),),
    "w2": (of_expert(Stored("model.layers.{layer}.mlp.experts.down_proj")),),
}
"""Names of experts of which a layer has one tensor, as transformers 5 keeps them in memory."""


def with_biases(names: Mapping[str, Layout]) -> Mapping[str, Layout]:
    """Return the names with those of biases, which stand next to their weights."""
    biases = {
        f"{key}_bias": tuple(str(name).removesuffix("weight") + "bias" for name in stored)
        for key, stored in names.items()
    }
    return {**names, **biases}


LAYER_NORM_NAMES: Mapping[str, Layout] = {
    **DECODER_NAMES,
    **with_biases({key: DECODER_NAMES[key] for key in ("norm", "attn_norm", "mlp_norm")}),
}


def with_layout(names: Mapping[str, Layout], how: Callable[[str], Stored], *keys: str) -> Mapping[str, Layout]:
    """Return the names, with the tensors of `keys` stored in another way."""
    return {**names, **{key: tuple(how(str(name)) for name in names[key]) for key in keys}}


def with_interleaved_rope(names: Mapping[str, Layout]) -> Mapping[str, Layout]:
    """Return the names of a family whose rope turns neighbouring elements of a head."""
    names = with_layout(names, interleaved_norm, *(key for key in ("q_norm", "k_norm") if key in names))
    for key in ("qkv", "qkv_bias"):
        q, k, v = names[key]
        names = {**names, key: (interleaved_rope(str(q)), interleaved_rope(str(k)), v)}
    return names


def read_attention(
    config: ConfigJson, *, num_kv_heads: int | None = None, head_dim: int | None = None, **fields: Any
) -> AttentionSpec:
    """Return the attention of a config. `num_kv_heads` and `head_dim` are defaults for one that does not say, `fields`
    those of AttentionSpec that the family has.
    """
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    defaults_to = num_heads if num_kv_heads is None or config.is_null("num_key_value_heads") else num_kv_heads
    if "head_dim" not in config and head_dim is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of its {num_heads} attention heads")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", defaults_to),
        head_dim=config.integer("head_dim", head_dim or hidden_size // num_heads),
        **fields,
    )


def biased_attention(
    config: ConfigJson, flag: str = "attention_bias", default: bool = False, **fields: Any
) -> AttentionSpec:
    """Return attention with biases on all products or on none, as a flag of the config says; `fields` are those of
    `read_attention`.
    """
    biased = config.flag(flag, default)
    return read_attention(config, qkv_bias=biased, o_bias=biased, **fields)


def head_norms(config: ConfigJson, *, eps: float = 1e-6, **fields: Any) -> HeadNormSpec:
    """Return RMS norms of queries and keys; `eps` is a default, `fields` are those of HeadNormSpec that there are."""
    return HeadNormSpec(norm=NormSpec(eps=config.number("rms_norm_eps", eps)), **fields)


def in_windows(attention: AttentionSpec, size: int | None, inside: Sequence[bool]) -> list[AttentionSpec]:
    """Return the attention of each layer, with a window of `size` where it is `inside`."""
    return [replace(attention, window=size) if windowed else attention for windowed in inside]


def decoder(
    config: ConfigJson,
    mixers: Mixer | Sequence[Mixer | None],
    mlps: MlpSpec | ExpertsSpec | Sequence[MlpSpec | ExpertsSpec | None],
    *,
    ropes: Sequence[RopeSpec] | None = None,
    rope_theta: float = 10_000.0,
    norm: NormSpec | None = None,
    norm_eps: float = 1e-6,
    layer: Mapping[str, Any] | None = None,
    **network: Any,
) -> ModelSpec:
    """Return the network of a config. `mixers` and `mlps` are those of all layers, or have an entry for each: None for
    a block that a layer does not have.

    `rope_theta` and `norm_eps` are defaults for a config that does not say; without `ropes` the config's one rotates
    whole heads. `layer` are further fields of LayerSpec, `network` those of ModelSpec.
    """
    count = num_layers(config)
    each_mixer = [mixers] * count if isinstance(mixers, Mixer) else mixers
    each_mlp = [mlps] * count if isinstance(mlps, MlpSpec | ExpertsSpec) else mlps
    for what, each_layer in (("mixers", each_mixer), ("MLPs", each_mlp)):
        if len(each_layer) != count:
            raise ModelError(
                f"config.json describes the {what} of {len(each_layer)} layers, num_hidden_layers is {count}"
            )
    if ropes is None:
        attentions = [each for each in each_mixer if isinstance(each, AttentionSpec)]
        ropes = [_whole_rope(config, attentions[0].head_dim, rope_theta)] if attentions else []
    max_position = config.integer("max_position_embeddings")
    fields: dict[str, Any] = {
        "dtype": checkpoint_dtype(config),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "max_position": max((extended_length(rope, max_position) for rope in ropes), default=max_position),
    }
    return ModelSpec(
        architecture=config.raw("architectures")[0],
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        norm=norm or NormSpec(eps=config.number("rms_norm_eps", norm_eps)),
        ropes=tuple(ropes),
        layers=tuple(
            LayerSpec(mixer=each, mlp=inner, **(layer or {})) for each, inner in zip(each_mixer, each_mlp, strict=True)
        ),
        **(fields | network),
    )


def _whole_rope(config: ConfigJson, head_dim: int, theta: float) -> RopeSpec:
    """Return the rope of a family that transformers rotates whole heads in, whatever is said."""
    rope = read_rope(config, head_dim=head_dim, theta=theta)
    if rope.rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"config.json: a partial_rotary_factor that rotates {rope.rotary_dim} of {head_dim} elements of a head is "
            "not supported: use 1"
        )
    return rope


def mlp(config: ConfigJson, size: int | None = None, **fields: Any) -> MlpSpec:
    """Return the dense MLP of a config, of `size` if that is not its intermediate_size; `fields` are those of MlpSpec
    that the family has.
    """
    size = config.integer("intermediate_size") if size is None else size
    return MlpSpec(**{"intermediate_size": size, "activation": activation(config), **fields})


def plain_mlp(
    config: ConfigJson, size: int | None = None, *, act: str, field: str = "hidden_act", bias: bool = True
) -> MlpSpec:
    """Return the MLP without a gate, of `size` as in `mlp`; `field` names its activation, which by default is `act`."""
    return mlp(config, size, activation=activation(config, field, act), gated=False, bias=bias)


def layer_norm(config: ConfigJson, eps: str, *, bias: bool = True) -> NormSpec:
    """Return layer norm, whose epsilon the config calls `eps`."""
    return NormSpec(eps=config.number(eps, 1e-5), centered=True, bias=bias)


def activation(config: ConfigJson, field: str = "hidden_act", default: str = "silu") -> str:
    """Return our name of the config's activation."""
    name = config.text(field, default)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{field} {name!r} is not one of those we know: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def checkpoint_dtype(config: ConfigJson) -> str:
    """Return the name of the dtype that the checkpoint is in."""
    return config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch.")


def optional_number(config: ConfigJson, name: str, default: float | None) -> float | None:
    """Return a positive number, or None where null is written out; `default` if the field is absent."""
    if config.is_null(name) or (default is None and name not in config):
        return None
    return config.number(name, default)


def num_layers(config: ConfigJson) -> int:
    """Return the number of layers."""
    return config.integer("num_hidden_layers", most=MAX_LAYERS)


def further_layers(config: ConfigJson, default: int) -> int:
    """Return the number of layers for further tokens that DeepSeek-V3 and its kin may store behind the others."""
    return config.integer("num_nextn_predict_layers", config.integer("num_mtp_layers", default, least=0), least=0)


def per_layer(config: ConfigJson, field: str, values: list[_Value]) -> list[_Value]:
    """Return the values of a field, of which each layer has one. Raises ModelError if there are more or fewer."""
    if len(values) != (count := num_layers(config)):
        raise ModelError(f"config.json: {field} describes {len(values)} layers, num_hidden_layers is {count}")
    return values


def layer_types(config: ConfigJson, field: str = "layer_types") -> list[str]:
    """Return the kind of each layer."""
    return per_layer(config, field, config.texts(field))


def windowed_layers(config: ConfigJson, otherwise: Callable[[int], bool]) -> list[bool]:
    """Return which layers have a window: as `layer_types` says, else as `otherwise` does of the number of a layer."""
    if "layer_types" in config:
        return [kind == "sliding_attention" for kind in layer_types(config)]
    return [otherwise(number) for number in range(num_layers(config))]


def optional_window(config: ConfigJson) -> int | None:
    """Return the sliding window of a family that has none if the config does not say."""
    return config.integer("sliding_window") if "sliding_window" in config else None


def window(config: ConfigJson) -> int | None:
    """Return the sliding window: if absent it is 4096, as in transformers; only null says that there is none."""
    return None if config.is_null("sliding_window") else config.integer("sliding_window", 4096)


def accept_only(config: ConfigJson, **values: Any) -> None:
    """Raise UnsupportedModelError if a field says something else than the one value that is computed."""
    for field, value in values.items():
        if field in config and config.raw(field) != value:
            raise UnsupportedModelError(
                f"config.json: {field} {brief(config.raw(field))} is not supported: use {json.dumps(value)}"
            )


def read_router(config: ConfigJson, count: int, top_k: int, **fields: Any) -> RouterSpec:
    """Return the router of a config. `count` and `top_k` are defaults for one that does not say, `fields` are those of
    RouterSpec that the family has.
    """
    return RouterSpec(
        num_experts=num_experts(config, count), top_k=config.integer("num_experts_per_tok", top_k), **fields
    )


def sigmoid_router(config: ConfigJson, **fields: Any) -> RouterSpec:
    """Return the router of DeepSeek-V3 and similar models; `fields` are those of RouterSpec that differ."""
    read = {
        "num_experts": config.integer("n_routed_experts", 128),
        "top_k": config.integer("num_experts_per_tok", 8),
        "renormalize": config.flag("norm_topk_prob", True),
        "num_groups": config.integer("n_group", 1),
        "top_groups": config.integer("topk_group", 1),
        "scale": config.number("routed_scaling_factor", 1.0),
    }
    return RouterSpec(sigmoid=True, choice_bias=True, min_sum=1e-20, **(read | fields))


def num_experts(config: ConfigJson, default: int) -> int:
    """Return the number of experts; transformers 5 takes either name for the other."""
    return config.integer("num_local_experts", config.integer("num_experts", default))
