"""Reads Llama and similar models, which differ from it in a property or two: sliding windows, NoPE layers, multipliers,
an ungated MLP, QK norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, Mixer, MlpSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    accept_only,
    biased_attention,
    decoder,
    head_norms,
    in_windows,
    mlp,
    num_layers,
    optional_window,
    per_layer,
    read_attention,
    read_router,
    window,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Stored, of_expert
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

MIXTRAL_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
    "w13": tuple(f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3")),
    "w2": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
}
PHI3_NAMES: WeightNames = {
    **DECODER_NAMES,
    "qkv": ("model.layers.{layer}.self_attn.qkv_proj.weight",),
    "mlp.gate_up": ("model.layers.{layer}.mlp.gate_up_proj.weight",),
}
_BLOCK_SPARSE = "model.layers.{layer}.block_sparse_moe."
GRANITE_MOE_NAMES: WeightNames = {
    **DECODER_NAMES,
    "router": (f"{_BLOCK_SPARSE}router.layer.weight",),
    "w13": (of_expert(Stored(f"{_BLOCK_SPARSE}input_linear.weight")),),
    "w2": (of_expert(Stored(f"{_BLOCK_SPARSE}output_linear.weight")),),
}
GRANITE_MOE_IN_MEMORY: WeightNames = {
    "router": (f"{_BLOCK_SPARSE}router.weight",),
    "w13": (of_expert(Stored(f"{_BLOCK_SPARSE}experts.gate_up_proj")),),
    "w2": (of_expert(Stored(f"{_BLOCK_SPARSE}experts.down_proj")),),
}
ARCEE_NAMES: WeightNames = {**DECODER_NAMES, "mlp.up_bias": ("model.layers.{layer}.mlp.up_proj.bias",)}
HUNYUAN_NAMES: WeightNames = {
    **DECODER_NAMES,
    "q_norm": ("model.layers.{layer}.self_attn.query_layernorm.weight",),
    "k_norm": ("model.layers.{layer}.self_attn.key_layernorm.weight",),
}

CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(config: ConfigJson) -> ModelSpec:
    """Return the network of a LlamaForCausalLM."""
    return decoder(config, biased_attention(config), mlp(config, bias=config.flag("mlp_bias", False)))


def original_llama(config: ConfigJson) -> ModelSpec:
    """Return the network of a LLaMAForCausalLM, as first converted: its length has a name of its own."""
    length = config.integer("max_sequence_length", 2048)
    return llama(config.with_defaults({"max_position_embeddings": length}))


def internlm3(config: ConfigJson) -> ModelSpec:
    """Return the network of an InternLM3ForCausalLM: Llama with other names of the biases, which come all or none."""
    biased = config.flag("qkv_bias", config.flag("attention_bias", False))
    if config.flag("bias", config.flag("mlp_bias", False)) != biased:
        raise UnsupportedModelError("config.json: qkv_bias other than bias is not supported: set them alike")
    attention = read_attention(config, num_kv_heads=2, head_dim=128, qkv_bias=biased, o_bias=biased)
    return decoder(config, attention, mlp(config, bias=biased), norm_eps=1e-5)


def mistral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MistralForCausalLM."""
    return decoder(config, read_attention(config, num_kv_heads=8, window=window(config)), mlp(config))


def mixtral(config: ConfigJson) -> ModelSpec:
    """Return the network of a MixtralForCausalLM."""
    router = read_router(config, 8, 2, renormalize=True)
    # Unlike Mistral, whose absent window is 4096: here absent is none, as in transformers.
    attention = read_attention(config, num_kv_heads=8, window=optional_window(config))
    return decoder(config, attention, ExpertsSpec(router=router, expert=mlp(config)), norm_eps=1e-5, rope_theta=1e6)


def phi3(config: ConfigJson) -> ModelSpec:
    """Return the network of a Phi3ForCausalLM: Phi-3, 3.5, 4 and 4-mini."""
    attention = read_attention(config, window=optional_window(config))
    rope = read_rope(config, head_dim=attention.head_dim)
    return decoder(config, attention, mlp(config), ropes=[rope], norm_eps=1e-5)


