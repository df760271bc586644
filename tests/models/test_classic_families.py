"""Decoders with layer norms, ALiBi or norms behind the blocks: what is refused, and the names of older checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from ragged_requests import Request, Runner
from safetensors.torch import load_file, save_file

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import load_spec, spec_from_config
from splitfuse.models.sources.files import SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import check_weights, load_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "ffn_dim": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
NEW_FALCON = {"new_decoder_architecture": True}


HUB: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"logit_scale": 0.8, "rope_theta": 75e6, "use_qk_norm": True, "tie_word_embeddings": True},
    "Cohere2ForCausalLM": {"sliding_window_pattern": 2, "rope_theta": 50000, "logit_scale": 0.25, "rotary_pct": 1.0},
    "FalconForCausalLM": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "GPT2LMHeadModel": {"n_embd": 96, "n_head": 4, "n_layer": 2, "n_positions": 256, "n_ctx": 256, "n_inner": 100},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.5, "rotary_emb_base": 5000, "use_parallel_residual": False},
    "Ministral3ForCausalLM": {
        "rope_parameters": {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "MptForCausalLM": {
        "d_model": 96,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "norm_type": "low_precision_layernorm",
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "softmax_scale": 0.5, "qk_ln": False},
    },
    "NemotronForCausalLM": {"partial_rotary_factor": 0.25, "rope_theta": 5000.0, "head_dim": 16, "norm_eps": 1e-6},
    "OPTForCausalLM": {"do_layer_norm_before": True, "word_embed_proj_dim": 64, "ffn_dim": 80, "enable_bias": False},
    "Olmo3ForCausalLM": {
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    },
    "PhiForCausalLM": {"partial_rotary_factor": 0.25, "rope_theta": 5000.0, "rope_scaling": None, "qk_layernorm": True},
    "StableLmForCausalLM": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2, "rope_theta": 5000},
    "Starcoder2ForCausalLM": {
        "norm_epsilon": 1e-4,
        "norm_type": "layer_norm",
        "mlp_type": "default",
        "use_bias": False,
    },
}


@pytest.mark.parametrize("architecture", HUB)
def test_a_config_of_before_means_what_transformers_reads(architecture: str) -> None:
    """Fields as the labs wrote them, and as transformers 5 writes what it has read."""
    said = {"architectures": [architecture], **SIZES, **HUB[architecture]}
    read = getattr(transformers, architecture).config_class(**copy.deepcopy(said)).to_dict()
    assert spec_from_config(said) == spec_from_config(read)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("OPTForCausalLM", {"do_layer_norm_before": False}, "do_layer_norm_before False .*: use true"),  # 350m
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 .*: use 64"),
        ("OPTForCausalLM", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("OPTForCausalLM", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("OPTForCausalLM", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention True .*: use false"),
        ("GPTNeoXForCausalLM", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("FalconForCausalLM", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 .*: use 1"),
        ("FalconForCausalLM", NEW_FALCON | {"parallel_attn": False}, "parallel_attn False .*: use true"),
        ("MptForCausalLM", {"attn_config": {"clip_qkv": 6}}, "clip_qkv 6 .*: use null"),
        ("MptForCausalLM", {"attn_config": {"alibi": False}}, "alibi False .*: use true"),
        ("MptForCausalLM", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max 16 .*: use 8"),
        ("MptForCausalLM", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        ("MptForCausalLM", {"attn_config": {"qk_ln": True}}, "qk_ln"),
        ("MptForCausalLM", {"no_bias": False}, "no_bias"),
        ("MptForCausalLM", {"logit_scale": 0.5}, "logit_scale"),
        ("Cohere2ForCausalLM", {"use_qk_norm": True}, "use_qk_norm"),
        ("Cohere2ForCausalLM", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Olmo3ForCausalLM", {"rope_parameters": {"global": {"rope_type": "default"}}}, "it has .*global"),
        (
            "Ministral3ForCausalLM",
            {"rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "of type yarn",
        ),
        ("BloomForCausalLM", {}, "use a later model"),
        ("OlmoForCausalLM", {}, "the first OLMo, .*: use OLMo 2"),
        ("QWenLMHeadModel", {}, "the first Qwen, .*: use Qwen1.5"),
    ],
)
def test_what_is_not_computed_is_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec_from_config({"architectures": [architecture], **SIZES, "max_seq_len": 512, **fields})


def test_an_error_names_the_field_as_the_config_does() -> None:
    with pytest.raises(ModelError, match="n_head must be a whole number"):
        spec_from_config({"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 0})
    with pytest.raises(ModelError, match=r"config\.json has no n_head"):
        spec_from_config({"architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(
    ("variant", "rename"),
    [
        ("gpt-neox", lambda name: name.replace("embed_out.", "lm_head.")),
        ("gpt2", lambda name: name.removeprefix("transformer.")),  # as OpenAI's files have them
        ("opt", lambda name: name.removeprefix("model.")),
        ("falcon-40b", lambda name: name.removeprefix("transformer.")),
        ("cohere-untied", lambda name: name.removeprefix("model.")),
    ],
)
def test_other_names_of_the_same_weights(variant: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    model = tiny_models.save(variant, tmp_path)
    stored = {rename(name): weight for name, weight in load_file(tmp_path / SINGLE_FILE).items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask, which old files hold
    save_file(stored, tmp_path / SINGLE_FILE)
    source = ModelFolder(tmp_path)
    spec = check_weights(source.weights(), load_spec(source))
    decoder = load_decoder(
        source.weights(), spec, dtype=torch.float32, device=torch.device("cpu"), backend=ReferenceBackend()
    )
    request = Request([5, 3, 8, 1])
    Runner(decoder, block_size=4).step([(request, 4)])
    with torch.no_grad():
        oracle = model(input_ids=torch.tensor([[5, 3, 8, 1]])).logits[0]
    assert (torch.stack(request.logits) - oracle).abs().max() <= 1e-4 * oracle.abs().max()
