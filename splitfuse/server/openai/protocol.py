"""Defines the requests of OpenAI's dialect: its parameters, and those that vLLM's users know, as strict types.

They decide what is supported, what is refused, and what a parameter left out means. Nothing is ignored: an unknown
parameter is refused, and so is a known one that is not supported, unless its value requests nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from splitfuse.core.sampling_params import MAX_INT, MAX_LOGPROBS, SamplingParams
from splitfuse.errors import InvalidRequestError, any_of
from splitfuse.server.auth import Owner
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import GenerationRequest, errors_named, form_names
from splitfuse.server.openai.structured import StructuredFields
from splitfuse.server.openai.tools import CACHED, EPHEMERAL, MessageToolCall, ToolChoiceField, Tools, tool_options
from splitfuse.server.sampling import refine_sampling, sampling_params
from splitfuse.server.texts import Texts, texts_of, texts_schema
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral
from splitfuse.text.chat_options import ChatOptions
from splitfuse.text.tools import MAX_TOOLS, name_results, place_in_messages
from splitfuse.text.variables import EFFORTS, VERBOSITIES

OF_VLLM: Mapping[str, list[Any]] = {
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "use_beam_search": [False],
}
"""Parameters of vLLM's API that are not supported, with the values that request nothing."""
EffortField = Annotated[str, Meta(extra_json_schema={"enum": list(EFFORTS)})]
VerbosityField = Annotated[str, Meta(extra_json_schema={"enum": list(VERBOSITIES)})]
DEFAULT_MAX_TOKENS = 16
"""Value of a completion's max_tokens that is left out, as OpenAI's."""


@accepts_neutral(include_obfuscation=[False])
class StreamOptions(Body, kw_only=True, frozen=True):
    """Holds the options of a stream. `include_usage` adds a last event with the numbers of tokens, and
    `continuous_usage_stats` those so far to each event.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerateBody(StructuredFields, kw_only=True, frozen=True):
    """Holds the parameters that both routes for generating text share. null is a parameter left out."""

    PATH: ClassVar[str]

    model: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=1024, description="Changes nothing")] | None = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, le=MAX_INT, description="Keeps a prompt's last tokens; -1: as many as fit")] | None
    ) = None
    splitfuse_timing: Annotated[bool, Meta(description="Adds times and steps to the answer")] | None = None

    @property
    def names(self) -> dict[str, str]:
        """Return names of parameters in this request that are not those of SamplingParams: see `errors_named`."""
        return {}

    def params(self) -> SamplingParams:
        """Return the parameters of sampling; max_tokens stays open if it is left out. Raises InvalidRequestError."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """Return the fields of a GenerationRequest which only this route has. Raises InvalidRequestError."""
        raise NotImplementedError

    def to_generation(self, owner: Owner, *, arrival_time: float, slo_enabled: bool) -> GenerationRequest:
        """Return the request to generate. Raises InvalidRequestError and RefusedError for what cannot be honoured."""
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequestError("stream_options need stream: true", parameter="stream_options")
            self.stream_options.check_neutral("stream_options.")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs need stream: false", parameter="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens must be at least 1, or -1 for as many as fit, not 0",
                parameter="truncate_prompt_tokens",
            )
        name, form = self.form() or ("", None)
        with errors_named(self.names):
            params = self.params()
        return GenerationRequest(
            **self.content(),
            params=replace(params, structured_outputs=form),
            names={**self.names, **form_names(name)},
            scheduling=self.scheduling(owner, arrival_time=arrival_time, slo_enabled=slo_enabled),
            deadline=self.splitfuse_deadline,
            keep_tokens=self.truncate_prompt_tokens,
            stream=bool(self.stream),
            include_timing=bool(self.splitfuse_timing),
        )

    @classmethod
    def suggest(cls, field: str) -> str:
        """See Body: a field of the other route is reported as such."""
        for other in GenerateBody.__subclasses__():
            if other.PATH != cls.PATH and field in other.supported():
                return f"; it is one of {other.PATH}, and this is {cls.PATH}"
        return super().suggest(field)

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: lengths within the model's, token ids within its vocabulary."""
        refine_sampling(super().refine_schema(schema, bounds), bounds)
        return schema


