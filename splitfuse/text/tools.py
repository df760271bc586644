"""Checks tools, and the calls and results in a conversation, for every API alike.

The places in errors are the callers': `where` is how a request names the value, such as `tools[0].function`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from splitfuse.errors import InvalidRequestError, brief, brief_json, did_you_mean, nearest
from splitfuse.text.chat_formats.message import AUTO, Tool, ToolCall, ToolChoice

NAME = "^[a-zA-Z0-9_-]{1,128}$"
"""Pattern of the names of tools."""
MAX_TOOLS = 1024
"""Number of tools that a request may have."""


def placed_tool(tool: Tool, where: str, *, parameters: str = "parameters") -> Tool:
    """Return a tool with its place. Raises InvalidRequestError for a name or a schema that no tool can have.
    `parameters` is what the request calls the schema.
    """
    place = f"{where}.{parameters}"
    if not re.fullmatch(NAME, tool.name):
        _refuse(f"{where}.name", f"must match {NAME}, as get_weather does, not {tool.name!r:.200}")
    schema = tool.parameters or {}
    kind, properties = schema.get("type", "object"), schema.get("properties", {})
    if kind != "object":
        message = f'must be a schema of an object, with "type": "object", not {brief_json(kind)}'
        _refuse(place, message)
    if not isinstance(properties, Mapping):
        _refuse(place, f"must have properties that are an object, not {brief_json(properties)}")
    return replace(tool, place=place)


def check_choice(tools: Sequence[Tool], choice: ToolChoice = AUTO, *, name: str = "tool_choice") -> None:
    """Raise InvalidRequestError for tools of one name, or a choice of a tool that is not there."""
    names = Counter(tool.name for tool in tools)
    for each, count in names.items():
        if count > 1:
            _refuse("tools", f"has {count} tools named {each!r}: each needs a name of its own")
    if choice.mode == "required" and not tools:
        _refuse(name, "requires a call, and there are no tools: add tools")
    if choice.name is not None and choice.name not in names:
        _refuse(name, f"names {choice.name!r:.200}, which is none of the tools{nearest(choice.name, names)}")


def template_call(call: ToolCall) -> dict[str, Any]:
    """Return a call of an earlier turn as chat templates read it, with an object of arguments. What the model wrote in
    place of one goes back to it as it is, so that a conversation can go on from there.
    """
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.parsed}}


def name_results(messages: Sequence[dict[str, Any]], place: Callable[[int, int | None], str]) -> None:
    """Give the results of tools in a conversation, as chat templates read it, the names of their tools.

    `place` returns how a request names the id in a result, or in a call of a message by its number. Raises
    InvalidRequestError for a result that answers no call before it, and for calls of one id before their result.
    """
    names: dict[str, str] = {}
    unanswered: set[str] = set()
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            if (call_id := call.get("id", "")) in unanswered and call_id:
                problem = f"is {call_id!r:.80}, as that of a call before it: each call needs an id of its own"
                _refuse(place(index, number), problem)
            names[call_id] = call["function"]["name"]
            unanswered.add(call_id)
        if message.get("role") == "tool":
            if (call_id := message["tool_call_id"]) not in names:
                problem = f"is {call_id!r:.80}, which is the id of no call in an assistant's message before it"
                _refuse(place(index, None), problem + nearest(call_id[:80], names))
            unanswered.discard(call_id)
            message.setdefault("name", names[call_id])


def place_in_messages(index: int, number: int | None) -> str:
    """Return how OpenAI's chats name an id, for `name_results`."""
    return f"messages[{index}]." + ("tool_call_id" if number is None else f"tool_calls[{number}].id")


