"""Writes answers of OpenAI's Responses API: whole ones, and the typed events of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from splitfuse.core.request_output import FinishReason
from splitfuse.server.context import TokenCounts
from splitfuse.server.errors import RefusedError
from splitfuse.server.explain import Timing
from splitfuse.server.generate import MessageResponder
from splitfuse.server.openai.answers import ChatLogprob
from splitfuse.server.responses.items import Status
from splitfuse.server.responses.protocol import LOGPROBS, ResponseRequest
from splitfuse.server.state import AppState
from splitfuse.server.validation import Body
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    ToolCall,
    ToolCallStart,
)
from splitfuse.text.generation import Generation


class InputTokensDetails(msgspec.Struct, frozen=True):
    """Counts as `cached_tokens` the tokens of the input that were found in the prefix cache. Writing to it is free."""

    cached_tokens: int
    cache_write_tokens: Literal[0] = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Counts the tokens of thoughts, if the model's can be told apart."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """Counts tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, counts: TokenCounts) -> ResponseUsage:
        """Return the numbers of tokens."""
        return cls(
            counts.prompt,
            InputTokensDetails(counts.cached),
            counts.generated,
            OutputTokensDetails(counts.reasoning or 0),
            counts.prompt + counts.generated,
        )


class OutputPart(msgspec.Struct):
    """Holds the text of a message (output_text), or of a thought (reasoning_text)."""

    type: Literal["output_text", "reasoning_text"]
    text: str = ""
    annotations: list[Any] | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class OutputItem(msgspec.Struct):
    """Holds a thought, a message or a call of a function."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Status = "in_progress"
    role: Literal["assistant"] | UnsetType = UNSET
    summary: list[Any] | UnsetType = UNSET
    content: list[OutputPart] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ResponseFailure(msgspec.Struct, frozen=True):
    """Says why a response has failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str

    @classmethod
    def of(cls, error: RefusedError) -> ResponseFailure:
        """Return the nearest of OpenAI's codes for an error, with its message: a deadline is none of the prompt's."""
        codes: dict[int, Literal["rate_limit_exceeded", "invalid_prompt"]]
        codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
        return cls(codes.get(error.status, "server_error"), error.message)


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Says why a response is cut off: max_output_tokens, or the model's length, if that is less."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseAnswer(msgspec.Struct, frozen=True):
    """Answers POST /v1/responses and GET /v1/responses/{response_id}. Parameters come back as they were understood."""

    id: str
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    background: Literal[False] = False
    object: Literal["response"] = "response"
    service_tier: Literal["default"] = "default"
    splitfuse_timing: Timing | UnsetType = UNSET


