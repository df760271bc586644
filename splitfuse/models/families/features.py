"""Names what networks of other families have: a config that asks for it is refused unless its family reads it.

A field that is not listed here is a remark, a training setting or a number that a family reads; transformers ignores it
too where its class does not have it.
"""

from __future__ import annotations

import re

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.models.families.config_json import ConfigJson

FEATURES: dict[str, tuple[str, ...]] = {
    "experts": (r"(num|n|moe_num)_(local_|routed_|shared_)?experts", r"shared_experts?_\w+", "moe_intermediate_size"),
    "layers without experts among those with": ("first_k_dense_replace", "mlp_only_layers", "moe_layer_freq"),
    "experts chosen by groups": ("n_group", "topk_group"),
    "experts in addition to an MLP": ("enable_moe_block",),
    "experts of compressed inputs": ("moe_latent_size",),
    "gates of experts of their own": (r"swiglu_(limit|alpha)", "zero_expert_num", "moe_apply_router_weight_on_input"),
    "MLA": (r"(q|kv|o)_lora_rank", "v_head_dim", r"qk_(nope|rope)_head_dim"),
    "a sparse index of keys": (r"index_\w+", r"indexer_\w+", r"compress_\w+"),
    "differential attention": ("lambda_std_dev",),
    "chunked attention": ("attention_chunk_size",),
    "a recurrent state": (
        *(r"mamba_\w+", r"ssm_\w+", r"kda_\w+", "state_size", "conv_L_cache", "lru_width", "use_mamba_kernels"),
        *(
            r"linear_(attn|conv|key|value|num|head|a|dt)\w*",
            r"time_step_\w+",
            r"(short_)?conv\w*_(kernel|kernel_size|width)",
        ),
        *("layers_block_type", "block_types", r"attn_layer_\w+"),
    ),
    "hyper-connections": (r"hc_\w+",),
    "embeddings of n-grams": (r"ngram_\w+", "heads_per_ngram"),
    "per-layer embeddings": (r"\w+_per_layer_input", r"ple_\w+", r"altup_\w+", "laurel_rank"),
    "shared KV": ("num_kv_shared_layers",),
    "K = V": ("attention_k_eq_v",),
    "attention to later tokens": (
        *(
            "use_bidirectional_attention",
            "is_encoder_decoder",
            "add_cross_attention",
            "prefix_lm",
            "cross_attention_layers",
        ),
    ),
    "scores that fall with distance": ("alibi", "use_alibi", "attn_config"),
    "scores with relative positions": ("d_rel", r"rel_\w+", r"position_bias_\w+"),
    "positions of images": ("use_mrope",),
    "attention sinks": ("learnable_sink_init", "add_swa_attention_sink_bias", "add_full_attention_sink_bias"),
    "soft caps": (r"\w*soft_?cap(ping)?",),
    "clipped projections": ("clip_qkv",),
    "queries scaled by position": ("attn_temperature_tuning", r"log_scaling_\w+"),
    "scores scaled by layer": ("scale_attn_by_inverse_layer_idx",),
    "multipliers": (
        r"\w+_multipliers?",
        r"\w+_alpha_factor",
        r"\w+_beta_factor",
        "scale_emb",
        "scale_depth",
        "embedding_scale",
    ),
    "scaled values": ("attention_value_scale",),
    "sparse activations": ("activation_sparsity_pattern",),
    "layers of different sizes": (
        r"\w+_per_layer",
        "use_double_wide_mlp",
        "per_layer_config",
        "block_configs",
        r"swa_(head_dim|num_\w+)",
    ),
    "adapters": ("adapter_rank", "use_shared_attention_adapter"),
    "scaled logits": ("logit_scale", "logits_scaling", "mup_width_scale"),
    "biases": (r"(attention|mlp|qkv|lm_head|attention_out)_bias", r"use_(qkv_)?bias", "add_bias_linear", "bias"),
    "QK norm": ("qk_layernorm", "use_qk_norm", "qk_norm"),
    "post-norms": ("use_sandwich_norm", "use_post_norm"),
    "residuals of normed inputs": ("apply_residual_connection_post_layernorm",),
    "parallel blocks": ("parallel_attn", "use_parallel_residual", "new_decoder_architecture"),
    "gated attention": ("use_attention_gate", "attn_output_gate", "use_gated_attn"),
    "NoPE layers": ("no_rope_layers", "no_rope_layer_interval"),
    "a rope for each layer": ("rope_local_base_freq", "layer_rope_theta", "swa_rope_theta"),
}
"""Feature -> patterns of its fields. A field asks for it unless it is null, false, 0, 1 or empty."""

_PATTERNS = {what: re.compile("|".join(patterns)) for what, patterns in FEATURES.items()}


def refuse_unread(config: ConfigJson, architecture: str) -> None:
    """Raise UnsupportedModelError, naming the field, for a feature that the reader of the config has not read."""
    for name in config.unread():
        value = config.raw(name)
        what = next((what for what, pattern in _PATTERNS.items() if pattern.fullmatch(name)), None)
        if what is not None and value and (value is True or value != 1):
            raise UnsupportedModelError(
                f"config.json has {name} = {brief(value)}: {what}, which is not supported for {architecture}"
            )
