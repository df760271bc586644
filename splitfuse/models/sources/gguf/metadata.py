"""Reads a GGUF file's metadata by types: every value is checked once, here. Knows the keys of no architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.models.families.config_json import LARGEST_INTEGER, is_number, is_whole

NO_TOKEN = 2**32 - 1
"""Id that stands for no token, -1."""

_Value = TypeVar("_Value")


class Metadata:
    """Reads values by key. Those of the architecture, such as "llama.block_count", are named without it.

        >>> metadata = Metadata("model.gguf", {"general.architecture": "llama", "llama.block_count": 30})
        >>> metadata.integer("block_count")
        30

    Each getter raises ModelError if the value is absent and there is no default, or if it is not valid.
    """

    def __init__(self, location: str, values: Mapping[str, Any]) -> None:
        self.location = location
        self._values = values
        self._read: set[str] = set()
        self.architecture = ""
        self.architecture = self.text("general.architecture")

    def __contains__(self, key: str) -> bool:
        return self._full(key) in self._values

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int = LARGEST_INTEGER) -> int:
        """Return a whole number from `least` to `most`."""
        return self._value(
            key,
            default,
            f"a whole number from {least} to {most}",
            lambda value: is_whole(value) and least <= value <= most,
        )

    def optional_token(self, key: str, count: int) -> int | None:
        """Return the id of a token of `count`, or None if there is none."""
        if self._values.get(key) == NO_TOKEN:
            return None
        return self.integer(key, most=count - 1) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        valid = "a positive finite number"
        return float(self._value(key, default, valid, lambda value: is_number(value) and 0 < value < math.inf))

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        return self._value(key, default, "a text", lambda value: isinstance(value, str))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        return self._value(key, default, "true or false", lambda value: isinstance(value, bool))

    def flags(self, key: str, length: int) -> list[bool]:
        """Return a flag for each of `length` layers; of a number n, all but each n-th have it."""
        if isinstance(self._values.get(self._full(key)), int):
            every = self.integer(key, least=1)
            return [(number + 1) % every > 0 for number in range(length)]
        return [bool(each) for each in self.numbers(key, length)]

    def texts(self, key: str) -> list[str]:
        """Return a list of texts."""
        return self._value(key, None, "a list of texts", _is_texts)

    def numbers(self, key: str, length: int) -> Sequence[float]:
        """Return `length` numbers; empty if there are none."""
        if key not in self:
            return ()
        return self._value(
            key,
            None,
            f"{length} numbers",
            lambda value: not isinstance(value, str | list) and isinstance(value, Sequence) and len(value) == length,
        )

    def refuse_unread(self, remarks: Collection[str]) -> None:
        """Raise UnsupportedModelError for a value of the architecture that no getter was called for and that is no
        remark: it would change the network. Zero, false and what is empty ask for nothing.
        """
        prefix = f"{self.architecture}."
        for key, value in self._values.items():
            if key.startswith(prefix) and key not in self._read and key.removeprefix(prefix) not in remarks:
                asks = any(value) if isinstance(value, Sequence) and not isinstance(value, str) else bool(value)
                if asks and value != "none":
                    raise UnsupportedModelError(
                        f"{self.location} has {key:.200} = {brief(value)}, which is not supported for the architecture "
                        f"{self.architecture}"
                    )

    def _full(self, key: str) -> str:
        outside = key.startswith(("general.", "tokenizer.")) or not self.architecture
        return key if outside else f"{self.architecture}.{key}"

    def _value(self, key: str, default: _Value | None, wanted: str, is_valid: Callable[[Any], bool]) -> _Value:
        full = self._full(key)
        self._read.add(full)
        value = self._values.get(full, default)
        if value is None:
            raise ModelError(f"{self.location} has no {full} in its metadata")
        if not is_valid(value):
            raise ModelError(f"{self.location}: {full} must be {wanted}, not {brief(value)}")
        return value  # type: ignore[no-any-return]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