@accepts_neutral(best_of=[1], suffix=[""], **OF_VLLM)
class CompletionRequest(GenerateBody, kw_only=True, frozen=True):
    """Asks to continue prompts: POST /v1/completions. A prompt is text or token ids, one or several."""

    PATH: ClassVar[str] = "/v1/completions"

    prompt: Texts
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT, description="Left out: 16, or what the model has room for")] | (
        None
    ) = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    return_token_ids: Annotated[bool, Meta(description="Adds the ids of an answer's tokens to it")] | None = None

    def neutral(self) -> Mapping[str, tuple[Any, ...]]:
        """See Body: the best n of n choices are all of them."""
        return {**self.NEUTRAL, "best_of": (None, self.n or 1)}

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: a list of prompts has one kind of them."""
        super().refine_schema(schema, bounds)["properties"]["prompt"] = texts_schema(bounds, bounds.max_prompts)
        return schema

    def content(self) -> dict[str, Any]:
        """See GenerateBody."""
        return {
            "prompts": texts_of(self.prompt, "prompt"),
            "default_max_tokens": DEFAULT_MAX_TOKENS,
            "include_output": self.max_tokens != 0,
            "each_token": bool(self.return_token_ids),
        }

    def params(self) -> SamplingParams:
        """Return the parameters of sampling. max_tokens 0 becomes 1, whose token is not shown; left out, open."""
        if self.max_tokens == 0 and self.min_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens (0), not {self.min_tokens}", parameter="min_tokens"
            )
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return sampling_params(
            self,
            max_tokens=1 if self.max_tokens == 0 else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((count for count in wanted if count is not None), default=None),
        )


@accepts_neutral(cache_control=EPHEMERAL)
class ContentPart(Body, kw_only=True, frozen=True):
    """Holds a text that is a part of a message, or an assistant's refusal in place of one."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("image_url", "input_audio", "file"),
            "messages are text, also to vision-language models: use parts of the type text",
        ),
        "cache_control": CACHED,
    }

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "refusal"]})]
    text: str | None = None
    refusal: str | None = None

    def plain(self, where: str, role: str) -> dict[str, str]:
        """Return the part for a chat template. Raises InvalidRequestError, naming the place, for any other."""
        known = ("text", "refusal") if role == "assistant" else ("text",)
        if self.type not in known:
            message = f"{where}.type must be {' or '.join(known)}, not {self.type!r:.80}"
            raise InvalidRequestError(message, parameter=f"{where}.type")
        self.check_neutral(where + ".")
        text, other = (self.text, self.refusal) if self.type == "text" else (self.refusal, self.text)
        if text is None or other is not None:
            message = f"{where} must have a {self.type}, and nothing else, as its type says"
            raise InvalidRequestError(message, parameter=where)
        return {"type": "text", "text": text}


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages."""
_ONE_ROLE = {
    **dict.fromkeys(("refusal", "reasoning_content", "reasoning", "tool_calls"), "assistant"),
    "tool_call_id": "tool",
}
"""Fields of messages of one role, with the role."""


@accepts_neutral(
    annotations=[[]],
    audio=[],
    cache_control=EPHEMERAL,
    function_call=[],
)
class ChatMessage(Body, kw_only=True, frozen=True):
    """Holds one turn of a conversation. Several parts of text are joined by line ends, unless the model's chat template
    reads parts.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        "cache_control": CACHED,
        "function_call": "functions are called by tool_calls",
    }

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str | Annotated[list[ContentPart], Meta(min_length=1, max_length=1024)] | None = None
    name: Annotated[str, Meta(max_length=512)] | None = None
    refusal: Annotated[str, Meta(description="In place of an assistant's content")] | None = None
    reasoning_content: Annotated[str, Meta(description="An assistant's, for the chat template")] | None = None
    reasoning: Annotated[str, Meta(description="Another name of reasoning_content")] | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=MAX_TOOLS, description="An assistant's")] | None = None
    tool_call_id: Annotated[str, Meta(max_length=512, description="Of the call that a tool answers")] | None = None

    def plain(self, index: int) -> dict[str, Any]:
        """Return the message for a chat template.

        Raises InvalidRequestError or RefusedError, naming the place, for what a template would ignore.
        """
        where = f"messages[{index}]"
        if self.role not in ROLES:
            message = f"{where}.role must be {any_of(ROLES)}, not {self.role!r:.80}"
            raise InvalidRequestError(message, parameter=f"{where}.role")
        self.check_neutral(where + ".")
        for name, role in _ONE_ROLE.items():
            if self.role != role and getattr(self, name) not in (None, []):
                message = f"{where}.{name} needs the role {role}, not {self.role}"
                raise InvalidRequestError(message, parameter=f"{where}.{name}")
        if self.role == "tool" and self.tool_call_id is None:
            place = f"{where}.tool_call_id"
            raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        role = "system" if self.role == "developer" else self.role  # a newer name for it, unknown to templates
        reasoning = _one_of(self, "reasoning_content", "reasoning", where + ".")
        calls = [call.plain(f"{where}.tool_calls[{number}]") for number, call in enumerate(self.tool_calls or ())]
        fields: dict[str, Any] = {
            "name": self.name,
            "reasoning_content": reasoning,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return {"role": role, "content": self._plain_content(where), **given}

    def _plain_content(self, where: str) -> str | list[dict[str, str]]:
        if self.content is None:
            if self.role != "assistant":
                place = f"{where}.content"
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
            return self.refusal or ""
        if self.refusal is not None:
            message = f"{where} has a content and a refusal: leave one out"
            raise InvalidRequestError(message, parameter=f"{where}.refusal")
        if isinstance(self.content, str):
            return self.content
        return [part.plain(f"{where}.content[{number}]", self.role) for number, part in enumerate(self.content)]


@accepts_neutral(
    audio=[],
    function_call=["none"],
    functions=[[]],
    modalities=[["text"]],
    moderation=[],
    prediction=[],
    prompt_cache_retention=["in_memory", "in-memory"],
    service_tier=["auto", "default"],
    web_search_options=[],
    **OF_VLLM,
)
class ChatRequest(GenerateBody, kw_only=True, frozen=True):
    """Asks to answer a conversation: POST /v1/chat/completions."""

    PATH: ClassVar[str] = "/v1/chat/completions"
    REFUSED: ClassVar[Mapping[str, str]] = {
        "function_call": "functions are called by tools, with a tool_choice",
        "functions": "they are called by tools of the type function",
        "prompt_cache_retention": CACHED,
        "service_tier": "there is one tier, in which splitfuse_priority orders requests",
    }

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT, description="Left out: what there is room for")] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Meta(max_length=64, description="The template's own switches")] | None
    ) = None
    add_generation_prompt: Annotated[bool, Meta(description="Begins the assistant's turn; left out: true")] | None = (
        None
    )
    continue_final_message: Annotated[bool, Meta(description="Continues the last message")] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField | None = None
    reasoning_effort: EffortField | None = None
    verbosity: VerbosityField | None = None
    reasoning_max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT, description="Closes a longer thought")] | None = None
    thinking_token_budget: (
        Annotated[int, Meta(ge=0, le=MAX_INT, description="Another name of reasoning_max_tokens")] | None
    ) = None
    include_reasoning: Annotated[bool, Meta(description="Adds the thought to the answer; left out: true")] | None = None
    parallel_tool_calls: Annotated[bool, Meta(description="Allows several calls; left out: true")] | None = None
    store: Annotated[bool, Meta(description="Keeps the answer, for GET; left out: false")] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=1024, description="Changes nothing")] | None = None
    safety_identifier: Annotated[str, Meta(max_length=1024, description="Changes nothing")] | None = None

    def neutral(self) -> Mapping[str, tuple[Any, ...]]:
        """See Body: functions that must not be called are none."""
        if self.function_call == "none" and isinstance(self.functions, list):
            return {**self.NEUTRAL, "functions": (None, self.functions)}
        return self.NEUTRAL

    @property
    def names(self) -> dict[str, str]:
        """See GenerateBody."""
        given = {"max_tokens": "max_completion_tokens", "reasoning_max_tokens": "thinking_token_budget"}
        others = {name: other for name, other in given.items() if getattr(self, name) is None}
        return {"prompt": "messages", **others}

    def content(self) -> dict[str, Any]:
        """See GenerateBody."""
        budget = _one_of(self, "reasoning_max_tokens", "thinking_token_budget")
        parallel = self.parallel_tool_calls is not False
        chat = replace(chat_options(self), parallel_tool_calls=parallel, reads_parts=True, max_reasoning_tokens=budget)
        return {"messages": plain_messages(self.messages), "chat": chat}

    def params(self) -> SamplingParams:
        """Return the parameters of sampling; max_tokens stays open if it is left out. Raises InvalidRequestError."""
        max_tokens = _one_of(self, "max_completion_tokens", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", parameter="top_logprobs")
        return sampling_params(self, max_tokens=max_tokens, logprobs=self.top_logprobs or 0 if self.logprobs else None)


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages for a chat template. Raises InvalidRequestError or RefusedError, naming the place."""
    plain = [message.plain(index) for index, message in enumerate(messages)]
    name_results(plain, place_in_messages)
    return plain


def chat_options(body: ChatRequest | TokenizeRequest) -> ChatOptions:
    """Return how the chat template renders the messages of a body. Raises InvalidRequestError for a contradiction."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt contradict each other: set one of them to false",
            parameter="continue_final_message",
        )
    adds = not continues and body.add_generation_prompt is not False
    tools = tool_options(body.tools, body.tool_choice if isinstance(body, ChatRequest) else None)
    return ChatOptions(
        adds,
        continues,
        body.chat_template_kwargs,
        **tools,
        reasoning_effort=body.reasoning_effort,
        verbosity=body.verbosity,
    )


