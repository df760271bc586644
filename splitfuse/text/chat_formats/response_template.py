"""Reads the response template of transformers, by which a model's folder may say how its answers are written.

A template is a parser as data, with regular expressions of anyone; it is not run. It says which of our formats it means
(formats.py), and its markers of thoughts are taken over. https://huggingface.co/docs/transformers/chat_response_parsing
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from splitfuse.text.chat_formats.formats import (
    CHAT_FORMATS,
    CallFormat,
    Channels,
    ChatFormat,
    GemmaCalls,
    JsonCalls,
    NamedCalls,
    TaggedCalls,
)

_logger = logging.getLogger(__name__)

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names that a thought has in messages."""


def with_response_template(chat_format: ChatFormat, template: Any) -> ChatFormat:
    """Return the format that a template describes, where it describes one of ours; `chat_format`, which is that of the
    chat template, where it does not, with a line in the log.
    """
    fields = template.get("fields") if isinstance(template, Mapping) else None
    if not isinstance(fields, Mapping):
        _logger.warning("the response_template of the model is not read: it has no fields")
        return chat_format
    if (thought := next((fields[name] for name in _THOUGHTS if name in fields), None)) is not None:
        texts = _first(thought, "open"), _first(thought, "close")
        if all(texts):
            chat_format = replace(chat_format, reasoning=texts)
        elif chat_format.reasoning is None and not isinstance(chat_format.calls, Channels):
            _logger.warning("thoughts in the response_template of the model are not read: they need open and close")
    if (calls := fields.get("tool_calls")) is not None:
        if (name := _format_like(calls)) is not None:
            chat_format = replace(CHAT_FORMATS[name], reasoning=chat_format.reasoning)
        else:
            _logger.warning("calls in the response_template of the model are not read: no known format is like them")
    return chat_format


def _first(field: Any, name: str) -> str:
    """Return the text of a field that marks its begin or end, the first of several; an empty one if it has none."""
    text = field.get(name) if isinstance(field, Mapping) else None
    text = text[0] if isinstance(text, list) and text else text
    return text if isinstance(text, str) else ""


def _format_like(field: Any) -> str | None:
    """Return the name of the format of which a field has the most texts, and all that tell it from others."""
    written = json.dumps(field, ensure_ascii=False).replace("\\", "").replace('"', "")  # as in expressions
    is_json = isinstance(field, Mapping) and field.get("content") == "json"
    telling = {name: _telling(each.calls) for name, each in CHAT_FORMATS.items() if each.calls is not None}
    likes = {
        name: len(texts)
        for name, texts in telling.items()
        if all(text in written for text in texts) and (is_json or not isinstance(CHAT_FORMATS[name].calls, JsonCalls))
    }
    return max(likes, key=lambda name: likes[name], default=None)


def _telling(calls: CallFormat) -> list[str]:
    """Return the texts of a format that tell it from others."""
    match calls:
        case NamedCalls():
            texts = [calls.open, calls.before, calls.after[0]]
        case TaggedCalls():
            texts = [*calls.section, calls.open, calls.before, calls.key[0]]
        case GemmaCalls():
            texts = [calls.open, calls.quote]
        case Channels():
            texts = ["<|channel|>", "<|message|>"]
        case _:
            texts = [calls.open, calls.close]
    return [text.strip().replace('"', "") for text in texts if text.strip()]
