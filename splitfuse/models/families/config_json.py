"""Typed reading of config.json: every number is checked once, here. Knows JSON, no architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from splitfuse.errors import ModelError

LARGEST_INTEGER = 2**31 - 1  # beyond any size a network has, within what every tensor library indexes


class ConfigJson:
    """Reads the fields of a config, or of a section of it. null counts as absent, as in transformers.

        >>> config = ConfigJson({"hidden_size": 64, "rope_scaling": {"factor": 2.0}})
        >>> config.integer("hidden_size"), config.integer("num_experts", 8)
        (64, 8)
        >>> config.section("rope_scaling").number("factor")
        2.0

    Each getter raises ModelError if the field is absent and there is no default, or if its value is not valid.
    """

    def __init__(self, values: Mapping[str, Any], section: str = "") -> None:
        self._values = values
        self._section = section

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def raw(self, name: str) -> Any:
        """Return the value as JSON gave it, or None."""
        return self._values.get(name)

    def is_null(self, name: str) -> bool:
        """Return whether null is written out, which for a few fields differs from absence."""
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_INTEGER) -> int:
        """Return a whole number from `least` to `most`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._refuse(name, f"a whole number from {least} to {most}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._refuse(name, "a positive finite number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false", value)
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._refuse(name, "a string", value)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        value = self._value(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refuse(name, "a list of strings", value)
        return value

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return a list of whole numbers from 0 on."""
        value = self._value(name, default)
        if not isinstance(value, list) or any(
            isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in value
        ):
            raise self._refuse(name, "a list of whole numbers from 0 on", value)
        return value

    def section(self, name: str) -> ConfigJson:
        """Return a nested object; empty if absent."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self._refuse(name, "an object", value)
        return ConfigJson(value, section=f"{self._section}{name}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"config.json has no {self._section}{name}")
        return value

    def _refuse(self, name: str, wanted: str, value: Any) -> ModelError:
        return ModelError(f"config.json: {self._section}{name} must be {wanted}, not {value!r:.80}")
