"""Reads LFM2: gated short convolutions, and attention in some layers."""

from __future__ import annotations

from splitfuse.kernels.layers import ConvSpec, HeadNormSpec, Mixer, MlpSpec, NormSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    decoder,
    layer_types,
    num_layers,
    read_attention,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import conv1d
from splitfuse.models.spec import ModelSpec

_LAYER = "model.layers.{layer}"

LFM2_NAMES: WeightNames = {
    **DECODER_NAMES,
    "norm": ("model.embedding_norm.weight",),
    "attn_norm": (f"{_LAYER}.operator_norm.weight",),
    "q_norm": (f"{_LAYER}.self_attn.q_layernorm.weight",),
    "k_norm": (f"{_LAYER}.self_attn.k_layernorm.weight",),
    "o": (f"{_LAYER}.self_attn.out_proj.weight",),
    "in_proj": (f"{_LAYER}.conv.in_proj.weight",),
    "in_proj_bias": (f"{_LAYER}.conv.in_proj.bias",),
    "conv": (conv1d(f"{_LAYER}.conv.conv.weight"),),
    "conv_bias": (f"{_LAYER}.conv.conv.bias",),
    "out_proj": (f"{_LAYER}.conv.out_proj.weight",),
    "out_proj_bias": (f"{_LAYER}.conv.out_proj.bias",),
    "mlp_norm": (f"{_LAYER}.ffn_norm.weight",),
    "mlp.gate_up": tuple(f"{_LAYER}.feed_forward.{part}.weight" for part in ("w1", "w3")),
    "mlp.down": (f"{_LAYER}.feed_forward.w2.weight",),
}


def lfm2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Lfm2ForCausalLM."""
    norm = NormSpec(eps=config.number("norm_eps", 1e-5))
    attention = read_attention(config, num_kv_heads=8, qk_norm=HeadNormSpec(norm=norm))
    conv = ConvSpec(
        num_channels=config.integer("hidden_size"),
        conv_size=config.integer("conv_L_cache", 3),
        bias=config.flag("conv_bias", False),
    )
    layers = list(range(num_layers(config)))
    if "layer_types" in config:
        mixers: list[Mixer] = [attention if kind == "full_attention" else conv for kind in layer_types(config)]
    else:
        attending = set(config.integers("full_attn_idxs", layers))
        mixers = [attention if number in attending else conv for number in layers]
    return decoder(
        config,
        mixers,
        MlpSpec(intermediate_size=_intermediate_size(config), activation="silu"),
        rope_theta=1e6,
        norm=norm,
        tied_embeddings=config.flag("tie_embedding", config.flag("tie_word_embeddings", True)),
    )


def _intermediate_size(config: ConfigJson) -> int:
    size = config.integer("block_ff_dim", config.integer("intermediate_size", 12288))
    if not config.flag("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    if config.is_null("block_ffn_dim_multiplier"):
        return size
    size = int(config.number("block_ffn_dim_multiplier", 1.0) * size)
    multiple = config.integer("block_multiple_of", 256)
    return -(-size // multiple) * multiple


FAMILIES = {"Lfm2ForCausalLM": Family("lfm2", lfm2, LFM2_NAMES)}
