"""Reads config.json by types: every number is checked once, here. Knows JSON, no architecture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from splitfuse.errors import ModelError, brief

LARGEST_INTEGER = 2**31 - 1  # beyond any size a network has, within what every tensor library indexes

LONGEST_NAME = 200


class ConfigJson:
    """Reads the fields of a config, or of a section of it. null counts as absent, as in transformers.

        >>> config = ConfigJson({"hidden_size": 64, "rope_scaling": {"factor": 2.0}})
        >>> config.integer("hidden_size"), config.integer("num_experts", 8)
        (64, 8)
        >>> config.section("rope_scaling").number("factor")
        2.0

    Each getter raises ModelError if the field is absent and there is no default, or if its value is not valid.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        section: str = "",
        read: set[str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._values = values
        self._section = section
        self._read = set() if read is None else read
        self._names = names or {}

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def raw(self, name: str) -> Any:
        """Return the value as JSON gave it, or None."""
        self._read.add(name)
        return self._values.get(name)

    def unread(self) -> list[str]:
        """Return the fields that no getter was called for, neither here nor of a copy with other values."""
        return [name for name in self._values if name not in self._read]

    def is_null(self, name: str) -> bool:
        """Return whether null is written out, which for a few fields differs from absence."""
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_INTEGER) -> int:
        """Return a whole number from `least` to `most`."""
        wanted = f"a whole number from {least} to {most}"
        value: int = self._value(name, default, wanted, lambda value: is_whole(value) and least <= value <= most)
        return value

    def number(self, name: str, default: float | None = None, *, most: float = sys.float_info.max) -> float:
        """Return a positive number of at most `most`."""
        wanted = "a positive finite number" + ("" if most == sys.float_info.max else f" of at most {most:g}")
        return float(self._value(name, default, wanted, lambda value: is_number(value) and 0 < value <= most))

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value: bool = self._value(name, default, "true or false", lambda value: isinstance(value, bool))
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string, which is a name: no longer than names are."""
        wanted = f"a string of at most {LONGEST_NAME} characters"
        value: str = self._value(
            name, default, wanted, lambda value: isinstance(value, str) and len(value) <= LONGEST_NAME
        )
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        value: list[str] = self._value(name, None, "a list of strings", _list_of(lambda item: isinstance(item, str)))
        return value

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return a list of whole numbers from 0 on."""
        valid = _list_of(lambda item: is_whole(item) and item >= 0)
        value: list[int] = self._value(name, default, "a list of whole numbers from 0 on", valid)
        return value

    def numbers(self, name: str, length: int) -> list[float]:
        """Return a list of `length` positive numbers."""
        valid = _list_of(lambda item: is_number(item) and 0 < item <= sys.float_info.max)
        wanted = f"a list of {length} positive finite numbers"
        value: list[float] = self._value(name, None, wanted, lambda value: valid(value) and len(value) == length)
        return list(map(float, value))

    def with_defaults(self, others: ConfigJson | Mapping[str, Any]) -> ConfigJson:
        """Return these fields, and of the others those that are not among them, or are null."""
        values = others._values if isinstance(others, ConfigJson) else others
        absent = {name: value for name, value in values.items() if name not in self}
        return ConfigJson({**self._values, **absent}, self._section, self._read, self._names)

    def renamed(self, names: Mapping[str, str]) -> ConfigJson:
        """Return these fields, some also under our names, which `names` leads from to the config's own. One that is
        already there under ours keeps its value, as in transformers.

        >>> ConfigJson({"n_head": 12}).renamed({"num_attention_heads": "n_head"}).integer("num_attention_heads")
        12
        """
        ours = {name: self._values[own] for name, own in names.items() if own in self._values}
        return ConfigJson({**ours, **self._values}, self._section, self._read, {**self._names, **names})

    def with_values(self, values: Mapping[str, Any]) -> ConfigJson:
        """Return these fields, with other values of some."""
        return ConfigJson({**self._values, **values}, self._section, self._read, self._names)

    def section(self, name: str) -> ConfigJson:
        """Return a nested object; empty if absent."""
        value = self._value(name, {}, "an object", lambda value: isinstance(value, dict))
        return ConfigJson(value, section=f"{self._section}{name}.")

    def _value(self, name: str, default: Any, wanted: str, is_valid: Callable[[Any], bool]) -> Any:
        self._read |= {name, self._names.get(name, name)}
        value = default if self._values.get(name) is None else self._values[name]
        if value is None:
            raise ModelError(f"config.json has no {self._section}{self._names.get(name, name)}")
        if not is_valid(value):
            field = f"{self._section}{self._names.get(name, name)}"
            raise ModelError(f"config.json: {field} must be {wanted}, not {brief(value)}")
        return value


def is_whole(value: Any) -> bool:
    """Return whether a value of JSON or metadata is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value of JSON or metadata is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(is_valid(item) for item in value)
