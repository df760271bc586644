"""Reads DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash: latent attention, and experts chosen within groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LatentSpec, MlpSpec, NormSpec, RouterSpec
from splitfuse.models.families.common import (
    EXPERT_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    accept_only,
    decoder,
    further_layers,
    mlp,
    num_layers,
    sigmoid_router,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Layout, Place, Shape, Stored
from splitfuse.models.families.rope_config import read_rope, rope_section
from splitfuse.models.spec import ModelSpec

_ATTENTION = "model.layers.{layer}.self_attn"


def _latent(place: Place) -> LatentSpec:
    assert place.attention.latent is not None
    return place.attention.latent


def _pairs(dim: int) -> Tensor:
    """Return the order in which neighbouring elements, which rope rotates together, come half a vector apart."""
    return torch.arange(dim).view(dim // 2, 2).T.flatten()


def _queries(name: str) -> Stored:
    """Return queries with the rotated elements of each head first."""

    def take(tensor: Tensor, place: Place) -> Tensor:
        rope, nope = _latent(place).rope_dim, _latent(place).nope_dim
        heads = tensor.view(-1, nope + rope, *tensor.shape[1:])
        return heads[:, torch.cat((nope + _pairs(rope), torch.arange(nope)))].view_as(tensor)

    return Stored(name, take)


def _keys_and_values(name: str) -> Stored:
    """Return the compressed vector of keys and values, and the rotated elements of keys."""

    def take(tensor: Tensor, place: Place) -> Tensor:
        rope, rank = _latent(place).rope_dim, _latent(place).kv_rank
        return tensor[torch.cat((torch.arange(rank), rank + _pairs(rope)))]

    return Stored(name, take)


def _of_heads(name: str, take: Callable[[Tensor, LatentSpec], Tensor]) -> Stored:
    """Return a weight of each head, [H, N, K], of a tensor that has the rows of each head's key, then of its value."""

    def heads(tensor: Tensor, place: Place) -> Tensor:
        return take(tensor.view(place.attention.num_heads, -1, tensor.shape[1]), _latent(place))

    def shape(_: Shape, place: Place) -> Shape:
        latent = _latent(place)
        return place.attention.num_heads * (latent.nope_dim + latent.v_dim), latent.kv_rank

    return Stored(name, heads, shape)


def _compressed(end: str) -> Callable[[Place], Layout]:
    """Return the tensors that read the hidden states."""

    def layout(place: Place) -> Layout:
        direct = _latent(place).q_rank is None
        queries = _queries(f"{_ATTENTION}.q_proj.{end}") if direct else f"{_ATTENTION}.q_a_proj.{end}"
        return queries, _keys_and_values(f"{_ATTENTION}.kv_a_proj_with_mqa.{end}")

    return layout


DEEPSEEK_NAMES: WeightNames = {
    **EXPERT_NAMES,
    "qkv": _compressed("weight"),
    "qkv_bias": _compressed("bias"),
    "q_a_norm": (f"{_ATTENTION}.q_a_layernorm.weight",),
    "q_b": (_queries(f"{_ATTENTION}.q_b_proj.weight"),),
    "kv_a_norm": (f"{_ATTENTION}.kv_a_layernorm.weight",),
    "k_b": (_of_heads(f"{_ATTENTION}.kv_b_proj.weight", lambda rows, latent: rows[:, : latent.nope_dim].mT),),
    "v_b": (_of_heads(f"{_ATTENTION}.kv_b_proj.weight", lambda rows, latent: rows[:, latent.nope_dim :]),),
}

V3_DEFAULTS = {
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
}
GLM_DEFAULTS = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "moe_intermediate_size": 1536,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
}


def deepseek_v2(config: ConfigJson) -> ModelSpec:
    """Return the network of a DeepseekV2ForCausalLM."""
    accept_only(config, scoring_func="softmax", norm_topk_prob=False, moe_layer_freq=1)
    method = config.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"topk_method {brief(method)} is not supported: use greedy or group_limited_greedy")
    grouped = method == "group_limited_greedy"
    groups, top_groups = (config.integer(field, None if grouped else 1) for field in ("n_group", "topk_group"))
    router = RouterSpec(
        num_experts=config.integer("n_routed_experts", 64),
        top_k=config.integer("num_experts_per_tok"),
        renormalize=False,
        num_groups=groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        group_best=1,
        scale=config.number("routed_scaling_factor", 1.0),
    )
    biased = config.flag("mlp_bias", False)
    size = config.integer("moe_intermediate_size", 1407)
    shared = mlp(config, size * config.integer("n_shared_experts", 2), bias=biased)
    experts = ExpertsSpec(router=router, expert=mlp(config, size), shared=shared)
    dense = config.integer("first_k_dense_replace", 0, least=0)
    mlps = [mlp(config, bias=biased) if number < dense else experts for number in range(num_layers(config))]
    return _decoder(config, mlps)


