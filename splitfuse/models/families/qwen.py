"""Reads Qwen2, Qwen3, Qwen3-MoE and Mellum: windows in some layers, biases or norms of heads, experts in some layers;
and the text of Qwen's vision-language models.
"""

from __future__ import annotations

from dataclasses import replace

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, MlpSpec, RouterSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    biased_attention,
    decoder,
    head_norms,
    in_windows,
    layer_types,
    mlp,
    num_layers,
    read_attention,
    read_router,
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
    return decoder(config, _in_upper_windows(config, read_attention(config, qkv_bias=True)), mlp(config))


def qwen3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3ForCausalLM."""
    attention = biased_attention(config, head_dim=128, qk_norm=head_norms(config))
    return decoder(config, _in_upper_windows(config, attention), mlp(config))


def qwen2_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen2MoeForCausalLM."""
    router = read_router(config, 60, 4, renormalize=config.flag("norm_topk_prob", False))
    experts = gated_shared_experts(config, router, 1408, 5632)
    attention = read_attention(config, num_kv_heads=16, qkv_bias=config.flag("qkv_bias", True))
    size = window(config) if config.flag("use_sliding_window", False) else None
    end = config.integer("max_window_layers", 28, least=0)
    inside = windowed_layers(config, lambda layer: size is not None and layer % 2 == 0 and layer < end)
    return decoder(config, in_windows(attention, size, inside), sparse_layers(config, experts))


def qwen3_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3MoeForCausalLM."""
    router = read_router(config, 128, 8, renormalize=config.flag("norm_topk_prob", False))
    experts = ExpertsSpec(router=router, expert=mlp(config, config.integer("moe_intermediate_size", 768)))
    attention = biased_attention(
        config,
        num_kv_heads=4,
        qk_norm=head_norms(config),
        window=window(config) if config.flag("use_sliding_window", False) else None,
    )
    return decoder(config, attention, sparse_layers(config, experts))


def gated_shared_experts(config: ConfigJson, router: RouterSpec, size: int, shared_size: int) -> ExpertsSpec:
    """Return experts, and one for all tokens behind a gate; the sizes are defaults for a config that does not say."""
    return ExpertsSpec(
        router=router,
        expert=mlp(config, config.integer("moe_intermediate_size", size)),
        shared=mlp(config, config.integer("shared_expert_intermediate_size", shared_size)),
        shared_gate=True,
    )


def sparse_layers(config: ConfigJson, experts: ExpertsSpec) -> list[MlpSpec | ExpertsSpec]:
    """Return the MLP of each layer: every `decoder_sparse_step`-th has experts, but those of `mlp_only_layers`."""
    every, dense = config.integer("decoder_sparse_step", 1), set(config.integers("mlp_only_layers", []))
    return [mlp(config) if n in dense or (n + 1) % every else experts for n in range(num_layers(config))]


def qwen2_vl(config: ConfigJson) -> ModelSpec:
    """Return the network of the text of Qwen2-VL and Qwen2.5-VL: Qwen2. Where there is no image, the three positions of
    a token are one, and its rope is a plain one.
    """
    attention = read_attention(config, num_kv_heads=8, qkv_bias=True)
    layers = _in_upper_windows(config.with_defaults({"max_window_layers": 80}), attention)
    rope = read_rope(config, head_dim=attention.head_dim, theta=1e6, honours=MROPE)
    return decoder(config, layers, mlp(config), ropes=[rope], norm_eps=1e-5)


def qwen3_vl(config: ConfigJson) -> ModelSpec:
    """Return the network of the text of Qwen3-VL: Qwen3 without windows."""
    attention = biased_attention(config, num_kv_heads=32, head_dim=128, qk_norm=head_norms(config))
    rope = read_rope(config, head_dim=attention.head_dim, theta=5e5, honours=MROPE)
    return decoder(config, attention, mlp(config), ropes=[rope])


def mellum(config: ConfigJson) -> ModelSpec:
    """Return the network of a MellumForCausalLM: Qwen3-MoE with windows, and a rope for each kind of layer."""
    attention = biased_attention(config, num_kv_heads=4, head_dim=128, qk_norm=head_norms(config))
    kinds = (attention, replace(attention, window=config.integer("sliding_window", 1024), rope=1))
    router = read_router(config, 64, 8, renormalize=config.flag("norm_topk_prob", True))
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


def _in_upper_windows(config: ConfigJson, attention: AttentionSpec) -> list[AttentionSpec]:
    """Return the attention of each layer, with windows as layer_types says, else from max_window_layers on."""
    if not config.flag("use_sliding_window", False):
        return [attention] * num_layers(config)
    inside = windowed_layers(config, lambda layer: layer >= config.integer("max_window_layers", 28, least=0))
    return in_windows(attention, window(config), inside)


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
