"""Lists the architectures that we load, and leads from a config.json to a ModelSpec.

To add a family: a function from config to spec, a weight-name table if its names are new, and a line in the FAMILIES of
its family file. One with a new kind of layer also needs a spec in kernels/layers.py, its operations in the backends,
its place in models/decoder.py and its shapes in models/parameters.py. A feature of a config that changes the network is
honoured or refused, never ignored. Knows no tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.kernels.layers import AttentionSpec, ConvSpec, ExpertsSpec, LayerSpec, RecurrentSpec
from splitfuse.models.families import (
    cohere,
    deepseek,
    ernie,
    exaone,
    falcon,
    gemma,
    gemma4,
    glm,
    glm_moe,
    gpt,
    gpt_oss,
    lfm2,
    llama,
    llama4,
    mamba_hybrid,
    minimax,
    ministral,
    olmo,
    qwen,
    qwen_hybrid,
    stablelm,
)
from splitfuse.models.families.common import LEGACY_LAYER_TYPES, Family
from splitfuse.models.families.config_json import LONGEST_NAME, ConfigJson
from splitfuse.models.families.features import refuse_unread
from splitfuse.models.families.wrappers import text_config
from splitfuse.models.sources.quantized.config import read_quantization
from splitfuse.models.sources.source import ModelSource
from splitfuse.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {
    **cohere.FAMILIES,
    **deepseek.FAMILIES,
    **ernie.FAMILIES,
    **exaone.FAMILIES,
    **falcon.FAMILIES,
    **gemma.FAMILIES,
    **gemma4.FAMILIES,
    **glm.FAMILIES,
    **glm_moe.FAMILIES,
    **gpt.FAMILIES,
    **gpt_oss.FAMILIES,
    **lfm2.FAMILIES,
    **llama.FAMILIES,
    **llama4.FAMILIES,
    **mamba_hybrid.FAMILIES,
    **minimax.FAMILIES,
    **ministral.FAMILIES,
    **olmo.FAMILIES,
    **qwen.FAMILIES,
    **qwen_hybrid.FAMILIES,
    **stablelm.FAMILIES,
}

ENCODERS = {"BertModel": "bert", "RobertaModel": "roberta", "XLMRobertaModel": "xlm-roberta"}
"""Architectures of bidirectional encoders (models/encoder), which generate nothing -> their model_type."""

REFUSED = {
    **dict.fromkeys(ENCODERS, "it is an encoder, which generates nothing: serve it for embeddings"),
    "BloomForCausalLM": "Bloom, whose embeddings have a norm, is not supported: use a later model, such as Falcon",
    "OlmoForCausalLM": "the first OLMo, whose norms have no weights, is not supported: use OLMo 2",
    "QWenLMHeadModel": "the first Qwen, whose tokenizer is a tiktoken file, is not supported: use Qwen1.5 or later",
}
"""Architectures that are known and not loaded -> the reason, and what to use."""


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
    if read_quantization(values) is not None and spec.dtype == "float16":  # refuses what the source of weights would
        return replace(spec, dtype="bfloat16")  # in which there are kernels: only what is dense loses bits
    return spec


def find_family(architecture: str) -> Family:
    """Return the entry of FAMILIES. Raises UnsupportedModelError that names the nearest architecture.

    >>> find_family("Qwen3ForCausalLM").names["norm"]
    ('model.norm.weight',)
    """
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    if architecture in REFUSED:
        raise UnsupportedModelError(f"architecture {architecture}: {REFUSED[architecture]}")
    architecture = architecture[:LONGEST_NAME]
    near = difflib.get_close_matches(architecture, FAMILIES, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UnsupportedModelError(
        f"architecture {architecture!r} is not one of the {len(FAMILIES)} that `splitfuse models` lists, such as "
        f"LlamaForCausalLM{hint}"
    )


def _check_layer_types(config: ConfigJson, spec: ModelSpec) -> None:
    """Refuse a config whose layer_types differs from what will be computed."""
    if "layer_types" not in config:
        return
    computed = [_layer_type(layer) for layer in spec.layers]
    legacy = {new: old for old, new in LEGACY_LAYER_TYPES.items()}
    if config.raw("layer_types") not in (computed, [legacy.get(kind, kind) for kind in computed]):
        raise UnsupportedModelError(
            f"layer_types {brief(config.raw('layer_types'))} is not supported here: "
            f"{spec.architecture} with this config computes {brief(computed)}"
        )


def _layer_type(layer: LayerSpec) -> str:
    """Return the kind of a layer as layer_types names it."""
    mixer = layer.mixer
    if isinstance(mixer, AttentionSpec):
        full = "full_attention" if mixer.chunk is None else "chunked_attention"
        return full if mixer.window is None else "sliding_attention"
    if isinstance(mixer, RecurrentSpec):
        return "conv" if isinstance(mixer, ConvSpec) else "linear_attention"
    return "moe" if isinstance(layer.mlp, ExpertsSpec) else "mlp"
