"""Finds the language model in checkpoints that hold more: its fields in config.json, its tensors, what is left aside.

A vision-language checkpoint is read for its text alone: no image, audio or video is ever computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.models.families.config_json import ConfigJson

OUTER_FIELDS = ("dtype", "torch_dtype")
"""Fields of the whole that hold for the text too, if it does not say."""

PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""Beginnings of a language model's names, in place of "model.": as transformers writes them, and before version 5."""

_PREFIX = r"(model\.)?"
ASIDE = {
    "vision": re.compile(_PREFIX + r"(visual|vision_tower|vision_model|vision_encoder|vision_embedder|embed_vision)\."),
    "audio": re.compile(_PREFIX + r"(audio_tower|audio_model|audio_encoder|embed_audio)\."),
    "projector": re.compile(_PREFIX + r"(multi_modal_projector|patch_merger|mm_projector|vision_projection)\."),
    "multi-token prediction": re.compile(_PREFIX + r"mtp[._]"),
}
"""Kind of what is left aside -> names of its tensors."""
OF_WRAPPERS = ("vision", "audio", "projector")
"""Kinds that only checkpoints with a language model inside have."""

_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.")

_KEYS_AND_VALUES = re.compile(r"\.self_attn\.([kv]_proj\.weight|[kv]_proj\.bias|k_norm\.weight)$")


def text_config(config: ConfigJson, model_types: Collection[str]) -> ConfigJson:
    """Return the fields of the language model: those of `text_config`, or all where older files have them at one level.

    Raises UnsupportedModelError if it is none of `model_types`.
    """
    if "text_config" not in config:
        return config
    text = config.section("text_config")
    kind = text.raw("model_type")
    if kind is not None and kind not in model_types:
        raise UnsupportedModelError(
            f"config.json: a text_config of the model_type {brief(kind)} is not supported here: only one of "
            f"{', '.join(model_types)}"
        )
    values = {name: config.raw(name) for name in OUTER_FIELDS if name not in text}
    tied = [each.flag("tie_word_embeddings", False) for each in (config, text) if "tie_word_embeddings" in each]
    values |= {"tie_word_embeddings": any(tied)} if tied else {}
    return text.with_values({**values, "architectures": config.raw("architectures")})


def text_names(stored: Container[str]) -> Callable[[str], str]:
    """Return how a checkpoint that holds a language model calls the tensors of one that stands alone."""
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}norm.weight" in stored), PREFIXES[0])
    head = "language_model.lm_head." if prefix == "language_model.model." else "lm_head."

    def name(plain: str) -> str:
        return (
            head + plain.removeprefix("lm_head.") if plain.startswith("lm_head.") else prefix + plain[len("model.") :]
        )

    return name


def kind_aside(name: str, *, wrapper: bool, further: Container[int] = (), reusing: Collection[int] = ()) -> str | None:
    """Return the kind of a tensor that is left aside, or None. Layers that are `further` ones predict further tokens;
    those that are `reusing` another's keys and values have no use for their own.
    """
    for kind, pattern in ASIDE.items():
        if (wrapper or kind not in OF_WRAPPERS) and pattern.match(name):
            return kind
    layer = _LAYER.match(name)
    if layer and int(layer[1]) in reusing and _KEYS_AND_VALUES.search(name):
        return "unused keys and values"
    return "multi-token prediction" if layer and int(layer[1]) in further else None
