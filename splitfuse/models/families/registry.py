"""Lists the architectures that we load, and leads from a config.json to a ModelSpec.

To add a family: a function from config to spec, a weight-name table if its names are new, a line in FAMILIES. One with
a new kind of layer also needs a spec in kernels/interface.py, its operations in the backends, its place in
models/decoder.py and its shapes in models/weights.py. A feature of a config that changes the network is honoured or
refused, never ignored. Knows no tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.kernels.interface import AttentionSpec, ConvSpec, DeltaSpec, Mixer
from splitfuse.models.families.common import DECODER_NAMES, Family
from splitfuse.models.families.config_json import LONGEST_NAME, ConfigJson
from splitfuse.models.families.lfm2 import LFM2_NAMES, lfm2
from splitfuse.models.families.llama import MIXTRAL_NAMES, llama, mistral, mixtral
from splitfuse.models.families.exaone import EXAONE4_NAMES, exaone4
from splitfuse.models.families.features import refuse_unread
from splitfuse.models.families.gemma import GEMMA2_NAMES, GEMMA_NAMES, gemma, gemma2, gemma3
from splitfuse.models.families.glm import GLM4_NAMES, GLM_NAMES, glm, glm4
from splitfuse.models.families.llama import (
    ARCEE_NAMES,
    HUNYUAN_NAMES,
    MIXTRAL_NAMES,
    PHI3_NAMES,
    arcee,
    cwm,
    granite,
    hunyuan_dense,
    internlm3,
    llama,
    mistral,
    mistral3,
    mixtral,
    original_llama,
    phi3,
    seed_oss,
    smollm3,
)
from splitfuse.models.families.qwen import QWEN3_MOE_NAMES, qwen2, qwen3, qwen3_moe
from splitfuse.models.families.qwen_hybrid import QWEN3_5_NAMES, QWEN3_NEXT_NAMES, qwen3_5, qwen3_5_moe, qwen3_next
from splitfuse.models.families.qwen import QWEN3_MOE_NAMES, qwen2, qwen2_vl, qwen3, qwen3_moe, qwen3_vl
from splitfuse.models.families.wrappers import text_config
from splitfuse.models.sources.source import ModelSource
from splitfuse.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", llama, DECODER_NAMES),
    "LLaMAForCausalLM": Family("llama", original_llama, DECODER_NAMES),
    "AquilaForCausalLM": Family("aquila", llama, DECODER_NAMES),
    "AquilaModel": Family("aquila", llama, DECODER_NAMES),
    "ArceeForCausalLM": Family("arcee", arcee, ARCEE_NAMES),
    "CwmForCausalLM": Family("cwm", cwm, DECODER_NAMES),
    "Exaone4ForCausalLM": Family("exaone4", exaone4, EXAONE4_NAMES),
    "GemmaForCausalLM": Family("gemma", gemma, GEMMA_NAMES),
    "Gemma2ForCausalLM": Family("gemma2", gemma2, GEMMA2_NAMES),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3, GEMMA2_NAMES),
    "Gemma3ForConditionalGeneration": Family("gemma3", gemma3, GEMMA2_NAMES, text_types=("gemma3_text",)),
    "GlmForCausalLM": Family("glm", glm, GLM_NAMES),
    "Glm4ForCausalLM": Family("glm4", glm4, GLM4_NAMES),
    "GraniteForCausalLM": Family("granite", granite, DECODER_NAMES),
    "HunYuanDenseV1ForCausalLM": Family("hunyuan_v1_dense", hunyuan_dense, HUNYUAN_NAMES),
    "InternLM3ForCausalLM": Family("internlm3", internlm3, DECODER_NAMES),
    "MistralForCausalLM": Family("mistral", mistral, DECODER_NAMES),
    "Mistral3ForConditionalGeneration": Family("mistral3", mistral3, DECODER_NAMES, text_types=("mistral",)),
    "MixtralForCausalLM": Family("mixtral", mixtral, MIXTRAL_NAMES),
    "Phi3ForCausalLM": Family("phi3", phi3, PHI3_NAMES),
    "Qwen2ForCausalLM": Family("qwen2", qwen2, DECODER_NAMES),
    "Qwen2VLForConditionalGeneration": Family("qwen2_vl", qwen2_vl, DECODER_NAMES, text_types=("qwen2_vl_text",)),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl", qwen2_vl, DECODER_NAMES, text_types=("qwen2_5_vl_text",)
    ),
    "Qwen3VLForConditionalGeneration": Family("qwen3_vl", qwen3_vl, DECODER_NAMES, text_types=("qwen3_vl_text",)),
    "Qwen3ForCausalLM": Family("qwen3", qwen3, DECODER_NAMES),
    "Lfm2ForCausalLM": Family("lfm2", lfm2, LFM2_NAMES),
    "Qwen3NextForCausalLM": Family("qwen3_next", qwen3_next, QWEN3_NEXT_NAMES, honours=EXPERTS),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", qwen3_5, QWEN3_5_NAMES),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", qwen3_5_moe, QWEN3_5_NAMES, honours=EXPERTS),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3_moe, QWEN3_MOE_NAMES, honours=EXPERTS),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3_moe, QWEN3_MOE_NAMES),
    "SeedOssForCausalLM": Family("seed_oss", seed_oss, DECODER_NAMES),
    "SmolLM3ForCausalLM": Family("smollm3", smollm3, DECODER_NAMES),
    "XverseForCausalLM": Family("xverse", llama, DECODER_NAMES),
}


def load_spec(source: ModelSource) -> ModelSpec:
    """Return the network of a stored model. Raises as `ModelSource.config` and `spec_from_config` do."""
    return spec_from_config(source.config())


def spec_from_config(values: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of a parsed config.json.

    Raises UnsupportedModelError for an architecture or a feature we do not know, ModelError for values that make no
    sense.
    """
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UnsupportedModelError(
            'config.json names no architecture: "architectures" should be a list such as ["LlamaForCausalLM"]'
        )
    family = find_family(architectures[0])
    config = ConfigJson(values)
    text = text_config(config, family.text_types) if family.text_types else config
    spec = family.read(text)
    if config.text("model_type", family.model_type) != family.model_type:
        raise UnsupportedModelError(
            f"config.json contradicts itself: {architectures[0]} has the model_type {family.model_type}, not "
            f"{brief(values['model_type'])}"
        )
    refuse_unread(text, architectures[0])
    _check_layer_types(text, spec)
    return spec


