"""Tells what each architecture's network has, for `splitfuse models` and the docs.

It is read off the spec of a config that says nothing but sizes, so that a family that is added shows up by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from splitfuse.kernels.layers import AttentionSpec
from splitfuse.models.families.registry import FAMILIES, spec_from_config
from splitfuse.models.spec import ModelSpec

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim", "d_model"), 4096),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 4096),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 12),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 2048),
    "vocab_size": 1000,
    "num_experts_per_tok": 2,
}
"""Fields without which no config is read, under the names of all families; nothing that is shown depends on them."""

TYPICAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [3, 9]},
    "GraniteForCausalLM": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "GraniteMoeForCausalLM": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    "GraniteMoeHybridForCausalLM": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "layer_types": (["mamba"] * 5 + ["attention"]) * 2,
    },
    "Lfm2ForCausalLM": {"full_attn_idxs": [2, 5, 8, 10]},
    "NemotronHForCausalLM": {"hybrid_override_pattern": "MEMEM*EMEMEM"},
}
"""Config fields of released models, for families whose defaults leave a feature off."""

MODELS = {
    "AquilaForCausalLM": "Aquila 2",
    "AquilaModel": "Aquila",
    "ArceeForCausalLM": "Arcee AFM",
    "BambaForCausalLM": "Bamba",
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "CohereForCausalLM": "Command R, R+",
    "CwmForCausalLM": "Code World Model",
    "DeepseekV2ForCausalLM": "DeepSeek V2",
    "DeepseekV3ForCausalLM": "DeepSeek V3, R1",
    "Dots1ForCausalLM": "dots.llm1",
    "Ernie4_5ForCausalLM": "Ernie 4.5",
    "Ernie4_5_MoeForCausalLM": "Ernie 4.5 with experts",
    "Exaone4ForCausalLM": "EXAONE 4",
    "FalconForCausalLM": "Falcon 7B, 40B, RW",
    "GPT2LMHeadModel": "GPT-2",
    "GPTBigCodeForCausalLM": "StarCoder, SantaCoder",
    "GPTJForCausalLM": "GPT-J",
    "GPTNeoXForCausalLM": "GPT-NeoX, Pythia",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3",
    "Gemma3ForConditionalGeneration": "Gemma 3 4B to 27B",
    "Gemma4ForCausalLM": "Gemma 4",
    "Gemma4ForConditionalGeneration": "Gemma 4",
    "Gemma4UnifiedForCausalLM": "Gemma 4 12B",
    "Gemma4UnifiedForConditionalGeneration": "Gemma 4 12B",
    "GemmaForCausalLM": "Gemma",
    "Glm4ForCausalLM": "GLM-4 0414",
    "Glm4MoeForCausalLM": "GLM-4.5 to 4.7",
    "Glm4MoeLiteForCausalLM": "GLM-4.7-Flash",
    "GlmForCausalLM": "GLM-4 9B",
    "GptOssForCausalLM": "gpt-oss",
    "GraniteForCausalLM": "Granite 3",
    "GraniteMoeForCausalLM": "Granite 3 with experts",
    "GraniteMoeHybridForCausalLM": "Granite 4, 4 H",
    "HunYuanDenseV1ForCausalLM": "Hunyuan dense",
    "InternLM3ForCausalLM": "InternLM 3",
    "LLaMAForCausalLM": "LLaMA as first converted",
    "Lfm2ForCausalLM": "LFM2",
    "Llama4ForCausalLM": "Llama 4",
    "Llama4ForConditionalGeneration": "Llama 4 Scout, Maverick",
    "LlamaForCausalLM": "Llama 2, 3, 3.1 and later, Yi, DeepSeek-R1 distills, SmolLM2",
    "MellumForCausalLM": "Mellum",
    "MiniMaxM2ForCausalLM": "MiniMax M2",
    "Ministral3ForCausalLM": "Ministral 3",
    "MinistralForCausalLM": "Ministral",
    "Mistral3ForConditionalGeneration": "Mistral Small 3.1 and 3.2, Ministral 3",
    "MistralForCausalLM": "Mistral, Mistral Nemo, Zephyr",
    "MixtralForCausalLM": "Mixtral",
    "MPTForCausalLM": "MPT",
    "MptForCausalLM": "MPT",
    "NemotronForCausalLM": "Nemotron 4, Minitron",
    "NemotronHForCausalLM": "Nemotron-H, Nemotron Nano 2, 3 Nano",
    "OPTForCausalLM": "OPT",
    "Olmo2ForCausalLM": "OLMo 2",
    "Olmo3ForCausalLM": "OLMo 3",
    "OlmoeForCausalLM": "OLMoE",
    "Phi3ForCausalLM": "Phi-3, 3.5, 4, 4-mini",
    "PhiForCausalLM": "Phi-1, 1.5, 2",
    "Qwen2ForCausalLM": "Qwen 1.5, 2, 2.5, QwQ",
    "Qwen2MoeForCausalLM": "Qwen 1.5 MoE, Qwen2 57B",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3 30B, 235B, Coder",
    "Qwen3NextForCausalLM": "Qwen3-Next",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
    "Qwen3_5ForCausalLM": "Qwen3.5",
    "Qwen3_5ForConditionalGeneration": "Qwen3.5, 3.6",
    "Qwen3_5MoeForCausalLM": "Qwen3.5 with experts",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3.5, 3.6 35B and larger",
    "SeedOssForCausalLM": "Seed-OSS",
    "SmolLM3ForCausalLM": "SmolLM3",
    "StableLmForCausalLM": "StableLM 2, 3B",
    "Starcoder2ForCausalLM": "StarCoder2",
    "XverseForCausalLM": "XVERSE",
}
"""Architecture -> models that have it."""

WORDS: dict[str, str | None] = {
    "AttentionSpec.alibi": "ALiBi",
    "AttentionSpec.chunk": "chunked attention",
    "AttentionSpec.gate": "gated attention",
    "AttentionSpec.kv_layer": "shared KV",
    "AttentionSpec.latent": "MLA",
    "AttentionSpec.o_bias": "biases",
    "AttentionSpec.qk_norm": "QK norm",
    "AttentionSpec.qkv_bias": "biases",
    "AttentionSpec.query_scaling": "queries scaled by position",
    "AttentionSpec.rope": "NoPE layers",
    "RopeSpec.rotary_dim": "partial rope",
    "AttentionSpec.scale": "attention scale",
    "AttentionSpec.sinks": "attention sinks",
    "AttentionSpec.softcap": "soft caps",
    "AttentionSpec.v_norm": "norms of values",
    "AttentionSpec.value_is_key": "K = V",
    "AttentionSpec.window": "sliding window",
    "ConvSpec": "short convolutions",
    "DeltaSpec": "gated delta nets",
    "ExpertsSpec": "experts",
    "ExpertsSpec.shared": "a shared expert",
    "LayerSpec.norms": "post-norms",
    "LayerSpec.output_scale": "scaled layers",
    "LayerSpec.parallel": "parallel blocks",
    "LayerSpec.residual_scale": "scaled blocks",
    "LayerSpec.token_input": "per-layer embeddings",
    "MambaSpec": "Mamba-2",
    "MambaSpec.bias": "biases",
    "MlpSpec.bias": "biases",
    "MlpSpec.gated": "ungated MLP",
    "ModelSpec.embed_scale": "scaled embeddings",
    "ModelSpec.head_bias": "biases",
    "ModelSpec.learned_positions": "learned positions",
    "ModelSpec.logit_scale": "scaled logits",
    "ModelSpec.logit_softcap": "soft caps",
    "NormSpec.centered": "layer norms",
}
"""Properties of a spec -> their words in the table. A field that is not here, of another value than its default, is a
detail.
"""


@dataclass(frozen=True)
class Row:
    """Describes an architecture: models that have it, what its network has, what is not computed, and the network of a
    config that says nothing but sizes.
    """

    architecture: str
    models: str
    properties: tuple[str, ...]
    limits: str
    spec: ModelSpec


def rows() -> list[Row]:
    """Return a row for each architecture, in alphabetical order.

    >>> next(row for row in rows() if row.architecture == "SmolLM3ForCausalLM").properties
    ('NoPE layers',)
    """
    return [
        Row(
            architecture=name,
            models=MODELS.get(name, ""),
            properties=properties(spec := default_spec(name)),
            limits=", ".join(_limits(name, spec)),
            spec=spec,
        )
        for name in sorted(FAMILIES, key=str.lower)
    ]


def default_spec(architecture: str) -> ModelSpec:
    """Return the network of a config that says nothing but sizes."""
    return spec_from_config({"architectures": [architecture], **SIZES, **TYPICAL.get(architecture, {})})


def properties(spec: ModelSpec) -> tuple[str, ...]:
    """Return what a network has beyond a plain decoder, in words, each once and in the order of WORDS."""
    found = set(_parts(spec))
    heads = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]
    if any(each.rope is not None and spec.ropes[each.rope].rotary_dim < each.head_dim for each in heads):
        found.add("RopeSpec.rotary_dim")
    if spec.learned_positions or "AttentionSpec.alibi" in found:
        found.discard("AttentionSpec.rope")
    return tuple(dict.fromkeys(word for part, word in WORDS.items() if part in found and word))


def _limits(architecture: str, spec: ModelSpec) -> Iterator[str]:
    """Yield the limits of an architecture, in words."""
    if FAMILIES[architecture].text_types:
        yield "text only"
    if any(isinstance(layer.mixer, AttentionSpec) and layer.mixer.latent is not None for layer in spec.layers):
        yield "no int8 cache"


def _parts(value: Any) -> Iterator[str]:
    """Yield the classes within a spec, and the fields that have another value than their default."""
    if isinstance(value, tuple):
        for each in value:
            yield from _parts(each)
    if not is_dataclass(value) or isinstance(value, Enum):
        return
    name = type(value).__name__
    yield name
    for field in fields(value):
        inner = getattr(value, field.name)
        if field.default is not MISSING and inner != field.default and not (field.name == "rope" and inner is not None):
            yield f"{name}.{field.name}"
        yield from _parts(inner)