def smollm3(config: ConfigJson) -> ModelSpec:
    """Return the network of a SmolLM3ForCausalLM: every fourth layer has no rope, and the window if there is one."""
    every = config.integer("no_rope_layer_interval", 4)
    default = [int((n + 1) % every > 0) for n in range(num_layers(config))]
    rotated = per_layer(config, "no_rope_layers", config.integers("no_rope_layers", default))
    size = optional_window(config) if config.flag("use_sliding_window", False) else None
    inside = windowed_layers(config, lambda number: size is not None and not rotated[number])
    attention = biased_attention(config, num_kv_heads=4)
    layers = [
        replace(attention, rope=0 if has_rope else None, window=size if windowed else None)
        for has_rope, windowed in zip(rotated, inside, strict=True)
    ]
    return decoder(
        config,
        layers,
        mlp(config, bias=config.flag("mlp_bias", False)),
        rope_theta=2e6,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def cwm(config: ConfigJson) -> ModelSpec:
    """Return the network of a CwmForCausalLM: Llama with windows but in every fourth layer."""
    config = config.with_defaults({"rope_parameters": CWM_ROPE})
    inside = windowed_layers(config, lambda number: number % 4 > 0)
    size = None if config.is_null("sliding_window") else config.integer("sliding_window", 8192)
    attention = read_attention(config, num_kv_heads=8, head_dim=128)
    return decoder(
        config,
        in_windows(attention, size, inside),
        mlp(config, bias=config.flag("mlp_bias", False)),
        rope_theta=1e6,
        norm_eps=1e-5,
    )


def granite_attention(config: ConfigJson) -> AttentionSpec:
    """Return the attention of Granite, whose scale is a field."""
    return biased_attention(config, scale=config.number("attention_multiplier", 1.0))


def granite_decoder(
    config: ConfigJson, mixers: Mixer | Sequence[Mixer], mlps: MlpSpec | ExpertsSpec, **network: Any
) -> ModelSpec:
    """Return a network with the multipliers of embedding, blocks and logits of Granite; `network` as in `decoder`."""
    return decoder(
        config,
        mixers,
        mlps,
        layer={"residual_scale": config.number("residual_multiplier", 1.0)},
        embed_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
        **network,
    )


def granite(config: ConfigJson) -> ModelSpec:
    """Return the network of a GraniteForCausalLM: Llama with multipliers."""
    return granite_decoder(config, granite_attention(config), mlp(config, bias=config.flag("mlp_bias", False)))


def granite_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of a GraniteMoeForCausalLM."""
    router = read_router(config, 8, 2, renormalize=True)
    return granite_decoder(config, granite_attention(config), ExpertsSpec(router=router, expert=mlp(config)))


def arcee(config: ConfigJson) -> ModelSpec:
    """Return the network of an ArceeForCausalLM: Llama with an MLP without gate."""
    bias, name = config.flag("mlp_bias", False), config.text("hidden_act", "relu2")
    inner = mlp(config.with_defaults({"hidden_act": name}), gated=False, bias=bias)
    return decoder(config, biased_attention(config), inner, norm_eps=1e-5)


def seed_oss(config: ConfigJson) -> ModelSpec:
    """Return the network of a SeedOssForCausalLM: Llama with a flag for each kind of bias."""
    attention = read_attention(
        config,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias", False),
    )
    return decoder(config, attention, mlp(config, bias=config.flag("mlp_bias", False)))


def hunyuan_dense(config: ConfigJson) -> ModelSpec:
    """Return the network of a HunYuanDenseV1ForCausalLM: Llama with norms of heads behind the rope, whose `alpha`
    stretches its base.
    """
    accept_only(config, use_qk_norm=True)
    norms = head_norms(config.with_defaults({"rms_norm_eps": 1e-5}), after_rope=True)
    attention = biased_attention(config, qk_norm=norms)
    rope = read_rope(config, head_dim=attention.head_dim, honours=["alpha"])
    return decoder(config, attention, mlp(config), ropes=[rope], norm_eps=1e-5)


FAMILIES = {
    "AquilaForCausalLM": Family("aquila", llama, DECODER_NAMES),
    "AquilaModel": Family("aquila", llama, DECODER_NAMES),
    "ArceeForCausalLM": Family("arcee", arcee, ARCEE_NAMES),
    "CwmForCausalLM": Family("cwm", cwm, DECODER_NAMES),
    "GraniteForCausalLM": Family("granite", granite, DECODER_NAMES),
    "GraniteMoeForCausalLM": Family("granitemoe", granite_moe, GRANITE_MOE_NAMES, (GRANITE_MOE_IN_MEMORY,)),
    "HunYuanDenseV1ForCausalLM": Family("hunyuan_v1_dense", hunyuan_dense, HUNYUAN_NAMES),
    "InternLM3ForCausalLM": Family("internlm3", internlm3, DECODER_NAMES),
    "LLaMAForCausalLM": Family("llama", original_llama, DECODER_NAMES),
    "LlamaForCausalLM": Family("llama", llama, DECODER_NAMES),
    "MistralForCausalLM": Family("mistral", mistral, DECODER_NAMES),
    "MixtralForCausalLM": Family("mixtral", mixtral, MIXTRAL_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
    "Phi3ForCausalLM": Family("phi3", phi3, PHI3_NAMES),
    "SeedOssForCausalLM": Family("seed_oss", seed_oss, DECODER_NAMES),
    "SmolLM3ForCausalLM": Family("smollm3", smollm3, DECODER_NAMES),
    "XverseForCausalLM": Family("xverse", llama, DECODER_NAMES),
}
