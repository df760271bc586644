"""Defines the requests of OpenAI's Responses API as strict types: each parameter is honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from splitfuse.core.sampling_params import MAX_INT
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError
from splitfuse.server.auth import Owner
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import FORM, GenerationRequest, errors_named, form_names
from splitfuse.server.openai.protocol import EffortField, VerbosityField
from splitfuse.server.openai.structured import StructuredOutputsBody
from splitfuse.server.openai.tools import CACHED, FunctionDefinition, FunctionNameField
from splitfuse.server.responses.items import ASYNC, MAX_ITEMS, Item, messages_of
from splitfuse.server.sampling import SamplingFields, refine_sampling, sampling_params
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral
from splitfuse.text.chat_formats.message import AUTO, Tool, ToolChoice
from splitfuse.text.chat_options import ChatOptions
from splitfuse.text.tools import MAX_TOOLS, chosen_tools

PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
MAX_TOP_LOGPROBS = 20
"""Number of alternatives to each token, as OpenAI's: a stream writes all of them four times."""
Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""Values of include. Thoughts are not encrypted: they come in plain, and go on from there."""

_LABEL = Annotated[str, Meta(max_length=1024, description="Changes nothing")]


class TextFormat(Body, kw_only=True, frozen=True):
    """Says that an answer is text, any JSON object, or JSON of a schema, to which it keeps, strict or not."""

    TYPES: ClassVar[tuple[str, ...]] = ("text", "json_object", "json_schema")

    type: str
    name: Annotated[str, Meta(max_length=512)] | None = None
    schema_: dict[str, Any] | None = field(default=None, name="schema")
    description: Annotated[str, Meta(max_length=65536, description="Changes nothing")] | None = None
    strict: Annotated[bool, Meta(description="Changes nothing: every schema is kept to")] | None = None

    def form(self) -> StructuredOutputs | None:
        """Return the form of the answer; None for text. Raises InvalidRequestError or RefusedError."""
        self.check_type(self.type, "text.format")
        for name, given in (("name", self.name), ("schema", self.schema_)):
            place = f"text.format.{name}"
            if self.type == "json_schema" and given is None:
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
            if self.type != "json_schema" and given is not None:
                raise InvalidRequestError(f"{place} needs the type json_schema, not {self.type}", parameter=place)
        if self.type == "text":
            return None
        with errors_named({FORM: FORM_NAMES[self.type]}):
            return StructuredOutputs.of({"json_object": True} if self.schema_ is None else {"json": self.schema_})


NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
"""Names of parameters of this route by those of chats, for errors."""
FORM_NAMES = {"text": "", "json_object": "text.format", "json_schema": "text.format.schema"}
"""Names of the form of an answer in errors, by the type of its format."""


class TextBody(Body, kw_only=True, frozen=True):
    """Says which form the text of the answer has, and how long it should be."""

    format: TextFormat | None = None
    verbosity: VerbosityField | None = None


@accepts_neutral(
    context=["auto"],
    generate_summary=["auto"],
    mode=["standard"],
    summary=["auto"],  # there is no summary of a thought but the thought
)
class ReasoningBody(Body, kw_only=True, frozen=True):
    """Says how the model reasons. Its thoughts come as content of the reasoning items, not as a summary."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "summary": "thoughts are not summarized; they come as they are, in the content of reasoning items",
        "generate_summary": "thoughts are not summarized; they come as they are, in the content of reasoning items",
    }

    effort: EffortField | None = None


@accepts_neutral(
    allowed_callers=[["direct"]],
    defer_loading=[False],
    output_schema=[],
    **ASYNC,
)
class ResponseTool(FunctionDefinition, kw_only=True, frozen=True):
    """Describes a function that the model may call. `parameters` is a JSON schema of an object."""

    TYPES: ClassVar[tuple[str, ...]] = ("function",)

    type: str

    def tool(self, where: str) -> Tool:
        """Return the tool. Raises InvalidRequestError or RefusedError, naming the place."""
        self.check_type(self.type, where)
        self.check_neutral(where + ".")
        return self.tool_at(where)


