"""Reads MiniMax-M2: norms of whole rows of queries and keys, part of each head rotated, experts chosen by sigmoids."""

from __future__ import annotations

from splitfuse.kernels.layers import ExpertsSpec
from splitfuse.models.families.common import (
    FUSED_EXPERT_NAMES,
    Family,
    WeightNames,
    accept_only,
    decoder,
    head_norms,
    mlp,
    read_attention,
    read_router,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.llama import MIXTRAL_NAMES
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

MINIMAX_NAMES: WeightNames = {
    **MIXTRAL_NAMES,
    "choice_bias": ("model.layers.{layer}.block_sparse_moe.e_score_correction_bias",),
}
MINIMAX_ALTERNATIVES = ({**FUSED_EXPERT_NAMES, "choice_bias": ("model.layers.{layer}.mlp.e_score_correction_bias",)},)


def minimax_m2(config: ConfigJson) -> ModelSpec:
    """Return the network of a MiniMaxM2ForCausalLM."""
    accept_only(config, scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=True, qk_norm_type="per_layer")
    norms = head_norms(config, whole_row=True)
    attention = read_attention(config, num_kv_heads=8, head_dim=128, qk_norm=norms)
    router = read_router(config, 256, 8, renormalize=True, sigmoid=True, choice_bias=True)
    share = config.integer("rotary_dim", attention.head_dim) / attention.head_dim
    rope = read_rope(config, head_dim=attention.head_dim, theta=5e6, share=share)
    further = config.integer("num_mtp_modules", 0, least=0)
    experts = ExpertsSpec(router=router, expert=mlp(config))
    return decoder(config, attention, experts, ropes=(rope,), further_layers=further)


FAMILIES = {"MiniMaxM2ForCausalLM": Family("minimax_m2", minimax_m2, MINIMAX_NAMES, alternatives=MINIMAX_ALTERNATIVES)}
