"""Tiny random transformers models of every family and variant: the oracle of the parity tests.

transformers starts norms at one and biases at zero, which would hide a forgotten one: here every weight is random.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 97
MAX_POSITION = 128


def sizes(**changes: Any) -> dict[str, Any]:
    """Settings of a small network; `changes` win."""
    small: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITION,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return small | changes


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """A `rope_parameters` section."""
    return {"rope_type": kind, "rope_theta": 10000.0} | fields


def tiny(model: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A model of that class with the changed settings."""
    return model(model.config_class(**sizes(**changes)))


def tiny_with_vision(model: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A vision-language model whose text has the changed settings."""
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
    if "Qwen" in model.__name__:
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0]}
        if model is transformers.Qwen2VLForConditionalGeneration:
            vision |= {"hidden_size": 48, "embed_dim": 16}
    else:
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "image_size": 16}
    if model is transformers.Llama4ForConditionalGeneration:
        vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    tied = {"tie_word_embeddings": changes.pop("tie_word_embeddings", False)}
    return model(model.config_class(text_config=sizes(**changes), vision_config=vision, **tied))


def llama(**changes: Any) -> PreTrainedModel:
    """A Llama with the changed settings."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(**changes)))


def mistral(**changes: Any) -> PreTrainedModel:
    """A Mistral with the changed settings."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes(**changes)))


def qwen2(**changes: Any) -> PreTrainedModel:
    """A Qwen2 with the changed settings."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes(**changes)))


def qwen3(**changes: Any) -> PreTrainedModel:
    """A Qwen3 with the changed settings."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes(**changes)))


def mixtral(**changes: Any) -> PreTrainedModel:
    """A Mixtral with the changed settings."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes(num_local_experts=5, **changes)))


def falcon(**changes: Any) -> PreTrainedModel:
    """A Falcon with the changed settings; six heads have slopes that bf16 holds, as which its oracle keeps them."""
    return tiny(transformers.FalconForCausalLM, num_key_value_heads=None, **changes)


def gpt(model: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A GPT-2 or a decoder with the same names of sizes, with the changed settings."""
    small = {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": MAX_POSITION}
    return model(model.config_class(**{**small, "bos_token_id": None, "eos_token_id": None, **changes}))


def mpt(**changes: Any) -> PreTrainedModel:
    """An MPT with the changed settings."""
    small = {"vocab_size": VOCAB_SIZE, "d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": MAX_POSITION}
    return transformers.MptForCausalLM(transformers.MptForCausalLM.config_class(**small, **changes))


def opt(**changes: Any) -> PreTrainedModel:
    """An OPT with the changed settings."""
    return tiny(transformers.OPTForCausalLM, ffn_dim=72, num_key_value_heads=None, **changes)


def phi3_longrope(original: int) -> PreTrainedModel:
    """A Phi-3 whose texts of more than `original` tokens are long: all but those of one token if it is 1."""
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 5.0, 8.0, 13.0, 21.0]}
    scaling = rope("longrope", attention_factor=1.05, partial_rotary_factor=0.75, **factors)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return tiny(
        transformers.Phi3ForCausalLM, original_max_position_embeddings=original, rope_parameters=scaling, **heads
    )


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    """A Qwen3-MoE with the changed settings."""
    few = {"head_dim": 16, "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes(**(few | changes))))


def delta_sizes(**changes: Any) -> dict[str, Any]:
    """Settings of a small hybrid of gated delta nets and attention, of odd head sizes; `changes` win."""
    small: dict[str, Any] = {
        "num_hidden_layers": 4,
        "head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 18,
    }
    return sizes(**(small | changes))


def qwen3_5(**changes: Any) -> PreTrainedModel:
    """A Qwen3.5 with the changed settings."""
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**delta_sizes(**changes)))


SHARED_EXPERT = {
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}


def qwen3_5_moe(**changes: Any) -> PreTrainedModel:
    """A Qwen3.5-MoE with the changed settings."""
    return transformers.Qwen3_5MoeForCausalLM(
        transformers.Qwen3_5MoeTextConfig(**delta_sizes(**SHARED_EXPERT, **changes))
    )


def qwen3_next(**changes: Any) -> PreTrainedModel:
    """A Qwen3-Next with the changed settings."""
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**delta_sizes(**SHARED_EXPERT, **changes)))


def lfm2(**changes: Any) -> PreTrainedModel:
    """An LFM2 with the changed settings."""
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes(block_multiple_of=8, **changes)))


GRANITE_HYBRID: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_chunk_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 28,
    "num_local_experts": 5,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
}
NEMOTRON_H: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "ME*-M",
    "head_dim": 10,
    "mamba_num_heads": 6,
    "mamba_head_dim": 18,
    "ssm_state_size": 10,
    "n_groups": 3,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "routed_scaling_factor": 1.5,
}
"""Settings of hybrids of Mamba-2 and attention, of odd head sizes."""
GEMMA4: dict[str, Any] = {
    "head_dim": 6,
    "global_head_dim": 10,
    "num_hidden_layers": 4,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LLAMA4: dict[str, Any] = {
    "head_dim": 10,
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 30,
    "num_local_experts": 5,
    "attention_chunk_size": 9,
    "floor_scale": 5,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
}
"""Settings of latent attention and of the experts that come with it."""


def qwen2_moe(**changes: Any) -> PreTrainedModel:
    """A Qwen2-MoE with the changed settings."""
    few = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return tiny(transformers.Qwen2MoeForCausalLM, **few, shared_expert_intermediate_size=28, **changes)


def gpt_oss(**changes: Any) -> PreTrainedModel:
    """A gpt-oss with the changed settings."""
    few = {"head_dim": 10, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7}
    return tiny(transformers.GptOssForCausalLM, **(few | changes))


def olmoe(**changes: Any) -> PreTrainedModel:
    """An OLMoE with the changed settings."""
    return tiny(transformers.OlmoeForCausalLM, num_experts=6, num_experts_per_tok=2, **changes)


def glm4_moe(**changes: Any) -> PreTrainedModel:
    """A GLM-4.5 with the changed settings."""
    few = {"head_dim": 20, "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return tiny(transformers.Glm4MoeForCausalLM, **few, **changes)


def dots1(**changes: Any) -> PreTrainedModel:
    """A dots.llm1 with the changed settings."""
    few = {"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return tiny(transformers.Dots1ForCausalLM, **(few | changes))


def minimax_m2(**changes: Any) -> PreTrainedModel:
    """A MiniMax-M2 with the changed settings."""
    few = {"head_dim": 20, "num_local_experts": 6, "num_experts_per_tok": 2}
    return tiny(transformers.MiniMaxM2ForCausalLM, **few, **changes)


def ernie(**changes: Any) -> PreTrainedModel:
    """An Ernie 4.5 with the changed settings."""
    return tiny(transformers.Ernie4_5ForCausalLM, **changes)


def ernie_moe(**changes: Any) -> PreTrainedModel:
    """An Ernie 4.5 with experts and the changed settings."""
    few = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20}
    return tiny(transformers.Ernie4_5_MoeForCausalLM, **few, **changes)


VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-plain": lambda: llama(num_key_value_heads=6),
    "llama-gqa": llama,
    "llama-biases-gelu": lambda: llama(attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-tied-wide-heads": lambda: llama(tie_word_embeddings=True, head_dim=12, hidden_act="gelu_pytorch_tanh"),
    "llama-rope-linear": lambda: llama(rope_parameters=rope("linear", factor=4.0)),
    "llama-rope-dynamic": lambda: llama(max_position_embeddings=24, rope_parameters=rope("dynamic", factor=3.0)),
    "llama-rope-llama3": lambda: llama(
        rope_parameters=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "llama-rope-yarn": lambda: llama(
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "arcee": lambda: tiny(transformers.ArceeForCausalLM),
    "arcee-biases": lambda: tiny(transformers.ArceeForCausalLM, head_dim=10, attention_bias=True, mlp_bias=True),
    "cwm": lambda: tiny(
        transformers.CwmForCausalLM, bos_token_id=0, head_dim=10, num_hidden_layers=5, sliding_window=6, mlp_bias=True
    ),
    "cwm-layer-types": lambda: tiny(
        transformers.CwmForCausalLM,
        bos_token_id=0,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=rope("default"),
    ),
    "exaone4": lambda: tiny(transformers.Exaone4ForCausalLM, num_hidden_layers=5, sliding_window=6, head_dim=10),
    "exaone4-no-window": lambda: tiny(
        transformers.Exaone4ForCausalLM,
        tie_word_embeddings=True,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        rope_parameters=rope("default"),
    ),
    "exaone4-layer-types": lambda: tiny(
        transformers.Exaone4ForCausalLM,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=10,
    ),
    "gemma": lambda: tiny(transformers.GemmaForCausalLM, head_dim=16, num_key_value_heads=1),
    "gemma-biases": lambda: tiny(
        transformers.GemmaForCausalLM, head_dim=10, tie_word_embeddings=False, attention_bias=True, hidden_act="silu"
    ),
    "gemma2": lambda: tiny(
        transformers.Gemma2ForCausalLM,
        head_dim=16,
        num_hidden_layers=4,
        query_pre_attn_scalar=24,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma2-no-softcaps": lambda: tiny(
        transformers.Gemma2ForCausalLM,
        head_dim=10,
        tie_word_embeddings=False,
        attention_bias=True,
        sliding_window=9,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    "gemma3": lambda: tiny(
        transformers.Gemma3ForCausalLM,
        head_dim=16,
        num_hidden_layers=7,
        query_pre_attn_scalar=24,
        sliding_window=6,
        rope_parameters={
            "sliding_attention": rope("default"),
            "full_attention": rope("linear", factor=8.0, rope_theta=1e6),
        },
    ),
    "gemma3-final-softcap": lambda: tiny(
        transformers.Gemma3ForCausalLM,
        head_dim=10,
        tie_word_embeddings=False,
        attention_bias=True,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    ),
    "gemma3-vision": lambda: tiny_with_vision(
        transformers.Gemma3ForConditionalGeneration,
        head_dim=16,
        num_hidden_layers=6,
        sliding_window=6,
        tie_word_embeddings=True,
    ),
    "glm": lambda: tiny(transformers.GlmForCausalLM, head_dim=16, tie_word_embeddings=True),
    "glm-quarter-rope": lambda: tiny(
        transformers.GlmForCausalLM,
        head_dim=16,
        attention_bias=False,
        rope_parameters=rope("default", partial_rotary_factor=0.25),
    ),
    "glm4": lambda: tiny(transformers.Glm4ForCausalLM, head_dim=12, num_attention_heads=7, num_key_value_heads=1),
    "granite": lambda: tiny(
        transformers.GraniteForCausalLM,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.2,
    ),
    "granite-biases": lambda: tiny(
        transformers.GraniteForCausalLM, head_dim=10, attention_bias=True, mlp_bias=True, residual_multiplier=0.5
    ),
    "granite-moe": lambda: tiny(
        transformers.GraniteMoeForCausalLM,
        num_local_experts=6,
        attention_bias=True,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    ),
    "hunyuan-dense-alpha": lambda: tiny(
        transformers.HunYuanDenseV1ForCausalLM,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters=rope("dynamic", alpha=1000.0, factor=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "hunyuan-dense-biases": lambda: tiny(transformers.HunYuanDenseV1ForCausalLM, head_dim=8, attention_bias=True),
    "cohere-qk-norm": lambda: tiny(transformers.CohereForCausalLM, use_qk_norm=True, attention_bias=True),
    "cohere-untied": lambda: tiny(transformers.CohereForCausalLM, tie_word_embeddings=False, logit_scale=0.3),
    "cohere2": lambda: tiny(
        transformers.Cohere2ForCausalLM, num_hidden_layers=5, sliding_window=7, attention_bias=True
    ),
    "cohere2-layer-types": lambda: tiny(
        transformers.Cohere2ForCausalLM,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "falcon-7b": lambda: falcon(num_attention_heads=7, hidden_size=56, ffn_hidden_size=70),
    "falcon-40b": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-11b": lambda: falcon(
        new_decoder_architecture=True,
        num_kv_heads=3,
        num_ln_in_parallel_attn=1,
        tie_word_embeddings=False,
        rope_parameters=rope("linear", factor=3.0),
    ),
    "falcon-rw": lambda: falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-alibi-one-kv-head": lambda: falcon(alibi=True, parallel_attn=False, activation="gelu_pytorch_tanh"),
    "gpt2": lambda: gpt(transformers.GPT2LMHeadModel),
    "gpt2-scales": lambda: gpt(
        transformers.GPT2LMHeadModel,
        n_inner=70,
        tie_word_embeddings=False,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="relu",
    ),
    "gpt-bigcode": lambda: gpt(transformers.GPTBigCodeForCausalLM),
    "gpt-bigcode-many-heads": lambda: gpt(transformers.GPTBigCodeForCausalLM, multi_query=False, n_inner=70),
    "gptj": lambda: gpt(transformers.GPTJForCausalLM, rotary_dim=6),
    "gpt-neox": lambda: tiny(transformers.GPTNeoXForCausalLM, hidden_size=96, num_key_value_heads=None),
    "gpt-neox-sequential": lambda: tiny(
        transformers.GPTNeoXForCausalLM,
        num_key_value_heads=None,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
        rope_parameters=rope("linear", factor=4.0, partial_rotary_factor=1.0),
    ),
    "mellum": lambda: tiny(
        transformers.MellumForCausalLM,
        head_dim=10,
        num_hidden_layers=4,
        sliding_window=7,
        attention_bias=True,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        layer_types=["sliding_attention", "full_attention"] * 2,
        mlp_layer_types=["dense", "sparse", "sparse", "dense"],
        rope_parameters={
            "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=500.0),
            "sliding_attention": rope("default"),
        },
    ),
    "ministral": lambda: tiny(transformers.MinistralForCausalLM, sliding_window=7, head_dim=10),
    "ministral-layer-types": lambda: tiny(
        transformers.MinistralForCausalLM,
        head_dim=8,
        sliding_window=6,
        tie_word_embeddings=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "ministral3": lambda: tiny(
        transformers.Ministral3ForCausalLM,
        head_dim=12,
        rope_parameters=rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=8,
            llama_4_scaling_beta=0.5,
            mscale=1.0,
            mscale_all_dim=0.7,
        ),
    ),
    "ministral3-window": lambda: tiny(
        transformers.Ministral3ForCausalLM,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        sliding_window=7,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1),
    ),
    "mpt": lambda: mpt(),
    "mpt-scale": lambda: mpt(tie_word_embeddings=False, attn_config={"softmax_scale": 0.3}),
    "nemotron": lambda: tiny(transformers.NemotronForCausalLM, head_dim=12),
    "nemotron-biases": lambda: tiny(
        transformers.NemotronForCausalLM,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
    ),
    "olmo2": lambda: tiny(transformers.Olmo2ForCausalLM),
    "olmo2-biases": lambda: tiny(
        transformers.Olmo2ForCausalLM, attention_bias=True, tie_word_embeddings=True, head_dim=10
    ),
    "olmo3": lambda: tiny(transformers.Olmo3ForCausalLM, num_hidden_layers=5, sliding_window=7, attention_bias=True),
    "olmo3-yarn-layer-types": lambda: tiny(
        transformers.Olmo3ForCausalLM,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=32),
            "sliding_attention": rope("default") | {"rope_theta": 500.0},
        },
    ),
    "opt": lambda: opt(),
    "opt-without-biases": lambda: opt(enable_bias=False, tie_word_embeddings=False, activation_function="gelu"),
    "phi2": lambda: tiny(transformers.PhiForCausalLM, hidden_size=72),
    "phi2-qk-layernorm": lambda: tiny(
        transformers.PhiForCausalLM, hidden_size=96, qk_layernorm=True, tie_word_embeddings=True, hidden_act="relu"
    ),
    "stablelm": lambda: tiny(transformers.StableLmForCausalLM, hidden_size=96, use_qkv_bias=True),
    "stablelm-parallel-qk-layernorm": lambda: tiny(
        transformers.StableLmForCausalLM,
        hidden_size=96,
        use_parallel_residual=True,
        qk_layernorm=True,
        tie_word_embeddings=True,
    ),
    "starcoder2": lambda: tiny(transformers.Starcoder2ForCausalLM, sliding_window=7),
    "starcoder2-without-biases": lambda: tiny(
        transformers.Starcoder2ForCausalLM, use_bias=False, tie_word_embeddings=False, head_dim=10, hidden_act="gelu"
    ),
    "mistral-window": lambda: mistral(sliding_window=7),
    "mistral-no-window": lambda: mistral(sliding_window=None, rope_parameters=rope("default")),
    "phi3": lambda: tiny(transformers.Phi3ForCausalLM, tie_word_embeddings=True),
    "phi3-window": lambda: tiny(
        transformers.Phi3ForCausalLM, sliding_window=7, num_attention_heads=14, hidden_size=112
    ),
    "phi3-longrope-short": lambda: phi3_longrope(MAX_POSITION),
    "phi3-longrope-long": lambda: phi3_longrope(1),
    "seed-oss": lambda: tiny(transformers.SeedOssForCausalLM, head_dim=10),
    "seed-oss-biases": lambda: tiny(
        transformers.SeedOssForCausalLM, head_dim=16, attention_bias=False, attention_out_bias=True, mlp_bias=True
    ),
    "smollm3": lambda: tiny(transformers.SmolLM3ForCausalLM, num_hidden_layers=5),
    "smollm3-windows": lambda: tiny(
        transformers.SmolLM3ForCausalLM,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=6,
    ),
    "qwen2": qwen2,
    "qwen2-tied-upper-windows": lambda: qwen2(
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: qwen3(head_dim=16),
    "qwen3-biases-layer-types": lambda: qwen3(
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "lfm2": lambda: lfm2(layer_types=["full_attention", "conv", "conv"]),
    "lfm2-biases-untied": lambda: lfm2(
        num_hidden_layers=2,
        full_attn_idxs=[0],
        conv_bias=True,
        conv_L_cache=5,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
    ),
    "qwen3.5": lambda: qwen3_5(max_position_embeddings=640),
    "qwen3.5-vision": lambda: tiny_with_vision(
        transformers.Qwen3_5ForConditionalGeneration,
        head_dim=16,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rope_parameters=rope("default", mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
    ),
    "qwen3.5-one-head-tied": lambda: qwen3_5(
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_conv_kernel_dim=2,
        tie_word_embeddings=True,
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        num_hidden_layers=3,
        rope_parameters=rope("default", partial_rotary_factor=0.5),
    ),
    "bamba": lambda: tiny(
        transformers.BambaForCausalLM,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_n_groups=4,
        mamba_d_state=10,
        mamba_chunk_size=16,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "granite-hybrid": lambda: tiny(
        transformers.GraniteMoeHybridForCausalLM, **GRANITE_HYBRID, tie_word_embeddings=True
    ),
    "granite-hybrid-dense-rope": lambda: tiny(
        transformers.GraniteMoeHybridForCausalLM,
        **GRANITE_HYBRID | {"mamba_n_groups": 1, "num_local_experts": 0},
        mamba_expand=3,
        mamba_d_conv=2,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        time_step_limit=[0.4, 0.9],
        attention_bias=True,
        position_embedding_type="rope",
    ),
    "nemotron-h": lambda: tiny(transformers.NemotronHForCausalLM, **NEMOTRON_H, max_position_embeddings=640),
    "nemotron-h-biases": lambda: tiny(
        transformers.NemotronHForCausalLM,
        **NEMOTRON_H | {"n_groups": 1, "n_group": 1, "topk_group": 1, "hybrid_override_pattern": "E-*M-"},
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        mlp_bias=True,
        mlp_hidden_act="silu",
        norm_topk_prob=False,
    ),
    "qwen3.5-moe": lambda: qwen3_5_moe(full_attention_interval=2),
    "qwen3-next": lambda: qwen3_next(mlp_only_layers=[1], norm_topk_prob=False),
    "ministral3-vision": lambda: tiny_with_vision(
        transformers.Mistral3ForConditionalGeneration,
        model_type="ministral3",
        head_dim=12,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.2),
    ),
    "mistral3-vision": lambda: tiny_with_vision(
        transformers.Mistral3ForConditionalGeneration, model_type="mistral", head_dim=10, sliding_window=None
    ),
    "qwen2-vision": lambda: tiny_with_vision(
        transformers.Qwen2VLForConditionalGeneration,
        tie_word_embeddings=True,
        rope_parameters=rope("default", mrope_section=[1, 2, 1], rope_theta=1e6),
    ),
    "qwen2.5-vision-windows": lambda: tiny_with_vision(
        transformers.Qwen2_5_VLForConditionalGeneration,
        rope_parameters=rope("default", mrope_section=[1, 2, 1]),
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3-vision": lambda: tiny_with_vision(
        transformers.Qwen3VLForConditionalGeneration,
        head_dim=16,
        rope_parameters=rope("default", mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
    "deepseek-v2-groups-biases": lambda: tiny(
        transformers.DeepseekV2ForCausalLM,
        **LATENT,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        attention_bias=True,
        mlp_bias=True,
        routed_scaling_factor=3.0,
    ),
    "deepseek-v2-direct-queries": lambda: tiny(
        transformers.DeepseekV2ForCausalLM,
        **LATENT | {"q_lora_rank": None, "qk_nope_head_dim": 4, "n_shared_experts": 1},
    ),
    "deepseek-v3": lambda: tiny(
        transformers.DeepseekV3ForCausalLM,
        **LATENT,
        first_k_dense_replace=1,
        rope_parameters=rope(
            "yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0
        ),
    ),
    "glm4-moe-lite": lambda: tiny(
        transformers.Glm4MoeLiteForCausalLM,
        **LATENT | {"n_group": 1, "topk_group": 1, "v_head_dim": 18},
        norm_topk_prob=False,
        attention_bias=True,
        mlp_layer_types=["sparse", "dense", "sparse"],
    ),
    "gemma4-keys-as-values": lambda: tiny(
        transformers.Gemma4ForCausalLM,
        **GEMMA4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        final_logit_softcapping=5.0,
        hidden_activation="silu",
    ),
    "gemma4-experts": lambda: tiny(
        transformers.Gemma4ForCausalLM,
        **GEMMA4,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=5,
        top_k_experts=2,
        moe_intermediate_size=20,
        rms_norm_eps=1e-5,
    ),
    "gemma4-vision-per-layer-embeddings": lambda: tiny_with_vision(
        transformers.Gemma4ForConditionalGeneration,
        **GEMMA4,
        pad_token_id=0,
        hidden_size_per_layer_input=12,
        vocab_size_per_layer_input=101,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        tie_word_embeddings=True,
    ),
    "gemma4-unified-shared-keys": lambda: tiny(
        transformers.Gemma4UnifiedForCausalLM,
        **GEMMA4 | {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={
            "sliding_attention": rope("linear", factor=2.0),
            "full_attention": rope("proportional", partial_rotary_factor=0.6, factor=2.0),
        },
    ),
    "llama4-vision": lambda: tiny_with_vision(
        transformers.Llama4ForConditionalGeneration,
        **LLAMA4,
        interleave_moe_layer_step=2,
        num_key_value_heads=1,
        num_attention_heads=7,
        attn_scale=0.7,
    ),
    "llama4-two-experts-plain-heads": lambda: tiny(
        transformers.Llama4ForCausalLM,
        **LLAMA4,
        use_qk_norm=False,
        attention_bias=True,
        num_experts_per_tok=2,
        no_rope_layers=[0, 1, 0, 1],
        attn_temperature_tuning=False,
        moe_layers=[0, 1, 3],
        layer_types=["full_attention", "full_attention", "chunked_attention", "chunked_attention"],
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "mixtral-window": lambda: mixtral(sliding_window=7),
    "qwen3-moe": lambda: qwen3_moe(norm_topk_prob=True, tie_word_embeddings=True),
    "qwen3-moe-some-dense": lambda: qwen3_moe(
        attention_bias=True,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=6,
    ),
    "qwen2-moe": qwen2_moe,
    "qwen2-moe-some-dense": lambda: qwen2_moe(
        norm_topk_prob=True,
        tie_word_embeddings=True,
        qkv_bias=False,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "gpt-oss": lambda: gpt_oss(num_attention_heads=7, num_key_value_heads=1),
    "gpt-oss-tied-layer-types": lambda: gpt_oss(
        tie_word_embeddings=True,
        attention_bias=False,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters=rope("default"),
    ),
    "olmoe": lambda: olmoe(num_attention_heads=8),
    "olmoe-biases": lambda: olmoe(attention_bias=True, norm_topk_prob=True, tie_word_embeddings=True),
    "glm-moe-groups": lambda: glm4_moe(n_group=4, topk_group=2, routed_scaling_factor=1.5, attention_bias=True),
    "glm-moe-norms": lambda: glm4_moe(
        use_qk_norm=True, norm_topk_prob=False, n_shared_experts=2, first_k_dense_replace=0, tie_word_embeddings=True
    ),
    "dots1": lambda: dots1(n_group=2, topk_group=1, first_k_dense_replace=1, norm_topk_prob=True),
    "dots1-upper-windows": lambda: dots1(
        attention_bias=True, sliding_window=6, max_window_layers=1, n_shared_experts=2, tie_word_embeddings=True
    ),
    "minimax-m2": lambda: minimax_m2(rotary_dim=12),
    "minimax-m2-tied": lambda: minimax_m2(tie_word_embeddings=True, num_attention_heads=7, num_key_value_heads=1),
    "ernie": lambda: ernie(head_dim=10, tie_word_embeddings=False),
    "ernie-biases": lambda: ernie(use_bias=True),
    "ernie-moe": lambda: ernie_moe(moe_num_shared_experts=1),
    "ernie-moe-some-dense": lambda: ernie_moe(
        use_bias=True,
        tie_word_embeddings=False,
        num_hidden_layers=5,
        moe_layer_interval=2,
        moe_layer_end_index=3,
        moe_num_shared_experts=0,
    ),
}


def is_norm(name: str) -> bool:
    """Whether a weight is one of a norm."""
    return "norm" in name or ".ln_" in name


def make(variant: str, other: Callable[[], PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of that name, or another one, the same at every call, all weights random."""
    torch.manual_seed(sum(variant.encode()))
    model = (other or VARIANTS[variant])()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(mean=float(is_norm(name)), std=0.3)
            else:
                weight.normal_(std=0.15)
        for name in sorted(model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()):
            model.get_buffer(name).normal_(mean=1.0, std=0.3)
    return model.float().eval()


def save(variant: str, folder: Path, *, max_shard_size: str = "1GB") -> PreTrainedModel:
    """Make the model, write it to `folder` in Hugging Face format, and return it."""
    model = make(variant)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
