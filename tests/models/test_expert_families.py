"""Families with experts: their defaults, what they refuse, and both ways in which checkpoints store experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ragged_requests import Request, Runner
from safetensors.torch import save_file
from transformers import (
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MiniMaxM2Config,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.kernels.layers import ExpertsSpec, MlpSpec, RouterSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import FAMILIES, load_spec, spec_from_config
from splitfuse.models.sources.files import SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import ModelSpec, YarnScaling
from splitfuse.models.weights import check_weights, load_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "Dots1ForCausalLM": Dots1Config,
    "Ernie4_5ForCausalLM": Ernie4_5Config,
    "Ernie4_5_MoeForCausalLM": Ernie4_5_MoeConfig,
    "Glm4MoeForCausalLM": Glm4MoeConfig,
    "GptOssForCausalLM": GptOssConfig,
    "GraniteMoeForCausalLM": GraniteMoeConfig,
    "MiniMaxM2ForCausalLM": MiniMaxM2Config,
    "OlmoeForCausalLM": OlmoeConfig,
    "Qwen2MoeForCausalLM": Qwen2MoeConfig,
}
NEEDED = {
    "Dots1ForCausalLM": {
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    }
}
"""Fields without a default that makes sense."""


def spec_of(architecture: str, **fields: Any) -> ModelSpec:
    return spec_from_config({"architectures": [architecture], **SIZES, **fields})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """A config that says nothing but its sizes is read as what transformers writes for it."""
    needed = NEEDED.get(architecture, {})
    stated = json.loads(CONFIGS[architecture](**SIZES, **needed).to_json_string(use_diff=False))
    stated["dtype"] = "float32"
    assert spec_of(architecture, **needed) == spec_from_config({**stated, "architectures": [architecture]})


def test_gpt_oss_of_its_lab() -> None:
    spec = spec_of(
        "GptOssForCausalLM",
        num_experts_per_tok=4,
        num_local_experts=32,
        experts_per_token=4,
        initial_context_length=4096,
        swiglu_limit=7.0,
        rope_theta=150000,
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
    )
    assert [layer.mixer.window for layer in spec.layers] == [128, None, 128]
    assert all(layer.mixer.sinks and layer.mixer.o_bias and layer.mixer.head_dim == 64 for layer in spec.layers)
    assert spec.layers[0].mlp == ExpertsSpec(
        router=RouterSpec(num_experts=32, top_k=4, renormalize=True, bias=True),
        expert=MlpSpec(intermediate_size=160, activation="clamped_swiglu", bias=True),
    )
    [rope] = spec.ropes
    assert rope.theta == 150000
    assert isinstance(rope.scaling, YarnScaling) and not rope.scaling.truncate
    assert spec.max_position == 131072


def test_glm_reads_its_router_and_shared_expert() -> None:
    spec = spec_of(
        "Glm4MoeForCausalLM",
        n_group=8,
        topk_group=4,
        n_routed_experts=64,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        moe_intermediate_size=32,
    )
    assert [type(layer.mlp) for layer in spec.layers] == [MlpSpec, ExpertsSpec, ExpertsSpec]
    assert spec.layers[1].mlp == ExpertsSpec(
        router=RouterSpec(
            num_experts=64,
            top_k=8,
            renormalize=True,
            sigmoid=True,
            choice_bias=True,
            num_groups=8,
            top_groups=4,
            min_sum=1e-20,
            scale=2.5,
        ),
        expert=MlpSpec(intermediate_size=32, activation="silu"),
        shared=MlpSpec(intermediate_size=64, activation="silu"),
    )
    assert spec.ropes[0].rotary_dim == 2


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, [None, None, None]),
        ({"use_sliding_window": True}, [9, None, 9]),
        ({"use_sliding_window": True, "max_window_layers": 2}, [9, None, None]),
    ],
)
def test_qwen2_moe_windows(fields: dict[str, Any], windows: list[int | None]) -> None:
    spec = spec_of("Qwen2MoeForCausalLM", sliding_window=9, **fields)
    assert [layer.mixer.window for layer in spec.layers] == windows


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported: use 7.0"),
        ("GptOssForCausalLM", {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported: use 1.702"),
        ("GptOssForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: use \"silu\""),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported: use null"),
        ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("MiniMaxM2ForCausalLM", {"use_qk_norm": False}, "use_qk_norm False is not supported: use true"),
        ("Ernie4_5_MoeForCausalLM", {"num_experts": 8}, "config.json has num_experts"),
        ("Glm4MoeForCausalLM", {"num_local_experts": 8}, "config.json has num_local_experts"),
    ],
)
def test_fields_not_honoured_are_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(architecture, **fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Glm4MoeForCausalLM", {"n_group": 3}, "128 experts do not form 3 equal groups of which 1 are chosen"),
        ("Glm4MoeForCausalLM", {"n_group": 4, "topk_group": 5}, "128 experts do not form 4 equal groups of which 5"),
        (
            "Glm4MoeForCausalLM",
            {"n_group": 64, "topk_group": 2},
            "a token cannot visit 8 experts: 2 of 64 groups have 4",
        ),
        ("Glm4MoeForCausalLM", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number from 0"),
        ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": [8, 8]}, "moe_num_experts must be a whole number from 1"),
        ("Ernie4_5_MoeForCausalLM", {"moe_k": 65}, "a token cannot visit 65 experts: there are 64"),
        ("GptOssForCausalLM", {"layer_types": ["full_attention"]}, "layer_types describes 1 layers"),
    ],
)
def test_invalid_values_are_named(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(architecture, **fields)


def first_logits(folder: Path) -> tuple[torch.Tensor, Decoder]:
    weights, backend = ModelFolder(folder).weights(), ReferenceBackend()
    spec = check_weights(weights, load_spec(ModelFolder(folder)))
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=torch.device("cpu"), backend=backend)
    request = Request([5, 3, 70, 22, 9])
    Runner(decoder, block_size=4).step([(request, 5)])
    return torch.stack(request.logits), decoder


@pytest.mark.parametrize(
    "variant",
    [
        "mixtral-window",
        "qwen3-moe",
        "qwen2-moe",
        "glm-moe-groups",
        "ernie-moe",
        "olmoe",
        "dots1",
        "minimax-m2",
        "deepseek-v3",
        "granite-moe",
        "granite-hybrid",
        "nemotron-h",
    ],
)
def test_experts_in_one_tensor_are_the_same_network(variant: str, tmp_path: Path) -> None:
    """transformers writes each expert apart, and keeps them in memory as one tensor, which other tools write."""
    apart, fused = tmp_path / "apart", tmp_path / "fused"
    model = tiny_models.save(variant, apart)
    model.config.save_pretrained(fused)
    kept = {name for name, weight in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    save_file({n: w.contiguous() for n, w in model.state_dict().items() if n in kept}, fused / SINGLE_FILE)
    (expected, _), (ours, decoder) = first_logits(apart), first_logits(fused)
    assert torch.equal(ours, expected)
    assert FAMILIES[decoder.spec.architecture].alternatives
