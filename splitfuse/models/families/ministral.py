"""Reads Ministral and Ministral 3: Mistral with windows in some layers; with queries that grow with the position."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.layers import QueryScaling
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    decoder,
    in_windows,
    mlp,
    optional_window,
    read_attention,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.llama import mistral
from splitfuse.models.families.rope_config import read_rope, rope_section
from splitfuse.models.spec import ModelSpec, YarnScaling

MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Rope of a config that has none."""


def ministral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MinistralForCausalLM."""
    size = window(config)
    inside = windowed_layers(config, lambda _: size is not None)
    return decoder(config, in_windows(read_attention(config, num_kv_heads=8), size, inside), mlp(config))


def ministral3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Ministral3ForCausalLM."""
    config = config.with_defaults({"rope_parameters": MINISTRAL3_ROPE})
    section = rope_section(config)
    head_dim = None if config.is_null("head_dim") else 128
    attention = read_attention(config, num_kv_heads=8, head_dim=head_dim, window=optional_window(config))
    # Its section repeats the length of the config.
    rope = read_rope(config, head_dim=attention.head_dim, honours=["llama_4_scaling_beta", "max_position_embeddings"])
    if "llama_4_scaling_beta" in section:
        if not isinstance(rope.scaling, YarnScaling):
            raise UnsupportedModelError("config.json: llama_4_scaling_beta needs a rope of type yarn")
        beta, length = section.number("llama_4_scaling_beta"), rope.scaling.original_max_position
        attention = replace(attention, query_scaling=QueryScaling(beta=beta, length=length))
    return decoder(config, attention, mlp(config), ropes=(rope,), norm_eps=1e-5)


def mistral3(config: ConfigJson) -> ModelSpec:
    """Return the network of the text in a Mistral3ForConditionalGeneration: Mistral Small 3 or Ministral 3."""
    read = ministral3 if config.text("model_type", "mistral") == "ministral3" else mistral
    return read(config.with_defaults({"tie_word_embeddings": True}))


FAMILIES = {
    "Mistral3ForConditionalGeneration": Family(
        "mistral3", mistral3, DECODER_NAMES, text_types=("mistral", "ministral3")
    ),
    "MinistralForCausalLM": Family("ministral", ministral, DECODER_NAMES),
    "Ministral3ForCausalLM": Family("ministral3", ministral3, DECODER_NAMES),
}
