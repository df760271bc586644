"""Reads Qwen2, Qwen3 and Qwen3-MoE: windows from a layer on, biases or norms of heads, experts in some layers."""

from __future__ import annotations

from splitfuse.kernels.interface import ExpertsSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    WeightNames,
    Windows,
    activation,
    mlp,
    num_experts,
    num_layers,
    plain_decoder,
    window,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.spec import ModelSpec

QWEN3_MOE_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.mlp.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up")),
    "w2": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
}


def qwen2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen2ForCausalLM."""
    return plain_decoder(config, qkv_bias=True, windows=_upper_layer_windows(config))


def qwen3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3ForCausalLM."""
    biased, windows = config.flag("attention_bias", False), _upper_layer_windows(config)
    return plain_decoder(config, head_dim=128, qk_norm=True, qkv_bias=biased, o_bias=biased, windows=windows)


def qwen3_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3MoeForCausalLM."""
    biased, layers = config.flag("attention_bias", False), range(num_layers(config))
    every, dense_layers = config.integer("decoder_sparse_step", 1), set(config.integers("mlp_only_layers", []))
    dense = mlp(config)
    experts = ExpertsSpec(
        num_experts=num_experts(config, 128),
        top_k=config.integer("num_experts_per_tok", 8),
        intermediate_size=config.integer("moe_intermediate_size", 768),
        activation=activation(config),
        renormalize=config.flag("norm_topk_prob", False),
    )
    return plain_decoder(
        config,
        num_kv_heads=4,
        qk_norm=True,
        qkv_bias=biased,
        o_bias=biased,
        windows=(window(config) if config.flag("use_sliding_window", False) else None,) * len(layers),
        mlps=[dense if n in dense_layers or (n + 1) % every else experts for n in layers],
    )


def _upper_layer_windows(config: ConfigJson) -> Windows:
    """Qwen's rule: if windows are on, layer_types says where; without it, the layers from max_window_layers on."""
    layers = range(num_layers(config))
    if not config.flag("use_sliding_window", False):
        return (None,) * len(layers)
    size = window(config)
    if "layer_types" in config:
        return tuple(size if kind == "sliding_attention" else None for kind in config.texts("layer_types"))
    first = config.integer("max_window_layers", 28, least=0)
    return tuple(size if layer >= first else None for layer in layers)
