"""Llama and its kin: Mistral has a window in every layer, Mixtral also experts."""

from __future__ import annotations

from splitfuse.kernels.interface import ExpertsSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    WeightNames,
    activation,
    num_experts,
    num_layers,
    plain_decoder,
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
    return plain_decoder(config, qkv_bias=biased, o_bias=biased, mlp_bias=config.flag("mlp_bias", False))


def mistral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MistralForCausalLM."""
    return plain_decoder(config, num_kv_heads=8, windows=(window(config),) * num_layers(config))


def mixtral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MixtralForCausalLM."""
    count = num_layers(config)
    # Unlike Mistral, whose absent window is 4096: here absent is none, as in transformers.
    size = config.integer("sliding_window") if "sliding_window" in config else None
    experts = ExpertsSpec(
        num_experts=num_experts(config, 8),
        top_k=config.integer("num_experts_per_tok", 2),
        intermediate_size=config.integer("intermediate_size"),
        activation=activation(config),
        renormalize=True,
    )
    return plain_decoder(
        config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6, windows=(size,) * count, mlps=(experts,) * count
    )
