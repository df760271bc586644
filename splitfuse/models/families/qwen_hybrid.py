"""Reads Qwen3-Next and Qwen3.5: gated delta nets, and every few layers a gated attention; dense or with experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.kernels.layers import DeltaSpec, ExpertsSpec, Mixer, MlpSpec, NormSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    decoder,
    head_norms,
    layer_types,
    mlp,
    num_layers,
    read_attention,
    read_router,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Place, Stored, conv1d, plus_one
from splitfuse.models.families.qwen import QWEN2_MOE_NAMES, gated_shared_experts, sparse_layers
from splitfuse.models.families.rope_config import MROPE, read_rope
from splitfuse.models.spec import ModelSpec

HEAD_DIM = 256
ONLY = {"attention_bias": False, "hidden_act": "silu", "attn_output_gate": True, "mamba_ssm_dtype": "float32"}
"""Fields whose other values are refused: the last two are in checkpoints, but not in transformers."""
_LINEAR = "model.layers.{layer}.linear_attn"
_Q_PROJ = "model.layers.{layer}.self_attn.q_proj.weight"


def _delta(place: Place) -> DeltaSpec:
    assert place.layer is not None and isinstance(place.layer.mixer, DeltaSpec)
    return place.layer.mixer


def _half_of_heads(half: int) -> Stored:
    """Return the rows of queries (0) or gates (1), which alternate by head."""

    def take(tensor: Tensor, place: Place) -> Tensor:
        return tensor.view(place.attention.num_heads, 2, -1, tensor.shape[1])[:, half].flatten(0, 1)

    return Stored(_Q_PROJ, take, lambda shape, _: (2 * shape[0], shape[1]))


def _qkvz(tensor: Tensor, place: Place) -> Tensor:
    """Return all queries, keys, values and z of rows that have those of one key head after the other."""
    spec = _delta(place)
    values = spec.num_value_heads // spec.num_key_heads * spec.value_dim
    by_key_head = tensor.view(spec.num_key_heads, -1, tensor.shape[1])
    parts = by_key_head.split_with_sizes((spec.key_dim, spec.key_dim, values, values), dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def _by_key_head(tensor: Tensor, place: Place) -> Tensor:
    """Return all betas, then all rates, of rows that have those of one key head after the other."""
    by_key_head = tensor.view(_delta(place).num_key_heads, 2, -1, tensor.shape[1])
    return by_key_head.transpose(0, 1).flatten(0, 2)


QWEN3_NEXT_NAMES: WeightNames = {
    **QWEN2_MOE_NAMES,
    "norm": (plus_one("model.norm.weight"),),
    "attn_norm": (plus_one("model.layers.{layer}.input_layernorm.weight"),),
    "mlp_norm": (plus_one("model.layers.{layer}.post_attention_layernorm.weight"),),
    "q_norm": (plus_one("model.layers.{layer}.self_attn.q_norm.weight"),),
    "k_norm": (plus_one("model.layers.{layer}.self_attn.k_norm.weight"),),
    "qkv": (_half_of_heads(0), *DECODER_NAMES["qkv"][1:]),
    "attn_gate": (_half_of_heads(1),),
    "in_proj": (Stored(f"{_LINEAR}.in_proj_qkvz.weight", _qkvz),),
    "gates": (Stored(f"{_LINEAR}.in_proj_ba.weight", _by_key_head),),
    "conv": (conv1d(f"{_LINEAR}.conv1d.weight"),),
    "decay": (Stored(f"{_LINEAR}.A_log", lambda tensor, _: tensor.float().exp()),),
    "decay_bias": (f"{_LINEAR}.dt_bias",),
    "out_norm": (f"{_LINEAR}.norm.weight",),
    "out_proj": (f"{_LINEAR}.out_proj.weight",),
}
QWEN3_5_NAMES: WeightNames = {
    **QWEN3_NEXT_NAMES,
    "in_proj": tuple(f"{_LINEAR}.in_proj_{part}.weight" for part in ("qkv", "z")),
    "gates": tuple(f"{_LINEAR}.in_proj_{part}.weight" for part in "ba"),
}


def qwen3_next(config: ConfigJson) -> ModelSpec:
    """Return the network of a Qwen3NextForCausalLM."""
    router = read_router(config, 512, 10, renormalize=config.flag("norm_topk_prob", True))
    experts = gated_shared_experts(config, router, 512, 512)
    return _hybrid(config, sparse_layers(config, experts), num_kv_heads=2)


def qwen3_5(config: ConfigJson) -> ModelSpec:
    """Return the network of Qwen3.5, or of its text."""
    return _hybrid(config, mlp(config), num_kv_heads=4)


def qwen3_5_moe(config: ConfigJson) -> ModelSpec:
    """Return the network of Qwen3.5-MoE, or of its text."""
    router = read_router(config, 256, 8, renormalize=True)
    return _hybrid(config, gated_shared_experts(config, router, 512, 512), num_kv_heads=2)


def _hybrid(
    config: ConfigJson, mlps: MlpSpec | ExpertsSpec | Sequence[MlpSpec | ExpertsSpec], *, num_kv_heads: int
) -> ModelSpec:
    for field, only in ONLY.items():
        if field in config and config.raw(field) != only:
            raise UnsupportedModelError(f"{field} {brief(config.raw(field))} is not supported here: use {brief(only)}")
    delta = DeltaSpec(
        num_key_heads=config.integer("linear_num_key_heads", 16),
        num_value_heads=config.integer("linear_num_value_heads", 32),
        key_dim=config.integer("linear_key_head_dim", 128),
        value_dim=config.integer("linear_value_head_dim", 128),
        conv_size=config.integer("linear_conv_kernel_dim", 4),
        norm=NormSpec(eps=config.number("rms_norm_eps", 1e-6)),
    )
    attention = read_attention(
        config, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, qk_norm=head_norms(config), gate=True
    )
    if "layer_types" in config:
        is_delta = [kind == "linear_attention" for kind in layer_types(config)]
    else:
        interval = config.integer("full_attention_interval", 4)
        is_delta = [bool((n + 1) % interval) for n in range(num_layers(config))]
    mixers: list[Mixer] = [delta if each else attention for each in is_delta]
    rope = read_rope(config, head_dim=attention.head_dim, share=0.25, honours=MROPE)
    return decoder(config, mixers, mlps, ropes=[rope])


FAMILIES = {
    "Qwen3NextForCausalLM": Family("qwen3_next", qwen3_next, QWEN3_NEXT_NAMES, alternatives=(FUSED_EXPERT_NAMES,)),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", qwen3_5, QWEN3_5_NAMES),
    "Qwen3_5ForConditionalGeneration": Family("qwen3_5", qwen3_5, QWEN3_5_NAMES, text_types=("qwen3_5_text",)),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", qwen3_5_moe, QWEN3_5_NAMES, (FUSED_EXPERT_NAMES,)),
    "Qwen3_5MoeForConditionalGeneration": Family(
        "qwen3_5_moe", qwen3_5_moe, QWEN3_5_NAMES, (FUSED_EXPERT_NAMES,), text_types=("qwen3_5_moe_text",)
    ),
}
