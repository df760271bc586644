"""Text in, text out over any EngineClient, for many callers in one event loop: what TextGenerator is for a thread.

It decides what runs off the event loop (long texts, templates), and turns an engine's outputs into text as they come.
What a caller reads is what `pipeline` gives, token for token. It must not know of HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from splitfuse.core.request import DEFAULT_SCHEDULING, FinishReason, RequestOutput, SchedulingOptions
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineClient, Stream
from splitfuse.engine.messages import Add
from splitfuse.errors import InvalidRequestError, TokenizerError
from splitfuse.text.aiter import merged
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.generation import Generation, Message, Prompt
from splitfuse.text.tokenizer import Tokenizer

_NUM_THREADS = 2  # for texts and templates: the cores belong to the engines
_SHORT = 1024  # characters that are encoded sooner than a thread is reached

_Result = TypeVar("_Result")


class ServedGeneration(Generation):
    """A Generation that also counts what it took: passes, and the moment the first one began."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        choice: int = 0,
        index: int = 0,
    ) -> None:
        super().__init__(request_id, prompt, params, tokenizer, choice=choice)
        self.index = index
        """Of its prompt, in a call with several."""
        self.num_steps = 0
        self.first_step: float | None = None  # on the clock of `timings`
        self.slo_met: bool | None = None
        """Whether what was promised was kept so far; None if nothing was."""
        self.sent: float | None = None
        """When it went to the engine, on the same clock."""
        self.stream: Stream | None = None
        self.detokenizing = 0.0
        """Seconds, since the engine had ended it."""
        self._num_ids_taken = 0

    @property
    def left(self) -> float:
        """When nothing more was to come of the engine, or was wanted; infinity until then."""
        if self.stream is not None:
            return self.stream.left
        return math.inf if self.timings.finished is None else self.timings.finished

    def push(self, output: RequestOutput) -> None:
        """As Generation.push: an output is a step that computed a part of the request."""
        began = time.monotonic()
        self.num_steps += 1
        self.slo_met = output.slo_met
        super().push(output)
        if self.left <= began:
            self.detokenizing += time.monotonic() - began

    @property
    def num_released(self) -> int:
        """Tokens that are part of the answer whatever comes: those behind the text shown so far, at the end all."""
        if self.finish_reason is not None:
            return len(self.token_ids)
        return min(self._detokenizer.num_tokens(len(self.text)), len(self.token_ids))

    def take_ids(self) -> list[int]:
        """The tokens that have become part of the answer, whatever comes, since the last call; the text of the last
        ones may still be held back.
        """
        start, self._num_ids_taken = self._num_ids_taken, self.num_released if self.params.stop else len(self.token_ids)
        return self.token_ids[start : self._num_ids_taken]

    def offsets(self, start: int, end: int) -> list[int]:
        """For tokens `start` to `end` - 1, the number of characters of the answer before each."""
        lengths = self._detokenizer.lengths
        return [lengths[i - 1] if i else 0 for i in range(start, end)]


class TextService:
    """Prompts to generations over one EngineClient. All methods belong to the client's event loop."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="text")

    async def off_loop(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, done on one of a few threads; what waits there meanwhile is the caller alone."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encode(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> Prompt:
        """A prompt of text or of token ids. Raises InvalidRequestError if it is empty or no valid text."""
        if not isinstance(prompt, str):
            return Prompt(tuple(prompt))
        if not prompt:
            raise InvalidRequestError("the prompt is empty: it must have at least one character", parameter="prompt")

        def encoded() -> Prompt:
            return Prompt(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

        return encoded() if len(prompt) <= _SHORT else await self.off_loop(encoded)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation through the model's chat template; `variables` are the template's own switches.

        Raises InvalidRequestError if the model has no template, or if the template refuses, takes too long or breaks
        the rules.
        """

        def encoded() -> Prompt:
            template = self._chat_template()
            try:
                text = template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)
            except TokenizerError as error:  # the template's fault or the messages': other messages may do
                raise InvalidRequestError(f"the model's chat template failed: {error}", parameter="messages") from error
            return Prompt(self.tokenizer.encode(text, add_special_tokens=False), continues=False)

        return await self.off_loop(encoded)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise InvalidRequestError if the model cannot honour the request, EngineDiedError if none was ever loaded."""
        self.client.info.limits.check(prompt.token_ids, params)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        scheduling: SchedulingOptions = DEFAULT_SCHEDULING,
    ) -> AsyncGenerator[tuple[ServedGeneration, str], None]:
        """Each of the `params.n` choices with its new text, as it comes, and a last time when it ends, perhaps without.

        Close the iterator (`contextlib.aclosing`) or read it to its end: closing aborts what is unfinished.
        `request_id` must be unique. Iterating raises InvalidRequestError, EngineDiedError; a request that failed alone
        has the finish_reason ERROR and says why.
        """
        return self.run(self.begin([(prompt, params)], request_id=request_id), scheduling=scheduling)

    def begin(self, requests: Sequence[tuple[Prompt, SamplingParams]], *, request_id: str) -> list[ServedGeneration]:
        """The generations of several prompts and all their choices, for `run`. Nothing is computed yet."""
        return [
            ServedGeneration(
                f"{request_id}-{index}.{choice}", prompt, params, self.tokenizer, choice=choice, index=index
            )
            for index, (prompt, params) in enumerate(requests)
            for choice in range(params.n)
        ]

    def run(
        self,
        generations: Sequence[ServedGeneration],
        *,
        scheduling: SchedulingOptions = DEFAULT_SCHEDULING,
        each_token: bool = False,
    ) -> AsyncGenerator[tuple[ServedGeneration, str], None]:
        """As `generate`, for generations that `begin` has made. With `each_token` they come when they have a new token,
        with or without new text.
        """
        choices = [self._choice(generation, scheduling, each_token=each_token) for generation in generations]
        return choices[0] if len(choices) == 1 else merged(choices)

    async def _choice(
        self, generation: ServedGeneration, scheduling: SchedulingOptions, *, each_token: bool
    ) -> AsyncGenerator[tuple[ServedGeneration, str], None]:
        sent = generation.sent = time.monotonic()
        request = Add(
            generation.request_id, generation.prompt.token_ids, generation.params, generation.choice, scheduling, sent
        )
        try:
            async with self.client.open(request) as stream:
                generation.stream = stream
                async for output in stream:
                    length = len(generation.text)
                    generation.first_step = stream.began
                    generation.push(output)
                    has_ended = generation.finish_reason is not None
                    if has_ended and output.finish_reason is None:  # a stop string: only we can see it
                        stream.stop(len(generation.token_ids))
                    if has_ended or len(generation.text) > length or (each_token and output.token_ids):
                        yield generation, generation.take()
                    if has_ended:
                        return
        finally:
            if generation.finish_reason is None:
                generation.end(FinishReason.ABORT)

    def _chat_template(self) -> ChatTemplate:
        """Compiled at its first use."""
        if self._template is None:
            if self.tokenizer.chat_template is None:
                raise InvalidRequestError("the model has no chat template: use completions with plain prompts")
            self._template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
        return self._template
