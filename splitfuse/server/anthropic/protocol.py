"""Defines the requests of Anthropic's Messages API as strict types: each field is honoured or refused by name.

What a conversation becomes for a chat template is decided in conversation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from splitfuse.core.sampling_params import MAX_INT, MAX_STOP_STRINGS, SamplingParams
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError, any_of, nearest
from splitfuse.server.anthropic.conversation import (
    EPHEMERAL,
    ContextManagement,
    MessagesTool,
    MessageTurn,
    SystemBlock,
    TurnReader,
)
from splitfuse.server.auth import Owner
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import FORM, GenerationRequest, errors_named, form_names
from splitfuse.server.sampling import MAX_STOP_CHARACTERS
from splitfuse.server.slo_params import Deadline, OnTimeOnly, PriorityName, SloParams, TargetSeconds
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral
from splitfuse.text.chat_formats.message import Tool, ToolChoice
from splitfuse.text.chat_options import ChatOptions
from splitfuse.text.tools import MAX_TOOLS, check_choice, chosen_tools
from splitfuse.text.variables import SWITCHES

EFFORTS = ("low", "medium", "high", "xhigh", "max")
"""Values of output_config.effort. Claude Code always sends one: it is a wish, which templates that know it read."""
DISPLAYS = ("summarized", "updates", "omitted")
"""Values of thinking.display. There is no summary: thoughts are shown whole, as they come, or not at all."""
MIN_BUDGET = 1024
"""Number of tokens that the budget of a thought has at least, as Anthropic's."""
NAMES = {"reasoning_effort 'none'": "thinking.type 'disabled'", "reasoning_max_tokens": "thinking.budget_tokens"}
"""Names in this API of what is called otherwise elsewhere, for errors: see `errors_named`."""
_FORM = "json_schema"


class MessagesToolChoice(Body, kw_only=True, frozen=True):
    """Says whether the answer calls tools: auto, as the model likes; any; the tool of a name; or none."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["auto", "any", "tool", "none"]})]
    name: Annotated[str, Meta(description="Of the type tool")] | None = None
    disable_parallel_tool_use: Annotated[bool, Meta(description="Allows at most one call")] | None = None

    def choice(self) -> ToolChoice:
        """Return the choice. Raises InvalidRequestError or RefusedError for a contradiction."""
        modes: dict[str, Literal["none", "auto", "required"]]
        modes = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
        if self.type not in modes:
            message = f"tool_choice.type must be auto, any, tool or none, not {self.type!r:.80}"
            raise InvalidRequestError(message, parameter="tool_choice.type")
        if self.type == "tool" and self.name is None:
            raise RefusedError(
                400, "tool_choice.name is missing", code="missing_parameter", parameter="tool_choice.name"
            )
        if self.type != "tool" and self.name is not None:
            message = f"tool_choice.name needs the type tool, not {self.type}"
            raise InvalidRequestError(message, parameter="tool_choice.name")
        return ToolChoice(modes[self.type], self.name)


@accepts_neutral(block_binding=[{}])
class MessagesThinking(Body, kw_only=True, frozen=True):
    """Says whether the model thinks before it answers: enabled, with a budget; adaptive, as it likes; or disabled."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["enabled", "adaptive", "disabled"]})]
    budget_tokens: Annotated[int, Meta(ge=MIN_BUDGET, le=MAX_INT, description="Tokens of a thought, if enabled")] | (
        None
    ) = None
    display: (
        Annotated[
            str,
            Meta(description="omitted: answers show no thoughts", extra_json_schema={"enum": list(DISPLAYS)}),
        ]
        | None
    ) = None

    def check(self, max_tokens: int | None) -> None:
        """Raise InvalidRequestError or RefusedError, naming the place, for a contradiction."""
        if self.type not in ("enabled", "adaptive", "disabled"):
            message = f"thinking.type must be enabled, adaptive or disabled, not {self.type!r:.80}"
            raise InvalidRequestError(message, parameter="thinking.type")
        if self.display not in (None, *DISPLAYS):
            message = f"thinking.display must be summarized, updates or omitted, not {self.display!r:.80}"
            raise InvalidRequestError(message, parameter="thinking.display")
        place = "thinking.budget_tokens"
        if self.type == "enabled" and self.budget_tokens is None:
            raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        if self.type != "enabled" and self.budget_tokens is not None:
            raise InvalidRequestError(f"{place} needs the type enabled, not {self.type}", parameter=place)
        if max_tokens is not None and (self.budget_tokens or 0) >= max(max_tokens, 1):
            message = f"{place} must be below max_tokens ({max_tokens}), not {self.budget_tokens}"
            raise InvalidRequestError(message, parameter=place)


