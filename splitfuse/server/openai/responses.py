"""Generations as OpenAI's clients read them: whole answers, and the events of a stream.

It decides what each field of an answer says. It must not know of engines, sockets or errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import TokenLogprob
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest
from splitfuse.text.service import ServedGeneration
from splitfuse.text.token_text import TokenPieces
from splitfuse.text.tokenizer import Detokenizer, Tokenizer

LOWEST_LOGPROB = -9999.0  # instead of minus infinity, which JSON has no number for; OpenAI's does the same

EndedBy = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens`: of the prompts, found in the prefix cache by every choice."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """A prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timing(msgspec.Struct, frozen=True):
    """Seconds from the request's arrival. `queued`: until the first step for it was done; `first_token`: of any choice;
    `gaps`: between a token and the next of its choice, all choices after each other; `steps`: that gave it something;
    `slo_met`: whether all choices were as promised; `phases`: where the time went."""

    queued: float | None
    first_token: float | None
    gaps: list[float]
    steps: int
    cached_tokens: int
    slo_met: bool | None
    phases: dict[LatencyPhase, float]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """An entry for each token; the first token of a prompt has no probability."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer, or its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: EndedBy | None
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """An answer of /v1/completions, and an event of its stream: there, `usage` is null but in the last."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    """A token that was chosen."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """An entry for each token."""

    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer's turn."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: EndedBy


class ChatCompletion(msgspec.Struct, frozen=True):
    """An answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    splitfuse_timing: Timing | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What an event adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One answer's next piece."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: EndedBy | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """An event of a stream of /v1/chat/completions; `usage` is null but in the last."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    splitfuse_timing: Timing | UnsetType = UNSET


@dataclass(frozen=True)
class Heading:
    """What all events of an answer begin with."""

    id: str
    created: int
    model: str


class Answer(ABC):
    """One request's answer, whole or in events."""

    def __init__(self, heading: Heading, tokenizer: Tokenizer, pieces: TokenPieces, *, n: int, include_usage: bool):
        self.heading = heading
        self._tokenizer = tokenizer
        self._piece = pieces.of
        self._n = n
        self._include_usage = include_usage
        self._num_told: dict[ServedGeneration, int] = {}  # tokens whose logprobs are out

    @abstractmethod
    def whole(self, generations: Sequence[ServedGeneration], usage: Usage, timing: Timing | None) -> Any:
        """The answer at once; `generations` in the order of prompts and choices, all ended."""

    @abstractmethod
    def events(self, generation: ServedGeneration, text: str) -> Iterator[Any]:
        """What `text`, new in a generation, or its end, is told by."""

    @abstractmethod
    def last_event(self, usage: Usage | None, timing: Timing | None) -> Any:
        """The one without choices, in which numbers come."""

    def _index(self, generation: ServedGeneration) -> int:
        return generation.index * self._n + generation.choice

    def _untold(self, generation: ServedGeneration) -> range:
        """The tokens, by number, that are certain now and were not told of yet. From here on they are."""
        start = self._num_told.get(generation, 0)
        self._num_told[generation] = max(start, generation.num_released)
        return range(start, self._num_told[generation])

    @property
    def _usage_of_events(self) -> UnsetType | None:
        return None if self._include_usage else UNSET


