"""A request out of its JSON, and what is wrong with it in the words of whoever wrote it.

It decides how a mismatch is told: the place, what is there and what may be. What requests say is protocol.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from splitfuse.errors import nearest
from splitfuse.server.errors import RefusedError
from splitfuse.server.openai.protocol import NEUTRAL, ChatRequest, CompletionRequest, refuse_unless_neutral

ROUTE_OF: dict[type[msgspec.Struct], str] = {
    CompletionRequest: "/v1/completions",
    ChatRequest: "/v1/chat/completions",
}
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "null": "null",
    "array": "an array",
    "object": "an object",
}
"""Of JSON's types."""
NO_TEXT = ("image_url", "input_audio", "file")
"""What parts of a message can hold elsewhere."""

_Body = TypeVar("_Body", bound=msgspec.Struct)


def decode(kind: type[_Body], body: bytes) -> _Body:
    """A request out of its JSON. Raises RefusedError (400) for what is no JSON or not of that kind, naming the place;
    for what is known and not honoured, too.
    """
    try:
        try:
            request = msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            request = msgspec.convert(_with_whole_numbers(msgspec.json.decode(body)), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _mismatch(kind, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RefusedError(400, "the body is nested too deeply", code="invalid_json") from error
    neutral = NEUTRAL.get(kind, {})
    if isinstance(request, CompletionRequest) and request.n is not None:
        neutral = {**neutral, "best_of": (None, request.n)}  # the best n of n: all
    refuse_unless_neutral(request, neutral)
    return request


def _with_whole_numbers(value: Any) -> Any:
    """3.0 is 3, as JSON has one kind of numbers only."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    return [_with_whole_numbers(item) for item in value] if isinstance(value, list) else value


def _mismatch(kind: type[msgspec.Struct], message: str) -> RefusedError:
    """What msgspec says, with the parameter's name as people write it: `messages[0].content`."""
    what, _, at = message.partition(" - at ")
    place = re.sub(r"^`\$\.?(.*)`$|^`key` in `\$\.?(.*)`$", lambda m: m[1] or m[2] or "", at, flags=re.DOTALL)
    if match := re.match(r"Object contains unknown field `(.*)`$", what, re.DOTALL):
        return _unknown(kind, place, match[1])
    if match := re.match(r"Object missing required field `(.*)`$", what):
        place = f"{place}.{match[1]}" if place else match[1]
        return RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
    subject = f"a key of {place}" if at.startswith("`key`") else place or "the body"
    return RefusedError(400, f"{subject} {_in_words(kind, place, what)}", code="invalid_type", parameter=place or None)


def _unknown(kind: type[msgspec.Struct], place: str, field: str) -> RefusedError:
    """A field that is none, with what was perhaps meant."""
    name = f"{place}.{field}" if place else field
    if field in NO_TEXT and re.search(r"content\[\d+\]$", place):
        message = f"{name} is not supported: messages are text, and parts of them have the type text"
        return RefusedError(400, message, code="unsupported_parameter", parameter=name)
    hint = ""
    if not place and len(field) < 80:
        others = [other for other in ROUTE_OF if kind in ROUTE_OF and other is not kind]
        elsewhere = next((ROUTE_OF[other] for other in others if field in _fields(other)), None)
        its_place = f"; it is one of {elsewhere}, and this is {ROUTE_OF[kind]}" if elsewhere else ""
        hint = its_place or nearest(field, sorted(_fields(kind)))
    return RefusedError(400, f"unknown parameter {name!r:.200}{hint}", code="unknown_parameter", parameter=name[:200])


def _in_words(kind: type[msgspec.Struct], place: str, what: str) -> str:
    """`must be a number or null, not a string`."""
    if match := re.match(r"Invalid enum value (.*)$", what, re.DOTALL):
        allowed = [value for part in get_args(get_type_hints(kind).get(place)) for value in get_args(part)]
        one_of = f"must be {', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else "cannot be that"
        return f"{one_of}, not {match[1]:.80}"
    if match := re.match(r"Expected `([^`]*)`(.*?)(?:, got `([^`]*)`)?$", what, re.DOTALL):
        expected = " or ".join(WORDS.get(part, part) for part in match[1].split(" | "))
        return f"must be {expected}{match[2]:.100}" + (f", not {WORDS.get(match[3], match[3])}" if match[3] else "")
    return f"is wrong: {what:.200}"


def _fields(kind: type[msgspec.Struct]) -> Sequence[str]:
    return [name for name in kind.__struct_fields__ if name not in NEUTRAL.get(kind, {})]
