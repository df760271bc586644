"""Reads how hidden states become an embedding from the files of sentence-transformers, where a folder has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.models.families.config_json import is_whole
from splitfuse.models.sources.files import check_json
from splitfuse.models.sources.source import ModelSource

Mode = Literal["mean", "cls", "last"]

MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""Fields of a pooling module's config.json -> the hidden state that they choose: that of the first token, the mean of
all, or that of the last token. Others are refused.
"""
NAMES: dict[str, Mode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""Values of pooling_mode -> the same."""


@dataclass(frozen=True)
class Pooling:
    """Says how hidden states become an embedding, and of how many tokens at most, if the folder says it."""

    mode: Mode
    max_length: int | None = None


def read_pooling(source: ModelSource) -> Pooling | None:
    """Return what the folder says; None if it says nothing. Raises UnsupportedModelError for a way to make embeddings
    that is not supported, ModelError for files that make no sense.
    """
    modules = _read_modules(source)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ModelError(f"{source.location}/modules.json must be a list of objects")
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules]
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UnsupportedModelError(
            f"{source.location}/modules.json has a module {brief(unknown[0])}: Transformer, Pooling and Normalize are "
            "supported"
        )
    if "Pooling" not in kinds:
        return None
    if wrong := [
        each.get("path")
        for kind, each in zip(kinds, modules, strict=True)
        if kind == "Transformer" and each.get("path")
    ]:
        raise UnsupportedModelError(
            f"{source.location}/modules.json: the Transformer must lie in the folder itself, with the path '', not "
            f"{brief(wrong[0])}"
        )
    path = modules[kinds.index("Pooling")].get("path")
    if path != "1_Pooling":
        raise UnsupportedModelError(f"{source.location}/modules.json: Pooling must lie in 1_Pooling, not {brief(path)}")
    config = source.read_json("1_Pooling/config.json")
    if config is None:
        raise ModelError(f"{source.location}/1_Pooling/config.json is missing, which modules.json names")
    wanted = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = [MODES.get(name) for name in wanted] or [NAMES.get(str(config.get("pooling_mode")))]
    (mode,) = modes if len(modes) == 1 else (None,)
    if mode is None:
        found = ", ".join(wanted) or brief(config.get("pooling_mode"))
        raise UnsupportedModelError(
            f"{source.location}/1_Pooling/config.json has {found}: one of {', '.join(MODES)} is supported"
        )
    sizes = source.read_json("sentence_bert_config.json") or {}
    if (lower := sizes.get("do_lower_case")) not in (None, False):
        raise UnsupportedModelError(
            f"{source.location}/sentence_bert_config.json: do_lower_case must be false, not {brief(lower)}: texts are "
            "given to the tokenizer as they are"
        )
    length = sizes.get("max_seq_length")
    if length is not None and not (is_whole(length) and length >= 1):
        raise ModelError(
            f"{source.location}/sentence_bert_config.json: max_seq_length must be a whole number above 0, not "
            f"{brief(length)}"
        )
    return Pooling(mode, length)


def _read_modules(source: ModelSource) -> Any:
    """Return what modules.json holds, which is to be a list; None if there is no such file."""
    try:
        content = source.read("modules.json")
        if content is None:
            return None
        check_json(content)
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{source.location}/modules.json cannot be read as JSON: {error!s:.200}") from error
