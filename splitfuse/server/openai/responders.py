"""Writes answers in OpenAI's dialect: whole ones, and the events of a stream.

Decides what each field of an answer says.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.plan import TokenLogprob
from splitfuse.core.reasoning import Thought
from splitfuse.server.context import TokenCounts
from splitfuse.server.dialect import lazy_list
from splitfuse.server.explain import Timing
from splitfuse.server.generate import MessageResponder, Responder
from splitfuse.server.openai.answers import (
    LOWEST_LOGPROB,
    AssistantTurn,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatToolCall,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    EndedBy,
    PromptLogprob,
    PromptLogprobs,
    Usage,
    finite,
)
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest
from splitfuse.server.state import AppState
from splitfuse.text.chat_formats.message import (
    MessageEvent,
    ReasoningDelta,
)
from splitfuse.text.generation import Generation
from splitfuse.text.tokenizer import Detokenizer


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
            row = {str(each.token_id): PromptLogprob(finite(each.logprob), None, self._piece(each.token_id).text)}
            for rank, (token_id, value) in enumerate(each.top[:count], 1):
                row[str(token_id)] = PromptLogprob(finite(value), rank, self._piece(token_id).text)
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
            [None if value is None else finite(value) for _, value in chosen],
            lazy_list(tops()) if self._logprobs else None,
        )

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        tops: dict[str, float] = {}
        for token_id, top in ((logprob.token_id, logprob.logprob), *logprob.top[: self._logprobs]):
            name = self._piece(token_id).text
            tops[name] = max(finite(top), tops.get(name, LOWEST_LOGPROB))
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
