"""Reads OLMo 2, OLMo 3 and OLMoE: norms of whole rows of queries and keys; behind the blocks alone but in OLMoE."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, NormPlace
from splitfuse.models.families.common import (
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    POST_NORM_NAMES,
    Family,
    accept_only,
    biased_attention,
    decoder,
    head_norms,
    mlp,
    read_router,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import read_layer_ropes
from splitfuse.models.spec import ModelSpec


def olmo2(config: ConfigJson) -> ModelSpec:
    """Return the network of an Olmo2ForCausalLM."""
    return decoder(config, _attention(config), mlp(config), norm_eps=1e-5, layer={"norms": NormPlace.AFTER})


def olmo3(config: ConfigJson) -> ModelSpec:
    """Return the network of an Olmo3ForCausalLM."""
    attention, size = _attention(config), window(config)
    kinds = (attention, replace(attention, window=size, rope=1))
    windowed = windowed_layers(config, lambda number: (number + 1) % 4 > 0)
    return decoder(
        config,
        [kinds[inside] for inside in windowed],
        mlp(config),
        ropes=read_layer_ropes(config, head_dim=attention.head_dim, theta=500_000.0, local_theta=500_000.0),
        norm_eps=1e-5,
        layer={"norms": NormPlace.AFTER},
    )


def olmoe(config: ConfigJson) -> ModelSpec:
    """Return the network of an OlmoeForCausalLM."""
    router = read_router(config, 64, 8, renormalize=config.flag("norm_topk_prob", False))
    return decoder(config, _attention(config), ExpertsSpec(router=router, expert=mlp(config)), norm_eps=1e-5)


def _attention(config: ConfigJson) -> AttentionSpec:
    accept_only(config, clip_qkv=None)
    return biased_attention(config, qk_norm=head_norms(config, eps=1e-5, whole_row=True))


FAMILIES = {
    "Olmo2ForCausalLM": Family("olmo2", olmo2, POST_NORM_NAMES),
    "Olmo3ForCausalLM": Family("olmo3", olmo3, POST_NORM_NAMES),
    "OlmoeForCausalLM": Family("olmoe", olmoe, EXPERT_NAMES, (FUSED_EXPERT_NAMES,)),
}
