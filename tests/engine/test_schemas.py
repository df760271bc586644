"""Hundreds of schemas: every answer that ends validates, and a key that is not enforced is found wherever it stands."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import jsonschema_rs
import pytest

import splitfuse
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.text.grammar import compile_structured_outputs
from splitfuse.text.prompts import PreparedRequest

NUM_SCHEMAS = 300
NAMES = ("name", "kind of", "größe", 'a"b', "x/y", "z~0", "$ref", "items")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration")
PATTERNS = ("^[a-c]{2,5}$", "^(x|yy)+z?$", r"^\d{3}-\d{2}$", "^[^a-z]{1,4}$", "^é?[A-Z]+$")
ALIEN = ("not", "uniqueItems", "contains", "if", "propertyNames", "minimun", "dependentRequired", "nullable")


class Schemas:
    """Makes random schemas, whose answers are short."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)

    def whole(self) -> dict[str, Any]:
        """Return a schema, sometimes with definitions that refer to themselves."""
        rng, schema = self.rng, self.any(3)
        if rng.random() < 0.3:
            part = self.any(1)
            node = {
                "type": "object",
                "properties": {"value": part, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
            schema = {
                "type": "object",
                "properties": {"tree": {"$ref": "#/$defs/node"}, "rest": schema},
                "required": ["tree", "rest"],
                "additionalProperties": False,
                "$defs": {"node": node},
            }
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "made at random", **schema}

    def any(self, depth: int) -> dict[str, Any]:
        """Return a schema with at most `depth` within each other."""
        flat = (self.integer, self.number, self.string, self.enum, self.plain)
        nested = (self.object, self.array, self.alternatives, self.object)
        rng = self.rng
        schema = rng.choice((*flat, *nested) if depth else flat)
        made = schema(depth - 1)
        return {**made, "description": "says nothing", "default": None} if rng.random() < 0.2 else made

    def integer(self, _: int) -> dict[str, Any]:
        rng = self.rng
        low = rng.randint(-500, 500)
        bounds = rng.choice(
            ({"minimum": low, "maximum": low + rng.randint(9, 99)}, {"exclusiveMinimum": low, "maximum": low + 70})
        )
        return {"type": "integer", **bounds, **rng.choice(({}, {}, {"multipleOf": rng.choice((2, 5, 7))}))}

    def number(self, _: int) -> dict[str, Any]:
        return {"type": "number", "minimum": self.rng.choice((-2.5, 0, 3)), "exclusiveMaximum": 5}

    def string(self, _: int) -> dict[str, Any]:
        rng = self.rng
        low = rng.randint(0, 3)
        lengths = {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}
        patterns = {"type": "string", "pattern": rng.choice(PATTERNS)}
        return rng.choice((lengths, lengths, patterns, {"type": "string", "format": rng.choice(FORMATS)}))

    def enum(self, _: int) -> dict[str, Any]:
        rng = self.rng
        values: list[Any] = ["a", "ä\n", 3, -1.5, None, True, [1, "x"], {"k": []}, ""]
        return rng.choice(({"enum": rng.sample(values, rng.randint(1, 5))}, {"const": rng.choice(values)}))

    def plain(self, _: int) -> dict[str, Any]:
        return self.rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))

    def object(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(0, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        if names:
            schema["required"] = rng.sample(names, rng.randint(0, len(names)))
        schema["additionalProperties"] = False
        if rng.random() < 0.15:
            schema |= {"patternProperties": {"^p[0-9]$": self.any(0)}, "minProperties": 1, "maxProperties": 3}
            schema |= {"properties": {}, "required": []}
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        if rng.random() < 0.3:
            return {"type": "array", "prefixItems": [self.any(depth), self.any(depth)], "items": False, "minItems": 1}
        low = rng.randint(0, 2)
        return {"type": "array", "items": self.any(depth), "minItems": low, "maxItems": low + rng.randint(0, 2)}

    def alternatives(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        kinds: list[dict[str, Any]] = [self.integer(0), self.string(0), {"type": "null"}, self.array(depth)]
        match rng.choice(("anyOf", "oneOf", "allOf")):
            case "anyOf":
                return {"anyOf": [self.any(depth), self.any(depth)]}
            case "oneOf":  # of types that cannot overlap
                return {"oneOf": rng.sample(kinds, rng.randint(2, 3))}
        return {"allOf": [{"type": "string", "minLength": 1}, {"maxLength": 5}]}


@pytest.fixture(scope="module")
def pipe() -> Iterator[splitfuse.Pipeline]:
    yield splitfuse.pipeline(dtype="float32", max_num_seqs=16)


@pytest.mark.parametrize("count", [24, pytest.param(NUM_SCHEMAS, marks=pytest.mark.slow)])
def test_every_answer_that_ends_validates(pipe: splitfuse.Pipeline, count: int) -> None:
    """At random, so that answers are as odd as a schema allows: the model alone never writes JSON."""
    schemas, requests = [], []
    rng = Random("schemas")
    for number in range(count):
        schema = Schemas(number).whole()
        asked = StructuredOutputs.of({"json": schema, "disable_any_whitespace": number % 2 == 0})
        form = compile_structured_outputs(asked)
        (request,) = pipe.prepare("Once upon a time", max_new_tokens=300, temperature=1.0, seed=rng.randrange(2**32))
        requests.append(PreparedRequest(request.token_ids, replace(request.params, structured_outputs=form)))
        schemas.append(schema)
    ended = 0
    for piece in pipe.run(requests):
        if (response := piece.response) is None:
            continue
        assert response.error is None, (schemas[piece.index], response)
        if response.finish_reason != "length":
            ended += 1
            value = json.loads(response.generated_text)
            validator = jsonschema_rs.Draft202012Validator(schemas[piece.index], validate_formats=True)
            problems = [str(error) for error in validator.iter_errors(value)]
            assert not problems, (schemas[piece.index], response.generated_text, problems)
    assert ended > count * 0.9


def places(schema: Any, place: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, with its place."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key in ("properties", "patternProperties", "$defs"):
        for name, each in schema.get(key, {}).items():
            yield from places(each, f"{place}/{key}/{name}")
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for index, each in enumerate(schema.get(key, [])):
            yield from places(each, f"{place}/{key}/{index}")
    yield from places(schema.get("items"), f"{place}/items")


def test_an_unknown_key_is_named_wherever_it_stands() -> None:
    for number in range(NUM_SCHEMAS):
        rng = Random(number)
        schema = copy.deepcopy(Schemas(number).whole())
        place, chosen = rng.choice(list(places(schema)))
        chosen[key := rng.choice(ALIEN)] = {}
        with pytest.raises(splitfuse.InvalidRequestError) as refusal:
            compile_structured_outputs(StructuredOutputs.of({"json": schema}))
        assert f"has the key {key!r} at {place}, which is not supported" in str(refusal.value)
