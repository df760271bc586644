"""Forms of answers that would take a library, or a parser, long or much to compile."""

from typing import Any


def schema(**keys: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": keys}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def patterns(count: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{n}}}$"} for n in range(count)]


def doubling(count: int) -> str:
    rules = "".join(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}\n" for i in range(count))
    return f'start: r0\n{rules}r{count}: "a" |'


def alternatives(count: int) -> list[dict[str, Any]]:
    part = {"type": "object", "properties": {"a": {"type": "integer"}}}
    return [{"anyOf": [part, {"type": "object", "properties": {f"b{i}": {"type": "string"}}}]} for i in range(count)]


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": schema(**nested(100)),
    "very deep": {"guided_json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "large": {"guided_regex": "a" * 200_000},
    "nested alternatives": schema(allOf=alternatives(25)),
    "products of patterns": schema(allOf=patterns(25)),
    "divisibility": schema(type="integer", multipleOf=999983),
    "repetition": {"guided_regex": "a{100000}{1000}"},
    "many properties": schema(type="object", properties={f"p{i}": {"type": "string"} for i in range(3000)}),
    "brackets": {"guided_grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    "ambiguity": {"guided_grammar": doubling(30)},
}
