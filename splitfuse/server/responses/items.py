"""Defines the items of which conversations consist in OpenAI's Responses API, and reads them as messages.

Clients send items, answers consist of some, and the store keeps both: each may come back in a later request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta

from splitfuse.errors import InvalidRequestError, any_of
from splitfuse.server.errors import RefusedError
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral
from splitfuse.text.chat_formats.message import ToolCall
from splitfuse.text.tools import name_results, template_call

MAX_ITEMS = 4096
"""Number of items that a request may have, with those of the responses that it goes on from."""
_OWN_ID = re.compile(r"[a-z]+_([0-9a-f]{32})")
_ID = Annotated[str, Meta(max_length=512)]

Status = Literal["in_progress", "completed", "incomplete"]


class _Kind(NamedTuple):
    """Says which fields an item of a type must have, and which it may."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


_KINDS = {
    "message": _Kind(("role", "content"), ("phase",)),
    "function_call": _Kind(("call_id", "name", "arguments")),
    "function_call_output": _Kind(("call_id", "output"), ("name",)),
    "reasoning": _Kind((), ("summary", "content", "encrypted_content")),
    "item_reference": _Kind(("id",)),
}
_COMMON = ("type", "id", "status")
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {
    "input_text": ("user", "system", "developer", "tool", "assistant"),
    "output_text": ("assistant",),
    "refusal": ("assistant",),
    "reasoning_text": ("reasoning",),
    "summary_text": ("reasoning",),
}
"""Types of parts, with the roles of messages, or the other items, in which they may stand."""


@accepts_neutral(annotations=[[]], prompt_cache_breakpoint=[])
class ItemPart(Body, kw_only=True, frozen=True):
    """Holds a text that is a part of an item. `logprobs` come with answers, and change nothing."""

    TYPES: ClassVar[tuple[str, ...]] = tuple(_PARTS)

    type: str
    text: str | None = None
    refusal: str | None = None
    logprobs: Annotated[list[Any], Meta(description="Changes nothing")] | None = None

    def plain(self, where: str, role: str) -> str:
        """Return the text. Raises InvalidRequestError or RefusedError, naming the place, for what is none."""
        self.check_type(self.type, where)
        self.check_neutral(where + ".")
        if role not in _PARTS[self.type]:
            known = " or ".join(kind for kind, roles in _PARTS.items() if role in roles)
            message = f"{where}.type must be {known} for {role}, not {self.type}"
            raise InvalidRequestError(message, parameter=f"{where}.type")
        text, other = (self.refusal, self.text) if self.type == "refusal" else (self.text, self.refusal)
        if text is None or other is not None:
            message = f"{where} must have a {'refusal' if self.type == 'refusal' else 'text'}, as its type says"
            raise InvalidRequestError(message, parameter=where)
        return text


_Parts = Annotated[list[ItemPart], Meta(max_length=1024)]


ASYNC: Mapping[str, Sequence[Any]] = {"async": [False], "async_": [False]}
"""Field of calls and tools by its name and by the one of OpenAI's client, with the value that requests nothing."""


