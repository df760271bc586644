"""Reads the values of arguments as they come and writes them as JSON, by their position in the source: what was written
is never read again.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from splitfuse.text.chat_formats.source import Emit, Source, Steps

MAX_LITERAL = 100_000
"""Number of characters of a value in Python's notation that is read as such."""
MAX_DEPTH = 64
"""Number of values within each other."""
ANY = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
"""Names of the types of JSON schemas."""

_STRING_RUN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[-+.\w]")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_HEX_DIGIT = re.compile(r"[0-9A-Fa-f]")
_HEX = {"x": 2, "u": 4, "U": 8}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}


def escape(text: str) -> str:
    """Return text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def quote(text: str) -> str:
    """Return text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def json_value(source: Source, emit: Emit) -> Steps[bool]:
    """Emit a JSON value as it stands. Returns False where it ends too early or is no JSON: what was read is emitted,
    and the rest is left.
    """
    closers: list[str] = []
    expected = "value"  # or: first (value or end), key, first key (or end), colon, comma (or end), string, key string
    while True:
        text, start = source.text, source.position
        at, is_valid, is_complete = start, True, False
        while at < len(text) and is_valid and not is_complete:
            character = text[at]
            if expected in ("string", "key string"):
                at = _end_of(_STRING_RUN, text, at)
                if at == len(text):
                    break
                if text[at] == '"':
                    expected = "comma" if expected == "string" else "colon"
                    at += 1
                elif at + 1 == len(text):
                    break
                else:
                    at += 2
                    continue
            elif expected == "scalar":
                at = _end_of(_SCALARS, text, at)
                if at == len(text):
                    break
                expected = "comma"
            elif character in " \t\r\n":
                at += 1
                continue
            elif character == '"' and expected in ("value", "first", "key", "first key"):
                expected = "string" if expected in ("value", "first") else "key string"
                at += 1
                continue
            elif character in "{[" and expected in ("value", "first"):
                closers.append("}" if character == "{" else "]")
                expected = "first key" if character == "{" else "first"
                at += 1
                continue
            elif closers and character == closers[-1] and expected in ("first", "first key", "comma"):
                closers.pop()
                expected = "comma"
                at += 1
            elif closers and character == "," and expected == "comma":
                expected = "key" if closers[-1] == "}" else "value"
                at += 1
                continue
            elif character == ":" and expected == "colon":
                expected = "value"
                at += 1
                continue
            elif _SCALAR.match(character) and expected in ("value", "first"):
                expected = "scalar"
                continue
            else:
                is_valid = False
                continue
            is_complete = not closers and expected == "comma"
        if source.has_ended and is_valid and not is_complete:
            at, is_complete = len(text), expected == "scalar" and not closers
            emit(text[start:at])
            source.position = at
            return is_complete
        emit(text[start:at])
        source.position = at
        if is_complete or not is_valid:
            return is_valid
        yield


_SCALARS = re.compile(r"[-+.\w]*")


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    assert found is not None
    return found.end()


def quoted(source: Source, quote: str, emit: Emit, *, escapes: bool = True) -> Steps[bool]:
    """Emit the text of a string up to `quote`, after its first quote, with escapes resolved. Returns whether the
    quote came.
    """
    high = ""  # first half of a surrogate pair
    while True:
        text, start = source.text, source.position
        found = text.find(quote, start)
        backslash = text.find("\\", start, len(text) if found < 0 else found) if escapes else -1
        end = backslash if backslash >= 0 else found
        if end < 0:
            end = len(text)  # or where the quote may begin
            end -= next((n for n in range(min(len(quote) - 1, end - start), 0, -1) if text.endswith(quote[:n])), 0)
        if end > start:
            emit(("\ufffd" if high else "") + text[start:end])
            high = ""
            source.position = end
        if backslash >= 0:
            source.position += 1
            part = yield from _escaped(source)
            if "\ud800" <= part < "\udc00":
                emit("\ufffd" if high else "")
                high = part
                continue
            if "\udc00" <= part < "\ue000":
                part = (high + part).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            elif high:
                part = "\ufffd" + part
            high = ""
            emit(part)
        elif found >= 0:
            if high:
                emit("\ufffd")
            source.position = found + len(quote)
            return True
        elif source.has_ended:
            source.position = len(text)
            return False
        else:
            yield


