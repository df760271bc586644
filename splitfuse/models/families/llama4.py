"""Reads Llama 4: chunks of attention with rope and whole contexts without, and experts whose weights scale what they
read."""

from __future__ import annotations

from dataclasses import replace

from splitfuse.errors import ModelError, brief
from splitfuse.kernels.layers import ExpertsSpec, HeadNormSpec, NormSpec, QueryScaling
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    biased_attention,
    decoder,
    mlp,
    num_layers,
    read_router,
    with_interleaved_rope,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.layouts import of_expert, transposed
from splitfuse.models.spec import ModelSpec

_LAYER = "model.layers.{layer}"

LLAMA4_NAMES: WeightNames = {
    **with_interleaved_rope(DECODER_NAMES),
    "mlp.gate_up": tuple(f"{_LAYER}.feed_forward.{part}_proj.weight" for part in ("gate", "up")),
    "mlp.down": (f"{_LAYER}.feed_forward.down_proj.weight",),
    "router": (f"{_LAYER}.feed_forward.router.weight",),
    "w13": (of_expert(transposed(f"{_LAYER}.feed_forward.experts.gate_up_proj")),),
    "w2": (of_expert(transposed(f"{_LAYER}.feed_forward.experts.down_proj")),),
    "shared.gate_up": tuple(f"{_LAYER}.feed_forward.shared_expert.{part}_proj.weight" for part in ("gate", "up")),
    "shared.down": (f"{_LAYER}.feed_forward.shared_expert.down_proj.weight",),
}


def llama4(config: ConfigJson) -> ModelSpec:
    """Return the network of a Llama4ForCausalLM."""
    layers, every = range(num_layers(config)), config.integer("no_rope_layer_interval", 4)
    rotated = config.integers("no_rope_layers", []) or [int((number + 1) % every > 0) for number in layers]
    kinds = ["chunked_attention" if each else "full_attention" for each in rotated]
    kinds = config.texts("layer_types") if "layer_types" in config else kinds
    if min(len(rotated), len(kinds)) < len(layers):
        raise ModelError(
            f"config.json: no_rope_layers and layer_types must have an entry for each of {len(layers)} layers, not "
            f"{brief(rotated)} and {brief(kinds)}"
        )
    norm = NormSpec(eps=config.number("rms_norm_eps", 1e-5))
    attention = biased_attention(config, num_kv_heads=8, head_dim=128)
    chunk = config.integer("attention_chunk_size", 8192)
    with_rope = replace(
        attention,
        qk_norm=HeadNormSpec(norm=norm, weight=False, after_rope=True) if config.flag("use_qk_norm", True) else None,
    )
    scaling = QueryScaling(beta=config.number("attn_scale", 0.1), length=config.integer("floor_scale", 8192), offset=1)
    tuned = config.flag("attn_temperature_tuning", True)
    without = replace(attention, rope=None, query_scaling=scaling if tuned else None)
    router = read_router(config, 16, 1, renormalize=False, sigmoid=True, scales_input=True)
    experts = ExpertsSpec(router=router, expert=mlp(config), shared=mlp(config))
    dense = mlp(config, config.integer("intermediate_size_mlp", 16384))
    step = config.integer("interleave_moe_layer_step", 1)
    sparse = config.integers("moe_layers", [number for number in layers if (number + 1) % step == 0])
    return decoder(
        config,
        [
            replace(with_rope if has_rope else without, chunk=chunk if kind == "chunked_attention" else None)
            for has_rope, kind, _ in zip(rotated, kinds, layers, strict=False)
        ],
        [experts if number in sparse else dense for number in layers],
        rope_theta=500_000.0,
        norm=norm,
    )


FAMILIES = {
    "Llama4ForCausalLM": Family("llama4_text", llama4, LLAMA4_NAMES),
    "Llama4ForConditionalGeneration": Family("llama4", llama4, LLAMA4_NAMES, text_types=("llama4_text",)),
}
