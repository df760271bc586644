"""Reads EXAONE 4: norms behind the blocks, and where there are windows, no rope in the layers without."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.kernels.layers import NormPlace
from splitfuse.models.families.common import (
    POST_NORM_NAMES,
    Family,
    decoder,
    head_norms,
    mlp,
    read_attention,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.spec import ModelSpec


def exaone4(config: ConfigJson) -> ModelSpec:
    """Return the network of an Exaone4ForCausalLM."""
    size = window(config)
    every = config.integer("sliding_window_pattern", 4) if "layer_types" not in config else 1
    inside = windowed_layers(config, lambda number: size is not None and (number + 1) % every > 0)
    norms = head_norms(config.with_defaults({"rms_norm_eps": 1e-5}))
    attention = read_attention(config, num_kv_heads=32, qk_norm=norms)
    whole = replace(attention, rope=0 if size is None else None)
    local = replace(attention, window=size)
    return decoder(
        config,
        [local if windowed else whole for windowed in inside],
        mlp(config),
        norm_eps=1e-5,
        layer={"norms": NormPlace.AFTER},
    )


FAMILIES = {"Exaone4ForCausalLM": Family("exaone4", exaone4, POST_NORM_NAMES)}