def _escaped(source: Source) -> Steps[str]:
    """Return what the characters after a backslash mean; those that mean nothing, as they stand."""
    character = yield from source.peek()
    source.position += len(character)
    if (count := _HEX.get(character)) is not None:
        digits = yield from source.take_run(_HEX_DIGIT, count)
        if len(digits) == count and int(digits, 16) < 0x110000:
            return chr(int(digits, 16))
        is_cut = len(digits) < count and source.has_ended and source.position == len(source.text)
        return "" if is_cut else f"\\{character}{digits}"
    if character in "\"'\\/":  # or it is cut off
        return character
    return _ESCAPES.get(character, f"\\{character}")


def json_string(source: Source) -> Steps[str | None]:
    """Return the text of a JSON string; None, having read an unknown part of it, if there is none."""
    parts: list[str] = []
    if not (yield from source.take('"')) or not (yield from quoted(source, '"', parts.append)):
        return None
    return "".join(parts)


class Notation:
    """Says how values are written that are almost JSON."""

    def __init__(self, *, quotes: tuple[str, ...], escapes: bool, scalar: str, has_bare_keys: bool) -> None:
        self.quotes = quotes
        self.escapes = escapes
        self.scalar = re.compile(scalar)
        self.has_bare_keys = has_bare_keys


PYTHON = Notation(quotes=('"', "'"), escapes=True, scalar=r"[^\s,()\[\]{}:='\"]", has_bare_keys=False)
"""Notation of Python, which models mix with that of JSON."""


def gemma(quote: str) -> Notation:
    """Return the notation with keys that have no quotes, and with `quote` around texts."""
    return Notation(quotes=(quote, '"'), escapes=False, scalar=r"[^,\[\]{}<\"]", has_bare_keys=True)


_KEY = re.compile(r"[^\s:,{}\[\]<>\"']")


def literal(source: Source, notation: Notation, emit: Emit, depth: int = MAX_DEPTH) -> Steps[bool]:
    """Emit a value as JSON. Returns False where it ends too early or is malformed: the rest is left."""
    first = yield from source.skip_space()
    for quote in notation.quotes:
        if (yield from source.take(quote)):
            emit('"')
            escapes = notation.escapes or quote == '"'
            has_ended = yield from quoted(source, quote, lambda text: emit(escape(text)), escapes=escapes)
            if has_ended:
                emit('"')
            return has_ended
    if first in ("[", "(") and depth:
        return (yield from _elements(source, notation, emit, "]" if first == "[" else ")", depth - 1))
    if first == "{" and depth:
        return (yield from _entries(source, notation, emit, depth - 1))
    found = (yield from source.take_run(notation.scalar)).strip()
    if source.has_ended and source.position == len(source.text):  # it may be the beginning of something else
        emit(found if found[:1] in tuple("-0123456789") else "")
        return False
    emit(_scalar(found) if found else "")
    return bool(found)


def _elements(source: Source, notation: Notation, emit: Emit, closer: str, depth: int) -> Steps[bool]:
    source.position += 1
    emit("[")
    separator = ""
    while (yield from source.skip_space()) != closer:
        emit(separator)
        separator = ", "
        if not (yield from literal(source, notation, emit, depth)):
            return False
        if not (yield from source.take_separator(closer)):
            return False
    source.position += 1
    emit("]")
    return True


def _entries(source: Source, notation: Notation, emit: Emit, depth: int) -> Steps[bool]:
    source.position += 1
    emit("{")
    separator = ""
    while (yield from source.skip_space()) != "}":
        key: list[str] = []
        if notation.has_bare_keys and (bare := (yield from source.take_run(_KEY))):
            key = [quote(bare)]
        elif not (yield from literal(source, notation, key.append, depth)):
            return False
        if (yield from source.skip_space()) != ":":
            return False
        source.position += 1
        name = "".join(key)
        emit(f"{separator}{name if name.startswith(chr(34)) else quote(name)}: ")
        separator = ", "
        if not (yield from literal(source, notation, emit, depth)):
            return False
        if not (yield from source.take_separator("}")):
            return False
    source.position += 1
    emit("}")
    return True


