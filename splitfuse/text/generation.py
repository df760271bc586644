"""Text in, text out over an engine: encode, run, detokenize, watch for stop strings, account.

Every text a person reads comes from here, whether through a pipeline, the command line or a server. One Generation per
choice keeps all state of its text: nothing is shared between requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splitfuse.core.plan import TokenLogprob
from splitfuse.core.request import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.responses import Timings
from splitfuse.text.stop_strings import StopStrings
from splitfuse.text.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from splitfuse.engine.engine import Engine

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What goes into the engine, and whether the answer continues the prompt's text or stands alone (as in a chat)."""

    token_ids: tuple[int, ...]
    continues: bool = True


class Generation:
    """One choice of one request, as it grows: the text that may be shown, the tokens behind it, and how it ended."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        choice: int = 0,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.choice = choice
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.error: str | None = None
        self.retry_after: float | None = None  # it was not taken: seconds after which it may be
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache
        self.timings = Timings(time.monotonic())
        context = prompt.token_ids if prompt.continues else ()
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids=context)
        self._stop_strings = StopStrings(params.stop)
        self._num_taken = 0  # characters of `text` that `take` has given out
        self._unwatched = 0  # characters of the first min_tokens tokens, in which stop strings do not count

    def push(self, output: RequestOutput) -> None:
        """Take in what a step gave. If a stop string is now complete, `finish_reason` is set to STOP here, and
        `token_ids`, `logprobs` and `timings` end with the token that completed the text before it.
        """
        now = time.monotonic()
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.num_cached_tokens = output.num_cached_tokens
        self.timings.tokens += [now] * len(output.token_ids)
        self.text += "".join(self._watch(token_id) for token_id in output.token_ids if self.finish_reason is None)
        if self.finish_reason is None and output.finish_reason is not None:
            self.finish_reason, self.error = output.finish_reason, output.error
            self.retry_after = output.retry_after
            self.text += self._rest()
        if self.finish_reason is not None:
            self.timings.finished = now

    def end(self, reason: FinishReason) -> None:
        """The request was ended from outside: add what was still held back."""
        self.finish_reason, self.timings.finished = reason, time.monotonic()
        self.text += self._rest()

    def take(self) -> str:
        """The text that has come since the last call."""
        new = self.text[self._num_taken :]
        self._num_taken = len(self.text)
        return new

    def _watch(self, token_id: int) -> str:
        """The text that one more token releases."""
        text = self._detokenizer.push([token_id])
        if len(self._detokenizer.lengths) <= self.params.min_tokens:
            self._unwatched += len(text)
            return text
        released, self.stop_string = self._stop_strings.push(text)
        if self.stop_string is not None:
            self._stop()
        return released

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
        """End with the text before the stop string, and with the tokens that it takes."""
        self.finish_reason = FinishReason.STOP
        count = self._detokenizer.num_tokens(self._unwatched + self._stop_strings.length)
        count = max(count, self.params.min_tokens)
        for items in (self.token_ids, self.logprobs, self.timings.tokens):
            del items[count:]


class TextGenerator:
    """Prompts to generations over one engine, many at once. One thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._generations: dict[str, Generation] = {}  # unfinished
        self._news: dict[str, Generation] = {}  # those with something to tell to whoever streams them
        self._num_requests = 0

    def encode(self, prompt: str | Sequence[int]) -> Prompt:
        """A prompt of text or of token ids. Raises InvalidRequestError if it is neither, or empty."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError(
                    "the prompt is empty: it must have at least one character", parameter="prompt"
                )
            return Prompt(self.tokenizer.encode(prompt))
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
        if is_list and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return Prompt(tuple(prompt))
        raise InvalidRequestError(f"a prompt is a text or a list of token ids, not {prompt!r:.80}", parameter="prompt")

    def encode_chat(self, messages: str | Sequence[Message]) -> Prompt:
        """A conversation, or a single user's turn, through the model's chat template. Raises InvalidRequestError."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
        return Prompt(self.tokenizer.encode(template.render(messages), add_special_tokens=False), continues=False)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise InvalidRequestError if `add` would."""
        self.engine.check_request(prompt.token_ids, params)

    def add(self, prompt: Prompt, params: SamplingParams) -> list[Generation]:
        """Accept a request: one Generation for each of its `params.n` choices. Raises InvalidRequestError, and
        nothing is changed, if it cannot be honoured.
        """
        generations: list[Generation] = []
        number, self._num_requests = self._num_requests, self._num_requests + 1
        try:
            for choice in range(params.n):
                request_id = f"text-{number}.{choice}"
                self.engine.add_request(request_id, prompt.token_ids, params, choice=choice)
                generations.append(Generation(request_id, prompt, params, self.tokenizer, choice=choice))
        except InvalidRequestError:
            for generation in generations:
                self.engine.abort(generation.request_id)
            raise
        self._generations |= {generation.request_id: generation for generation in generations}
        return generations

    def stream(self, generations: Iterable[Generation]) -> Iterator[tuple[Generation, str]]:
        """Run until all of these have ended: each with its new text, step by step; a last one when it ends, perhaps
        empty. Several streams may take turns: a step for one is a step for all.

        If the caller stops listening, by an error or Ctrl-C too, what is unfinished is aborted and its blocks are free.
        """
        awaited = {
            g.request_id: g for g in generations if g.request_id in self._generations or g.request_id in self._news
        }
        try:
            while awaited:
                for request_id in [name for name in self._news if name in awaited]:
                    generation = self._news.pop(request_id)
                    if generation.finish_reason is not None:
                        del awaited[request_id]
                    yield generation, generation.take()
                if awaited:
                    self._step()
        finally:
            for generation in awaited.values():
                self.abort(generation)

    def _step(self) -> None:
        for output in self.engine.step():
            generation = self._generations.get(output.request_id)
            if generation is None:
                continue
            length = len(generation.text)
            generation.push(output)
            if generation.finish_reason is not None:
                del self._generations[generation.request_id]
                if output.finish_reason is None:  # a stop string: only we can see it
                    count = len(generation.token_ids)
                    self.engine.finish(generation.request_id, FinishReason.STOP, num_tokens=count)
            if len(generation.text) > length or generation.finish_reason is not None:
                self._news[generation.request_id] = generation
        for request_id in [name for name in self._generations if not self.engine.is_unfinished(name)]:
            generation = self._news[request_id] = self._generations.pop(request_id)
            generation.end(FinishReason.ABORT)  # by somebody who spoke to the engine directly

    def abort(self, generation: Generation) -> None:
        """End a generation that nobody waits for any more. One that has ended is left as it is."""
        self.engine.abort(generation.request_id)
        self._news.pop(generation.request_id, None)
        if self._generations.pop(generation.request_id, None):
            generation.end(FinishReason.ABORT)


def clamp_max_tokens(params: SamplingParams, prompt: Prompt, most: int, limit: int) -> SamplingParams:
    """`params` with max_tokens set to `most`, or to what a model of `limit` tokens leaves after the prompt if that is
    less.
    """
    room = max(limit - len(prompt.token_ids), 1)
    return replace(params, max_tokens=max(min(most, room), params.min_tokens))
