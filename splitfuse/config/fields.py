"""Declares settings as fields of dataclasses, and checks what they are given.

The metadata of a field holds its help text: flags, keywords of `pipeline()` and the table in docs/server.md are derived
from the fields.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field
from typing import Any, TypeVar

from splitfuse.errors import ConfigError, did_you_mean

MAX_SIZE = 1e9
"""Largest size in GiB or MiB: as bytes, it is still a number."""
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 1_000_000.0
"""Bounds of a timeout in the settings, in seconds: beyond them, timers of the system spin or overflow."""

_Settings = TypeVar("_Settings")


def setting(default: Any, help: str) -> Any:  # noqa: A002 - the word every command line uses
    """Return a dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


def parse_settings(kind: type[_Settings], settings: Mapping[str, Any]) -> _Settings:
    """Return settings of a kind from their values by name. Raises ConfigError for a wrong type, for an empty text,
    which a variable that is not set leaves on a command line, and for one that is not UTF-8.
    """
    hints, values = typing.get_type_hints(kind), dict(settings)
    for name, value in settings.items():
        if hints[name] == tuple[str, ...]:
            values[name] = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(item, str) for item in values[name]):
                raise ConfigError(f"{name} must be a text or a list of texts, not {value!r:.80}")
        else:
            _check_type(name, value, hints[name])
    made = kind(**values)  # whose own errors say what a value must be
    for name, value in values.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(name, text)
    return made


def refuse_unknown(settings: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError, with the nearest known name, for a setting that is not known."""
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    wanted_types = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = (*wanted_types, int) if float in wanted_types else wanted_types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in wanted_types)
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _check_text(name: str, text: str) -> None:
    """Raise ConfigError for a text that is empty, or that no message between processes and no JSON can have in it."""
    if not text.strip():
        raise ConfigError(f"{name} must not be empty: give it a value, or leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a path of other bytes, or of any in a locale without UTF-8
        raise ConfigError(f"{name} {text!r:.200} is not UTF-8: rename it, or set LC_ALL=C.UTF-8") from error


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_size(name: str, value: float) -> None:
    """Raise ConfigError for a size, in GiB or MiB, that is not positive or no memory has."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, not {value}")
    if value > MAX_SIZE:
        raise ConfigError(f"{name} must be at most {MAX_SIZE:.0f}, not {value}")


def check_timeout(name: str, value: float) -> None:
    """Raise ConfigError for a number of seconds that no timer can wait."""
    if not MIN_TIMEOUT <= value <= MAX_TIMEOUT:
        raise ConfigError(f"{name} must be a number of seconds from {MIN_TIMEOUT:g} to {MAX_TIMEOUT:.0f}, not {value}")


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Raise ConfigError for a value below the least one; None has not been set, and is right."""
    if value is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")