class NamedTool(Body, kw_only=True, frozen=True):
    """Names a function."""

    TYPES: ClassVar[tuple[str, ...]] = ("function",)

    type: str
    name: FunctionNameField


class ResponseToolChoice(Body, kw_only=True, frozen=True):
    """Names the function that the model must call, or those among which it may choose (allowed_tools)."""

    TYPES: ClassVar[tuple[str, ...]] = ("function", "allowed_tools")

    type: str
    name: FunctionNameField | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None

    def check(self) -> None:
        """Raise InvalidRequestError or RefusedError unless it has the fields of its type, and no others."""
        self.check_type(self.type, "tool_choice")
        needs = ("name",) if self.type == "function" else ("mode", "tools")
        for name in ("name", "mode", "tools"):
            given, place = getattr(self, name) is not None, f"tool_choice.{name}"
            if given and name not in needs:
                raise InvalidRequestError(f"{place} does not go with the type {self.type}", parameter=place)
            if name in needs and not given:
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        for index, tool in enumerate(self.tools or ()):
            tool.check_type(tool.type, f"tool_choice.tools[{index}]")


@accepts_neutral(include_obfuscation=[False])
class ResponseStreamOptions(Body, kw_only=True, frozen=True):
    """Holds the options of a stream, none of which changes it."""


