"""Writes answers in Anthropic's dialect: whole ones, and the events of a stream.

Both come from the same events, so that they have the same blocks of content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.request_output import FinishReason
from splitfuse.server.anthropic.conversation import sign
from splitfuse.server.anthropic.protocol import MessagesRequest
from splitfuse.server.context import TokenCounts
from splitfuse.server.explain import Timing
from splitfuse.server.generate import MessageResponder
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    ToolCall,
    ToolCallStart,
)
from splitfuse.text.generation import Generation

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnswerText(msgspec.Struct, tag_field="type", tag="text"):
    """Holds a text in an answer."""

    text: str = ""


class AnswerThinking(msgspec.Struct, tag_field="type", tag="thinking"):
    """Holds a thought in an answer: nothing, if it is not shown."""

    thinking: str = ""
    signature: str = ""


class AnswerToolUse(msgspec.Struct, tag_field="type", tag="tool_use"):
    """Holds a call of a tool. Where the answer was cut off within it, or the model has not written an object in JSON,
    `input` has what there is as a text, INVALID_JSON.
    """

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class ThoughtTokens(msgspec.Struct, frozen=True):
    """Counts the tokens of thoughts."""

    thinking_tokens: int


class MessagesUsage(msgspec.Struct, frozen=True):
    """Counts tokens. `input_tokens` are those of the prompt that were not found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    service_tier: Literal["standard"] = "standard"
    output_tokens_details: ThoughtTokens | UnsetType = UNSET

    @classmethod
    def of(cls, counts: TokenCounts) -> MessagesUsage:
        """Return the numbers of tokens in Anthropic's shape."""
        details = UNSET if counts.reasoning is None else ThoughtTokens(counts.reasoning)
        new = counts.prompt - counts.cached
        return cls(new, counts.generated, counts.cached, output_tokens_details=details)


class MessagesAnswer(msgspec.Struct, frozen=True):
    """Answers POST /v1/messages; in the first event of a stream, without content and stop_reason."""

    id: str
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    splitfuse_timing: Timing | UnsetType = UNSET


class MessagesDelta(msgspec.Struct, frozen=True):
    """Holds what an event adds: to a block, whose kind `type` says, or how the message has ended."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessagesEvent(msgspec.Struct, frozen=True):
    """Holds an event of a stream, which is also named by its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: MessagesAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnswerBlock | UnsetType = UNSET
    delta: MessagesDelta | UnsetType = UNSET
    usage: MessagesUsage | UnsetType = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


class MessagesResponder(MessageResponder):
    """Writes answers of /v1/messages."""

    def __init__(self, request: MessagesRequest, answer_id: str, counts: Callable[[], TokenCounts]) -> None:
        self._request = request
        self._id = answer_id
        self._counts = counts
        self._begun = False
        self._blocks: list[AnswerBlock] = []
        self._is_open = False  # the last block
        self._thought = ""  # that of the last block, shown or not
        self._arguments = ""  # those of the last block
        self._stop: tuple[StopReason, str | None] = "end_turn", None

    def whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> MessagesAnswer:
        """See Responder."""
        (generation,) = generations
        for _ in self.message_events(generation, generation.read(generation.text)):
            pass  # each one has added to the blocks
        answer = self._answer(self._blocks, *self._stop, counts)
        return answer if timing is None else msgspec.structs.replace(answer, splitfuse_timing=timing)

    def message_events(self, generation: Generation, news: Sequence[MessageEvent]) -> Iterator[MessagesEvent]:
        """See MessageResponder."""
        if not self._begun:
            self._begun = True
            yield MessagesEvent("message_start", message=self._answer([], None, None, self._counts()))
        for event in news if self._request.max_tokens else ():
            yield from self._events_of(event)
        if generation.finish_reason is not None:
            yield from self._close()
            self._stop = self._stop_of(generation)

    def last_events(self, counts: TokenCounts, timing: Timing | None) -> Iterator[MessagesEvent]:
        """See Responder."""
        reason, sequence = self._stop
        delta = MessagesDelta(stop_reason=reason, stop_sequence=sequence)
        shown = UNSET if timing is None else timing
        yield MessagesEvent("message_delta", delta=delta, usage=MessagesUsage.of(counts), splitfuse_timing=shown)
        yield MessagesEvent("message_stop")

    def _events_of(self, news: MessageEvent) -> Iterator[MessagesEvent]:
        last = self._blocks[-1] if self._is_open else None
        match news:
            case ToolCallStart():
                yield from self._start(AnswerToolUse(news.call_id, news.name, {}))
            case ArgumentsDelta():
                self._arguments += news.text
                yield self._delta(MessagesDelta("input_json_delta", partial_json=news.text))
            case ContentDelta():
                if not isinstance(last, AnswerText):
                    yield from self._start(last := AnswerText())
                last.text += news.text
                yield self._delta(MessagesDelta("text_delta", text=news.text))
            case ReasoningDelta():
                if not isinstance(last, AnswerThinking):
                    yield from self._start(last := AnswerThinking())
                self._thought += news.text
                if self._request.shows_thoughts:
                    last.thinking = self._thought
                    yield self._delta(MessagesDelta("thinking_delta", thinking=news.text))

    def _start(self, block: AnswerBlock) -> Iterator[MessagesEvent]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        self._thought = self._arguments = ""
        empty = msgspec.structs.replace(block)  # what is added to the block comes in events of its own
        yield MessagesEvent("content_block_start", index=len(self._blocks) - 1, content_block=empty)

    def _close(self) -> Iterator[MessagesEvent]:
        if not self._is_open:
            return
        last = self._blocks[-1]
        if isinstance(last, AnswerThinking):
            last.signature = sign(self._thought, shown=self._request.shows_thoughts)
            yield self._delta(MessagesDelta("signature_delta", signature=last.signature))
        elif isinstance(last, AnswerToolUse):
            last.input = ToolCall(last.id, last.name, self._arguments).parsed
        self._is_open = False
        yield MessagesEvent("content_block_stop", index=len(self._blocks) - 1)

    def _delta(self, delta: MessagesDelta) -> MessagesEvent:
        return MessagesEvent("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _stop_of(self, generation: Generation) -> tuple[StopReason, str | None]:
        """Return why a generation that has not failed has ended, and its stop sequence."""
        if generation.finish_reason is FinishReason.LENGTH:
            is_less = (generation.request.params.max_tokens or 0) < self._request.max_tokens
            return "model_context_window_exceeded" if is_less else "max_tokens", None
        if generation.stop_string is not None:
            return "stop_sequence", generation.stop_string
        return "tool_use" if generation.message.has_complete_calls else "end_turn", None

    def _answer(
        self, content: list[AnswerBlock], reason: StopReason | None, sequence: str | None, counts: TokenCounts
    ) -> MessagesAnswer:
        return MessagesAnswer(self._id, self._request.model, content, reason, sequence, MessagesUsage.of(counts))
