"""Llama 4's config.json: defaults, which layers have rope, chunks and experts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Llama4TextConfig

from splitfuse.errors import ModelError
from splitfuse.kernels.layers import (
    AttentionSpec,
    ExpertsSpec,
    HeadNormSpec,
    MlpSpec,
    NormSpec,
    QueryScaling,
    RouterSpec,
)
from splitfuse.models.families.registry import spec_from_config
from splitfuse.models.spec import ModelSpec

SIZES: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}


def spec_of(**fields: Any) -> ModelSpec:
    return spec_from_config({**SIZES, **fields})


def test_llama4_defaults() -> None:
    spec, theirs = spec_of(), Llama4TextConfig()
    norm, mlp = NormSpec(eps=theirs.rms_norm_eps), MlpSpec(intermediate_size=160, activation="silu")
    assert (spec.norm, spec.ropes[0].theta, spec.tied_embeddings) == (norm, 500_000.0, False)
    with_rope = AttentionSpec(
        num_heads=8,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        chunk=theirs.attention_chunk_size,
        qk_norm=HeadNormSpec(norm=norm, weight=False, after_rope=True),
    )
    without = AttentionSpec(
        num_heads=8,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        rope=None,
        query_scaling=QueryScaling(beta=theirs.attn_scale, length=theirs.floor_scale, offset=1),
    )
    assert [layer.mixer for layer in spec.layers] == [with_rope] * 3 + [without, with_rope]
    router = RouterSpec(num_experts=16, top_k=1, renormalize=False, sigmoid=True, scales_input=True)
    assert [layer.mlp for layer in spec.layers] == [ExpertsSpec(router=router, expert=mlp, shared=mlp)] * 5


def test_llama4_layers_differ_as_the_config_says() -> None:
    kinds = ["full_attention", "chunked_attention"] * 2 + ["full_attention"]
    spec = spec_of(layer_types=kinds, no_rope_layers=[1, 0, 1, 0, 0], interleave_moe_layer_step=2, use_qk_norm=False)
    mixers = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, AttentionSpec) and mixer.qk_norm is None for mixer in mixers)
    assert [mixer.chunk for mixer in mixers] == [None, 8192, None, 8192, None]  # type: ignore[union-attr]
    assert [mixer.rope for mixer in mixers] == [0, None, 0, None, None]  # type: ignore[union-attr]
    dense = MlpSpec(intermediate_size=16384, activation="silu")
    assert [layer.mlp == dense for layer in spec.layers] == [True, False, True, False, True]
    assert [layer.mlp == dense for layer in spec_of(moe_layers=[0]).layers] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers and layer_types must have an entry for each of 5 layers"),
        ({"layer_types": ["full_attention"]}, "no_rope_layers and layer_types must have an entry for each of 5 layers"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types .* is not supported here"),
        ({"attn_temperature_tuning": 4}, "attn_temperature_tuning must be true or false, not 4"),
        ({"num_local_experts": 0}, "num_local_experts must be a whole number from 1"),
    ],
)
def test_llama4_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**fields)


def test_chunks_are_refused_where_no_reader_honours_them() -> None:
    with pytest.raises(
        ModelError, match="attention_chunk_size = 64: chunked attention, which is not supported for Llama"
    ):
        spec_of(architectures=["LlamaForCausalLM"], attention_chunk_size=64)