class OutputFormat(Body, kw_only=True, frozen=True):
    """Says that the answer is JSON of a schema."""

    type: Annotated[str, Meta(extra_json_schema={"enum": [_FORM]})]
    schema_: dict[str, Any] = field(name="schema")

    def form(self, where: str) -> StructuredOutputs:
        """Return the form of the answer. Raises InvalidRequestError, naming the place."""
        if self.type != _FORM:
            message = f"{where}.type must be {_FORM}, not {self.type!r:.80}"
            raise InvalidRequestError(message, parameter=f"{where}.type")
        with errors_named({FORM: f"{where}.schema"}):
            return StructuredOutputs.of({"json": self.schema_})


class OutputConfig(Body, kw_only=True, frozen=True):
    """Says how much effort goes into an answer, and which form it has."""

    effort: Annotated[str, Meta(extra_json_schema={"enum": list(EFFORTS)})] | None = None
    format: OutputFormat | None = None


class MessagesMetadata(Body, kw_only=True, frozen=True):
    """Names a user, which changes nothing."""

    user_id: Annotated[str, Meta(max_length=1024)] | None = None


@accepts_neutral(
    cache_control=EPHEMERAL,
    container=[],
    diagnostics=[{}, {"previous_message_id": None}],
    inference_geo=[],
    mcp_servers=[[]],
    speed=["standard"],
    user_profile_id=[],
    workspace_id=[],
)
class CountTokensRequest(Body, kw_only=True, frozen=True):
    """Asks for the number of tokens of a conversation: POST /v1/messages/count_tokens."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "cache_control": "prompts stay in the prefix cache as long as there is room",
        "mcp_servers": "this server runs no tools itself",
        "speed": "there is one speed, which splitfuse_priority can change",
    }

    model: Annotated[str, Meta(max_length=512)]
    messages: Annotated[list[MessageTurn], Meta(min_length=1, max_length=4096)]
    system: str | Annotated[list[SystemBlock], Meta(max_length=1024)] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: MessagesThinking | None = None
    output_config: OutputConfig | None = None
    output_format: Annotated[OutputFormat, Meta(description="Older name of output_config.format")] | None = None
    context_management: ContextManagement | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: the model must be named."""
        model = super().refine_schema(schema, bounds)["properties"]["model"]
        if "enum" in model:
            model["enum"] = [name for name in model["enum"] if name is not None]
        return schema

    def conversation(self, max_tokens: int | None = None) -> tuple[list[dict[str, Any]], ChatOptions]:
        """Return the messages for a chat template, and how it renders them. Raises InvalidRequestError or RefusedError,
        naming the place.
        """
        if self.context_management is not None:
            self.context_management.check()
        reader = TurnReader(self.system, self.messages)
        choice = ToolChoice() if self.tool_choice is None else self.tool_choice.choice()
        options = ChatOptions(
            add_generation_prompt=not reader.continues,
            continue_final_message=reader.continues,
            tools=self._shown_tools(choice, reader.found_tools),
            tool_choice=choice,
            parallel_tool_calls=self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use,
            reads_parts=True,
            **self._thinking(max_tokens),
        )
        return reader.messages, options

    def _shown_tools(self, choice: ToolChoice, found: Mapping[str, str]) -> tuple[Tool, ...]:
        given = [(each, each.tool(f"tools[{index}]")) for index, each in enumerate(self.tools or ())]
        shown = tuple(tool for each, tool in given if not each.defer_loading or tool.name in found)
        check_choice([tool for _, tool in given], choice)
        names = {tool.name for _, tool in given}
        for name, place in found.items():
            if name not in names:
                message = f"{place} is {name!r:.200}, which is none of the tools{nearest(name, names)}"
                raise InvalidRequestError(message, parameter=place)
        hidden = names - {tool.name for tool in shown}
        if choice.mode == "required" and (choice.name in hidden or (hidden and not shown)):
            name = choice.name or min(hidden)
            message = f"tool_choice: the tool {name!r} has defer_loading, and no tool_reference to it comes before"
            raise InvalidRequestError(message, parameter="tool_choice")
        return chosen_tools(shown, choice)

    def _thinking(self, max_tokens: int | None) -> dict[str, Any]:
        """Return the fields of ChatOptions which say how long the model thinks. Raises as `conversation`."""
        effort = None if self.output_config is None else self.output_config.effort
        if effort not in (None, *EFFORTS):
            message = f"output_config.effort must be {any_of(EFFORTS)}, not {effort!r:.80}"
            raise InvalidRequestError(message, parameter="output_config.effort")
        if self.thinking is not None:
            self.thinking.check_neutral("thinking.")
            self.thinking.check(max_tokens)
            if self.thinking.type == "disabled":
                return {"reasoning_effort": "none"}
        wishes: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None:
            wishes |= dict.fromkeys(SWITCHES, True)
        return {"wishes": wishes, "max_reasoning_tokens": budget}

    def form(self) -> tuple[str, StructuredOutputs] | None:
        """Return the form of the answer, with the name by which the request gives it. Raises InvalidRequestError."""
        given = {
            "output_config.format": None if self.output_config is None else self.output_config.format,
            "output_format": self.output_format,
        }
        forms = [(f"{name}.schema", each.form(name)) for name, each in given.items() if each is not None]
        if len(forms) > 1:
            message = "output_config.format and output_format are two names of one thing: give one"
            raise InvalidRequestError(message, parameter="output_format")
        return forms[0] if forms else None


