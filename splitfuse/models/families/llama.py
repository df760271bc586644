"""Llama and its kin: Mistral has a window in every layer, Mixtral also experts."""

from __future__ import annotations

from splitfuse.kernels.interface import ExpertsSpec, RouterSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    WeightNames,
    decoder,
    mlp,
    num_experts,
    read_attention,
    window,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.spec import ModelSpec

MIXTRAL_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3")),
    "w2": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
}


def llama(config: ConfigJson) -> ModelSpec:
    """Return the network of a LlamaForCausalLM."""
    biased = config.flag("attention_bias", False)
    attention = read_attention(config, qkv_bias=biased, o_bias=biased)
    return decoder(config, attention, mlp(config, bias=config.flag("mlp_bias", False)))


def mistral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MistralForCausalLM."""
    return decoder(config, read_attention(config, num_kv_heads=8, window=window(config)), mlp(config))


def mixtral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MixtralForCausalLM."""
    # Unlike Mistral, whose absent window is 4096: here absent is none, as in transformers.
    size = config.integer("sliding_window") if "sliding_window" in config else None
    router = RouterSpec(
        num_experts=num_experts(config, 8), top_k=config.integer("num_experts_per_tok", 2), renormalize=True
    )
    attention = read_attention(config, num_kv_heads=8, window=size)
    return decoder(config, attention, ExpertsSpec(router=router, expert=mlp(config)), norm_eps=1e-5, rope_theta=1e6)
