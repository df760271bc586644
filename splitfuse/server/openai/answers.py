"""Writes answers in OpenAI's dialect: whole ones, and the events of a stream.

Decides what each field of an answer says.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.plan import TokenLogprob
from splitfuse.core.reasoning import Thought
from splitfuse.server.context import TokenCounts
from splitfuse.server.dialect import lazy_list
from splitfuse.server.explain import Timing
from splitfuse.server.generate import MessageResponder, Responder
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest
from splitfuse.server.state import AppState
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    ToolCall,
    ToolCallStart,
)
from splitfuse.text.generation import Generation
from splitfuse.text.token_text import TokenPieces
from splitfuse.text.tokenizer import Detokenizer

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
        return cls(piece.text, _finite(logprob), list(piece.utf8))


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


class OpenAIResponder(Responder):
    """Writes what the answers of both routes have in common."""

    whole_type: type[Any]
    event_type: type[Any]

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        answer_id: str,
        state: AppState,
        counts: Callable[[], TokenCounts],
        adapter: str,
    ) -> None:
        self._head = answer_id, int(time.time()), request.model or state.model, state.fingerprint(adapter)
        self._counts = counts
        self._tokenizer = state.service.tokenizer
        self._piece = state.pieces.of
        self._n = request.n or 1
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(options and options.continuous_usage_stats)
        self._num_prompt_logprobs = request.prompt_logprobs
        self._num_sent: dict[Generation, int] = {}  # tokens whose logprobs are out

    def whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> Any:
        """See Responder."""
        return self._make(self.whole_type, list(map(self._whole_choice, generations)), Usage.of(counts), timing)

    def last_events(self, counts: TokenCounts, timing: Timing | None) -> Iterable[Any]:
        """See Responder: one event without choices, with usage and timing, if either is wanted."""
        if self._include_usage or timing is not None:
            yield self._make(self.event_type, [], Usage.of(counts) if self._include_usage else UNSET, timing)

    @abstractmethod
    def _whole_choice(self, generation: Generation) -> Any:
        """Return a choice that has ended."""

    def _event(self, choice: Any) -> Any:
        usage = None if self._include_usage else UNSET
        return self._make(self.event_type, [choice], Usage.of(self._counts()) if self._usage_in_each else usage, None)

    def _make(self, kind: type[Any], choices: list[Any], usage: Usage | UnsetType | None, timing: Timing | None) -> Any:
        return kind(*self._head, choices, usage=usage, splitfuse_timing=UNSET if timing is None else timing)

    def _prompt_logprobs(self, generation: Generation) -> PromptLogprobs | UnsetType:
        if (count := self._num_prompt_logprobs) is None:
            return UNSET
        return lazy_list(self._prompt_entries(generation, count))

    def _prompt_entries(self, generation: Generation, count: int) -> Iterator[dict[str, PromptLogprob] | None]:
        yield None
        for each in generation.prompt_logprobs:
            row = {str(each.token_id): PromptLogprob(_finite(each.logprob), None, self._piece(each.token_id).text)}
            for rank, (token_id, value) in enumerate(each.top[:count], 1):
                row[str(token_id)] = PromptLogprob(_finite(value), rank, self._piece(token_id).text)
            yield row

    def _index(self, generation: Generation) -> int:
        return generation.index * self._n + generation.choice

    def _unsent(self, generation: Generation) -> range:
        """Return the tokens, by number, that are final and were not sent yet, and mark them as sent."""
        start = self._num_sent.get(generation, 0)
        self._num_sent[generation] = max(start, generation.num_released)
        return range(start, self._num_sent[generation])


class CompletionResponder(OpenAIResponder):
    """Writes answers of /v1/completions. `prompts` are as they were sent."""

    whole_type = event_type = Completion

    def __init__(
        self,
        request: CompletionRequest,
        answer_id: str,
        state: AppState,
        counts: Callable[[], TokenCounts],
        adapter: str,
        prompts: Sequence[str | Sequence[int]],
    ) -> None:
        super().__init__(request, answer_id, state, counts, adapter)
        self._is_truncated = request.truncate_prompt_tokens is not None
        self._echo = bool(request.echo)
        self._logprobs = request.logprobs
        self._hides_output = request.max_tokens == 0
        self._returns_ids = bool(request.return_token_ids)
        self._prompts = prompts
        self._echoed: dict[Generation, str] = {}

    def events(self, generation: Generation, text: str) -> Iterable[Completion]:
        """See Responder."""
        choice = self._choice(generation, text)
        if choice.text or choice.finish_reason or choice.token_ids:
            yield self._event(choice)

    def _whole_choice(self, generation: Generation) -> CompletionChoice:
        return self._choice(generation, generation.text)

    def _choice(self, generation: Generation, text: str) -> CompletionChoice:
        before = ""
        echoes = self._echo and generation not in self._num_sent
        numbers = self._unsent(generation)
        if echoes:
            before = self._echoed[generation] = self._prompt_text(generation)
        if self._hides_output:
            text, numbers = "", range(0)
        logprobs = None if self._logprobs is None else self._columns(generation, numbers, echoes=echoes)
        ids: list[int] | UnsetType = UNSET
        if self._returns_ids:
            ids = [] if self._hides_output else generation.take_ids()
        scores = self._prompt_logprobs(generation)
        ended_by = _ended_by(generation)
        if ended_by and self._hides_output:
            ended_by = "length"  # the token that is not shown ended nothing
        return CompletionChoice(self._index(generation), before + text, logprobs, ended_by, ids, scores)

    def _prompt_text(self, generation: Generation) -> str:
        prompt = generation.request.token_ids if self._is_truncated else self._prompts[generation.index]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _columns(self, generation: Generation, numbers: range, *, echoes: bool) -> CompletionLogprobs:
        """Return the log-probabilities of some tokens, after those of the prompt if that is echoed."""
        of_prompt, of_output = generation.prompt_logprobs, generation.logprobs
        offsets: list[int] = []
        chosen: list[tuple[int, float | None]] = []
        if echoes:
            detokenizer = Detokenizer(self._tokenizer)
            detokenizer.push(generation.request.token_ids)
            offsets = [0, *detokenizer.lengths[: len(of_prompt)]]
            chosen = [(generation.request.token_ids[0], None), *map(of_prompt.chosen, range(len(of_prompt)))]
        start = len(self._echoed.get(generation, ""))
        offsets += [start + offset for offset in generation.offsets(numbers.start, numbers.stop)]
        chosen += map(of_output.chosen, numbers)

        def tops() -> Iterator[dict[str, float] | None]:
            if echoes:
                yield None
                yield from map(self._top, of_prompt)
            yield from (self._top(of_output[number]) for number in numbers)

        return CompletionLogprobs(
            offsets,
            [self._piece(token_id).text for token_id, _ in chosen],
            [None if value is None else _finite(value) for _, value in chosen],
            lazy_list(tops()) if self._logprobs else None,
        )

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        tops: dict[str, float] = {}
        for token_id, top in ((logprob.token_id, logprob.logprob), *logprob.top[: self._logprobs]):
            name = self._piece(token_id).text
            tops[name] = max(_finite(top), tops.get(name, LOWEST_LOGPROB))
        return tops


class ChatResponder(OpenAIResponder, MessageResponder):
    """Writes answers of /v1/chat/completions."""

    whole_type, event_type = ChatCompletion, ChatCompletionChunk

    def __init__(
        self,
        request: ChatRequest,
        answer_id: str,
        state: AppState,
        counts: Callable[[], TokenCounts],
        adapter: str,
        keep: Callable[[ChatCompletion], None] | None = None,
    ) -> None:
        """Write answers to a request. `keep` is called with one that has ended, before it is sent."""
        super().__init__(request, answer_id, state, counts, adapter)
        self._keep = keep
        self._metadata = UNSET if keep is None else request.metadata or {}
        self._logprobs = bool(request.logprobs)
        self._entry = partial(ChatLogprob.of, pieces=state.pieces, num_top=request.top_logprobs or 0)
        self._shows_reasoning = request.include_reasoning is not False
        self._thoughts: dict[Generation, Thought | None] = {}  # of answers whose thoughts are left out

    def message_events(self, generation: Generation, news: Sequence[MessageEvent]) -> Iterable[ChatCompletionChunk]:
        """See MessageResponder. Log-probabilities come with the first event after their tokens."""
        index = self._index(generation)
        if generation not in self._num_sent:
            yield self._event(ChatChunkChoice(index, Delta(role="assistant", content="")))
        numbers = self._of_shown(generation, self._unsent(generation))
        deltas = [Delta.of(event) for event in news if self._is_shown(event)]
        if not deltas and self._logprobs and numbers:
            deltas = [Delta(content="")]
        logprobs = self._content(generation, numbers)
        for delta in deltas:
            yield self._event(ChatChunkChoice(index, delta, logprobs))
            logprobs = None
        if ended_by := _ended_by(generation):
            yield self._event(ChatChunkChoice(index, Delta(), None, ended_by))

    def _is_shown(self, event: MessageEvent) -> bool:
        return self._shows_reasoning or not isinstance(event, ReasoningDelta)

    def _of_shown(self, generation: Generation, numbers: Sequence[int]) -> Sequence[int]:
        """Return those of an answer's next tokens whose log-probabilities may be shown: none of a thought that is left
        out. Where no token tells what is a thought, none at all.
        """
        if self._shows_reasoning or not self._logprobs:
            return numbers
        if generation not in self._thoughts:
            self._thoughts[generation] = generation.request.params.thought()
        if (thought := self._thoughts[generation]) is None:
            return () if self._tokenizer.chat_format.thinks else numbers
        return [number for number in numbers if thought.push(generation.token_ids[number])]

    def whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> ChatCompletion:
        """See Responder: a chat has one prompt, and its logprobs come once."""
        if self._keep is not None:
            self._keep(self._whole(generations, counts, timing))
        return self._whole(generations, counts, timing)

    def last_events(self, counts: TokenCounts, timing: Timing | None) -> Iterable[Any]:
        """See Responder."""
        if self._keep is not None:
            self._keep(self._whole(sorted(self._num_sent, key=self._index), counts, timing))
        yield from super().last_events(counts, timing)

    def _whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> ChatCompletion:
        """Return the answer. Its lists of log-probabilities are written once."""
        answer: ChatCompletion = super().whole(generations, counts, timing)
        prompt_logprobs = self._prompt_logprobs(generations[0])
        return msgspec.structs.replace(answer, prompt_logprobs=prompt_logprobs, metadata=self._metadata)

    def _whole_choice(self, generation: Generation) -> ChatChoice:
        ended_by = _ended_by(generation)
        assert ended_by is not None
        message = generation.message
        calls = list(map(ChatToolCall.of, message.tool_calls)) or UNSET
        reasoning = message.reasoning if message.reasoning and self._shows_reasoning else UNSET
        content = message.content or (None if calls else "")
        turn = AssistantTurn(content, reasoning_content=reasoning, reasoning=reasoning, tool_calls=calls)
        logprobs = self._content(generation, self._of_shown(generation, range(len(generation.logprobs))))
        return ChatChoice(self._index(generation), turn, logprobs, ended_by)

    def _content(self, generation: Generation, numbers: Sequence[int]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(lazy_list(map(self._entry, map(generation.logprobs.__getitem__, numbers))))


def _ended_by(generation: Generation) -> EndedBy | None:
    """Return how a generation that has not failed has ended, if it has: with calls if the last one is complete."""
    if generation.finish_reason is None:
        return None
    if generation.finish_reason != "stop":
        return "length"
    return "tool_calls" if generation.message.has_complete_calls else "stop"


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN too
