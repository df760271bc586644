"""Reads Cohere's Command R: layers whose blocks read one norm, a rope of neighbouring elements, scaled logits; in the
second generation windows, and no positions in the layers without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, NormSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    accept_only,
    biased_attention,
    decoder,
    layer_norm,
    mlp,
    window,
    windowed_layers,
    with_interleaved_rope,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.spec import ModelSpec

COHERE_NAMES = with_interleaved_rope(DECODER_NAMES)


def cohere(config: ConfigJson) -> ModelSpec:
    """Return the network of a CohereForCausalLM."""
    norms = HeadNormSpec(norm=_norm(config), own_weights=True) if config.flag("use_qk_norm", False) else None
    return _parallel(config, biased_attention(config, qk_norm=norms), rope_theta=500_000.0)


def cohere2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Cohere2ForCausalLM."""
    accept_only(config, use_qk_norm=False)
    every = config.integer("sliding_window_pattern", 4)
    size, attention = window(config), biased_attention(config)
    near, far = replace(attention, window=size), replace(attention, rope=None)
    windowed = windowed_layers(config, lambda number: (number + 1) % every > 0)
    return _parallel(config, [near if size and inside else far for inside in windowed])


def _norm(config: ConfigJson) -> NormSpec:
    return layer_norm(config, "layer_norm_eps", bias=False)


def _parallel(config: ConfigJson, attention: AttentionSpec | Sequence[AttentionSpec], **fields: Any) -> ModelSpec:
    return decoder(
        config,
        attention,
        mlp(config),
        norm=_norm(config),
        layer={"parallel": True, "shared_norm": True},
        logit_scale=config.number("logit_scale", 0.0625),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        **fields,
    )


FAMILIES = {
    "CohereForCausalLM": Family("cohere", cohere, COHERE_NAMES),
    "Cohere2ForCausalLM": Family("cohere2", cohere2, COHERE_NAMES),
}
