"""Compiles the form that an answer must have into a grammar for the engine, and refuses what cannot be enforced.

`llguidance` knows the languages: JSON schemas, regular expressions, Lark and GBNF. It passes over keys of a schema that
it has never heard of; here they are refused, so that a schema is honoured or refused. A grammar is tried over bytes: no
vocabulary is needed to find that it is invalid, too large, or can never begin. What is compiled comes from anyone: a
server does this in a process with limits (sandbox.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from splitfuse.core.structured_outputs import StructuredOutputs, refused
from splitfuse.errors import InvalidRequestError, brief_json
from splitfuse.text.chat_formats.grammar import form_of, lark_of, parameters_of

MAX_DEPTH = 64
"""Number of schemas within each other."""
LIMIT = 2**63
"""Number that no integer of a schema may reach: the library computes bounds in 64 bits."""
TRIED_BYTES = 32
"""Number of bytes of an answer that a grammar is tried with."""
WHITESPACE = r" |\n[ \t]{0,40}"
"""White space between the values of JSON: a space, or a line break and an indentation. With more, a model that repeats
spaces would never end."""

_ANNOTATIONS = frozenset(
    (
        *("$anchor", "$comment", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType"),
        *("contentSchema", "default", "deprecated", "description", "discriminator", "example", "examples"),
        *("externalDocs", "id", "readOnly", "title", "writeOnly", "xml"),
    )
)
_VALUES = frozenset(
    (
        *("$ref", "additionalItems", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maximum"),
        *("maxItems", "maxLength", "maxProperties", "minimum", "minItems", "minLength", "minProperties", "multipleOf"),
        *("pattern", "required", "type"),
    )
)
_SCHEMAS = frozenset(("additionalItems", "additionalProperties", "items"))
_LISTS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_MAPPINGS = frozenset(("$defs", "definitions", "patternProperties", "properties"))
_KNOWN = _ANNOTATIONS | _VALUES | _SCHEMAS | _LISTS | _MAPPINGS
"""Keys of a schema that are honoured, or that say nothing about what is valid; and where further schemas are."""

_UNENFORCED = re.compile(r"%json\s*\{|^[ \t]*%llguidance\b|^[ \t]*[\w.]+[ \t]*\[[^]\n]*\btemperature\s*=", re.MULTILINE)
"""Parts of a Lark grammar that would be passed over, wholly or in part."""


def compile_structured_outputs(form: StructuredOutputs) -> StructuredOutputs:
    """Return the form with its grammar; one that has it already, of a recording, is only tried. Raises
    InvalidRequestError that says what cannot be enforced, and where.

    >>> compile_structured_outputs(StructuredOutputs.of({"regex": "[0-9]+"})).compiled
    '{"grammars": [{"name": "regex", "lark_grammar": "start: /[0-9]+/"}]}'
    """
    if form.compiled:
        _try(json.loads(form.compiled)["grammars"], form.kind)
        return form
    if form.kind == "tools":
        grammars = _grammars_of_calls(form)
    else:
        grammars = [_grammar(form)]
        _try(grammars, form.kind)
    return replace(form, source="", compiled=json.dumps({"grammars": grammars}))  # once is enough in each message


def _grammar(form: StructuredOutputs) -> dict[str, Any]:
    part: dict[str, Any]
    match form.kind:
        case "json":
            part = {"json_schema": _schema(form)}
        case "regex":
            part = json.loads(LLMatcher.grammar_from_regex(form.source))["grammars"][0]
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(form.source))
            choices = " | ".join(text.replace("\x7f", "\\u007f") for text in texts)  # the one that Lark wants escaped
            part = {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}  # a terminal: one item, however many there are
        case _:
            part = {"lark_grammar": _lark(form.source)}
    return {name: value for name, value in part.items() if value is not None}


def _schema(form: StructuredOutputs) -> dict[str, Any]:
    schema = json.loads(form.source)
    _check_schema(schema)
    spaces = {"whitespace_flexible": False} if form.disable_any_whitespace else {"whitespace_pattern": WHITESPACE}
    return {**schema, "x-guidance": spaces}


def _grammars_of_calls(form: StructuredOutputs) -> list[dict[str, Any]]:
    """Return the grammars of answers that call tools."""
    tools, other = parameters_of(form.source), form_of(form.source)
    for place, parameters in tools:
        with _named(place):
            _check_schema(parameters)
    try:
        grammar, trial = lark_of(form.source), lark_of(form.source, has_special_tokens=False)  # bytes alone
        parts = [{"name": name, "json_schema": _with_spaces(schema)} for name, schema in grammar.schemas.items()]
        parts += [] if other is None else [{**_grammar(other), "name": "form"}]
        with _named("tools"):
            _try([{"lark_grammar": trial.lark}, *parts], "tools")
    except (InvalidRequestError, TypeError, ValueError, AttributeError) as error:  # a key may have a value of any type
        if isinstance(error, InvalidRequestError) and error.parameter != "tools":
            raise
        for place, parameters in tools:
            with _named(place):
                _try([{"json_schema": _with_spaces(parameters)}], "json")
        if other is not None:
            _try([_grammar(other)], other.kind)
        if isinstance(error, InvalidRequestError):
            raise
        message = "tools cannot be enforced: a key of a schema has a value of a type that it cannot have"
        raise InvalidRequestError(message, parameter="tools") from error
    return [{"lark_grammar": grammar.lark}, *parts]


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the schema of a tool in errors by its place in the request."""
    try:
        yield
    except InvalidRequestError as error:
        message = place + str(error).removeprefix("structured_outputs.json").removeprefix("structured_outputs.tools")
        raise InvalidRequestError(message, parameter=place) from error


