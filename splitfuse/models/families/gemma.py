"""Reads Gemma 1, 2 and 3: norms stored as their distance from one, embeddings scaled by the root of their width; from
Gemma 2 on norms around the blocks, windows in most layers and soft caps, in Gemma 3 norms of heads and a second rope.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from splitfuse.kernels.layers import AttentionSpec, NormPlace
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    activation,
    biased_attention,
    checkpoint_dtype,
    decoder,
    head_norms,
    in_windows,
    mlp,
    optional_number,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import plus_one
from splitfuse.models.families.rope_config import read_layer_ropes
from splitfuse.models.spec import ModelSpec

_NORMS = {
    "norm": "model.norm.weight",
    "attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
}
_NORMS_AROUND = {
    **_NORMS,
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "post_attn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "post_mlp_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
GEMMA_NAMES: WeightNames = {**DECODER_NAMES, **{name: (plus_one(stored),) for name, stored in _NORMS.items()}}
GEMMA2_NAMES: WeightNames = {**DECODER_NAMES, **{name: (plus_one(stored),) for name, stored in _NORMS_AROUND.items()}}

TANH = "gelu_pytorch_tanh"


def gemma(config: ConfigJson) -> ModelSpec:
    """Return the network of a GemmaForCausalLM."""
    attention = biased_attention(config, num_kv_heads=16, head_dim=256)
    function = activation(config, "hidden_act", TANH)
    inner = mlp(config, activation="gelu_tanh" if function == "gelu" else function)  # the first configs say gelu
    return decoder(config, attention, inner, **outside_layers(config))


def gemma2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Gemma2ForCausalLM: every other layer has a window, from the first on."""
    inside = windowed_layers(config, lambda number: number % 2 == 0)
    attention = _scaled(config, softcap=optional_number(config, "attn_logit_softcapping", 50.0))
    return decoder(
        config,
        in_windows(attention, window(config), inside),
        mlp(config, activation=activation(config, "hidden_activation", TANH)),
        layer={"norms": NormPlace.AROUND},
        logit_softcap=optional_number(config, "final_logit_softcapping", 30.0),
        **outside_layers(config),
    )


def gemma3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Gemma3ForCausalLM: five layers of six have a window, and a rope of their own."""
    every = config.integer("sliding_window_pattern", 6)
    inside = windowed_layers(config, lambda number: (number + 1) % every > 0)
    attention = _scaled(config, qk_norm=head_norms(config))
    local = replace(attention, rope=1, window=window(config))
    return decoder(
        config,
        [local if windowed else attention for windowed in inside],
        mlp(config, activation=activation(config, "hidden_activation", TANH)),
        ropes=read_layer_ropes(config, head_dim=attention.head_dim, theta=1e6, local_theta=1e4),
        layer={"norms": NormPlace.AROUND},
        logit_softcap=optional_number(config, "final_logit_softcapping", None),
        **outside_layers(config),
    )


def _scaled(config: ConfigJson, **fields: Any) -> AttentionSpec:
    """Return the attention of Gemma 2 and 3, whose scores have a scale of their own."""
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    return biased_attention(config, num_kv_heads=4, head_dim=256, scale=scale, **fields)


def outside_layers(config: ConfigJson) -> dict[str, Any]:
    """Return what all have outside the layers. The scale of embeddings is rounded to the checkpoint's dtype, in which
    the models are trained.
    """
    scale = torch.tensor(config.integer("hidden_size") ** 0.5)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(checkpoint_dtype(config), torch.float32)
    return {"embed_scale": scale.to(dtype).item(), "tied_embeddings": config.flag("tie_word_embeddings", True)}


FAMILIES = {
    "Gemma2ForCausalLM": Family("gemma2", gemma2, GEMMA2_NAMES),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3, GEMMA2_NAMES),
    "Gemma3ForConditionalGeneration": Family("gemma3", gemma3, GEMMA2_NAMES, text_types=("gemma3_text",)),
    "GemmaForCausalLM": Family("gemma", gemma, GEMMA_NAMES),
}
