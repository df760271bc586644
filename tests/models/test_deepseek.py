"""Config.json of the families with latent attention: defaults, routers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from splitfuse.errors import ModelError
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LatentSpec, MlpSpec, NormSpec, RouterSpec
from splitfuse.models.families.registry import spec_from_config
from splitfuse.models.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
V2, V3, GLM = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"


def spec_of(architecture: str, **fields: Any) -> ModelSpec:
    if architecture == V2:
        fields = {"num_experts_per_tok": 6, **fields}
    return spec_from_config({"architectures": [architecture], **SIZES, **fields})


def experts_of(spec: ModelSpec) -> list[ExpertsSpec | None]:
    return [layer.mlp if isinstance(layer.mlp, ExpertsSpec) else None for layer in spec.layers]


@pytest.mark.parametrize(
    ("architecture", "theirs"), [(V2, DeepseekV2Config()), (V3, DeepseekV3Config()), (GLM, Glm4MoeLiteConfig())]
)
def test_latent_attention_defaults(architecture: str, theirs: Any) -> None:
    spec = spec_of(architecture)
    attention = AttentionSpec(
        num_heads=8,
        num_kv_heads=1,
        head_dim=theirs.qk_rope_head_dim + theirs.kv_lora_rank,
        latent=LatentSpec(
            norm=NormSpec(eps=1e-6),
            q_rank=theirs.q_lora_rank,
            kv_rank=theirs.kv_lora_rank,
            rope_dim=theirs.qk_rope_head_dim,
            nope_dim=theirs.qk_nope_head_dim,
            v_dim=theirs.v_head_dim,
        ),
    )
    assert {layer.mixer for layer in spec.layers} == {attention}
    assert (spec.norm.eps, spec.tied_embeddings) == (theirs.rms_norm_eps, False)
    found = next(filter(None, experts_of(spec)))
    shared = theirs.moe_intermediate_size * theirs.n_shared_experts
    assert found.expert == MlpSpec(intermediate_size=theirs.moe_intermediate_size, activation="silu")
    assert found.shared == MlpSpec(intermediate_size=shared, activation="silu")
    assert found.router.num_experts == theirs.n_routed_experts
    assert found.router.scale == theirs.routed_scaling_factor


def test_deepseek_routers() -> None:
    v2 = RouterSpec(num_experts=64, top_k=6, renormalize=False, group_best=1)
    assert [each and each.router for each in experts_of(spec_of(V2))] == [v2] * 4
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    router = experts_of(spec_of(V2, **groups))[0].router  # type: ignore[union-attr]
    assert (router.num_groups, router.top_groups) == (8, 3)
    v3, glm = (
        RouterSpec(
            num_experts=num_experts,
            top_k=top_k,
            renormalize=True,
            sigmoid=True,
            choice_bias=True,
            num_groups=groups,
            top_groups=top_groups,
            min_sum=1e-20,
            scale=scale,
        )
        for num_experts, top_k, groups, top_groups, scale in ((256, 8, 8, 4, 2.5), (64, 4, 1, 1, 1.8))
    )
    assert [each and each.router for each in experts_of(spec_of(V3))] == [None, None, None, v3]
    assert [each and each.router for each in experts_of(spec_of(GLM))] == [None, glm, glm, glm]


def test_yarn_puts_a_factor_on_the_scores() -> None:
    rope = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.5, "mscale_all_dim": 1.0}
    spec = spec_of(V3, rope_scaling={**rope, "original_max_position_embeddings": 64})
    plain = spec_of(V3).layers[0].mixer
    scaled = spec.layers[0].mixer
    assert isinstance(plain, AttentionSpec) and isinstance(scaled, AttentionSpec)
    assert scaled.score_scale / plain.score_scale == pytest.approx(1.3688879**2)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported: use greedy or group_limited_gre"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob True is not supported: use false"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
        (V2, {"num_experts_per_tok": None}, "config.json has no num_experts_per_tok"),
        (V2, {"topk_method": "group_limited_greedy"}, "config.json has no n_group"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported: use 1"),
        (V3, {"rope_interleave": False}, "rope_interleave False is not supported: use true"),
        (V3, {"q_lora_rank": None, "attention_bias": True}, "attention_bias without q_lora_rank is not supported"),
        (V3, {"n_group": 7}, "256 experts do not form 7 equal groups"),
        (V3, {"qk_rope_head_dim": 7}, "rotary part of a head must be an even number from 2 to head_dim 519, not 7"),
        (GLM, {"mlp_layer_types": ["dense"]}, "mlp_layer_types must be 4 times dense or sparse, not"),
        (GLM, {"first_k_dense_replace": 2}, "first_k_dense_replace 2 is not supported: use 1"),
        (GLM, {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
    ],
)
def test_latent_attention_refuses(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(architecture, **fields)
