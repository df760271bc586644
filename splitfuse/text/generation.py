"""Builds the text of one answer as its tokens come: detokenizes, watches for stop strings, keeps times.

Every text that a caller reads comes from here, whether through a pipeline, the command line or a server. One Generation
per choice holds all state of its text: requests share nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property

from splitfuse.core.plan import DraftKind, Logprobs
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.stream import Stream
from splitfuse.text.chat_formats.formats import Channels
from splitfuse.text.chat_formats.message import AssistantMessage, ContentDelta, MessageEvent, ToolCallStart
from splitfuse.text.chat_formats.parser import BODY_MARKERS, HEADER_BEGINS, MessageSource
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.responses import Timings
from splitfuse.text.stop_strings import StopStrings
from splitfuse.text.tokenizer import Detokenizer, Tokenizer


class Generation:
    """Grows one choice of a request: the text that may be shown, the tokens behind it, and how it ended."""

    def __init__(
        self,
        request_id: str,
        request: PreparedRequest,
        tokenizer: Tokenizer,
        *,
        index: int = 0,
        choice: int = 0,
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.index = index
        """Position of the prompt in a call with several."""
        self.choice = choice
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs = Logprobs()
        self.prompt_logprobs = Logprobs()
        self.values: tuple[float, ...] = ()
        """Numbers that PoolingParams ask for, once it has ended."""
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.error: str | None = None
        self.retry_after: float | None = None
        """Seconds after which a request that was refused may be accepted; infinity for never."""
        self.num_computed_tokens = 0
        """Number of tokens that were generated, those of a stop string among them, which are not part of the answer."""
        self.num_cached_tokens = 0
        """Number of prompt tokens found in the prefix cache."""
        self.num_steps = 0
        """Number of steps that computed a part of the request."""
        self.num_drafted_tokens, self.num_accepted_tokens = Counter[DraftKind](), Counter[DraftKind]()
        """Numbers of tokens that were guessed before they were chosen, and of those that were right, by kind."""
        self.slo_met: bool | None = None
        """Flag of an SLO that was met so far; None without one."""
        self.timings = Timings(time.monotonic())
        self.stream: Stream | None = None
        """Stream of its outputs, if the engine is behind an EngineClient."""
        context = request.token_ids if request.continues else ()
        self._source = request.message or MessageSource()
        self._parser = self._source.parser()
        self._events: list[MessageEvent] | None = None  # that `read` has returned
        markers = self._source.chat_format.markers
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids=context, shown_tokens=markers)
        self._stop_strings = StopStrings(request.params.stop)
        self._num_taken = 0  # characters of `text` that `take` has returned
        self._num_ids_taken = 0  # tokens that `take_ids` has returned
        self._thought = request.params.thought()
        self._unwatched = 0  # characters of thoughts, headers and the first min_tokens tokens: no stop strings there
        self._has_headers = isinstance(self._source.chat_format.calls, Channels)
        self._in_header = False
        self._second_call = None if self._source.parallel else self._source.parser()

    @property
    def first_step(self) -> float | None:
        """Return the time at which its first step began, on the clock of `timings`, if there is a stream."""
        return None if self.stream is None else self.stream.began

    def push(self, output: RequestOutput, stop: Callable[[int], object]) -> bool:
        """Process the output of a step, and return whether there is new text or the generation has ended.

        If the output completes a stop string, which the engine cannot see, `finish_reason` becomes STOP; `token_ids`,
        `logprobs` and `timings` end with the token that completed the text before it, and `stop` is called with their
        number; likewise if it begins a call after the only one that the answer may have.
        """
        now, length = time.monotonic(), len(self.text)
        self.num_steps += 1
        self.slo_met = output.slo_met
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.extend(output.prompt_logprobs)
        self.values = output.values
        self.num_cached_tokens = output.num_cached_tokens
        if output.num_drafted:
            self.num_drafted_tokens[output.draft_kind] += output.num_drafted
            self.num_accepted_tokens[output.draft_kind] += len(output.token_ids) - 1
        self.timings.tokens += [now] * len(output.token_ids)
        for count, token_id in enumerate(output.token_ids, start=len(self.token_ids) - len(output.token_ids) + 1):
            new = self._watch(token_id)
            self.text += new
            if self.finish_reason is None and self._calls_another(new):
                self.finish_reason = FinishReason.STOP
                self._keep(count)
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and output.finish_reason is not None:
            self.finish_reason, self.error = output.finish_reason, output.error
            self.retry_after = output.retry_after
            self.text += self._rest()
        if self.finish_reason is not None:
            self.timings.finished = now
        if self.finish_reason is not None and output.finish_reason is None:
            stop(len(self.token_ids))
        return self.finish_reason is not None or len(self.text) > length

    def fail(self, error: str) -> None:
        """End it with an error: the text of its tokens cannot be had."""
        self.finish_reason, self.error, self.timings.finished = FinishReason.ERROR, error, time.monotonic()

    def end(self, reason: FinishReason) -> None:
        """End it with the text that was held back, after its request was ended from outside."""
        self.finish_reason, self.timings.finished = reason, time.monotonic()
        self.text += self._rest()

    def take(self) -> str:
        """Return the text that has come since the last call."""
        new = self.text[self._num_taken :]
        self._num_taken = len(self.text)
        return new

    def read(self, text: str, *, is_last: bool = True) -> list[MessageEvent]:
        """Return what `text`, which `take` has returned, adds to the parts of the answer, and its end, if it has ended
        and this `is_last` of its texts. Call it with each text once.
        """
        events = self._parser.feed(text)
        if is_last and self.finish_reason is not None:
            rest = self._parser.finish()
            if self._source.calls_only and self.finish_reason is not FinishReason.STOP:
                rest = [event for event in rest if not isinstance(event, ContentDelta)]
            events += rest
        if not self._source.parallel:
            events = [event for event in events if getattr(event, "index", 0) == 0]
        self._events = self._events or []
        self._events += events
        return events

    @cached_property
    def message(self) -> AssistantMessage:
        """Return the parts of an answer that has ended."""
        assert self.finish_reason is not None
        if self._events is None:
            self.read(self.text)
        return AssistantMessage.of(self._events or ())

    @property
    def num_reasoning_tokens(self) -> int:
        """Return the number of tokens of the thought, if the request says by which tokens the model marks it."""
        return 0 if self._thought is None else self._thought.num_tokens

    @property
    def num_released(self) -> int:
        """Return the number of tokens that surely are part of the answer: those behind its text, at the end all."""
        if self.finish_reason is not None:
            return len(self.token_ids)
        return min(self._detokenizer.num_tokens(len(self.text)), len(self.token_ids))

    def take_ids(self) -> list[int]:
        """Return the tokens that have become part of the answer since the last call; the text of the last ones may
        still be held back.
        """
        start = self._num_ids_taken
        self._num_ids_taken = self.num_released if self.request.params.stop else len(self.token_ids)
        return self.token_ids[start : self._num_ids_taken]

    def offsets(self, start: int, end: int) -> list[int]:
        """Return, for tokens `start` to `end` - 1, the number of characters of the answer before each."""
        lengths = self._detokenizer.lengths
        return [lengths[i - 1] if i else 0 for i in range(start, end)]

    def _watch(self, token_id: int) -> str:
        """Return the text that one more token releases."""
        self.num_computed_tokens += 1
        text = self._detokenizer.push_one(token_id)
        is_answer = self._thought is None or self._thought.push(token_id)
        is_answer = not self._is_header(text) and is_answer
        if not is_answer or len(self._detokenizer.lengths) <= self.request.params.min_tokens:
            held = self._stop_strings.finish()
            self._unwatched += len(text)
            return held + text
        released, self.stop_string = self._stop_strings.push(text)
        if self.stop_string is not None:
            self._stop()
        return released

    def _is_header(self, text: str) -> bool:
        """Return whether `text`, the next token's, belongs to the header or the end of a message of a channel, which no
        client sees.
        """
        if self._has_headers and text.endswith((*HEADER_BEGINS, *BODY_MARKERS)):
            self._in_header = text.endswith(HEADER_BEGINS)
            return True
        return self._in_header

    def _calls_another(self, text: str) -> bool:
        """Return whether the answer, of which `text` is new, has begun a further call that it may not have."""
        events = [] if self._second_call is None else self._second_call.feed(text)
        return any(isinstance(event, ToolCallStart) and event.index > 0 for event in events)

    def _rest(self) -> str:
        rest = self._detokenizer.finish()
        if self.finish_reason is FinishReason.ERROR:
            return rest + self._stop_strings.finish()
        released, self.stop_string = self._stop_strings.push(rest)
        if self.stop_string is not None:
            self._stop()
            return released
        return released + self._stop_strings.finish()

    def _stop(self) -> None:
        """End with the text before the stop string and the tokens that make it."""
        self.finish_reason = FinishReason.STOP
        count = self._detokenizer.num_tokens(self._unwatched + self._stop_strings.length)
        self._keep(max(count, self.request.params.min_tokens))

    def _keep(self, count: int) -> None:
        """Keep the first tokens of those that were generated."""
        self.logprobs.truncate(count)
        del self.token_ids[count:], self.timings.tokens[count:]