def find_family(architecture: str) -> Family:
    """Return the entry of FAMILIES. Raises UnsupportedModelError that names the known architectures and the nearest.

    >>> find_family("Qwen3ForCausalLM").names["norm"]
    ('model.norm.weight',)
    """
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    architecture = architecture[:LONGEST_NAME]
    near = difflib.get_close_matches(architecture, FAMILIES, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UnsupportedModelError(
        f"architecture {architecture!r} is not one of those we know: {', '.join(sorted(FAMILIES))}{hint}"
    )


def _check_layer_types(config: ConfigJson, spec: ModelSpec) -> None:
    """Refuse a config whose layer_types differs from what will be computed."""
    if "layer_types" not in config:
        return
    computed = [_layer_type(layer.mixer) for layer in spec.layers]
    if config.raw("layer_types") != computed:
        raise UnsupportedModelError(
            f"layer_types {brief(config.raw('layer_types'))} is not supported here: "
            f"{spec.architecture} with this config computes {brief(computed)}"
        )


def _layer_type(mixer: Mixer | None) -> str:
    """Return the kind of a layer as layer_types names it."""
    if isinstance(mixer, AttentionSpec):
        return "full_attention" if mixer.window is None else "sliding_attention"
    return {DeltaSpec: "linear_attention", ConvSpec: "conv"}.get(type(mixer), "none")
