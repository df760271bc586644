"""Defines what an answer to a conversation consists of, in no API's words: content, a thought, calls of tools.

An answer comes as events; `AssistantMessage.of` joins them. Plain data, which every dialect and client may import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec

INVALID_JSON = "INVALID_JSON"
"""Name under which the text of arguments that are no object in JSON is one, as Anthropic's API advises."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Describes a function that a model may call. `parameters` is a JSON schema of an object, or None for no arguments.

    >>> Tool(name="weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    """Flag of a tool whose arguments must be valid by the schema, also where the model is free to call it or not."""
    place: str = field(default="parameters", repr=False, compare=False)
    """Name of the schema in the request, for errors."""

    def as_dict(self) -> dict[str, Any]:
        """Return the tool as chat templates read it."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True)
class ToolChoice:
    """Says whether an answer calls tools: none; as the model likes (auto); at least one (required), of that `name`."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


AUTO = ToolChoice()


@dataclass(frozen=True)
class ReasoningDelta:
    """Adds to the thought."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """Adds to the content."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Begins call number `index` of an answer, counted from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """Adds to the arguments of a call, which are JSON when the call has ended."""

    index: int
    text: str


MessageEvent: TypeAlias = ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta


@dataclass(frozen=True)
class ToolCall:
    """Holds a call. `arguments` is JSON, unless the answer was cut off there, or the model wrote none."""

    call_id: str
    name: str
    arguments: str

    @property
    def is_complete(self) -> bool:
        """Return whether the arguments are an object in JSON."""
        return _object_in(self.arguments) is not None

    @property
    def parsed(self) -> dict[str, Any]:
        """Return the arguments as an object, which has the text of those that are none in JSON.

        >>> ToolCall("call_1", "weather", '{"city": "Par').parsed
        {'INVALID_JSON': '{"city": "Par'}
        """
        parsed = _object_in(self.arguments or "{}")
        return {INVALID_JSON: self.arguments} if parsed is None else parsed


@dataclass(frozen=True)
class AssistantMessage:
    """Holds an answer.

    >>> AssistantMessage.of([ContentDelta("He"), ContentDelta("llo")])
    AssistantMessage(content='Hello', reasoning='', tool_calls=())
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, events: Iterable[MessageEvent]) -> AssistantMessage:
        """Return the message that consists of these events."""
        content, reasoning = [], []
        calls: list[tuple[ToolCallStart, list[str]]] = []
        for event in events:
            match event:
                case ContentDelta():
                    content.append(event.text)
                case ReasoningDelta():
                    reasoning.append(event.text)
                case ToolCallStart():
                    calls.append((event, []))
                case ArgumentsDelta():
                    calls[event.index][1].append(event.text)
        whole = tuple(ToolCall(start.call_id, start.name, "".join(pieces)) for start, pieces in calls)
        return cls("".join(content), "".join(reasoning), whole)

    @property
    def has_complete_calls(self) -> bool:
        """Return whether there are calls, and the last one has arguments that can be read."""
        return bool(self.tool_calls) and self.tool_calls[-1].is_complete


def _object_in(text: str) -> dict[str, Any] | None:
    """Return the object that a text is in JSON; None if it is none."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