def _scalar(found: str) -> str:
    if found in _WORDS:
        return _WORDS[found]
    if _NUMBER.fullmatch(found):
        return found
    try:
        number = ast.literal_eval(found) if len(found) < 100 else found
    except (ValueError, SyntaxError):
        number = found
    if isinstance(number, int | float) and number - number == 0:  # neither infinite nor NaN
        return json.dumps(number)
    return json.dumps(found, ensure_ascii=False)


def json_of(raw: str, types: frozenset[str]) -> str:
    """Return the JSON of a text that stands for a value of one of the types of a schema; of any, if there are none.

    >>> json_of("5", frozenset(("integer",))), json_of("5", frozenset(("string",)))
    ('5', '"5"')
    """
    types = types or ANY
    stripped = raw.strip()
    if "null" in types and stripped in ("null", "None", ""):
        return "null" if stripped or "string" not in types else '""'
    if "boolean" in types and stripped.lower() in ("true", "false"):
        return stripped.lower()
    if types & {"integer", "number"} and (number := _number(stripped, "number" not in types)) is not None:
        return number
    if types & {"object", "array"} and stripped[:1] in ("{", "[", "("):
        wanted = tuple(kind for name, kind in (("object", dict), ("array", list)) if name in types)
        if (text := _structure(stripped, wanted)) is not None:
            return text
    return json.dumps(raw, ensure_ascii=False)


def _number(text: str, is_whole: bool) -> str | None:
    if _NUMBER.fullmatch(text) and not (is_whole and re.search("[.eE]", text)):
        return text
    try:
        number = float(text) if len(text) < 100 else None
    except ValueError:
        return None
    if number is None or number - number != 0 or (is_whole and not number.is_integer()):
        return None
    return json.dumps(int(number) if number.is_integer() else number)


def _structure(text: str, wanted: tuple[type, ...]) -> str | None:
    try:
        return text if isinstance(json.loads(text), wanted) else None
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text) if len(text) <= MAX_LITERAL else None
        return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, (*wanted,)) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def types_of(schema: Any, name: str) -> frozenset[str]:
    """Return the types that an argument may have by the schema of a tool's parameters; none if that is not said."""
    if not isinstance(schema, Mapping):
        return frozenset()
    properties = schema.get("properties")
    each = properties.get(name) if isinstance(properties, Mapping) else None
    return types_of_schema(schema, schema.get("additionalProperties") if each is None else each)


def types_of_schema(root: Mapping[str, Any], schema: Any) -> frozenset[str]:
    """Return the types that values of a schema within `root` may have; none if that is not said."""
    found: set[str] = set()
    rest, seen = [schema], set()
    while rest:
        each = rest.pop()
        if not isinstance(each, Mapping):
            return frozenset()
        if id(each) in seen:
            continue
        seen.add(id(each))
        parts = [part for key in ("anyOf", "oneOf") if isinstance(each.get(key), list) for part in each[key]]
        if isinstance(each.get("allOf"), list):
            parts += [part for part in each["allOf"] if isinstance(part, Mapping) and _TYPED & part.keys()]
        kind = each.get("type")
        if isinstance(reference := each.get("$ref"), str):
            rest.append(referred_to(root, reference))
        elif isinstance(kind, str | list):
            found |= {kind} if isinstance(kind, str) else {name for name in kind if isinstance(name, str)}
        elif "const" in each or isinstance(each.get("enum"), list):
            found |= set(map(_type, [each["const"]] if "const" in each else each["enum"]))
        elif parts:
            rest += parts
        else:
            return frozenset()
        if each.get("nullable") is True:
            found.add("null")
    return frozenset(found)


_TYPED = frozenset(("$ref", "type", "const", "enum", "anyOf", "oneOf", "allOf"))


def referred_to(root: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference within a schema refers to; None if that is not there."""
    value: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        value = value.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(value, Mapping) else None
    return value


def _type(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number" if isinstance(value, float) else "integer"
        case str():
            return "string"
        case None:
            return "null"
        case list():
            return "array"
    return "object"
