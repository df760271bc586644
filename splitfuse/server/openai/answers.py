"""Defines the answers of OpenAI's dialect, whole and in events, as JSON has them."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.plan import TokenLogprob
from splitfuse.server.context import TokenCounts
from splitfuse.server.explain import Timing
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    ToolCall,
    ToolCallStart,
)
from splitfuse.text.token_text import TokenPieces

LOWEST_LOGPROB = -9999.0
"""Log-probability in place of minus infinity, which JSON has no number for. OpenAI's API has the same."""

EndedBy = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Counts as `cached_tokens` the prompt tokens that every choice found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Counts as `reasoning_tokens` those of thoughts."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Counts tokens. A prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET

    @classmethod
    def of(cls, counts: TokenCounts) -> Usage:
        """Return the numbers of tokens in OpenAI's shape."""
        total = counts.prompt + counts.generated
        thought = UNSET if counts.reasoning is None else CompletionTokensDetails(counts.reasoning)
        return cls(counts.prompt, counts.generated, total, PromptTokensDetails(counts.cached), thought)


class PromptLogprob(msgspec.Struct, frozen=True):
    """Describes a token at a place of a prompt, as vLLM does: its rank is known if it is among the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Holds log-probabilities: an entry for each token. The first token of a prompt has none."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(msgspec.Struct, frozen=True):
    """Holds one choice, or its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: EndedBy | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """Answers POST /v1/completions, whole or as an event, whose `usage` is null except in the last."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """Describes a token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token_id: int, logprob: float, pieces: TokenPieces) -> TopLogprob:
        """Return a token by its text and bytes."""
        piece = pieces.of(token_id)
        return cls(piece.text, finite(logprob), list(piece.utf8))


class ChatLogprob(msgspec.Struct, frozen=True):
    """Describes a token that was chosen."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]

    @classmethod
    def of(cls, logprob: TokenLogprob, *, pieces: TokenPieces, num_top: int) -> ChatLogprob:
        """Return a token with so many alternatives."""
        tops = [TopLogprob.of(token_id, value, pieces) for token_id, value in logprob.top[:num_top]]
        chosen = TopLogprob.of(logprob.token_id, logprob.logprob, pieces)
        return cls(chosen.token, chosen.logprob, chosen.bytes, tops)


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Holds log-probabilities: an entry for each token."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """Holds a called function. `arguments` is JSON, which is cut off where the answer is."""

    name: str
    arguments: str


class ChatToolCall(msgspec.Struct, frozen=True):
    """Holds a call of a tool."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"

    @classmethod
    def of(cls, call: ToolCall) -> ChatToolCall:
        """Return a call in OpenAI's shape."""
        return cls(call.call_id, FunctionCall(call.name, call.arguments))


class AssistantTurn(msgspec.Struct, frozen=True):
    """Holds the turn of the assistant. `content` is null if there are only calls; the thought has two names."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """Holds one choice."""

    index: int
    message: AssistantTurn
    logprobs: ChatLogprobs | None
    finish_reason: EndedBy


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answers POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    metadata: dict[str, str] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, frozen=True):
    """Adds to a called function: first its name, then to its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """Adds to call number `index` of a message, whose first one has the id."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """Holds what an event adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET

    @classmethod
    def of(cls, event: MessageEvent) -> Delta:
        """Return what one event of an answer adds."""
        match event:
            case ContentDelta():
                return cls(content=event.text)
            case ReasoningDelta():
                return cls(reasoning_content=event.text, reasoning=event.text)
            case ToolCallStart():
                function = FunctionDelta("", event.name)
                return cls(tool_calls=[ToolCallDelta(event.index, function, event.call_id, "function")])
            case ArgumentsDelta():
                return cls(tool_calls=[ToolCallDelta(event.index, FunctionDelta(event.text))])


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """Holds the next piece of a choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: EndedBy | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """Adds to an answer in a stream of /v1/chat/completions; its `usage` is null except in the last event."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN too
