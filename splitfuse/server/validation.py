"""Decodes JSON bodies, and tells what is wrong with a malformed one: the place, the value, a valid one.

A `Body` declares the fields of a request. `decode` lets msgspec decode it; only if that fails does it walk the JSON
along the type, to find the first mismatch. Every dialect uses it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import inspect

from splitfuse.errors import any_of, brief, entry, nearest
from splitfuse.server.errors import RefusedError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_DIGITS = 1000
"""Number of digits from which on an integer is treated as infinite. JSON has no bound of its own."""

MAX_WHOLE = 2.0**64
"""Number up to which a whole number may be written as 1e9; above, errors show it as it was written."""


@dataclass(frozen=True)
class SchemaBounds:
    """Holds bounds that the types do not know: the loaded model's (None before it is ready) and the server's."""

    max_prompts: int
    model: str | None = None
    vocab_size: int | None = None
    max_model_len: int | None = None

    @property
    def token(self) -> dict[str, Any]:
        """Return the schema of a token id."""
        return {
            "type": "integer",
            "minimum": 0,
            **({} if self.vocab_size is None else {"maximum": self.vocab_size - 1}),
        }


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Declares a JSON object that clients send. Unknown fields are refused; null means that a field is left out."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Parameters that are known but not supported, with the values that request nothing: see `accepts_neutral`."""
    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Fields and parameters that other servers know, with the reason why they are refused here."""

    TYPES: ClassVar[tuple[str, ...]] = ()
    """Values that its field `type` may have; an object of another type is refused by that, whatever else it has."""

    @classmethod
    def check_type(cls, kind: str, where: str) -> None:
        """Raise RefusedError (400) for a type that is not among TYPES."""
        if kind not in cls.TYPES:
            place = f"{where}.type"
            message = f"{place} {kind!r:.80} is not supported: use {any_of(cls.TYPES)}"
            raise RefusedError(400, message, code="unsupported_parameter", parameter=place)

    def neutral(self) -> Mapping[str, tuple[Any, ...]]:
        """Return NEUTRAL, extended by values that are neutral next to the other fields of this body."""
        return self.NEUTRAL

    def check_neutral(self, where: str = "") -> None:
        """Raise RefusedError (400) for an unsupported parameter with a value that requests something."""
        for name, values in self.neutral().items():  # null is always among them
            value = getattr(self, name)
            if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in values):
                reason = f"{self.REFUSED[name]}; " if name in self.REFUSED else ""
                sends = " or ".join(map(json.dumps, values[1:]))
                advice = f"leave it out or send {sends}" if sends else "leave it out"
                message = f"{where}{name}{_shown(value)} is not supported: {reason}{advice}"
                raise RefusedError(400, message, code="unsupported_parameter", parameter=where + name)

    @classmethod
    def supported(cls) -> list[str]:
        """Return the names of the supported fields."""
        return sorted(set(cls.__struct_fields__) - set(cls.NEUTRAL))

    @classmethod
    def suggest(cls, field: str) -> str:
        """Return what an unknown field may have been meant to be, to end an error message with; or nothing."""
        return nearest(field, cls.supported())

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """Return the JSON schema of this type with what the type alone does not say."""
        properties = schema["properties"]
        for name, values in cls.NEUTRAL.items():
            properties[name] = {"enum": list(values), "description": "Changes nothing; other values are not supported"}
        if cls.TYPES:
            properties["type"]["enum"] = list(cls.TYPES)
        if bounds.model is not None and "model" in properties:
            properties["model"] = {"enum": [bounds.model, None]}
        return schema


_Body = TypeVar("_Body", bound=Body)


def accepts_neutral(**neutral: Sequence[Any]) -> Callable[[type[_Body]], type[_Body]]:
    """Return a decorator which gives a Body fields that are not supported, but accepted as null or with these values.

    >>> @accepts_neutral(tools=([],))
    ... class Request(Body): ...
    """

    def extended(kind: type[_Body]) -> type[_Body]:
        return msgspec.defstruct(  # type: ignore[return-value]
            kind.__name__,
            [(name, Any, None) for name in neutral],
            bases=(kind,),
            module=kind.__module__,
            namespace={
                "__doc__": kind.__doc__,
                "NEUTRAL": {**kind.NEUTRAL, **{name: (None, *neutral[name]) for name in neutral}},
            },
            kw_only=True,
            forbid_unknown_fields=True,
            frozen=True,
        )

    return extended


def decode(kind: type[_Body], body: bytes) -> _Body:
    """Return the request in a body of JSON.

    Raises RefusedError (400) for an empty body or invalid JSON, for a value of another type or out of bounds (naming
    its place, such as `messages[0].content`), for an unknown field, and for a field that is known but not supported.
    """
    if not body.strip():
        raise RefusedError(400, "the body is empty: send a JSON object", code="invalid_json")
    try:
        try:
            request = msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            request = _convert(kind, _plain_json(body))
    except (msgspec.DecodeError, ValueError) as error:
        raise RefusedError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RefusedError(400, "the body is nested too deeply", code="invalid_json") from error
    request.check_neutral()
    return request


def _plain_json(body: bytes) -> Any:
    """Return the JSON as plain objects, with 3.0 as 3: JSON has one kind of numbers only. Raises ValueError, also for
    half a surrogate pair in a text, which Python would accept and nothing behind here can encode.
    """

    def real(digits: str) -> float:
        number = float(digits)
        return int(number) if number.is_integer() and abs(number) <= MAX_WHOLE else number

    text = body.decode()
    plain = json.loads(text, parse_float=real, parse_int=lambda d: int(d) if len(d) < MAX_DIGITS else math.inf)
    if _SURROGATE.search(text):
        json.dumps(plain, ensure_ascii=False).encode()
    return plain


def _convert(kind: type[_Body], value: Any) -> _Body:
    _check(_type_info(kind), value, "")
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:  # one that `_check` does not know
        raise _wrong("", "does not match its schema in /openapi.json") from error


_type_info = cache(inspect.type_info)


# What is wrong -------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """Return how an error shows a value behind a name: not at all if it is an object or an array."""
    match value:
        case bool():
            return f" {json.dumps(value)}"
        case str():
            return f" {json.dumps(value[:80])}"
        case int() | float():
            return f" {brief(value)}"
    return ""


def _wrong(place: str, problem: str) -> RefusedError:
    return RefusedError(400, f"{place or 'the body'} {problem}", code="invalid_type", parameter=place or None)


def _check(expected: inspect.Type, value: Any, place: str) -> None:
    """Raise RefusedError at the first value that is not of the expected type."""
    options = [option for option in _options(expected) if _is_of_kind(option, value)]
    if not options:
        wanted = " or ".join(dict.fromkeys(_kind(option) for option in _options(expected)))
        found = brief(value) if isinstance(value, float) else _kind_of(value)  # such as 1.5
        raise _wrong(place, f"must be {wanted}, not {found}")
    match options[0]:
        case inspect.StructType() as struct:
            _check_object(struct, value, place)
        case inspect.ListType(item_type=item, min_length=minimum, max_length=maximum):
            _check_length(value, place, "items", minimum, maximum)  # before a million of them are read
            for index, each in enumerate(value):
                _check(item, each, f"{place}[{index}]")
        case inspect.DictType(key_type=key_type, value_type=value_type, min_length=minimum, max_length=maximum):
            _check_length(value, place, "entries", minimum, maximum)
            for key, each in value.items():
                _check_key(key_type, key, place)
                _check(value_type, each, entry(place, key))
        case inspect.StrType(min_length=minimum, max_length=maximum):
            _check_length(value, place, "characters", minimum, maximum)
        case inspect.LiteralType(values=values) if value not in values:
            raise _wrong(place, f"must be {any_of(map(str, values))}, not {value!r:.80}")
        case inspect.IntType() | inspect.FloatType() as number:
            _check_bounds(number, value, place)
        case inspect.AnyType():
            _check_finite(value, place)


def _check_object(expected: inspect.StructType, value: Mapping[str, Any], place: str) -> None:
    fields = {field.encode_name: field for field in expected.fields}
    before = f"{place}." if place else ""
    body: type[Body] = expected.cls  # type: ignore[assignment]
    if body.TYPES and isinstance(kind := value.get("type"), str):
        body.check_type(kind, place)
    for name, each in value.items():
        if name not in fields:
            raise _unknown(expected.cls, before, name)
        _check(fields[name].type, each, before + name)
    for name, field in fields.items():
        if field.required and name not in value:
            name = before + name
            raise RefusedError(400, f"{name} is missing", code="missing_parameter", parameter=name)


def _unknown(kind: type[Any], before: str, field: str) -> RefusedError:
    name = before + field
    if reason := kind.REFUSED.get(field):
        message = f"{name} is not supported: {reason}"
        return RefusedError(400, message, code="unsupported_parameter", parameter=name)
    hint = kind.suggest(field) if not before and len(field) < 80 else ""
    message = f"unknown parameter {name!r:.200}{hint}"
    return RefusedError(400, message, code="unknown_parameter", parameter=name[:200])


def _check_key(expected: inspect.Type, key: str, place: str) -> None:
    """Keys are strings in JSON; those of a mapping of whole numbers must be written as such."""
    if isinstance(expected, inspect.IntType):
        try:
            number = int(key) if key.isascii() and len(key) < MAX_DIGITS else None
        except ValueError:
            number = None
        if number is None or str(number) != key:
            raise _wrong(place, f"must have whole numbers as keys, not {key!r:.80}")
        _check_bounds(expected, number, place, verb="have as key")


def _check_length(value: Any, place: str, unit: str, minimum: int | None, maximum: int | None) -> None:
    if minimum and not value:
        raise _wrong(place, "must not be empty")
    if maximum is not None and len(value) > maximum:
        raise _wrong(place, f"must have at most {maximum} {unit}, not {len(value)}")


def _check_bounds(expected: inspect.IntType | inspect.FloatType, value: float, place: str, verb: str = "be") -> None:
    minimum, above, maximum, below = expected.ge, expected.gt, expected.le, expected.lt
    too_small = (minimum is not None and value < minimum) or (above is not None and value <= above)
    too_large = (maximum is not None and value > maximum) or (below is not None and value >= below)
    is_finite = isinstance(value, int) or math.isfinite(value)  # an integer of 400 digits is no float
    if too_small or too_large or not is_finite:
        low = f" above {above:g}" if above is not None else "" if minimum is None else f" from {minimum:g}"
        if below is not None:
            high = f" and below {below:g}"
        else:
            high = " up" if above is not None or maximum is None else ""
            high += "" if maximum is None else f" to {int(maximum) if float(maximum).is_integer() else maximum}"
        raise _wrong(place, f"must {verb} {_kind(expected)}{low}{high}, not {brief(value)}")


def _check_finite(value: Any, place: str) -> None:
    """Refuse numbers that only JSON can write, such as 1e999, wherever they are."""
    if isinstance(value, dict):
        for key, each in value.items():
            _check_finite(each, entry(place, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_finite(each, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _wrong(place, "is a number out of range")


_KINDS: Mapping[type[inspect.Type], tuple[str, tuple[type, ...]]] = {
    inspect.IntType: ("a whole number", (int,)),
    inspect.FloatType: ("a number", (float, int)),
    inspect.StrType: ("a string", (str,)),
    inspect.LiteralType: ("a string", (str,)),
    inspect.BoolType: ("true or false", (bool,)),
    inspect.NoneType: ("null", (type(None),)),
    inspect.ListType: ("an array", (list,)),
    inspect.DictType: ("an object", (dict,)),
    inspect.StructType: ("an object", (dict,)),
    inspect.AnyType: ("anything", (object,)),
}
"""JSON's words for the types of msgspec, with the types of Python that such a value has."""


def _options(expected: inspect.Type) -> Iterable[inspect.Type]:
    """Yield the types that a value may have, without their annotations."""
    for option in expected.types if isinstance(expected, inspect.UnionType) else (expected,):
        yield option.type if isinstance(option, inspect.Metadata) else option


def _kind(expected: inspect.Type) -> str:
    return _KINDS[type(expected)][0]


def _is_of_kind(expected: inspect.Type, value: Any) -> bool:
    return isinstance(expected, inspect.AnyType) or type(value) in _KINDS[type(expected)][1]


def _kind_of(value: Any) -> str:
    return next(name for name, types in _KINDS.values() if type(value) in types)