def _with_spaces(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _lark(source: str) -> str:
    if (found := _UNENFORCED.search(source)) is not None:
        raise refused(f"has {found[0]!r}, which is not supported: leave it out", "grammar")
    try:
        return any_to_lark(source)
    except Exception as error:  # a converter in Python, of texts from anyone
        raise refused(f"is neither Lark nor GBNF: {error}", "grammar") from error


def _check_schema(schema: Any) -> None:
    """Raise InvalidRequestError, naming the place, for a key that is not honoured, and for a reference to what has not
    been checked.
    """
    rest = [("#", schema, 1)]
    places, references = {"#"}, {}
    while rest:
        place, each, depth = rest.pop()
        places.add(place)
        if isinstance(each, bool):
            continue
        if not isinstance(each, dict):
            raise refused(f"has at {place:.200} {brief_json(each)}, which is no schema", "json")
        if depth > MAX_DEPTH:
            raise refused(f"has more than {MAX_DEPTH} schemas within each other", "json")
        for key in each:
            if key not in _KNOWN and (not key.startswith("x-") or key == "x-guidance"):
                raise refused(f"has the key {key!r:.80} at {place:.200}, which is not supported", "json")
        _check_numbers(place, each)
        _check_open_range(place, each)
        references[place] = each.get("$ref", "#")
        rest.extend((f"{place}/{name}", part, depth + 1) for name, part in _parts(each))
    for place, reference in references.items():
        if unquote(str(reference)).replace("~1", "/").replace("~0", "~") not in places:
            raise refused(
                f"has at {place:.200} the $ref {brief_json(reference)}: only schemas within it can be referred "
                "to, such as #/$defs/name",
                "json",
            )


def _check_numbers(place: str, schema: dict[str, Any]) -> None:
    """Raise InvalidRequestError for a number in place of which the library would enforce another: it reads integers as
    floating-point numbers of 64 bits. Bounds that only integers of more bits would pass are left: it has none.
    """
    signs = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1, "const": 0, "enum": 0}
    rest = [(key, schema[key]) for key in signs if key in schema]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict | list):
            rest.extend((key, part) for part in (value.values() if isinstance(value, dict) else value))
        elif not isinstance(value, int if signs[key] == 0 else (int, float)):
            continue  # the library says what is wrong with it, if anything is
        elif value * signs[key] < LIMIT - 1 and (abs(value) >= LIMIT or float(value) != value):
            raise refused(
                f"has in {key!r} at {place:.200} the number {value!s:.40}, which cannot be enforced exactly: integers "
                f"up to {2**53} can",
                "json",
            )


def _check_open_range(place: str, schema: dict[str, Any]) -> None:
    """Raise InvalidRequestError for a range that begins after a whole number and ends before the next, seen from zero,
    such as from 0, exclusively, to 0.5: the library allows the whole number all the same.
    """
    for sign, near, far in ((1, "inimum", "aximum"), (-1, "aximum", "inimum")):
        start = schema.get(f"exclusiveM{near}")
        if isinstance(start, bool):  # as in draft 4
            start = schema.get(f"m{near}") if start else None
        for end in (schema.get(f"m{far}"), schema.get(f"exclusiveM{far}")):
            if not isinstance(start, int | float) or not isinstance(end, int | float):
                continue
            if 0 <= start * sign < end * sign < start * sign + 1 and float(start).is_integer():
                raise refused(
                    f"has at {place:.200} a range between {start} and {end}, in which no whole number is: this cannot "
                    f"be enforced with 'exclusiveM{near}', use 'm{near}'",
                    "json",
                )


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly within a schema, with their places in it."""
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            yield from ((f"{key}/{index}", each) for index, each in enumerate(value))
        elif key in _MAPPINGS and isinstance(value, dict):
            yield from ((f"{key}/{name}", each) for name, each in value.items())
        elif key in _SCHEMAS:
            yield key, value
        elif key in _LISTS | _MAPPINGS:
            kind = "a list" if key in _LISTS else "an object"
            raise refused(f"has a key {key!r} whose value must be {kind}, not {brief_json(value)}", "json")


@functools.cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _try(grammars: list[dict[str, Any]], kind: str) -> None:
    """Raise InvalidRequestError for a grammar that is invalid, by which no answer can begin, or whose first bytes lead
    to more than the parser holds.
    """
    matcher = LLMatcher(_bytes(), json.dumps({"grammars": grammars}), log_level=0)
    allowed: list[int] = []
    for _ in range(TRIED_BYTES):
        if matcher.is_error():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if not allowed:
            break
        visible = [byte for byte in allowed if chr(byte) not in " \t\n\r"]
        matcher.consume_token((visible or allowed)[len(visible) // 2])
    if not (error := matcher.get_error()):
        return
    if "NoExtension" in error:
        raise refused("allows no answer at all", kind)
    if "coerce_one_of" in error:
        raise refused("has the key 'oneOf' with alternatives that may overlap, which is not supported: use anyOf", kind)
    raise refused(f"cannot be enforced: {_sentence(error)}", kind)


def _sentence(error: str) -> str:
    """Return the part of an error that tells of the grammar, without the parser's state."""
    lines: Iterable[str] = (line.rstrip() for line in error.split("<state>")[0].splitlines())
    return " ".join(line for line in lines if line)[:500]