@accepts_neutral(caller=[{"type": "direct"}], created_by=[], namespace=[], **ASYNC)
class Item(Body, kw_only=True, frozen=True):
    """Holds a message, a call of a function or its output, a thought, or a reference to an item of a stored answer.

    `status` and `phase` come with answers, and change nothing.
    """

    TYPES: ClassVar[tuple[str, ...]] = tuple(_KINDS)

    type: str | None = None
    id: _ID | None = None
    status: Status | None = None
    role: Annotated[str, Meta(extra_json_schema={"enum": list(_ROLES)})] | None = None
    content: str | _Parts | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    call_id: _ID | None = None
    name: _ID | None = None
    arguments: Annotated[str, Meta(description="An object in JSON")] | None = None
    output: str | _Parts | None = None
    summary: _Parts | None = None
    encrypted_content: Annotated[str, Meta(description="Changes nothing")] | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: a variant for each type."""
        properties = super().refine_schema(schema, bounds)["properties"]
        variants = []
        for kind, (needs, may) in _KINDS.items():
            known = [name for name in properties if name in (*_COMMON, *needs, *may, *cls.NEUTRAL)]
            own: dict[str, Any] = {name: properties[name] for name in known}
            own["type"] = {"enum": [kind, None] if kind == "message" else [kind]}
            for name in needs:
                own[name] = {"anyOf": [option for option in own[name]["anyOf"] if option != {"type": "null"}]}
            required = [*needs, *(["type"] if kind != "message" else [])]
            variants.append({"type": "object", "properties": own, "required": required, "additionalProperties": False})
        return {"title": schema["title"], "description": schema["description"], "oneOf": variants}

    @property
    def kind(self) -> str:
        """Return its type."""
        return self.type or "message"

    def check(self, where: str) -> None:
        """Raise InvalidRequestError or RefusedError, naming the place, unless it has the fields of its type."""
        self.check_type(self.kind, where)
        self.check_neutral(where + ".")
        needs, may = _KINDS[self.kind]
        for name in self.supported():
            given, place = getattr(self, name) is not None, f"{where}.{name}"
            if given and name not in (*_COMMON, *needs, *may):
                message = f"{place} is nothing that an item of the type {self.kind} has: leave it out"
                raise InvalidRequestError(message, parameter=place)
            if name in needs and not given:
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        if self.role is not None and self.role not in _ROLES:
            message = f"{where}.role must be {any_of(_ROLES)}, not {self.role!r:.80}"
            raise InvalidRequestError(message, parameter=f"{where}.role")

    def text(self, where: str) -> str | list[dict[str, str]]:
        """Return the text of a message, or of an output, for a chat template: parts where there are several."""
        name, role = ("output", "tool") if self.kind == "function_call_output" else ("content", self.role or "")
        texts = _texts(getattr(self, name), f"{where}.{name}", role)
        return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]

    def thought(self, where: str) -> str:
        """Return the text of a thought: its content or, where that is left out, its summary."""
        name = "content" if self.content else "summary"
        return "\n".join(_texts(getattr(self, name) or [], f"{where}.{name}", "reasoning"))


def _texts(value: str | Sequence[ItemPart], where: str, role: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not value and role != "reasoning":
        raise InvalidRequestError(f"{where} must not be empty", parameter=where)
    return [part.plain(f"{where}[{index}]", role) for index, part in enumerate(value)]


def answer_id_of(item_id: str) -> str | None:
    """Return the id of the answer of which an item of that id is a part; None for an id that is none of ours."""
    found = _OWN_ID.match(item_id)
    return f"resp_{found[1]}" if found else None


def with_ids(items: Iterable[Item], unique_id: str) -> list[Item]:
    """Return the items of a request with an id each, by which clients may ask for them."""
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
    return [
        msgspec.structs.replace(
            item, type=item.kind, id=item.id or f"{prefixes.get(item.kind, 'item')}_{unique_id}i{number}"
        )
        for number, item in enumerate(items)
    ]


def messages_of(items: Sequence[Item], *, num_before: int) -> list[dict[str, Any]]:
    """Return the conversation that the items are, for a chat template. Errors name those of a request, which follow
    `num_before` others. Raises InvalidRequestError or RefusedError for what is no conversation.

    What an assistant thought, said and called between two turns of others is one message.
    """
    messages: list[dict[str, Any]] = []
    places: dict[int, str] = {}  # of ids, by the identity of calls and messages of outputs
    for number, item in enumerate(items):
        where = f"input[{number - num_before}]" if number >= num_before else "previous_response_id"
        item.check(where)
        _add(messages, item, where)
        if item.kind in ("function_call", "function_call_output"):
            message = messages[-1]
            places[id(message["tool_calls"][-1] if item.kind == "function_call" else message)] = f"{where}.call_id"

    def place(index: int, number: int | None) -> str:
        return places[id(messages[index] if number is None else messages[index]["tool_calls"][number])]

    name_results(messages, place)
    return messages


def _add(messages: list[dict[str, Any]], item: Item, where: str) -> None:
    match item.kind:
        case "message" if item.role != "assistant":
            role = "system" if item.role == "developer" else item.role  # a newer name, unknown to templates
            messages.append({"role": role, "content": item.text(where)})
        case "message":
            message = _assistant(messages, but_with="content")
            message["content"] = item.text(where)
        case "reasoning":
            if thought := item.thought(where):
                _assistant(messages, but_with="reasoning_content")["reasoning_content"] = thought
        case "function_call":
            assert item.call_id is not None and item.name is not None
            call = ToolCall(item.call_id, item.name, item.arguments or "")
            _assistant(messages).setdefault("tool_calls", []).append(template_call(call))
        case "function_call_output":
            named = {} if item.name is None else {"name": item.name}
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text(where), **named})
        case _:
            raise AssertionError(f"{where} is a reference, which the store was not asked for")


def _assistant(messages: list[dict[str, Any]], *, but_with: str = "") -> dict[str, Any]:
    """Return the assistant's message at the end, or a new one if there is none, or it has said that, or called."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or (but_with and (last.get(but_with) or last.get("tool_calls"))):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last
