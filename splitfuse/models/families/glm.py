"""Reads GLM-4: rope of neighbouring elements in half of each head, gate and up in one tensor; as Glm4 norms around the
blocks.
"""

from __future__ import annotations

from typing import Any

from splitfuse.kernels.layers import NormPlace
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    decoder,
    mlp,
    read_attention,
    with_interleaved_rope,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

GLM_NAMES: WeightNames = {
    **with_interleaved_rope(DECODER_NAMES),
    "mlp.gate_up": ("model.layers.{layer}.mlp.gate_up_proj.weight",),
}
GLM4_NAMES: WeightNames = {
    **GLM_NAMES,
    "post_attn_norm": ("model.layers.{layer}.post_self_attn_layernorm.weight",),
    "post_mlp_norm": ("model.layers.{layer}.post_mlp_layernorm.weight",),
}


def glm(config: ConfigJson, **layer: Any) -> ModelSpec:
    """Return the network of a GlmForCausalLM; `layer` are further fields of LayerSpec."""
    biased = config.flag("attention_bias", True)
    attention = read_attention(config, num_kv_heads=2, head_dim=128, qkv_bias=biased)
    rope = read_rope(config, head_dim=attention.head_dim, share=0.5)
    return decoder(config, attention, mlp(config), ropes=[rope], norm_eps=1.5625e-7, layer=layer)


def glm4(config: ConfigJson) -> ModelSpec:
    """Return the network of a Glm4ForCausalLM."""
    return glm(config, norms=NormPlace.AROUND)


FAMILIES = {
    "Glm4ForCausalLM": Family("glm4", glm4, GLM4_NAMES),
    "GlmForCausalLM": Family("glm", glm, GLM_NAMES),
}