def template_messages(messages: Any) -> Any:
    """Return messages as chat templates read them: calls with objects of arguments, results with names of tools. What
    is no list of messages is left as it is, for the template's own checks.

    Raises InvalidRequestError, naming the place, for what is no call, and for a result of no call.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return messages
    read = [dict(message) for message in messages]
    for index, message in enumerate(read):
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                _parsed(each, f"messages[{index}].tool_calls[{i}]") for i, each in enumerate(calls)
            ]
    if all("tool_call_id" in message for message in read if message.get("role") == "tool"):
        name_results(read, place_in_messages)
    return read


def written_messages(messages: Any) -> Any:
    """Return messages as OpenAI's API takes them: calls with arguments as text. All else is left as it is."""
    if not isinstance(messages, Sequence):
        return messages
    return [
        {**message, "tool_calls": list(map(_written, message["tool_calls"]))}
        if isinstance(message, Mapping) and message.get("tool_calls")
        else message
        for message in messages
    ]


def _written(call: Any) -> Any:
    try:
        function = call["function"]
        if isinstance(function["arguments"], Mapping):
            return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}
    except (TypeError, KeyError):
        pass  # the server says what is wrong
    return call


def _parsed(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(
            where, f'must be a mapping with a function, such as {{"name": "now", "arguments": {{}}}}, not {brief(call)}'
        )
    if isinstance(arguments := function.get("arguments", ""), Mapping):
        return dict(call)
    if not isinstance(arguments, str):
        _refuse(f"{where}.function.arguments", f"must be a mapping or its JSON, not {brief(arguments)}")
    call_id = str(call.get("id", ""))
    return template_call(ToolCall(call_id, function["name"], arguments))


def tools_of(value: object) -> tuple[Tool, ...]:
    """Return the tools that a list of mappings describes, in OpenAI's form or without its `function` around them.

    Raises InvalidRequestError, naming the place, for anything else.

    >>> tools_of([{"name": "now", "description": "Tell the time"}])
    (Tool(name='now', description='Tell the time', parameters=None, strict=False),)
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        _refuse("tools", f"must be a list of tools, not {brief(value)}")
    tools = tuple(_tool(each, f"tools[{index}]") for index, each in enumerate(value))
    check_choice(tools)
    return tools


def chosen_tools(tools: Sequence[Tool], choice: ToolChoice, *, allowed: Sequence[str] = ()) -> tuple[Tool, ...]:
    """Return the tools that an answer may call: those of the `allowed` names, if there are any. Raises
    InvalidRequestError as `check_choice`.
    """
    for name in allowed:
        check_choice(tools, ToolChoice("auto", name))
    chosen = tuple(tool for tool in tools if not allowed or tool.name in allowed)
    check_choice(chosen, choice)
    return () if choice.mode == "none" else chosen


def choice_of(value: object) -> ToolChoice:
    """Return the choice that none, auto, required or the name of a tool means. Raises InvalidRequestError for others.

    >>> choice_of("get_weather")
    ToolChoice(mode='required', name='get_weather')
    """
    if isinstance(value, ToolChoice):
        return value
    if not isinstance(value, str):
        _refuse("tool_choice", f"must be none, auto, required or the name of a tool, not {brief(value)}")
    if value in ("none", "auto", "required"):
        return ToolChoice(value)  # type: ignore[arg-type]
    return ToolChoice("required", value)


def _tool(value: object, where: str) -> Tool:
    if isinstance(value, Tool):
        tool = value
    else:
        if isinstance(value, Mapping) and "function" in value:
            where, value = f"{where}.function", value["function"]
        if not isinstance(value, Mapping):
            _refuse(where, f"must be a mapping with a name, not {brief(value)}")
        kinds: dict[str, Any] = {"name": str, "description": str, "parameters": Mapping, "strict": bool}
        given = {name: each for name, each in value.items() if each is not None and name != "type"}
        for name, each in given.items():
            if name not in kinds:
                _refuse(f"{where}.{name}", f"is unknown{did_you_mean(str(name), kinds)}")
            if not isinstance(each, kinds[name]):
                _refuse(f"{where}.{name}", f"must be a {kinds[name].__name__}, not {brief(each)}")
        if "name" not in given:
            _refuse(f"{where}.name", "is missing")
        tool = Tool(**given)
    return placed_tool(tool, where)


def _refuse(place: str, problem: str) -> NoReturn:
    raise InvalidRequestError(f"{place} {problem}", parameter=place)