EVENTS = [
    f"response.{kind}"
    for kind in (
        *("created", "in_progress", "completed", "incomplete", "failed"),
        *("output_item.added", "output_item.done", "content_part.added", "content_part.done"),
        *("output_text.delta", "output_text.done", "reasoning_text.delta", "reasoning_text.done"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
    )
]
"""Types of the events of a stream."""


class ResponseEvent(msgspec.Struct, frozen=True):
    """Holds an event of a stream, with the fields that its type has."""

    type: Annotated[str, Meta(extra_json_schema={"enum": EVENTS})]
    sequence_number: int
    response: ResponseAnswer | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class _Output:
    """Grows the items of an answer, and tells of it in events."""

    def __init__(self, unique_id: str, event: Callable[..., ResponseEvent]) -> None:
        self.items: list[OutputItem] = []
        self._unique_id = unique_id
        self._event = event
        self._is_open = False

    def push(self, news: MessageEvent, logprobs: list[Any] | UnsetType = UNSET) -> Iterator[ResponseEvent]:
        """Add to the items, and yield the events for that."""
        match news:
            case ReasoningDelta():
                yield from self._open("reasoning")
                yield self._added("response.reasoning_text.delta", news.text)
            case ContentDelta():
                yield from self._open("message")
                yield self._added("response.output_text.delta", news.text, logprobs)
            case ToolCallStart():
                yield from self.close("completed")
                yield from self._open("function_call", call_id=news.call_id, name=news.name, arguments="")
            case ArgumentsDelta():
                item = self.items[-1]
                assert isinstance(item.arguments, str), "calls come one after the other"
                item.arguments += news.text
                yield self._event("response.function_call_arguments.delta", **self._place(), delta=news.text)

    def finish(self, status: Status) -> Iterator[ResponseEvent]:
        """Close the last item, and yield the events for that. An answer of nothing is an empty message."""
        if not self.items:
            yield from self._open("message")
        yield from self.close(status)

    def close(self, status: Status) -> Iterator[ResponseEvent]:
        """Close the item that is open, if one is, and yield the events for that. A call that cannot be read is
        incomplete.
        """
        if not self._is_open:
            return
        self._is_open, item, place = False, self.items[-1], self._place()
        item.status = status
        if item.content is UNSET:
            if not ToolCall("", "", item.arguments or "").is_complete:
                item.status = "incomplete"
            call = {"name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **place, **call)
        else:
            (part,) = item.content
            own = {} if part.logprobs is UNSET else {"logprobs": part.logprobs}
            yield self._event(f"response.{part.type}.done", **place, content_index=0, text=part.text, **own)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _open(self, kind: Literal["reasoning", "message", "function_call"], **own: Any) -> Iterator[ResponseEvent]:
        """Begin an item, unless one of that kind is open."""
        if self._is_open and self.items[-1].type == kind:
            return
        yield from self.close("completed")
        index = len(self.items)
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item = OutputItem(f"{prefix}_{self._unique_id}{index:x}", kind, **own)
        part: OutputPart | None = None
        match kind:
            case "reasoning":
                item.summary, item.content, part = [], [], OutputPart("reasoning_text")
            case "message":
                item.role, item.content = "assistant", []
                part = OutputPart("output_text", annotations=[], logprobs=[])
        self.items.append(item)
        self._is_open = True
        yield self._event("response.output_item.added", output_index=index, item=item)
        if part is not None:
            item.content = [part]
            yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _added(self, kind: str, text: str, logprobs: list[Any] | UnsetType = UNSET) -> ResponseEvent:
        content = self.items[-1].content
        assert isinstance(content, list), "a part is open"
        (part,) = content
        part.text += text
        if isinstance(part.logprobs, list) and isinstance(logprobs, list):
            part.logprobs += logprobs
        return self._event(kind, **self._place(), content_index=0, delta=text, logprobs=logprobs)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1].id, "output_index": len(self.items) - 1}


