"""Reads StableLM, StarCoder2 and Nemotron: Llama with layer norms, a rope of part of a head, an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.kernels.layers import HeadNormSpec
from splitfuse.models.families.common import (
    LAYER_NORM_NAMES,
    Family,
    WeightNames,
    biased_attention,
    decoder,
    layer_norm,
    mlp,
    optional_window,
    plain_mlp,
    read_attention,
    with_biases,
    with_layout,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import of_each_head, plus_one
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

STABLELM_NAMES: WeightNames = {
    **LAYER_NORM_NAMES,
    "q_norm": (of_each_head("model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight"),),
    "k_norm": (of_each_head("model.layers.{layer}.self_attn.k_layernorm.norms.{head}.weight"),),
}
STARCODER2_NAMES: WeightNames = {
    **LAYER_NORM_NAMES,
    **with_biases(
        {
            "mlp.up": ("model.layers.{layer}.mlp.c_fc.weight",),
            "mlp.down": ("model.layers.{layer}.mlp.c_proj.weight",),
        }
    ),
}
NEMOTRON_NAMES = with_layout(
    {**LAYER_NORM_NAMES, **with_biases({"mlp.up": ("model.layers.{layer}.mlp.up_proj.weight",)})},
    plus_one,
    *("norm", "attn_norm", "mlp_norm"),
)


def stablelm(config: ConfigJson) -> ModelSpec:
    """Return the network of a StableLmForCausalLM."""
    norm, parallel = layer_norm(config, "layer_norm_eps"), config.flag("use_parallel_residual", False)
    head_norm = HeadNormSpec(norm=replace(norm, bias=False), own_weights=True)
    attention = read_attention(
        config,
        num_kv_heads=32,
        qkv_bias=config.flag("use_qkv_bias", False),
        qk_norm=head_norm if config.flag("qk_layernorm", False) else None,
    )
    return decoder(
        config,
        attention,
        mlp(config),
        ropes=(read_rope(config, head_dim=attention.head_dim, share=0.25),),
        norm=norm,
        layer={"parallel": parallel, "shared_norm": parallel},
    )


def starcoder2(config: ConfigJson) -> ModelSpec:
    """Return the network of a Starcoder2ForCausalLM."""
    return decoder(
        config,
        biased_attention(config, "use_bias", True, num_kv_heads=2, window=optional_window(config)),
        plain_mlp(config, act="gelu_pytorch_tanh", bias=config.flag("use_bias", True)),
        norm=layer_norm(config, "norm_epsilon"),
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def nemotron(config: ConfigJson) -> ModelSpec:
    """Return the network of a NemotronForCausalLM: Minitron and similar models."""
    attention = biased_attention(config)
    return decoder(
        config,
        attention,
        plain_mlp(config, act="relu2", bias=config.flag("mlp_bias", False)),
        ropes=(read_rope(config, head_dim=attention.head_dim, share=0.5),),
        norm=layer_norm(config, "norm_eps"),
    )


FAMILIES = {
    "NemotronForCausalLM": Family("nemotron", nemotron, NEMOTRON_NAMES),
    "StableLmForCausalLM": Family("stablelm", stablelm, STABLELM_NAMES),
    "Starcoder2ForCausalLM": Family("starcoder2", starcoder2, STARCODER2_NAMES),
}
