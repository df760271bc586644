"""Reads Falcon: RW with ALiBi, 7B with one head of keys and values, 40B and 11B with groups of heads."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.models.families.common import (
    Family,
    WeightNames,
    accept_only,
    decoder,
    layer_norm,
    plain_mlp,
    read_attention,
    with_biases,
    with_layout,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import of_kv_heads
from splitfuse.models.spec import ModelSpec

FALCON_NAMES = with_layout(
    with_biases(
        {
            "embed": ("transformer.word_embeddings.weight",),
            "norm": ("transformer.ln_f.weight",),
            "head": ("lm_head.weight",),
            "attn_norm": ("transformer.h.{layer}.input_layernorm.weight",),
            "qkv": ("transformer.h.{layer}.self_attention.query_key_value.weight",),
            "o": ("transformer.h.{layer}.self_attention.dense.weight",),
            "mlp_norm": ("transformer.h.{layer}.post_attention_layernorm.weight",),
            "mlp.up": ("transformer.h.{layer}.mlp.dense_h_to_4h.weight",),
            "mlp.down": ("transformer.h.{layer}.mlp.dense_4h_to_h.weight",),
        }
    ),
    of_kv_heads,
    *("qkv", "qkv_bias"),
)
FALCON_TWO_NORMS: WeightNames = with_biases(
    {
        "attn_norm": ("transformer.h.{layer}.ln_attn.weight",),
        "mlp_norm": ("transformer.h.{layer}.ln_mlp.weight",),
    }
)
"""Names of norms in parallel layers that have two."""


def falcon(config: ConfigJson) -> ModelSpec:
    """Return the network of a FalconForCausalLM."""
    config = config.with_defaults({"max_position_embeddings": 2048})
    grouped = config.flag("new_decoder_architecture", False)
    parallel, biased = config.flag("parallel_attn", True), config.flag("bias", False)
    accept_only(config, apply_residual_connection_post_layernorm=False)
    if grouped:
        accept_only(config, parallel_attn=True)
        num_kv_heads = config.integer("num_kv_heads", config.integer("num_attention_heads"))
        one_norm = config.integer("num_ln_in_parallel_attn", 2, most=2) == 1
    else:
        accept_only(config, num_ln_in_parallel_attn=1)
        num_kv_heads = 1 if config.flag("multi_query", True) else config.integer("num_attention_heads")
        one_norm = parallel
    attention = replace(read_attention(config, qkv_bias=biased, o_bias=biased), num_kv_heads=num_kv_heads)
    alibi = config.flag("alibi", False)
    if alibi:
        attention = replace(attention, rope=None, alibi=attention.score_scale)
    size = config.integer("ffn_hidden_size", 4 * config.integer("hidden_size"))
    return decoder(
        config,
        attention,
        plain_mlp(config, size, act="gelu", field="activation", bias=biased),
        ropes=() if alibi else None,
        norm=layer_norm(config, "layer_norm_epsilon"),
        layer={"parallel": parallel, "shared_norm": one_norm},
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


FAMILIES = {"FalconForCausalLM": Family("falcon", falcon, FALCON_NAMES, alternatives=(FALCON_TWO_NORMS,))}
