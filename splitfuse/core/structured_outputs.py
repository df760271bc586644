"""Describes the form that an answer must have: a JSON schema, a regular expression, one of several texts, a grammar.

The names are vLLM's. What a form means is decided where it is compiled (text/grammar.py), and it is enforced where
tokens are chosen (runtime/sampling/grammar.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitfuse.errors import InvalidRequestError, brief, did_you_mean

MAX_CHARACTERS = 2**17
"""Number of characters that a schema, an expression or a grammar may have."""
MAX_COMPILED = 4 * MAX_CHARACTERS
"""Number of characters that it may have when it is compiled."""
KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""Names of the forms, of which a request gives one."""
OPTIONS = ("disable_any_whitespace",)
"""Names of the options next to a form."""


@dataclass(frozen=True)
class StructuredOutputs:
    """Holds the form of an answer: `kind` is json, regex, choice or grammar, or tools for one that calls tools, and
    `source` its text until it is compiled.

    >>> StructuredOutputs.of({"regex": "[0-9]+"})
    StructuredOutputs(kind='regex', source='[0-9]+', disable_any_whitespace=False, compiled='')
    """

    kind: str
    source: str
    disable_any_whitespace: bool = False
    """True if JSON has no white space between its values."""
    compiled: str = ""
    """Grammar that the engine enforces; empty until the text layer has checked and compiled `source`."""

    def __post_init__(self) -> None:
        for text, most in ((self.source, MAX_CHARACTERS), (self.compiled, MAX_COMPILED)):
            if len(text) > most:
                raise refused(f"has {len(text)} characters; at most {most} are accepted", self.kind)

    @classmethod
    def of(cls, value: object) -> StructuredOutputs:
        """Return the form that a mapping asks for: one of KINDS, and perhaps OPTIONS.

        The value of json is a schema, as a mapping or as text; of json_object, True; of regex and grammar, text; of
        choice, a list of texts. Raises InvalidRequestError, naming the entry, for anything else.
        """
        if isinstance(value, StructuredOutputs):
            return value
        if not isinstance(value, Mapping):
            raise refused(f'must be a mapping such as {{"regex": "[0-9]+"}}, not {brief(value)}')
        given = {name: each for name, each in value.items() if each is not None and each is not False}
        for name in value:
            if name not in (*KINDS, *OPTIONS):
                raise refused(f"is unknown{did_you_mean(str(name), (*KINDS, *OPTIONS))}", str(name))
        kinds = [name for name in KINDS if name in given]
        if len(kinds) != 1:
            found = f"{' and '.join(kinds)} together" if kinds else "none of them"
            raise refused(f"must have one of {', '.join(KINDS)}, not {found}")
        (kind,) = kinds
        compact = given.get("disable_any_whitespace", False)
        if not isinstance(compact, bool):
            raise refused(f"must be True or False, not {brief(compact)}", "disable_any_whitespace")
        if compact and not kind.startswith("json"):
            raise refused(f"needs json or json_object, not {kind}", "disable_any_whitespace")
        source = _sources(kind, given[kind])
        return cls("json" if kind == "json_object" else kind, source, compact)

    def as_dict(self) -> dict[str, Any]:
        """Return a mapping of which `of` makes the same, and which can be written as JSON."""
        parsed = self.kind in ("json", "choice")
        options = {"disable_any_whitespace": True} if self.disable_any_whitespace else {}
        return {self.kind: json.loads(self.source) if parsed else self.source, **options}


def refused(problem: str, name: str = "") -> InvalidRequestError:
    """Return the error for a form, or for what is called `name` in it."""
    place = f"structured_outputs.{name}" if name else "structured_outputs"
    return InvalidRequestError(f"{place} {problem}", parameter=place)


def _sources(kind: str, value: Any) -> str:
    """Return the text of a form."""
    match kind:
        case "json_object":
            if value is not True:
                raise refused(f"must be True or False, not {brief(value)}", kind)
            return '{"type": "object"}'
        case "json" if isinstance(value, Mapping):
            return _as_json(value)
        case "choice":
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            if not is_list or not value or not all(isinstance(text, str) and text for text in value):
                raise refused(f"must be a list of non-empty strings, not {brief(value)}", kind)
            return json.dumps(list(value))
    if not isinstance(value, str) or not value:
        wanted = "a schema, as a mapping or as text" if kind == "json" else "a non-empty string"
        raise refused(f"must be {wanted}, not {brief(value)}", kind)
    if kind == "json" and len(value) <= MAX_CHARACTERS:
        try:
            if not isinstance(json.loads(value), dict):
                raise refused(f"must be a schema that is an object, not {brief(value)}", kind)
        except (ValueError, RecursionError) as error:
            raise refused(f"is not valid JSON: {error}", kind) from error
    return value


def _as_json(schema: Mapping[str, Any]) -> str:
    """Return a schema as JSON, without writing much more than MAX_CHARACTERS of it."""
    pieces, length = [], 0
    try:
        for piece in json.JSONEncoder(allow_nan=False).iterencode(schema):
            pieces.append(piece)
            if (length := length + len(piece)) > MAX_CHARACTERS:
                raise refused(f"has more than {MAX_CHARACTERS} characters, the most that are accepted", "json")
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(f"cannot be written as JSON: {error}", "json") from error
    return "".join(pieces)