def deepseek_v3(config: ConfigJson) -> ModelSpec:
    """Return the network of a DeepseekV3ForCausalLM."""
    config = config.with_defaults(V3_DEFAULTS)
    experts, dense = _sigmoid_experts(config), config.integer("first_k_dense_replace", least=0)
    mlps = [mlp(config) if number < dense else experts for number in range(num_layers(config))]
    return _decoder(config, mlps, mtp_layers=1)


def glm4_moe_lite(config: ConfigJson) -> ModelSpec:
    """Return the network of a Glm4MoeLiteForCausalLM: GLM-4.7-Flash."""
    config = config.with_defaults(GLM_DEFAULTS)
    count, experts = num_layers(config), _sigmoid_experts(config)
    kinds = config.texts("mlp_layer_types") if "mlp_layer_types" in config else ["dense", *["sparse"] * (count - 1)]
    if len(kinds) != count or set(kinds) - {"dense", "sparse"}:
        raise UnsupportedModelError(
            f"config.json: mlp_layer_types must be {count} times dense or sparse, not {brief(kinds)}"
        )
    if "mlp_layer_types" not in config:
        accept_only(config, first_k_dense_replace=1)
    # Its rank is no default of GLM_DEFAULTS, since null says that there is none.
    return _decoder(config, [mlp(config) if kind == "dense" else experts for kind in kinds], q_rank=768)


def _sigmoid_experts(config: ConfigJson) -> ExpertsSpec:
    accept_only(config, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, rope_interleave=True)
    size = config.integer("moe_intermediate_size")
    shared = mlp(config, size * config.integer("n_shared_experts", 1))
    return ExpertsSpec(router=sigmoid_router(config), expert=mlp(config, size), shared=shared)


def _decoder(
    config: ConfigJson, mlps: Sequence[MlpSpec | ExpertsSpec], *, q_rank: int = 1536, mtp_layers: int = 0
) -> ModelSpec:
    """Return a network of latent attention with these MLPs; `q_rank` and `mtp_layers` are defaults."""
    heads, biased = config.integer("num_attention_heads"), config.flag("attention_bias", False)
    latent = LatentSpec(
        norm=NormSpec(eps=1e-6),
        q_rank=None if config.is_null("q_lora_rank") else config.integer("q_lora_rank", q_rank),
        kv_rank=config.integer("kv_lora_rank", 512),
        rope_dim=config.integer("qk_rope_head_dim", 64),
        nope_dim=config.integer("qk_nope_head_dim", 128),
        v_dim=config.integer("v_head_dim", 128),
    )
    if biased and latent.q_rank is None:
        raise UnsupportedModelError("config.json: attention_bias without q_lora_rank is not supported")
    rope = read_rope(config, head_dim=latent.rope_dim)
    if rope.rotary_dim != latent.rope_dim:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1 is not supported")
    magnitude = _magnitude(config)
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=1,
        head_dim=latent.rope_dim + latent.kv_rank,
        latent=latent,
        qkv_bias=biased,
        o_bias=biased,
        scale=None if magnitude == 1.0 else (latent.rope_dim + latent.nope_dim) ** -0.5 * magnitude**2,
    )
    return decoder(config, attention, mlps, ropes=[rope], further_layers=further_layers(config, mtp_layers))


def _magnitude(config: ConfigJson) -> float:
    """Return the factor that YaRN's `mscale_all_dim` puts on queries and keys as a whole."""
    rope = rope_section(config)
    if rope.text("rope_type", rope.text("type", "default")) == "default" or not rope.raw("mscale_all_dim"):
        return 1.0
    factor = rope.number("factor")
    return 0.1 * rope.number("mscale_all_dim") * math.log(factor) + 1 if factor > 1 else 1.0


FAMILIES = {
    "DeepseekV2ForCausalLM": Family("deepseek_v2", deepseek_v2, DEEPSEEK_NAMES, (FUSED_EXPERT_NAMES,)),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", deepseek_v3, DEEPSEEK_NAMES, (FUSED_EXPERT_NAMES,)),
    "Glm4MoeLiteForCausalLM": Family("glm4_moe_lite", glm4_moe_lite, DEEPSEEK_NAMES, (FUSED_EXPERT_NAMES,)),
}
