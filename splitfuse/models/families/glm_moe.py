"""Reads GLM-4.5 and dots.llm1: the router of DeepSeek-V3 and an expert for every token, behind some dense layers."""

from __future__ import annotations

from typing import Any

from splitfuse.kernels.layers import ExpertsSpec, MlpSpec
from splitfuse.models.families.common import (
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    biased_attention,
    decoder,
    further_layers,
    head_norms,
    in_windows,
    mlp,
    num_layers,
    read_attention,
    sigmoid_router,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec


def glm4_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a Glm4MoeForCausalLM."""
    norms = head_norms(config, eps=1e-5) if config.flag("use_qk_norm", False) else None
    attention = read_attention(config, num_kv_heads=8, qkv_bias=config.flag("attention_bias", False), qk_norm=norms)
    mlps = _experts_from(1, config)
    rope = read_rope(config, head_dim=attention.head_dim, share=0.5)
    further = further_layers(config, 1)
    return decoder(config, attention, mlps, ropes=(rope,), norm_eps=1e-5, further_layers=further)


def dots1(config: ConfigJson) -> ModelSpec:
    """Return the network of a Dots1ForCausalLM."""
    attention = biased_attention(config, num_kv_heads=32, qk_norm=head_norms(config))
    mlps = _experts_from(0, config, renormalize=config.flag("norm_topk_prob", False))
    size, first = window(config), config.integer("max_window_layers", 62, least=0)
    inside = windowed_layers(config, lambda number: number >= first)
    return decoder(config, in_windows(attention, size, inside), mlps)


def _experts_from(first: int, config: ConfigJson, **router: Any) -> list[MlpSpec | ExpertsSpec]:
    """Return the MLP of each layer, which has experts from layer `first` on if the config does not say."""
    first = config.integer("first_k_dense_replace", first, least=0)
    size = config.integer("moe_intermediate_size", 1408)
    experts = ExpertsSpec(
        router=sigmoid_router(config, **router),
        expert=mlp(config, size),
        shared=mlp(config, size * config.integer("n_shared_experts", 1)),
    )
    return [mlp(config) if number < first else experts for number in range(num_layers(config))]


FAMILIES = {
    "Dots1ForCausalLM": Family("dots1", dots1, EXPERT_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
    "Glm4MoeForCausalLM": Family("glm4_moe", glm4_moe, EXPERT_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
}
