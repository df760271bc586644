"""Gemma 4's config.json: defaults, both ways to say the sizes of heads, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig

from splitfuse.errors import ModelError, WeightsError
from splitfuse.kernels.layers import AttentionSpec, HeadNormSpec, MlpSpec, NormPlace, NormSpec
from splitfuse.models.families.registry import load_spec, spec_from_config
from splitfuse.models.sources.files import SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import ModelSpec, ProportionalScaling, RopeSpec
from splitfuse.models.weights import check_weights, left_aside

SIZES: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 0,
}


KINDS = ["full_attention", *["sliding_attention"] * 5, "full_attention"]


def spec_of(**fields: Any) -> ModelSpec:
    return spec_from_config({**SIZES, **fields})


def mixers(spec: ModelSpec) -> list[AttentionSpec]:
    found = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, AttentionSpec) for mixer in found)
    return found  # type: ignore[return-value]


def test_gemma4_defaults() -> None:
    spec, theirs = spec_of(), Gemma4TextConfig()
    norm = NormSpec(eps=theirs.rms_norm_eps)
    local = AttentionSpec(
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        rope=1,
        window=theirs.sliding_window,
        qk_norm=HeadNormSpec(norm=norm),
        v_norm=norm,
        scale=1.0,
    )
    seen = [mixer == local for mixer in mixers(spec)]
    assert seen == [True, True, True, True, True, False, False]  # every sixth, and the last one always
    assert {(mixer.head_dim, mixer.num_kv_heads, mixer.window, mixer.rope) for mixer in mixers(spec)[5:]} == {
        (512, 4, None, 0)
    }
    assert spec.ropes == (
        RopeSpec(theta=1e6, rotary_dim=512, scaling=ProportionalScaling(share=0.25, factor=1.0)),
        RopeSpec(theta=1e4, rotary_dim=256),
    )
    assert {(layer.norms, layer.output_scale, layer.mlp) for layer in spec.layers} == {
        (NormPlace.AROUND, True, MlpSpec(intermediate_size=160, activation="gelu_tanh"))
    }
    assert (spec.norm, spec.tied_embeddings, spec.logit_softcap) == (norm, True, None)
    unified = spec_of(architectures=["Gemma4UnifiedForCausalLM"])
    assert mixers(unified)[0].window == 1024


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 96**0.5), ("bfloat16", 9.8125), ("float16", 9.796875)])
def test_gemma4_embedding_scale_is_rounded_to_the_dtype(dtype: str, scale: float) -> None:
    assert spec_of(dtype=dtype).embed_scale == pytest.approx(scale, rel=1e-7)


def test_gemma4_sizes_of_layers_are_said_in_two_ways() -> None:
    first = spec_of(attention_k_eq_v=True, num_global_key_value_heads=2, global_head_dim=20)
    sizes = {"head_dim": 20, "num_key_value_heads": 2}
    written = spec_of(attention_k_eq_v=True, per_layer_config={"5": sizes, "06": sizes})
    assert first == written
    assert [mixer.value_is_key for mixer in mixers(first)] == [False] * 5 + [True] * 2
    assert mixers(spec_of(num_global_key_value_heads=2))[5].num_kv_heads == 4  # only with attention_k_eq_v


def test_gemma4_layers_reuse_keys_of_the_last_of_their_kind() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    spec = spec_of(num_hidden_layers=5, layer_types=kinds, num_kv_shared_layers=2, use_double_wide_mlp=True)
    assert [mixer.kv_layer for mixer in mixers(spec)] == [None, None, None, 2, 1]
    assert [layer.mlp.intermediate_size for layer in spec.layers] == [160, 160, 160, 320, 320]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 7 times sliding_attention or full_attention"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types must be 7 times sliding_attention or full_attention"),
        ({"layer_types": ["sliding_attention"] * 7}, "layer_types .* is not supported here"),
        ({"enable_moe_block": True}, "config.json has no num_experts"),
        ({"enable_moe_block": True, "num_experts": 4}, "config.json has no top_k_experts"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers leaves no full_attention layer that has keys and values"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers must be a whole number from 0 to 7, not 8"),
        ({"per_layer_config": {"7": {"head_dim": 8}}}, "per_layer_config must be by the numbers of layers"),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, "per_layer_config must be by the numbers of layers"),
        ({"per_layer_config": {"6": {"head_dim": 8}}}, r"gives full_attention layers heads of \[8, 256\]: give those"),
        (
            {"layer_types": KINDS, "num_kv_shared_layers": 2, "per_layer_config": {"5": {"num_key_value_heads": 2}}},
            "layer 5 takes the keys and values of layer 4, which has 4 key/value heads of 256: .* not 2 of 256",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must be those of sliding_attention and"),
    ],
)
def test_gemma4_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**fields)


def test_gemma4_keys_that_are_not_used_may_be_stored(tmp_path: Path) -> None:
    tiny_models.save("gemma4-vision-per-layer-embeddings", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    attention = "model.language_model.layers.{}.self_attn.{}"
    unused = [attention.format(3, name) for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight")]
    save_file(tensors | {name: torch.zeros(3) for name in unused}, tmp_path / SINGLE_FILE)
    source = ModelFolder(tmp_path)
    spec = load_spec(source)
    assert sorted(left_aside(source.weights(), spec)["unused keys and values"]) == sorted(unused)
    check_weights(source.weights(), spec)
    save_file(tensors | {attention.format(1, "k_proj.bias"): torch.zeros(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=r"does not use \(1\)"):
        check_weights(source.weights(), spec)
