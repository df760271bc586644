"""Declares how OpenAI's chat requests tell of tools: their definitions, the choice among them, calls in a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from splitfuse.errors import InvalidRequestError
from splitfuse.server.errors import RefusedError
from splitfuse.server.validation import Body, accepts_neutral
from splitfuse.text.chat_formats.message import AUTO, Tool, ToolCall, ToolChoice
from splitfuse.text.tools import MAX_TOOLS, NAME, chosen_tools, placed_tool, template_call

FunctionNameField = Annotated[str, Meta(extra_json_schema={"pattern": NAME})]
"""Type of the name of a function."""
_FUNCTION = Annotated[str, Meta(extra_json_schema={"enum": ["function"]})]
EPHEMERAL = [{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}]
"""Values of cache_control that change nothing."""
CACHED = "prompts stay in the prefix cache as long as there is room"
"""Reason why a request cannot say how long its prompt is kept."""
CUSTOM: Mapping[str, str] = {"custom": "only functions are called, whose arguments are JSON: use the type function"}
"""Reason why other tools than functions are refused."""


class FunctionDefinition(Body, kw_only=True, frozen=True):
    """Describes a function that the model may call. `parameters` is a JSON schema of an object."""

    name: FunctionNameField
    description: str | None = None
    parameters: Annotated[dict[str, Any], Meta(extra_json_schema={"properties": {"type": {"const": "object"}}})] | (
        None
    ) = None
    strict: Annotated[bool, Meta(description="Makes the arguments valid by the schema")] | None = None

    def tool_at(self, where: str) -> Tool:
        """Return the tool. Raises InvalidRequestError, naming the place."""
        tool = Tool(name=self.name, description=self.description, parameters=self.parameters, strict=bool(self.strict))
        return placed_tool(tool, where)


@accepts_neutral(cache_control=EPHEMERAL)
class FunctionTool(Body, kw_only=True, frozen=True):
    """Holds a tool, which is a function."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **CUSTOM,
        "cache_control": CACHED,
    }

    type: _FUNCTION
    function: FunctionDefinition

    def tool(self, where: str) -> Tool:
        """Return the tool. Raises InvalidRequestError or RefusedError, naming the place."""
        _check_type(self.type, where)
        self.check_neutral(where + ".")
        return self.function.tool_at(f"{where}.function")


Tools = Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)]
"""Type of the tools of a request."""


class FunctionName(Body, kw_only=True, frozen=True):
    """Names a function."""

    name: FunctionNameField


class FunctionChoice(Body, kw_only=True, frozen=True):
    """Names a tool."""

    REFUSED: ClassVar[Mapping[str, str]] = CUSTOM

    type: _FUNCTION
    function: FunctionName


class AllowedTools(Body, kw_only=True, frozen=True):
    """Says which of the tools the model may call, and whether it must."""

    mode: Annotated[str, Meta(extra_json_schema={"enum": ["auto", "required"]})]
    tools: Annotated[list[FunctionChoice], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoiceBody(Body, kw_only=True, frozen=True):
    """Says which tool the model must call, by `function`, or which it may, by `allowed_tools`."""

    REFUSED: ClassVar[Mapping[str, str]] = CUSTOM

    type: Annotated[str, Meta(extra_json_schema={"enum": ["function", "allowed_tools"]})]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


ToolChoiceField = Annotated[str, Meta(extra_json_schema={"enum": ["none", "auto", "required"]})] | ToolChoiceBody
"""Type of the choice among the tools of a request."""


def tool_options(tools: Sequence[FunctionTool] | None, choice: str | ToolChoiceBody | None) -> dict[str, Any]:
    """Return the fields of ChatOptions which tell of tools. Raises InvalidRequestError, naming the place."""
    given = tuple(each.tool(f"tools[{index}]") for index, each in enumerate(tools or ()))
    chosen, allowed = _choice(choice), list[str]()
    if isinstance(choice, ToolChoiceBody) and choice.allowed_tools is not None:
        allowed = [_named(each, index) for index, each in enumerate(choice.allowed_tools.tools)]
    return {"tools": chosen_tools(given, chosen, allowed=allowed), "tool_choice": chosen}


def _choice(choice: str | ToolChoiceBody | None) -> ToolChoice:
    if choice is None:
        return AUTO
    if isinstance(choice, str):
        if choice in ("none", "auto", "required"):
            return ToolChoice(choice)  # type: ignore[arg-type]
        message = f"tool_choice must be none, auto, required or an object, not {choice!r:.80}"
        raise InvalidRequestError(message, parameter="tool_choice")
    fields = {"function": choice.function, "allowed_tools": choice.allowed_tools}
    if choice.type not in fields:
        message = f"tool_choice.type must be function or allowed_tools, not {choice.type!r:.80}"
        raise InvalidRequestError(message, parameter="tool_choice.type")
    for name, value in fields.items():
        place = f"tool_choice.{name}"
        if value is None and name == choice.type:
            raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        if value is not None and name != choice.type:
            raise InvalidRequestError(f"{place} needs the type {name}, not {choice.type}", parameter=place)
    if choice.function is not None:
        return ToolChoice("required", choice.function.name)
    assert choice.allowed_tools is not None
    if (mode := choice.allowed_tools.mode) not in ("auto", "required"):
        message = f"tool_choice.allowed_tools.mode must be auto or required, not {mode!r:.80}"
        raise InvalidRequestError(message, parameter="tool_choice.allowed_tools.mode")
    return ToolChoice(mode)  # type: ignore[arg-type]


def _named(choice: FunctionChoice, index: int) -> str:
    _check_type(choice.type, f"tool_choice.allowed_tools.tools[{index}]")
    return choice.function.name


def _check_type(kind: str, where: str) -> None:
    if kind != "function":
        message = f"{where}.type must be function, not {kind!r:.80}"
        raise InvalidRequestError(message, parameter=f"{where}.type")


class CalledFunction(Body, kw_only=True, frozen=True):
    """Holds the function of a call, with its arguments as text in JSON."""

    name: FunctionNameField
    arguments: Annotated[str, Meta(description="An object in JSON")]


class MessageToolCall(Body, kw_only=True, frozen=True):
    """Holds a call in an assistant's message. `index` is what streams number calls by."""

    REFUSED: ClassVar[Mapping[str, str]] = CUSTOM

    id: Annotated[str, Meta(max_length=512)]
    type: _FUNCTION = "function"
    function: CalledFunction
    index: Annotated[int, Meta(description="Changes nothing")] | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """Return the call for a chat template. Raises InvalidRequestError, naming the place."""
        _check_type(self.type, where)
        call = ToolCall(self.id, self.function.name, self.function.arguments)
        return template_call(call)