class CompletionAnswer(Answer):
    """Of /v1/completions. `prompts` are as they were sent."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[str | list[int]],
        heading: Heading,
        tokenizer: Tokenizer,
        pieces: TokenPieces,
    ) -> None:
        super().__init__(heading, tokenizer, pieces, n=request.n or 1, include_usage=request.include_usage)
        self._echo = bool(request.echo)
        self._logprobs = request.logprobs
        self._hides_output = request.max_tokens == 0
        self._returns_ids = bool(request.return_token_ids)
        self._prompts = prompts
        self._echoed: dict[ServedGeneration, str] = {}

    def whole(self, generations: Sequence[ServedGeneration], usage: Usage, timing: Timing | None) -> Completion:
        """See Answer."""
        choices = [self._choice(generation, generation.text) for generation in generations]
        return self._make(choices, usage, timing)

    def events(self, generation: ServedGeneration, text: str) -> Iterator[Completion]:
        """See Answer."""
        choice = self._choice(generation, text)
        if choice.text or choice.finish_reason or choice.token_ids:
            yield self._make([choice], self._usage_of_events, None)

    def last_event(self, usage: Usage | None, timing: Timing | None) -> Completion:
        """See Answer."""
        return self._make([], UNSET if usage is None else usage, timing)

    def _make(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, timing: Timing | None
    ) -> Completion:
        head = self.heading
        return Completion(
            head.id,
            head.created,
            head.model,
            choices,
            usage=usage,
            splitfuse_timing=UNSET if timing is None else timing,
        )

    def _choice(self, generation: ServedGeneration, text: str) -> CompletionChoice:
        before, entries = "", _Entries(self._piece, self._logprobs or 0)
        is_first = generation not in self._num_told
        told = self._untold(generation)
        if self._echo and is_first:
            before = self._echoed[generation] = self._prompt_text(generation)
            if self._logprobs is not None:
                self._add_prompt(entries, generation)
        if self._hides_output:
            text = ""
        elif self._logprobs is not None:
            start = len(self._echoed.get(generation, ""))
            for number, offset in zip(told, generation.offsets(told.start, told.stop), strict=True):
                entries.add(start + offset, generation.logprobs[number])
        logprobs = None if self._logprobs is None else entries.logprobs()
        ids: list[int] | UnsetType = UNSET
        if self._returns_ids:
            ids = [] if self._hides_output else generation.take_ids()
        return CompletionChoice(self._index(generation), before + text, logprobs, _ended_by(generation), ids)

    def _prompt_text(self, generation: ServedGeneration) -> str:
        prompt = self._prompts[generation.index]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _add_prompt(self, entries: _Entries, generation: ServedGeneration) -> None:
        token_ids = generation.prompt.token_ids
        detokenizer = Detokenizer(self._tokenizer)
        detokenizer.push(token_ids)
        offsets = [0, *detokenizer.lengths]
        entries.add_unknown(0, token_ids[0])
        for number, logprob in enumerate(generation.prompt_logprobs, start=1):
            entries.add(offsets[number], logprob)


class _Entries:
    """The columns of CompletionLogprobs, as they grow."""

    def __init__(self, piece: Any, num_top: int) -> None:
        self._piece = piece
        self._num_top = num_top
        self._offsets: list[int] = []
        self._tokens: list[str] = []
        self._values: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []

    def add(self, offset: int, logprob: TokenLogprob) -> None:
        token, value = self._piece(logprob.token_id).text, _finite(logprob.logprob)
        self._offsets.append(offset)
        self._tokens.append(token)
        self._values.append(value)
        tops: dict[str, float] = {}
        for token_id, top in ((logprob.token_id, logprob.logprob), *logprob.top[: self._num_top]):
            name = self._piece(token_id).text
            tops[name] = max(_finite(top), tops.get(name, LOWEST_LOGPROB))
        self._tops.append(tops)

    def add_unknown(self, offset: int, token_id: int) -> None:
        self._offsets.append(offset)
        self._tokens.append(self._piece(token_id).text)
        self._values.append(None)
        self._tops.append(None)

    def logprobs(self) -> CompletionLogprobs:
        tops = self._tops if self._num_top else None
        return CompletionLogprobs(self._offsets, self._tokens, self._values, tops)


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    def __init__(self, request: ChatRequest, heading: Heading, tokenizer: Tokenizer, pieces: TokenPieces) -> None:
        super().__init__(heading, tokenizer, pieces, n=request.n or 1, include_usage=request.include_usage)
        self._logprobs = bool(request.logprobs)
        self._num_top = request.top_logprobs or 0

    def whole(self, generations: Sequence[ServedGeneration], usage: Usage, timing: Timing | None) -> ChatCompletion:
        """See Answer."""
        choices = []
        for generation in generations:
            ended_by = _ended_by(generation)
            assert ended_by is not None
            message = AssistantMessage(generation.text)
            choices.append(ChatChoice(self._index(generation), message, self._new_logprobs(generation), ended_by))
        head, told = self.heading, UNSET if timing is None else timing
        return ChatCompletion(head.id, head.created, head.model, choices, usage, splitfuse_timing=told)

    def events(self, generation: ServedGeneration, text: str) -> Iterator[ChatCompletionChunk]:
        """See Answer."""
        index = self._index(generation)
        if generation not in self._num_told:
            yield self._chunk(ChatChunkChoice(index, Delta(role="assistant", content="")))
        logprobs = self._new_logprobs(generation)
        if text or (logprobs and logprobs.content):
            yield self._chunk(ChatChunkChoice(index, Delta(content=text), logprobs))
        if ended_by := _ended_by(generation):
            yield self._chunk(ChatChunkChoice(index, Delta(), None, ended_by))

    def last_event(self, usage: Usage | None, timing: Timing | None) -> ChatCompletionChunk:
        """See Answer."""
        head = self.heading
        return ChatCompletionChunk(
            head.id,
            head.created,
            head.model,
            [],
            usage=UNSET if usage is None else usage,
            splitfuse_timing=UNSET if timing is None else timing,
        )

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        head = self.heading
        return ChatCompletionChunk(head.id, head.created, head.model, [choice], usage=self._usage_of_events)

    def _new_logprobs(self, generation: ServedGeneration) -> ChatLogprobs | None:
        told = self._untold(generation)
        if not self._logprobs:
            return None
        return ChatLogprobs([self._entry(generation.logprobs[number]) for number in told])

    def _entry(self, logprob: TokenLogprob) -> ChatLogprob:
        tops = [self._token(token_id, value) for token_id, value in logprob.top[: self._num_top]]
        chosen = self._token(logprob.token_id, logprob.logprob)
        return ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, tops)

    def _token(self, token_id: int, logprob: float) -> TopLogprob:
        piece = self._piece(token_id)
        return TopLogprob(piece.text, _finite(logprob), list(piece.utf8))


def _ended_by(generation: ServedGeneration) -> EndedBy | None:
    """Of a generation that has not failed."""
    if generation.finish_reason is None:
        return None
    return "stop" if generation.finish_reason == "stop" else "length"


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN too
