"""Families as data: how an architecture's config.json becomes a ModelSpec, and what its weights are called.

To add a family: a function from config to spec, a weight-name table if its names are new, a line in FAMILIES. A feature
of a config that changes the network is honoured or refused, never ignored. Knows no tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.rope import extended_length, read_rope
from splitfuse.models.sources.hub import read_config
from splitfuse.models.spec import ModelSpec, MoESpec

WeightNames: TypeAlias = Mapping[str, tuple[str, ...]]
"""Our name of a weight -> the checkpoint's tensors stacked to make it, with `{layer}` for the layer's number and
`{expert}` for the expert's.
"""


@dataclass(frozen=True)
class Family:
    """One architecture: its config reader, its weight names, and which of FOREIGN_FEATURES its reader honours."""

    read: Callable[[ConfigJson], ModelSpec]
    names: WeightNames
    honours: frozenset[str] = frozenset()


def load_spec(path: Path) -> ModelSpec:
    """The network described by a model folder. Raises as `hub.read_config` and `spec_from_config` do."""
    return spec_from_config(read_config(path))


def spec_from_config(values: Mapping[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises UnsupportedModelError for an architecture or a feature we do not know, ModelError for values without sense.
    """
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UnsupportedModelError(
            'config.json names no architecture: "architectures" should be a list such as ["LlamaForCausalLM"]'
        )
    family = find_family(architectures[0])
    config = ConfigJson(values)
    for feature in FOREIGN_FEATURES:
        if config.raw(feature) and feature not in family.honours:
            raise UnsupportedModelError(f"config.json has {feature}, which is not supported")
    spec = family.read(config)
    _check_layer_types(config, spec)
    return spec


def find_family(architecture: str) -> Family:
    """The entry of FAMILIES, or UnsupportedModelError with those there are and the nearest."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    near = difflib.get_close_matches(architecture, FAMILIES, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UnsupportedModelError(
        f"architecture {architecture!r} is not one of those we know: {', '.join(sorted(FAMILIES))}{hint}"
    )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

MOST_LAYERS = 10_000  # a spec has an entry for each

# What would make another network of most families, and is refused by those that do not honour it.
FOREIGN_FEATURES = (
    "quantization_config",
    "compression_config",
    "alibi",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts",
    "num_local_experts",
    "use_mrope",
)
EXPERTS = frozenset({"num_experts", "num_local_experts"})

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

QWEN3_MOE_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.mlp.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up")),
    "w2": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
}
MIXTRAL_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3")),
    "w2": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
}


def _llama(config: ConfigJson) -> ModelSpec:
    biased = config.flag("attention_bias", False)
    spec = _plain_decoder(config)
    return replace(spec, qkv_bias=biased, o_bias=biased, mlp_bias=config.flag("mlp_bias", False))


def _mistral(config: ConfigJson) -> ModelSpec:
    spec = _plain_decoder(config, num_kv_heads=8)
    return replace(spec, windows=(_window(config),) * spec.num_layers)


def _qwen2(config: ConfigJson) -> ModelSpec:
    spec = _plain_decoder(config)
    return replace(spec, qkv_bias=True, windows=_upper_layer_windows(config, spec.num_layers))


def _qwen3(config: ConfigJson) -> ModelSpec:
    biased = config.flag("attention_bias", False)
    spec = _plain_decoder(config, head_dim=128)
    windows = _upper_layer_windows(config, spec.num_layers)
    return replace(spec, head_norms=True, qkv_bias=biased, o_bias=biased, windows=windows)


def _mixtral(config: ConfigJson) -> ModelSpec:
    spec = _plain_decoder(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6)
    window = config.integer("sliding_window") if "sliding_window" in config else None
    moe = MoESpec(
        num_experts=_num_experts(config, 8),
        top_k=config.integer("num_experts_per_tok", 2),
        intermediate_size=spec.intermediate_size,
        renormalize=True,
    )
    return replace(spec, windows=(window,) * spec.num_layers, moe=moe)


def _qwen3_moe(config: ConfigJson) -> ModelSpec:
    biased = config.flag("attention_bias", False)
    spec = _plain_decoder(config, num_kv_heads=4)
    window = _window(config) if config.flag("use_sliding_window", False) else None
    every, dense = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers", [])
    moe = MoESpec(
        num_experts=_num_experts(config, 128),
        top_k=config.integer("num_experts_per_tok", 8),
        intermediate_size=config.integer("moe_intermediate_size", 768),
        renormalize=config.flag("norm_topk_prob", False),
        dense_layers=frozenset(n for n in range(spec.num_layers) if n in dense or (n + 1) % every),
    )
    windows = (window,) * spec.num_layers
    return replace(spec, head_norms=True, qkv_bias=biased, o_bias=biased, windows=windows, moe=moe)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, DECODER_NAMES),
    "MistralForCausalLM": Family(_mistral, DECODER_NAMES),
    "MixtralForCausalLM": Family(_mixtral, MIXTRAL_NAMES, honours=EXPERTS),
    "Qwen2ForCausalLM": Family(_qwen2, DECODER_NAMES),
    "Qwen3ForCausalLM": Family(_qwen3, DECODER_NAMES),
    "Qwen3MoeForCausalLM": Family(_qwen3_moe, QWEN3_MOE_NAMES, honours=EXPERTS),
}


def _plain_decoder(
    config: ConfigJson,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
) -> ModelSpec:
    """What the families share; the keywords are for a config that does not say."""
    num_layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    if "head_dim" not in config and head_dim is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of its {num_heads} attention heads")
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads)
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {activation!r} is not one of those we know: {', '.join(sorted(ACTIVATIONS))}"
        )
    rope = read_rope(config, head_dim=head_dim, theta=rope_theta)
    return ModelSpec(
        architecture=config.raw("architectures")[0],
        dtype=config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch."),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_kv_heads or num_heads),
        head_dim=head_dim,
        max_position=extended_length(rope, config.integer("max_position_embeddings")),
        norm_eps=config.number("rms_norm_eps", norm_eps),
        activation=ACTIVATIONS[activation],
        rope=rope,
        windows=(None,) * num_layers,
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def _num_experts(config: ConfigJson, default: int) -> int:
    """transformers 5 takes either name for the other."""
    return config.integer("num_local_experts" if "num_local_experts" in config else "num_experts", default)


def _window(config: ConfigJson) -> int | None:
    """The sliding window: absent it is 4096, as in transformers, and only null says that there is none."""
    return None if config.is_null("sliding_window") else config.integer("sliding_window", 4096)


def _upper_layer_windows(config: ConfigJson, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's rule: if windows are on, layer_types says where; without it, the layers from max_window_layers on."""
    if not config.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = _window(config)
    if "layer_types" in config:
        return tuple(window if kind == "sliding_attention" else None for kind in config.texts("layer_types"))
    first = config.integer("max_window_layers", 28, least=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _check_layer_types(config: ConfigJson, spec: ModelSpec) -> None:
    """Refuse a config whose layer_types says something else than what will be computed."""
    if "layer_types" not in config:
        return
    computed = ["full_attention" if window is None else "sliding_attention" for window in spec.windows]
    if config.raw("layer_types") != computed:
        raise UnsupportedModelError(
            f"layer_types {config.raw('layer_types')!r:.200} is not supported here: "
            f"{spec.architecture} with this config computes {computed!r:.200}"
        )
