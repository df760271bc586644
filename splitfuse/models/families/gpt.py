"""Reads GPT-2, StarCoder, GPT-J, GPT-NeoX, OPT, Phi and MPT: layer norms, MLPs without a gate, and as positions learned
vectors, ALiBi or a rope that turns part of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, MlpSpec, NormSpec
from splitfuse.models.families.common import (
    LAYER_NORM_NAMES,
    Family,
    WeightNames,
    accept_only,
    decoder,
    layer_norm,
    num_layers,
    plain_mlp,
    read_attention,
    with_biases,
    with_interleaved_rope,
    with_layout,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import of_kv_heads, transposed
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec, RopeSpec

GPT2_FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
MPT_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}

_GPT2_NAMES = with_biases(
    {
        "embed": ("transformer.wte.weight",),
        "positions": ("transformer.wpe.weight",),
        "norm": ("transformer.ln_f.weight",),
        "head": ("lm_head.weight",),
        "attn_norm": ("transformer.h.{layer}.ln_1.weight",),
        "qkv": ("transformer.h.{layer}.attn.c_attn.weight",),
        "o": ("transformer.h.{layer}.attn.c_proj.weight",),
        "mlp_norm": ("transformer.h.{layer}.ln_2.weight",),
        "mlp.up": ("transformer.h.{layer}.mlp.c_fc.weight",),
        "mlp.down": ("transformer.h.{layer}.mlp.c_proj.weight",),
    }
)
GPT2_NAMES = with_layout(_GPT2_NAMES, transposed, "qkv", "o", "mlp.up", "mlp.down")
GPT_BIGCODE_NAMES = with_layout(_GPT2_NAMES, of_kv_heads, "qkv", "qkv_bias")
GPTJ_NAMES = with_interleaved_rope(
    {
        **_GPT2_NAMES,
        **with_biases(
            {
                "qkv": tuple(f"transformer.h.{{layer}}.attn.{part}_proj.weight" for part in "qkv"),
                "o": ("transformer.h.{layer}.attn.out_proj.weight",),
                "mlp.up": ("transformer.h.{layer}.mlp.fc_in.weight",),
                "mlp.down": ("transformer.h.{layer}.mlp.fc_out.weight",),
            }
        ),
    }
)
GPT_NEOX_NAMES = with_layout(
    with_biases(
        {
            "embed": ("gpt_neox.embed_in.weight",),
            "norm": ("gpt_neox.final_layer_norm.weight",),
            "head": ("embed_out.weight",),
            "attn_norm": ("gpt_neox.layers.{layer}.input_layernorm.weight",),
            "qkv": ("gpt_neox.layers.{layer}.attention.query_key_value.weight",),
            "o": ("gpt_neox.layers.{layer}.attention.dense.weight",),
            "mlp_norm": ("gpt_neox.layers.{layer}.post_attention_layernorm.weight",),
            "mlp.up": ("gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight",),
            "mlp.down": ("gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight",),
        }
    ),
    of_kv_heads,
    *("qkv", "qkv_bias"),
)
GPT_NEOX_LATER_NAMES: WeightNames = {"head": ("lm_head.weight",)}
OPT_NAMES = with_biases(
    {
        "embed": ("model.decoder.embed_tokens.weight",),
        "positions": ("model.decoder.embed_positions.weight",),
        "norm": ("model.decoder.final_layer_norm.weight",),
        "head": ("lm_head.weight",),
        "attn_norm": ("model.decoder.layers.{layer}.self_attn_layer_norm.weight",),
        "qkv": tuple(f"model.decoder.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
        "o": ("model.decoder.layers.{layer}.self_attn.out_proj.weight",),
        "mlp_norm": ("model.decoder.layers.{layer}.final_layer_norm.weight",),
        "mlp.up": ("model.decoder.layers.{layer}.fc1.weight",),
        "mlp.down": ("model.decoder.layers.{layer}.fc2.weight",),
    }
)
PHI_NAMES: WeightNames = {
    **LAYER_NORM_NAMES,
    **with_biases(
        {
            "norm": ("model.final_layernorm.weight",),
            "head": ("lm_head.weight",),
            "q_norm": ("model.layers.{layer}.self_attn.q_layernorm.weight",),
            "k_norm": ("model.layers.{layer}.self_attn.k_layernorm.weight",),
            "o": ("model.layers.{layer}.self_attn.dense.weight",),
            "mlp.up": ("model.layers.{layer}.mlp.fc1.weight",),
            "mlp.down": ("model.layers.{layer}.mlp.fc2.weight",),
        }
    ),
}
MPT_NAMES: WeightNames = {
    "embed": ("transformer.wte.weight",),
    "norm": ("transformer.norm_f.weight",),
    "head": ("lm_head.weight",),
    "attn_norm": ("transformer.blocks.{layer}.norm_1.weight",),
    "qkv": ("transformer.blocks.{layer}.attn.Wqkv.weight",),
    "o": ("transformer.blocks.{layer}.attn.out_proj.weight",),
    "mlp_norm": ("transformer.blocks.{layer}.norm_2.weight",),
    "mlp.up": ("transformer.blocks.{layer}.ffn.up_proj.weight",),
    "mlp.down": ("transformer.blocks.{layer}.ffn.down_proj.weight",),
}


def gpt2(config: ConfigJson) -> ModelSpec:
    """Return the network of a GPT2LMHeadModel."""
    config = config.renamed(GPT2_FIELDS)
    attention = _gpt2_attention(config)
    falling = config.flag("scale_attn_by_inverse_layer_idx", False)
    layers = [
        replace(attention, scale=attention.score_scale / (number + 1)) if falling else attention
        for number in range(num_layers(config))
    ]
    return _gpt2_decoder(config, layers, "gelu_new")


def gpt_bigcode(config: ConfigJson) -> ModelSpec:
    """Return the network of a GPTBigCodeForCausalLM: StarCoder and SantaCoder."""
    config = config.renamed(GPT2_FIELDS)
    num_kv_heads = 1 if config.flag("multi_query", True) else None
    return _gpt2_decoder(config, _gpt2_attention(config, num_kv_heads=num_kv_heads), "gelu_pytorch_tanh")


def gptj(config: ConfigJson) -> ModelSpec:
    """Return the network of a GPTJForCausalLM."""
    config = config.renamed(GPT2_FIELDS)
    rope = RopeSpec(theta=10_000.0, rotary_dim=config.integer("rotary_dim", 64))
    return decoder(
        config,
        read_attention(config),
        _gpt2_mlp(config, "gelu_new"),
        ropes=(rope,),
        norm=layer_norm(config, "layer_norm_epsilon"),
        layer={"parallel": True, "shared_norm": True},
        head_bias=True,
    )


def gpt_neox(config: ConfigJson) -> ModelSpec:
    """Return the network of a GPTNeoXForCausalLM: Pythia and similar models."""
    config = config.renamed({"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"})
    biased = config.flag("attention_bias", True)
    attention = read_attention(config, qkv_bias=biased, o_bias=biased)
    return decoder(
        config,
        attention,
        plain_mlp(config, act="gelu"),
        ropes=(read_rope(config, head_dim=attention.head_dim, share=0.25),),
        norm=layer_norm(config, "layer_norm_eps"),
        layer={"parallel": config.flag("use_parallel_residual", True)},
    )


def opt(config: ConfigJson) -> ModelSpec:
    """Return the network of an OPTForCausalLM; that of 350m, with norms behind the sums, is refused."""
    accept_only(
        config,
        do_layer_norm_before=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=config.integer("hidden_size"),
        _remove_final_layer_norm=False,
    )
    biased = config.flag("enable_bias", True)
    return decoder(
        config,
        read_attention(config, rope=None, qkv_bias=biased, o_bias=biased),
        plain_mlp(config, config.integer("ffn_dim"), act="relu", field="activation_function", bias=biased),
        ropes=(),
        norm=NormSpec(eps=1e-5, centered=True, bias=True),
        learned_positions=True,
        position_offset=2,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def phi(config: ConfigJson) -> ModelSpec:
    """Return the network of a PhiForCausalLM: Phi-1, 1.5 and 2."""
    norm = layer_norm(config, "layer_norm_eps")
    qk_norm = HeadNormSpec(norm=norm) if config.flag("qk_layernorm", False) else None
    attention = read_attention(config, qkv_bias=True, o_bias=True, qk_norm=qk_norm)
    return decoder(
        config,
        attention,
        plain_mlp(config, act="gelu_new"),
        ropes=(read_rope(config, head_dim=attention.head_dim, share=0.5),),
        norm=norm,
        layer={"parallel": True, "shared_norm": True},
        head_bias=True,
    )


def mpt(config: ConfigJson) -> ModelSpec:
    """Return the network of an MptForCausalLM."""
    config = config.renamed(MPT_FIELDS)
    inner = config.section("attn_config")
    accept_only(config, no_bias=True, expansion_ratio=4, logit_scale=None, norm_type="low_precision_layernorm")
    accept_only(inner, attn_type="multihead_attention", clip_qkv=None, qk_ln=False, prefix_lm=False)
    accept_only(inner, alibi=True, alibi_bias_max=8)
    scale = inner.number("softmax_scale") if "softmax_scale" in inner else None
    return decoder(
        config,
        read_attention(config, rope=None, alibi=1.0, scale=scale),
        plain_mlp(config, 4 * config.integer("hidden_size"), act="gelu", bias=False),
        ropes=(),
        norm=layer_norm(config, "layer_norm_epsilon", bias=False),
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def _gpt2_attention(config: ConfigJson, **fields: Any) -> AttentionSpec:
    accept_only(config, add_cross_attention=False)
    scale = None if config.flag("scale_attn_weights", True) else 1.0
    return read_attention(config, rope=None, qkv_bias=True, o_bias=True, scale=scale, **fields)


def _gpt2_mlp(config: ConfigJson, act: str) -> MlpSpec:
    size = config.integer("n_inner", 4 * config.integer("hidden_size"))
    return plain_mlp(config, size, act=act, field="activation_function")


def _gpt2_decoder(config: ConfigJson, attention: AttentionSpec | list[AttentionSpec], act: str) -> ModelSpec:
    return decoder(
        config,
        attention,
        _gpt2_mlp(config, act),
        ropes=(),
        norm=layer_norm(config, "layer_norm_epsilon"),
        learned_positions=True,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


FAMILIES = {
    "GPT2LMHeadModel": Family("gpt2", gpt2, GPT2_NAMES),
    "GPTBigCodeForCausalLM": Family("gpt_bigcode", gpt_bigcode, GPT_BIGCODE_NAMES),
    "GPTJForCausalLM": Family("gptj", gptj, GPTJ_NAMES),
    "GPTNeoXForCausalLM": Family("gpt_neox", gpt_neox, GPT_NEOX_NAMES, alternatives=(GPT_NEOX_LATER_NAMES,)),
    "MptForCausalLM": Family("mpt", mpt, MPT_NAMES),
    "MPTForCausalLM": Family("mpt", mpt, MPT_NAMES),
    "OPTForCausalLM": Family("opt", opt, OPT_NAMES),
    "PhiForCausalLM": Family("phi", phi, PHI_NAMES),
}
