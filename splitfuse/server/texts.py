"""Reads a field that has one text or several, each plain or as token ids, as OpenAI's `prompt` and `input` do."""

from __future__ import annotations

from typing import Any

from splitfuse.errors import InvalidRequestError
from splitfuse.server.validation import SchemaBounds

Texts = str | list[str | int | list[int]]
"""Type of such a field."""


def texts_of(given: Texts, name: str) -> list[str | list[int]]:
    """Return one text or more, or their token ids. Raises InvalidRequestError for a list of mixed kinds.

    >>> texts_of([1, 2], "prompt")
    [[1, 2]]
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError(f"{name} is empty: the list has nothing in it", parameter=name)
    kinds = set(map(type, given))
    if len(kinds) > 1 or kinds == {bool}:
        raise InvalidRequestError(
            f"{name} must be a text, a list of texts, a list of token ids, or a list of lists of token ids, not a "
            "mixture",
            parameter=name,
        )
    return [given] if kinds == {int} else given  # type: ignore[list-item, return-value]


def texts_schema(bounds: SchemaBounds, most: int) -> dict[str, Any]:
    """Return the JSON schema of a field of at most so many texts."""
    text, tokens = {"type": "string", "minLength": 1}, {"type": "array", "items": bounds.token, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": most}
    return {"anyOf": [text, tokens, {**several, "items": text}, {**several, "items": tokens}]}