@accepts_neutral(
    access_programs=[],
    background=[False],
    background_options=[],
    context_management=[[]],
    conversation=[],
    image=[],
    moderation=[],
    n=[1],
    prompt=[],
    prompt_cache_options=[{"mode": "implicit"}],
    prompt_cache_retention=["in_memory", "in-memory"],
    prompt_logprobs=[],
    service_tier=["auto", "default"],
)
class ResponseRequest(SamplingFields, kw_only=True, frozen=True):
    """Asks to answer a conversation of items: POST /v1/responses. null is a parameter left out."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "background": "a response is made while its client waits for it, as a stream if that takes long",
        "conversation": "previous_response_id goes on from a stored response",
        "max_completion_tokens": "it is max_output_tokens of this route",
        "max_tokens": "it is max_output_tokens of this route",
        "messages": "they are the input of this route",
        "n": "a response is one answer",
        "prompt": "this server keeps no prompts: send instructions and input",
        "prompt_cache_options": CACHED,
        "prompt_cache_retention": CACHED,
        "prompt_logprobs": "it is one of /v1/chat/completions",
        "reasoning_effort": "it is reasoning.effort of this route",
        "response_format": "it is text.format of this route",
        "service_tier": "there is one tier, in which splitfuse_priority orders requests",
    }

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=MAX_ITEMS)]
    model: Annotated[str, Meta(max_length=512)] | None = None
    instructions: Annotated[str, Meta(description="A system message before all others, for this response only")] | (
        None
    ) = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT, description="Left out: what there is room for")] | None = (
        None
    )
    max_tool_calls: Annotated[int, Meta(ge=0, description="Of built-in tools, which there are none of")] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[str, Meta(extra_json_schema={"enum": ["none", "auto", "required"]})] | ResponseToolChoice | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    structured_outputs: StructuredOutputsBody | None = None
    reasoning: ReasoningBody | None = None
    reasoning_max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT, description="Closes a longer thought")] | None = None
    include: Annotated[list[Includable], Meta(max_length=64)] | None = None
    top_logprobs: (
        Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS, description=f"Needs {LOGPROBS} in include, if it is not 0")]
        | None
    ) = None
    truncation: (
        Annotated[Literal["auto", "disabled"], Meta(description="auto: drops the oldest items if not all fit")] | None
    ) = None
    previous_response_id: Annotated[str, Meta(max_length=512)] | None = None
    store: Annotated[bool, Meta(description="Left out: true, if the server stores any")] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16, description="Comes back in the response"),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    user: _LABEL | None = None
    safety_identifier: _LABEL | None = None
    prompt_cache_key: _LABEL | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Meta(max_length=64, description="The template's own switches")] | None
    ) = None
    splitfuse_timing: Annotated[bool, Meta(description="Adds times and steps to the response")] | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: lengths within the model's, token ids within its vocabulary."""
        refine_sampling(super().refine_schema(schema, bounds), bounds)
        return schema

    @property
    def items(self) -> list[Item]:
        """Return the input as items."""
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else list(self.input)

    @property
    def format(self) -> TextFormat:
        """Return the format of the answer's text."""
        return (self.text and self.text.format) or TextFormat(type="text")

    def to_generation(
        self, owner: Owner, items: Sequence[Item], *, num_before: int, arrival_time: float, slo_enabled: bool
    ) -> GenerationRequest:
        """Return the request to generate from `items`, of which `num_before` were stored.

        Raises InvalidRequestError and RefusedError for what cannot be honoured.
        """
        for name in ("reasoning", "stream_options"):
            if (part := getattr(self, name)) is not None:
                part.check_neutral(f"{name}.")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options need stream: true", parameter="stream_options")
        with_logprobs = LOGPROBS in (self.include or ())
        if self.top_logprobs and not with_logprobs:
            message = f"top_logprobs needs {LOGPROBS} in include"
            raise InvalidRequestError(message, parameter="top_logprobs")
        form_name, form = self._form()
        messages = messages_of(items, num_before=num_before)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        params = sampling_params(
            self, max_tokens=self.max_output_tokens, logprobs=self.top_logprobs or 0 if with_logprobs else None
        )
        return GenerationRequest(
            messages=messages,
            chat=self._chat_options(),
            params=replace(params, structured_outputs=form),
            names={**NAMES, **form_names(form_name)},
            scheduling=self.scheduling(owner, arrival_time=arrival_time, slo_enabled=slo_enabled),
            deadline=self.splitfuse_deadline,
            drops_messages=self.truncation == "auto",
            stream=bool(self.stream),
            include_timing=bool(self.splitfuse_timing),
        )

    def _form(self) -> tuple[str, StructuredOutputs | None]:
        """Return the form that the answer must have, with its name in errors."""
        form = self.format.form()
        if (fields := self.structured_outputs) is None:
            return FORM_NAMES[self.format.type], form
        if form is not None:
            message = "text.format and structured_outputs both say which form the answer must have: give one"
            raise InvalidRequestError(message, parameter="structured_outputs")
        return "structured_outputs", StructuredOutputs.of(fields.asked())

    def _chat_options(self) -> ChatOptions:
        tools = tuple(each.tool(f"tools[{index}]") for index, each in enumerate(self.tools or ()))
        choice, allowed = self._tool_choice()
        return ChatOptions(
            variables=self.chat_template_kwargs,
            tools=chosen_tools(tools, choice, allowed=allowed),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            reads_parts=True,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            verbosity=None if self.text is None else self.text.verbosity,
            max_reasoning_tokens=self.reasoning_max_tokens,
        )

    def _tool_choice(self) -> tuple[ToolChoice, list[str]]:
        """Return the choice, and the names of the tools to which it is limited; none: it is not."""
        match self.tool_choice:
            case None:
                return AUTO, []
            case "none" | "auto" | "required" as mode:
                return ToolChoice(mode), []
            case str() as mode:
                message = f"tool_choice must be none, auto, required or an object, not {mode!r:.80}"
                raise InvalidRequestError(message, parameter="tool_choice")
            case choice:
                choice.check()
                if choice.type == "function":
                    return ToolChoice("required", choice.name), []
                return ToolChoice(choice.mode or "auto"), [tool.name for tool in choice.tools or ()]