class ResponsesResponder(MessageResponder):
    """Writes answers of /v1/responses. `keep` is called with one that has ended, before it is sent."""

    def __init__(
        self,
        request: ResponseRequest,
        unique_id: str,
        state: AppState,
        counts: Callable[[], TokenCounts],
        keep: Callable[[ResponseAnswer], None] | None,
    ) -> None:
        self._request = request
        self._state = state
        self._counts = counts
        self._keep = keep
        self._created = int(time.time())
        self._num_events = 0
        self._output = _Output(unique_id, self._event)
        self._num_read = 0  # tokens whose log-probabilities are out, or part of no message
        self._has_logprobs = LOGPROBS in (request.include or ())
        self._blank = self._answer(f"resp_{unique_id}")

    def whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> ResponseAnswer:
        """See Responder."""
        (generation,) = generations
        for _ in self._read_whole(generation):
            pass
        return self._end(generation, counts, timing)

    def message_events(self, generation: Generation, news: Sequence[MessageEvent]) -> Iterable[ResponseEvent]:
        """See MessageResponder."""
        yield from self._begin()
        yield from self._read(generation, news, generation.num_released)
        if generation.finish_reason is not None:
            self._generation = generation
            yield from self._output.finish(_status(generation))

    def last_events(self, counts: TokenCounts, timing: Timing | None) -> Iterable[ResponseEvent]:
        """See Responder: the whole response."""
        answer = self._end(self._generation, counts, timing)
        yield self._event(f"response.{answer.status}", response=answer)

    def failed_events(self, error: RefusedError) -> Iterable[ResponseEvent]:
        """Yield the last events of a stream that breaks off."""
        yield from self._begin()
        failure = ResponseFailure.of(error)
        output = self._output.items
        if output and output[-1].status == "in_progress":
            output[-1].status = "incomplete"
        answer = msgspec.structs.replace(
            self._blank, status="failed", error=failure, output=output, usage=ResponseUsage.of(self._counts())
        )
        yield self._event("response.failed", response=answer)

    def _begin(self) -> Iterator[ResponseEvent]:
        if not self._num_events:
            yield self._event("response.created", response=self._blank)
            yield self._event("response.in_progress", response=self._blank)

    def _end(self, generation: Generation, counts: TokenCounts, timing: Timing | None) -> ResponseAnswer:
        status = _status(generation)
        answer = msgspec.structs.replace(
            self._blank,
            status=status,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details=None if status == "completed" else IncompleteDetails(),
            output=self._output.items,
            usage=ResponseUsage.of(counts),
            splitfuse_timing=UNSET if timing is None else timing,
        )
        if self._keep is not None:
            self._keep(answer)
        return answer

    def _read_whole(self, generation: Generation) -> Iterator[ResponseEvent]:
        """Read an answer that has ended as its stream would have been: with log-probabilities, token by token."""
        if self._has_logprobs:
            text = generation.text
            ends = [*generation.offsets(1, len(generation.token_ids)), len(text)]
            start = 0
            for number, end in enumerate(ends, 1):
                news = generation.read(text[start:end], is_last=number == len(ends))
                start = max(start, end)
                yield from self._read(generation, news, number)
        else:
            yield from self._read(generation, generation.read(generation.text), 0)
        yield from self._output.finish(_status(generation))

    def _read(self, generation: Generation, news: Sequence[MessageEvent], num_tokens: int) -> Iterator[ResponseEvent]:
        """Add what is new in an answer, whose first `num_tokens` tokens are behind it."""
        for event in news:
            logprobs: list[Any] | UnsetType = UNSET
            if isinstance(event, ContentDelta):
                logprobs = self._logprobs(generation, num_tokens)
            yield from self._output.push(event, logprobs)
        if news:
            self._num_read = num_tokens

    def _logprobs(self, generation: Generation, num_tokens: int) -> list[Any]:
        if not self._has_logprobs:
            return []
        numbers, self._num_read = range(self._num_read, num_tokens), num_tokens
        num_top = self._request.top_logprobs or 0
        return [
            ChatLogprob.of(generation.logprobs[number], pieces=self._state.pieces, num_top=num_top)
            for number in numbers
        ]

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        """Return the next event. What grows is in it as it is now: events are written at once."""
        number, self._num_events = self._num_events, self._num_events + 1
        return ResponseEvent(kind, number, **fields)

    def _answer(self, answer_id: str) -> ResponseAnswer:
        """Return the answer as it begins."""
        asked = self._request
        effort = asked.reasoning.effort if asked.reasoning is not None else None
        tools = [each.tool(f"tools[{index}]") for index, each in enumerate(asked.tools or ())]
        text = {"format": _given(asked.format), "verbosity": (asked.text and asked.text.verbosity) or "medium"}
        return ResponseAnswer(
            id=answer_id,
            created_at=self._created,
            completed_at=None,
            status="in_progress",
            error=None,
            incomplete_details=None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            max_tool_calls=asked.max_tool_calls,
            metadata=asked.metadata or {},
            model=asked.model or self._state.model,
            output=[],
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=asked.previous_response_id,
            prompt_cache_key=asked.prompt_cache_key,
            reasoning={"effort": effort, "summary": None},
            safety_identifier=asked.safety_identifier,
            store=self._keep is not None,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            text=text,
            tool_choice=_given(asked.tool_choice) if asked.tool_choice is not None else "auto",
            tools=[{"type": "function", **tool.as_dict()["function"], "strict": tool.strict} for tool in tools],
            top_logprobs=asked.top_logprobs or 0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            truncation=asked.truncation or "disabled",
            usage=None,
            user=asked.user,
        )


def _status(generation: Generation) -> Literal["completed", "incomplete"]:
    return "completed" if generation.finish_reason is FinishReason.STOP else "incomplete"


def _given(value: Any) -> Any:
    """Return a part of a request as it was sent, without what was left out."""
    if isinstance(value, Body):
        return {name: _given(each) for name, each in msgspec.to_builtins(value).items() if each is not None}
    return value
