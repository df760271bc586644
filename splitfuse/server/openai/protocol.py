"""What requests say: OpenAI's parameters, and those that vLLM's users know, as types that decode strictly.

It decides what is honoured, what is refused, and what a parameter left out means. Nothing is ignored: an unknown
parameter is refused, and so is a known one that we do not honour, unless its value asks for nothing. It must not know
of engines or sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from splitfuse.core.sampling_params import MAX_INT, MAX_LOGPROBS, SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.server.errors import RefusedError
from splitfuse.server.openai.sampling import SamplingFields, TokenId, sampling_params

TokenIds = Annotated[list[TokenId], Meta(min_length=1)]


class _Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """An object in a body."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """`include_usage`: a last event with the numbers of tokens."""

    include_usage: bool | None = None


class _Generate(SamplingFields, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What both ways to ask for text have in common. null is a parameter left out."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=1024, description="Changes nothing")] | None = None
    splitfuse_timing: Annotated[bool, Meta(description="Adds times and steps to the answer")] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens. Raises InvalidRequestError without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options need stream: true", parameter="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Generate, kw_only=True, frozen=True):
    """POST /v1/completions. A prompt is text or token ids, one or several."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT, description="Left out: 16, or what the model has room for")] | (
        None
    ) = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    return_token_ids: Annotated[bool, Meta(description="Adds the ids of an answer's tokens to it")] | None = None
    best_of: Any = None
    suffix: Any = None

    def prompts(self, most: int) -> list[str | list[int]]:
        """One or more, at most `most`. Raises InvalidRequestError for a list of mixed kinds."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequestError("the prompt is empty: the list has nothing in it", parameter="prompt")
        kinds = set(map(type, prompt))
        if kinds == {int}:
            return [prompt]  # type: ignore[list-item]
        if len(kinds) > 1 or kinds == {bool}:
            raise InvalidRequestError(
                "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, not a "
                "mixture",
                parameter="prompt",
            )
        if len(prompt) > most:
            raise InvalidRequestError(
                f"prompt has {len(prompt)} prompts; this server takes at most {most} in one request",
                parameter="prompt",
            )
        return prompt  # type: ignore[return-value]

    def params(self) -> SamplingParams:
        """max_tokens 0 becomes 1, of which nothing is to be shown; left out it stays open."""
        if self.max_tokens == 0 and self.min_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens (0), not {self.min_tokens}", parameter="min_tokens"
            )
        return sampling_params(
            self,
            max_tokens=1 if self.max_tokens == 0 else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A piece of a message's text."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str


class ChatMessage(_Request, kw_only=True, frozen=True):
    """One turn. Several parts of text are joined by line ends."""

    role: Annotated[str, Meta(extra_json_schema={"enum": ["system", "developer", "user", "assistant"]})]
    content: str | Annotated[list[ContentPart], Meta(min_length=1, max_length=1024)]
    name: Annotated[str, Meta(max_length=512)] | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None

    def plain(self, index: int) -> dict[str, Any]:
        """For a template. Raises InvalidRequestError, naming the place, for what a template would pass over."""
        where = f"messages[{index}]"
        if self.role not in ("system", "developer", "user", "assistant"):
            raise InvalidRequestError(
                f"{where}.role must be system, developer, user or assistant, not {self.role!r:.80}",
                parameter=f"{where}.role",
            )
        refuse_unless_neutral(self, _NEUTRAL_IN_MESSAGE, where + ".")
        content = self.content
        if not isinstance(content, str):
            for number, part in enumerate(content):
                if part.type != "text":
                    place = f"{where}.content[{number}].type"
                    raise InvalidRequestError(f"{place} must be text, not {part.type!r:.80}", parameter=place)
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role  # a newer name for it, unknown to templates
        return {"role": role, "content": content, **({} if self.name is None else {"name": self.name})}


class ChatRequest(_Generate, kw_only=True, frozen=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT, description="Left out: what there is room for")] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Meta(max_length=64, description="The template's own switches")] | None
    ) = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def plain_messages(self) -> list[dict[str, Any]]:
        """For a template. Raises InvalidRequestError."""
        return [message.plain(index) for index, message in enumerate(self.messages)]

    def params(self) -> SamplingParams:
        """max_tokens stays open if it is left out. Raises InvalidRequestError."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, most):
            raise InvalidRequestError(
                f"max_completion_tokens {most} and max_tokens {self.max_tokens} are two names of one thing: give one",
                parameter="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", parameter="top_logprobs")
        return sampling_params(self, max_tokens=most, logprobs=self.top_logprobs or 0 if self.logprobs else None)


class TokenizeRequest(_Request, kw_only=True, frozen=True):
    """POST /tokenize: a prompt, or messages as a chat would read them."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: Annotated[bool, Meta(description="For a prompt; left out: true")] | None = None
    add_generation_prompt: Annotated[bool, Meta(description="For messages; left out: true")] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None

    def check(self) -> None:
        """Raises InvalidRequestError unless it has one of the two, and nothing that is for the other."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", parameter="prompt")
        others = ("add_generation_prompt", "chat_template_kwargs") if self.messages is None else ("add_special_tokens",)
        for name in others:
            if getattr(self, name) is not None:
                owner = "messages" if self.messages is None else "a prompt"
                raise InvalidRequestError(f"{name} is for {owner} only: leave it out", parameter=name)


class DetokenizeRequest(_Request, kw_only=True, frozen=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: Annotated[str, Meta(max_length=512)] | None = None
    skip_special_tokens: Annotated[bool, Meta(description="Left out: true")] | None = None


# Known, and not honoured ---------------------------------------------------------------------------------------------

_NEUTRAL_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "refusal": (None,),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
}

NEUTRAL: Mapping[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]] = {
    CompletionRequest: {"best_of": (None, 1), "suffix": (None, "")},
    ChatRequest: {
        "audio": (None,),
        "function_call": (None, "none"),
        "functions": (None, []),
        "metadata": (None, {}),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "parallel_tool_calls": (None, True, False),  # of no tools
        "prediction": (None,),
        "prompt_cache_key": (None,),
        "prompt_cache_retention": (None,),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "safety_identifier": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "verbosity": (None,),
        "web_search_options": (None,),
    },
    ChatMessage: _NEUTRAL_IN_MESSAGE,
}
"""Parameters that are known and not honoured, with the values by which they ask for nothing."""


def refuse_unless_neutral(body: msgspec.Struct, neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raise RefusedError (400) for a parameter of `neutral` with a value that asks for something."""
    for name, values in neutral.items():
        value = getattr(body, name)
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise RefusedError(
                400,
                f"{where}{name} is not supported: leave it out",
                code="unsupported_parameter",
                parameter=where + name,
            )
