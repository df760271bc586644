"""Reads Qwen2, Qwen3, Qwen3-MoE and Mellum: windows in some layers, biases or norms of heads, experts in some layers;
and the text of Qwen's vision-language models.
"""

from __future__ import annotations

from dataclasses import replace

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.interface import ExpertsSpec, MlpSpec, RouterSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    Windows,
    decoder,
    head_norms,
    in_windows,
    layer_types,
    mlp,
    num_experts,
    num_layers,
    read_attention,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import MROPE, read_layer_ropes, read_rope
from splitfuse.models.spec import ModelSpec

QWEN2_MOE_NAMES: WeightNames = {
    **EXPERT_NAMES,
    "shared.gate_up": tuple(f"model.layers.{{layer}}.mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")),
    "shared.down": ("model.layers.{layer}.mlp.shared_expert.down_proj.weight",),
    "shared_gate": ("model.layers.{layer}.mlp.shared_expert_gate.weight",),
}


def qwen2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen2ForCausalLM."""
    attention = read_attention(config, qkv_bias=True)
    return decoder(config, in_windows(attention, _upper_layer_windows(config)), mlp(config))


def qwen3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3ForCausalLM."""
    biased = config.flag("attention_bias", False)
    attention = read_attention(config, head_dim=128, qk_norm=head_norms(config), qkv_bias=biased, o_bias=biased)
    return decoder(config, in_windows(attention, _upper_layer_windows(config)), mlp(config))


def qwen2_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen2MoeForCausalLM."""
    router = RouterSpec(
        num_experts=num_experts(config, 60),
        top_k=config.integer("num_experts_per_tok", 4),
        renormalize=config.flag("norm_topk_prob", False),
    )
    experts = ExpertsSpec(
        router=router,
        expert=mlp(config, config.integer("moe_intermediate_size", 1408)),
        shared=mlp(config, config.integer("shared_expert_intermediate_size", 5632)),
        shared_gate=True,
    )
    attention = read_attention(config, num_kv_heads=16, qkv_bias=config.flag("qkv_bias", True))
    size = window(config) if config.flag("use_sliding_window", False) else None
    end = config.integer("max_window_layers", 28, least=0)
    inside = windowed_layers(config, lambda layer: size is not None and layer % 2 == 0 and layer < end)
    layers = in_windows(attention, tuple(size if windowed else None for windowed in inside))
    return decoder(config, layers, _sparse(config, experts))


def qwen3_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3MoeForCausalLM."""
    biased = config.flag("attention_bias", False)
    router = RouterSpec(
        num_experts=num_experts(config, 128),
        top_k=config.integer("num_experts_per_tok", 8),
        renormalize=config.flag("norm_topk_prob", False),
    )
    experts = ExpertsSpec(router=router, expert=mlp(config, config.integer("moe_intermediate_size", 768)))
    attention = read_attention(
        config,
        num_kv_heads=4,
        qk_norm=head_norms(config),
        qkv_bias=biased,
        o_bias=biased,
        window=window(config) if config.flag("use_sliding_window", False) else None,
    )
    return decoder(config, attention, _sparse(config, experts))


def _sparse(config: ConfigJson, experts: ExpertsSpec) -> list[MlpSpec | ExpertsSpec]:
    """Return the MLP of each layer: every `decoder_sparse_step`-th has experts, but those of `mlp_only_layers`."""
    every, dense = config.integer("decoder_sparse_step", 1), set(config.integers("mlp_only_layers", []))
    return [mlp(config) if n in dense or (n + 1) % every else experts for n in range(num_layers(config))]


def qwen2_vl(config: ConfigJson) -> ModelSpec:
    """Return the network of the text of Qwen2-VL and Qwen2.5-VL: Qwen2. Where there is no image, the three positions of
    a token are one, and its rope is a plain one.
    """
    attention = read_attention(config, num_kv_heads=8, qkv_bias=True)
    windows = _upper_layer_windows(config.with_defaults({"max_window_layers": 80}))
    rope = read_rope(config, head_dim=attention.head_dim, theta=1e6, honours=MROPE)
    return decoder(config, in_windows(attention, windows), mlp(config), ropes=[rope], norm_eps=1e-5)


def qwen3_vl(config: ConfigJson) -> ModelSpec:
    """Return the network of the text of Qwen3-VL: Qwen3 without windows."""
    biased = config.flag("attention_bias", False)
    attention = read_attention(
        config, num_kv_heads=32, head_dim=128, qk_norm=head_norms(config), qkv_bias=biased, o_bias=biased
    )
    rope = read_rope(config, head_dim=attention.head_dim, theta=5e5, honours=MROPE)
    return decoder(config, attention, mlp(config), ropes=[rope])


def mellum(config: ConfigJson) -> ModelSpec:
    """Return the network of a MellumForCausalLM: Qwen3-MoE with windows, and a rope for each kind of layer."""
    biased, size = config.flag("attention_bias", False), config.integer("sliding_window", 1024)
    attention = read_attention(
        config, num_kv_heads=4, head_dim=128, qk_norm=head_norms(config), qkv_bias=biased, o_bias=biased
    )
    kinds = (attention, replace(attention, window=size, rope=1))
    router = RouterSpec(
        num_experts=num_experts(config, 64),
        top_k=config.integer("num_experts_per_tok", 8),
        renormalize=config.flag("norm_topk_prob", True),
    )
    experts = ExpertsSpec(router=router, expert=mlp(config, config.integer("moe_intermediate_size", 896)))
    mlps: dict[str, MlpSpec | ExpertsSpec] = {"sparse": experts, "dense": mlp(config)}
    inner = layer_types(config, "mlp_layer_types") if "mlp_layer_types" in config else ["sparse"] * num_layers(config)
    if unknown := set(inner) - set(mlps):
        raise UnsupportedModelError(f"config.json: mlp_layer_types must be sparse or dense, not {', '.join(unknown)}")
    return decoder(
        config,
        [kinds[inside] for inside in windowed_layers(config, lambda _: False)],
        [mlps[kind] for kind in inner],
        ropes=read_layer_ropes(config, head_dim=attention.head_dim, theta=500_000.0, local_theta=10_000.0),
    )


def _upper_layer_windows(config: ConfigJson) -> Windows:
    """Return the window of each layer: from layer_types, else from max_window_layers on."""
    layers = range(num_layers(config))
    if not config.flag("use_sliding_window", False):
        return (None,) * len(layers)
    size = window(config)
    if "layer_types" in config:
        return tuple(size if kind == "sliding_attention" else None for kind in layer_types(config))
    first = config.integer("max_window_layers", 28, least=0)
    return tuple(size if layer >= first else None for layer in layers)


FAMILIES = {
    "MellumForCausalLM": Family("mellum", mellum, EXPERT_NAMES),
    "Qwen2ForCausalLM": Family("qwen2", qwen2, DECODER_NAMES),
    "Qwen2VLForConditionalGeneration": Family("qwen2_vl", qwen2_vl, DECODER_NAMES, text_types=("qwen2_vl_text",)),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl", qwen2_vl, DECODER_NAMES, text_types=("qwen2_5_vl_text",)
    ),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", qwen2_moe, QWEN2_MOE_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
    "Qwen3ForCausalLM": Family("qwen3", qwen3, DECODER_NAMES),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3_moe, EXPERT_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
    "Qwen3VLForConditionalGeneration": Family("qwen3_vl", qwen3_vl, DECODER_NAMES, text_types=("qwen3_vl_text",)),
}
