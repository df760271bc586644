"""Makes the grammar of answers that call tools, in the model's own way of writing calls.

A call that this grammar allows is one that the parser reads, with arguments that are valid by the schema of its tool.
Requests ask for such a grammar by `call_grammar`; `lark_of` makes it, where texts from anyone are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError, brief_json
from splitfuse.text.chat_formats.formats import (
    CHAT_FORMATS,
    CallFormat,
    Channels,
    ChatFormat,
    GemmaCalls,
    JsonCalls,
    NamedCalls,
    PythonCalls,
    TaggedCalls,
)
from splitfuse.text.chat_formats.message import Tool, ToolChoice
from splitfuse.text.chat_formats.values import referred_to, types_of_schema

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of the arguments of a tool without parameters."""
MAX_DEPTH = 16
"""Number of references and alternatives within each other in the schema of a value that is written as raw text."""
_RAW_KEYS = frozenset(("pattern", "minLength", "maxLength", "format", "const", "enum"))
_KEY = re.compile(r"[^<>\"\n\s=,(){}:]+")


_OPEN = frozenset(
    ("additionalProperties", "patternProperties", "minProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "not")
)
"""Keys of a schema that say more about the properties of an object than those which it declares."""


def call_grammar(
    chat_format: ChatFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool = True,
    special_tokens: Mapping[str, int] | None = None,
    form: StructuredOutputs | None = None,
) -> StructuredOutputs | None:
    """Return the form of answers that call tools as `choice` says; None if it leaves that to the model. Then arguments
    of a strict tool are valid by its schema all the same, and an answer without calls is JSON of the `form` that is
    given; other forms are those of the whole answer.

    `special_tokens` are the markers of the format that are special tokens, with their ids. Raises InvalidRequestError
    for a model whose way of calling tools is not known.
    """
    calls = chat_format.calls
    is_free = choice.mode == "auto" and any(tool.strict or form for tool in tools)
    if choice.mode != "required" and not is_free:
        return None
    if form is not None and (form.kind != "json" or calls is None or calls.is_bare):  # a bare call is JSON too
        return form
    if calls is None:
        message = "this model cannot be made to call tools: it is not known how it writes calls, use auto"
        message = "arguments of strict tools cannot be enforced with this model" if is_free else message
        raise InvalidRequestError(message, parameter="tools" if is_free else "tool_choice")
    is_json = isinstance(calls, JsonCalls | NamedCalls | Channels)
    chosen = [
        [
            tool.place,
            tool.name,
            _schema_of(tool)
            if tool.strict or not (is_free and is_json)  # raw texts need the names of arguments
            else {"type": "object"},
        ]
        for tool in tools
        if choice.name in (None, tool.name)
    ]
    source = {
        "format": chat_format.name,
        "tools": chosen,
        "is_free": is_free,
        "is_parallel": parallel,
        "special_tokens": dict(special_tokens or {}),
        "form": None if form is None else dataclasses.asdict(form),
    }
    return StructuredOutputs("tools", json.dumps(source))


def _schema_of(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which allows others than it declares only if it says so: functions take
    no others, and a model that begins to invent some may find no end.
    """
    schema = {"type": "object", **(tool.parameters or NO_ARGUMENTS)}
    declared, required = schema.get("properties"), schema.get("required", [])
    if not _OPEN & schema.keys() and isinstance(declared, dict) and isinstance(required, list):
        extras = [name for name in required if name not in declared]
        schema |= {} if extras else {"additionalProperties": False}
    return schema


@dataclass
class CallGrammar:
    """Holds a grammar in Lark, and the schemas to which it refers as @name."""

    lark: str
    schemas: dict[str, dict[str, Any]]


def form_of(source: str) -> StructuredOutputs | None:
    """Return the form of an answer without calls in the source of a form."""
    form = json.loads(source)["form"]
    return None if form is None else StructuredOutputs(**form)


def parameters_of(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the schemas of tools in the source of a form, each with its place in the request."""
    return [(place, schema) for place, _, schema in json.loads(source)["tools"]]


def lark_of(source: str, *, has_special_tokens: bool = True) -> CallGrammar:
    """Return the grammar that the source of a form asks for; as bytes only, without `has_special_tokens`."""
    given = json.loads(source)
    chat_format = CHAT_FORMATS[given["format"]]
    calls, is_free, is_parallel = chat_format.calls, given["is_free"], given["is_parallel"]
    assert calls is not None
    writer = _Writer(calls, given["special_tokens"] if has_special_tokens else {})
    has_form = given["form"] is not None
    trigger = "" if calls.is_bare or has_form else "".join(chat_format.triggers)
    if is_free and trigger not in writer.special_tokens:
        writer.omitted = trigger  # free text ends with it
    names = [writer.rule(writer.call(place, name, schema)) for place, name, schema in given["tools"]]
    call = writer.rule(" | ".join(names))
    is_repeated = is_parallel and calls.is_repeatable and not (is_free and trigger == calls.open.strip())
    before, after = writer.around()
    group = writer.rule(f"{before} {call} {f'({writer.text(calls.separator)} {call})*' if is_repeated else ''} {after}")
    start = group
    if has_form:
        before_form = f"{before} {writer.text('<|channel|>final<|message|>')}" if isinstance(calls, Channels) else ""
        start = f"{group} | {before_form} @form"
    elif is_free:
        start = writer.free(group, trigger, is_parallel)
    return CallGrammar("\n".join([f"start: {start}", *writer.rules]), writer.schemas)


@dataclass
class _Writer:
    """Collects rules and schemas."""

    calls: CallFormat
    special_tokens: Mapping[str, int]
    omitted: str = ""
    """Text that has come when calls begin."""
    rules: list[str] = field(default_factory=list)
    schemas: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule, and return its name."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def text(self, text: str) -> str:
        """Return an expression for a text."""
        pieces = self._specials.split(text) if self._specials else [text]
        written = [
            f"<[{self.special_tokens[piece]}]>" if piece in self.special_tokens else _quoted(piece)
            for piece in pieces
            if piece
        ]
        return " ".join(written)

    @functools.cached_property
    def _specials(self) -> re.Pattern[str] | None:
        markers = "|".join(map(re.escape, self.special_tokens))
        return re.compile(f"({markers})") if markers else None

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return an expression for JSON of a schema."""
        name = f"s{len(self.schemas)}"
        self.schemas[name] = dict(schema)
        return f"@{name}"

    def begin(self, text: str) -> str:
        """Return an expression for the text with which calls begin."""
        return self.text(text.removeprefix(self.omitted))

    def around(self) -> tuple[str, str]:
        """Return expressions for what is before the first call and after the last."""
        match calls := self.calls:
            case JsonCalls(is_list=True):
                return self.begin(f"{calls.open}["), self.text(f"]{calls.close}")
            case PythonCalls(is_bare=True):
                return self.text(calls.brackets[0]), self.text(calls.brackets[1])
            case PythonCalls():
                return self.begin(calls.open + calls.brackets[0]), self.text(calls.brackets[1] + calls.close)
            case Channels():
                return f"({self.text('<|start|>assistant')})?", ""
        return self.begin(calls.section[0]), self.text(calls.section[1])

    def free(self, group: str, trigger: str, is_parallel: bool) -> str:
        """Return an expression for an answer that may have calls."""
        often = "*" if is_parallel else "?"
        if isinstance(self.calls, Channels):
            channel = '("analysis" | "commentary" | "final")'
            message = self.rule(f"{self.text('<|channel|>')} {channel} {self.text('<|message|>')} /(?s:.*)/")
            lead = self.rule(f"({self.text('<|start|>assistant')})?")
            return f"({lead} {message} {self.text('<|end|>')})* ({group} | {lead} {message})"
        if self.calls.is_bare:
            other = self.rule(r"/([^\[{\s](?s:.*))?/")
            return f"{group} | {other}"
        text = self.rule("/(?s:.*)/")
        if trigger in self.special_tokens:
            return f"{text} ({group} {text}){often}"
        return f"({self.rule('/(?s:.*)/', f'[suffix={_quoted(trigger)}]')} {group}){often} {text}"

    def call(self, place: str, name: str, schema: dict[str, Any]) -> str:
        """Return an expression for a call of a tool."""
        calls = self.calls
        if schema["type"] != "object":
            raise _refused(place, f"must be a schema of an object, not of {brief_json(schema['type'])}")
        match calls:
            case JsonCalls():
                before = f'{{"name": {_quoted(name)}, "{calls.arguments}": '
                if calls.is_list or calls.is_bare:
                    return f"{self.text(before)} {self.json(schema)} {self.text('}')}"
                return f"{self.begin(calls.open + before)} {self.json(schema)} {self.text('}' + calls.close)}"
            case NamedCalls():
                number = " /[0-9]{1,4}/ " if calls.ids == "numbered" else " "
                before = self.begin(f"{calls.open}{calls.before}{name}{':' if calls.ids == 'numbered' else ''}")
                end = self.text(calls.end + calls.close)
                return f"{before}{number}{self.text(calls.after[0])} {self.json(schema)} {end}"
            case TaggedCalls():
                before = self.begin(f"{calls.open}{calls.before}{name}{calls.after}")
                return f"{before} {self._tagged(calls, place, schema)} {self.text(calls.end_of_call + calls.close)}"
            case PythonCalls():
                return f"{self.text(f'{name}(')} {self._listed(place, schema, '=', ', ')} {self.text(')')}"
            case GemmaCalls():
                before = self.begin(f"{calls.open}{calls.before}{name}{{")
                return f"{before} {self._listed(place, schema, ':', ',')} {self.text('}' + calls.close)}"
        before = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        return f"{self.text(before)} {self.json(schema)}"

    def _properties(self, place: str, schema: dict[str, Any]) -> list[tuple[str, Any, bool]]:
        """Return the name and the schema of each property, and whether it is required."""
        if "$ref" in schema:
            schema = {**schema, **(referred_to(schema, schema["$ref"]) or {})}
            del schema["$ref"]
        for key in schema:
            if key in ("allOf", "anyOf", "oneOf", "patternProperties", "minProperties", "maxProperties"):
                raise _refused(
                    place, f"has the key {key!r} at #, which is not supported in this model's way of calling tools"
                )
        properties = dict(schema.get("properties") or {})
        required = schema.get("required") or []
        for name in required:
            properties.setdefault(name, schema.get("additionalProperties", True))
        for name in properties:
            if not _KEY.fullmatch(name):
                raise _refused(place, f"has the property {name!r:.80}, which this model cannot write")
        return [(name, each, name in required) for name, each in properties.items()]

    def _tagged(self, calls: TaggedCalls, place: str, schema: dict[str, Any]) -> str:
        """Return an expression for arguments between tags."""
        parts = []
        for name, each, is_required in self._properties(place, schema):
            before = f"{calls.key[0]}{name}{calls.key[1]}"
            alternatives = [
                f"{self.text(before + calls.value[-1 if kind == 'json' else 0])} {value}"
                for kind, value in self._raw(place, schema, each, calls.end, "")
            ]
            part = self.rule(" | ".join(alternatives))
            parts.append(part if is_required else f"{part}?")
        return " ".join(parts)

    def _listed(self, place: str, schema: dict[str, Any], equals: str, separator: str) -> str:
        """Return an expression for arguments with names, with separators between them."""
        head = tail = '""'
        for name, each, is_required in reversed(self._properties(place, schema)):
            if isinstance(self.calls, GemmaCalls):
                quote = self.calls.quote
                found = [value for _, value in self._raw(place, schema, each, quote, quote)]
            else:
                found = [self.json(_within(schema, each))]
            argument = self.rule(f"{self.text(name + equals)} ({' | '.join(found)})")
            rest = f"{self.text(separator)} {argument} {tail}"
            new_head = f"{argument} {tail}" if is_required else f"({argument} {tail} | {head})"
            tail = self.rule(rest if is_required else f"({self.text(separator)} {argument})? {tail}")
            head = self.rule(new_head)
        return head

    def _raw(
        self, place: str, root: dict[str, Any], schema: Any, end: str, before: str, depth: int = MAX_DEPTH
    ) -> list[tuple[str, str]]:
        """Return expressions for a value, a string as raw text between `before` and `end` and others as JSON; without
        `before`, JSON has this end too.
        """
        json_end = "" if before else self.text(end)
        if not isinstance(schema, dict) or depth == 0:
            return [("text", self._free_text(before, end))]
        if isinstance(reference := schema.get("$ref"), str):
            return self._raw(place, root, referred_to(root, reference), end, before, depth - 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                parts = [self._raw(place, root, part, end, before, depth - 1) for part in schema[key]]
                return [each for part in parts for each in part]
        if len(schema.get("allOf") or ()) == 1:
            (part,) = schema["allOf"]
            others = {key: value for key, value in schema.items() if key != "allOf"}
            joined = {**others, **part} if isinstance(part, dict) else others
            return self._raw(place, root, joined, end, before, depth - 1)
        if "const" in schema or "enum" in schema:
            return [
                ("text", self.text(before + value + end))
                if isinstance(value, str)
                else ("json", f"{self.text(json.dumps(value))} {json_end}")
                for value in ([schema["const"]] if "const" in schema else schema["enum"])
            ]
        types = types_of_schema(root, schema)
        if not types:
            return [("text", self._free_text(before, end))]
        found: list[tuple[str, str]] = []
        if "string" in types:
            found.append(("text", self._string(place, schema, end, before)))
        if kinds := sorted(types - {"string"}):
            kept = {key: value for key, value in schema.items() if key not in _RAW_KEYS and key != "nullable"}
            narrowed = _within(root, {**kept, "type": kinds if len(kinds) > 1 else kinds[0]})
            found.append(("json", f"{self.json(narrowed)} {json_end}"))
        return found

    def _string(self, place: str, schema: dict[str, Any], end: str, before: str) -> str:
        """Return an expression for a string as raw text."""
        if (name := schema.get("format")) is not None and name not in _FORMATS:
            raise _refused(
                place, f"has the format {name!r:.80}, which is not supported in this model's way of calling tools"
            )
        parts = [f"/{_FORMATS[name]}/"] if name is not None else []
        if (pattern := schema.get("pattern")) is not None:
            start, stop = "" if pattern.startswith("^") else "(?s:.*)", "" if pattern.endswith("$") else "(?s:.*)"
            inner = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/").replace("\n", r"\n")
            parts.append(f"/{start}({inner}){stop}/")
        if "minLength" in schema or "maxLength" in schema:
            parts.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
        if not parts:
            return self._free_text(before, end)
        marker = re.escape(end.strip()).replace("/", r"\/")
        terminal = f"T{len(self.rules)}"
        self.rules.append(f"{terminal}: {' & '.join(parts)} & ~/(?s:.*){marker}(?s:.*)/")
        return self._until(terminal, before, end)

    def _free_text(self, before: str, end: str) -> str:
        """Return an expression for any text up to its end."""
        lead = end[: len(end) - len(end.lstrip())]
        return self._until("/(?s:.*)/", before, end[len(lead) :])

    def _until(self, terminal: str, before: str, end: str) -> str:
        """Return an expression for a terminal up to the end, whether that is a special token or a text."""
        marker = end.rstrip()
        if any(token in end for token in self.special_tokens):
            return f"{self.text(before)} {self.rule(terminal)} {self.text(end)}"
        text = self.rule(terminal, f"[suffix={_quoted(marker)}]")
        return f"{self.text(before)} {text} {self.text(end[len(marker) :])}"


def _refused(place: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place} {problem}", parameter=place)


def _within(root: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Return the schema of a part with the definitions of the whole."""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**(schema if isinstance(schema, dict) else {}), **definitions}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


_DAYS = r"(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"[0-9]{{4}}-({_DAYS})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9_+-]{1,32}(\.[A-Za-z0-9_+-]{1,32}){0,4}@[A-Za-z0-9]{1,32}(\.[A-Za-z0-9]{1,32}){1,4}",
    "ipv4": r"(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}",
    "uri": r"https?:\/\/[A-Za-z0-9]{1,32}(\.[A-Za-z0-9]{1,32}){0,4}(\/[A-Za-z0-9._~%?&=#+-]{0,128}){0,16}",
}
"""Formats of strings with expressions for texts that have them."""
