"""Reads gpt-oss: windows and whole contexts in turns, sinks, experts with biases and a clamped gate."""

from __future__ import annotations

from splitfuse.kernels.layers import ExpertsSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    accept_only,
    biased_attention,
    decoder,
    in_windows,
    mlp,
    read_router,
    windowed_layers,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import Stored, every_other, of_expert, transposed
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

_LAYER = "model.layers.{layer}"

GPT_OSS_NAMES: WeightNames = {
    **DECODER_NAMES,
    "sinks": (f"{_LAYER}.self_attn.sinks",),
    "router": (f"{_LAYER}.mlp.router.weight",),
    "router_bias": (f"{_LAYER}.mlp.router.bias",),
    "w13": tuple(of_expert(every_other(transposed(f"{_LAYER}.mlp.experts.gate_up_proj"), half)) for half in (0, 1)),
    "w1_bias": tuple(
        of_expert(every_other(Stored(f"{_LAYER}.mlp.experts.gate_up_proj_bias"), half)) for half in (0, 1)
    ),
    "w2": (of_expert(transposed(f"{_LAYER}.mlp.experts.down_proj")),),
    "w2_bias": (of_expert(Stored(f"{_LAYER}.mlp.experts.down_proj_bias")),),
}

_EXPERT = f"{_LAYER}.mlp.experts.{{expert}}"
SEPARATE_EXPERTS: WeightNames = {
    "w13": tuple(f"{_EXPERT}.{part}_proj.weight" for part in ("gate", "up")),
    "w1_bias": tuple(f"{_EXPERT}.{part}_proj.bias" for part in ("gate", "up")),
    "w2": (f"{_EXPERT}.down_proj.weight",),
    "w2_bias": (f"{_EXPERT}.down_proj.bias",),
}
"""Names of experts that are stored one by one, as GGUF files give them."""
MXFP4_NAMES: WeightNames = {
    "w13": tuple(every_other(Stored(f"{_EXPERT}.gate_up_proj_blocks"), half) for half in (0, 1)),
    "w2": (f"{_EXPERT}.down_proj_blocks",),
}
"""Names of weights of experts as they are released: in MXFP4, of which the reader gives one by one."""

ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
"""Rope of a config that has none."""


def gpt_oss(config: ConfigJson) -> ModelSpec:
    """Return the network of a GptOssForCausalLM."""
    accept_only(config, swiglu_alpha=1.702, swiglu_limit=7.0, hidden_act="silu")
    attention = biased_attention(config, default=True, num_kv_heads=8, head_dim=64, sinks=True)
    size = None if config.is_null("sliding_window") else config.integer("sliding_window", 128)
    inside = windowed_layers(config, lambda number: number % 2 == 0)
    router = read_router(config, 128, 4, renormalize=True, bias=True)
    config = config.with_defaults({"rope_parameters": ROPE})
    return decoder(
        config,
        in_windows(attention, size, inside),
        ExpertsSpec(router=router, expert=mlp(config, activation="clamped_swiglu", bias=True)),
        ropes=(read_rope(config, head_dim=attention.head_dim, theta=150_000.0),),
        norm_eps=1e-5,
    )


FAMILIES = {"GptOssForCausalLM": Family("gpt_oss", gpt_oss, GPT_OSS_NAMES, (SEPARATE_EXPERTS, MXFP4_NAMES))}