_STOP = Annotated[str, Meta(min_length=1, max_length=1024)]


class MessagesRequest(CountTokensRequest, kw_only=True, frozen=True):
    """Asks to answer a conversation: POST /v1/messages."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **CountTokensRequest.REFUSED,
        **dict.fromkeys(("max_completion_tokens", "max_output_tokens"), "it is max_tokens of this route"),
        "n": "a message is one answer",
        "reasoning_effort": "it is output_config.effort of this route",
        "response_format": "it is output_config.format of this route",
        "seed": "it is one of /v1/chat/completions",
        "stop": "it is stop_sequences of this route",
    }

    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT, description="At most what the model has room for; 0: none")]
    stop_sequences: Annotated[list[_STOP], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0, description="Left out: 1")] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_INT, description="0: all tokens")] | None = None
    metadata: MessagesMetadata | None = None
    service_tier: Annotated[Literal["auto", "standard_only"], Meta(description="Changes nothing")] | None = None
    splitfuse_deadline: Deadline | None = None
    splitfuse_slo: TargetSeconds | None = None
    splitfuse_on_time_only: OnTimeOnly | None = None
    splitfuse_priority: PriorityName | None = None
    splitfuse_timing: Annotated[bool, Meta(description="Adds times and steps to the answer")] | None = None

    @property
    def shows_thoughts(self) -> bool:
        """Return whether the answer shows the thoughts of the model."""
        return self.thinking is None or self.thinking.display != "omitted"

    def to_generation(self, owner: Owner, *, arrival_time: float, slo_enabled: bool) -> GenerationRequest:
        """Return the request to generate. Raises InvalidRequestError and RefusedError for what cannot be honoured."""
        messages, chat = self.conversation(self.max_tokens)
        slo = SloParams(**{name: getattr(self, name) for name in SloParams.__struct_fields__})
        name, form = self.form() or ("", None)
        stop = tuple(self.stop_sequences or ())
        if (length := sum(map(len, stop))) > MAX_STOP_CHARACTERS:
            message = f"stop_sequences has {length} characters in all; at most {MAX_STOP_CHARACTERS} are accepted"
            raise InvalidRequestError(message, parameter="stop_sequences")
        return GenerationRequest(
            messages=messages,
            chat=chat,
            params=SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=self.top_p or 1.0,
                top_k=self.top_k or 0,
                stop=stop,
                structured_outputs=form,
            ),
            default_max_tokens=max(self.max_tokens, 1),
            include_output=self.max_tokens > 0,
            names={**NAMES, **form_names(name)},
            scheduling=slo.scheduling(owner, arrival_time=arrival_time, slo_enabled=slo_enabled),
            deadline=self.splitfuse_deadline,
            stream=bool(self.stream),
            include_timing=bool(self.splitfuse_timing),
        )
