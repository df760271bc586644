"""Reads Ernie 4.5, dense and with experts: rope that turns neighbouring elements of a head."""

from __future__ import annotations

from typing import Any

from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, MlpSpec, RouterSpec
from splitfuse.models.families.common import (
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    biased_attention,
    decoder,
    mlp,
    num_layers,
    with_interleaved_rope,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Stored
from splitfuse.models.spec import ModelSpec


def _choice_bias(place: str) -> Stored:
    name = f"model.layers.{{layer}}.mlp.{place}.e_score_correction_bias"
    return Stored(name, lambda tensor, _: tensor.flatten(), lambda shape, _: (1, *shape))


ERNIE_NAMES: WeightNames = {
    **with_interleaved_rope(EXPERT_NAMES),
    "choice_bias": (_choice_bias("moe_statics"),),
    "head_bias": ("lm_head.bias",),
}

ERNIE_ALTERNATIVES = ({**FUSED_EXPERT_NAMES, "choice_bias": (_choice_bias("gate.moe_statics"),)},)


def ernie4_5(config: ConfigJson) -> ModelSpec:
    """Return the network of an Ernie4_5ForCausalLM."""
    attention = biased_attention(config, "use_bias", num_kv_heads=2, head_dim=128)
    return _ernie(config, attention, mlp(config, bias=config.flag("use_bias", False)))


def ernie4_5_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of an Ernie4_5_MoeForCausalLM."""
    biased, size = config.flag("use_bias", False), config.integer("moe_intermediate_size", 1536)
    router = RouterSpec(
        num_experts=config.integer("moe_num_experts", 64),
        top_k=config.integer("moe_k", 6),
        renormalize=True,
        choice_bias=True,
        min_sum=config.number("moe_norm_min", 1e-12),
    )
    shared = config.integer("moe_num_shared_experts", 2, least=0)
    experts = ExpertsSpec(
        router=router, expert=mlp(config, size), shared=mlp(config, size * shared, bias=biased) if shared else None
    )
    dense, every = mlp(config, bias=biased), config.integer("moe_layer_interval", 1)
    first = config.integer("moe_layer_start_index", 1, least=0)
    last = config.integer("moe_layer_end_index", -1, least=-1)
    layers = range(num_layers(config))
    sparse = {n for n in layers if (n + 1) % every == 0 and first <= n <= (len(layers) if last < 0 else last)}
    mlps = [experts if n in sparse else dense for n in layers]
    return _ernie(config, biased_attention(config, "use_bias", num_kv_heads=4), mlps, head_bias=biased)


def _ernie(
    config: ConfigJson, attention: AttentionSpec, mlps: MlpSpec | list[MlpSpec | ExpertsSpec], **network: Any
) -> ModelSpec:
    tied = config.flag("tie_word_embeddings", True)
    return decoder(config, attention, mlps, rope_theta=500_000.0, norm_eps=1e-5, tied_embeddings=tied, **network)


FAMILIES = {
    "Ernie4_5ForCausalLM": Family("ernie4_5", ernie4_5, ERNIE_NAMES),
    "Ernie4_5_MoeForCausalLM": Family("ernie4_5_moe", ernie4_5_moe, ERNIE_NAMES, alternatives=ERNIE_ALTERNATIVES),
}