def _one_of(body: Body, name: str, other: str, where: str = "") -> Any:
    """Return the value that a body gives by one of two names, which follow `where` in errors. Raises
    InvalidRequestError if they contradict.
    """
    value, others = getattr(body, name), getattr(body, other)
    if value is not None and others not in (None, value):
        message = f"{where}{name} {value!s:.80} and {other} {others!s:.80} are two names of one thing: give one"
        raise InvalidRequestError(message, parameter=where + name)
    return others if value is None else value


class TokenizeRequest(Body, kw_only=True, frozen=True):
    """Asks for the tokens of a prompt, or of messages in the chat template: POST /tokenize."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: Annotated[bool, Meta(description="Left out: true for a prompt, false for messages")] | None = (
        None
    )
    return_token_strs: Annotated[bool, Meta(description="Adds how the vocabulary writes each token")] | None = None
    add_generation_prompt: Annotated[bool, Meta(description="For messages; left out: true")] | None = None
    continue_final_message: Annotated[bool, Meta(description="For messages; left out: false")] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    tools: Annotated[Tools, Meta(description="For messages")] | None = None
    reasoning_effort: EffortField | None = None
    verbosity: VerbosityField | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: the two alternatives of `check`."""
        properties, kinds = super().refine_schema(schema, bounds)["properties"], []
        for needed, others in _TOKENIZE.items():
            own = {name: properties[name] for name in (*_TOKENIZE_BOTH, needed, *others)}
            own[needed] = next(option for option in own[needed]["anyOf"] if option != {"type": "null"})
            kinds.append({"type": "object", "properties": own, "required": [needed], "additionalProperties": False})
        return {"title": schema["title"], "description": schema["description"], "oneOf": kinds}

    def check(self) -> None:
        """Raise InvalidRequestError unless it has either a prompt or messages, and only parameters that go with it."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", parameter="prompt")
        other = "messages" if self.messages is None else "prompt"
        for name in _TOKENIZE[other]:
            if getattr(self, name) is not None:
                raise InvalidRequestError(f"{name} needs {other}: leave it out", parameter=name)


_TOKENIZE_BOTH = ("model", "add_special_tokens", "return_token_strs")
_TOKENIZE = {
    "prompt": (),
    "messages": (
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
        *("tools", "reasoning_effort", "verbosity"),
    ),
}
"""Parameters of TokenizeRequest that go with a prompt, and with messages."""


class DetokenizeRequest(Body, kw_only=True, frozen=True):
    """Asks for the text of tokens: POST /detokenize."""

    tokens: list[int]
    model: Annotated[str, Meta(max_length=512)] | None = None
    skip_special_tokens: Annotated[bool, Meta(description="Left out: true")] | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: token ids within the model's vocabulary."""
        super().refine_schema(schema, bounds)["properties"]["tokens"]["items"] = bounds.token
        return schema
