"""Turns text into text with any EngineClient, for many callers in one event loop: what TextGenerator is for a thread.

Two processes render templates and tokenize all texts, one for short and one for long texts, and two more compile
grammars (sandbox.py); threads handle large bodies and answers. The event loop turns an engine's outputs into text as
they come. What a caller reads equals what `pipeline` gives, token for token.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar, copy_context
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import DEFAULT_SCHEDULING, SchedulingOptions
from splitfuse.engine.client import EngineClient
from splitfuse.engine.memory import give_back_memory
from splitfuse.engine.messages import Add
from splitfuse.engine.stream import Stream
from splitfuse.errors import InvalidRequestError, SplitfuseError, TokenizerError
from splitfuse.text.chat_options import CHAT, ChatOptions
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import GREEDY, Message, PreparedRequest, PromptEncoder
from splitfuse.text.sandbox import SECONDS, Sandbox, StoppedError
from splitfuse.text.tokenizer import Tokenizer

_NUM_THREADS = 2  # for large bodies and answers: the cores belong to the engines
_NUM_COMPILERS = 2  # processes for forms: one more than a hostile client can take
_PAUSE = 1.0  # seconds between two times that memory is given back
_SHORT = 16384  # characters of a text that takes a few milliseconds
_SHORT_SECONDS = 0.5  # of computing time: what takes longer is done again where the long texts are

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Client whose texts the running task handles: clients take turns."""

_Result = TypeVar("_Result")
Pause = Callable[[], Awaitable[object]]
"""Function whose result is awaited before more text is taken."""
Take = Callable[[Generation, str], Pause | None]
"""Function that takes the new text of a generation."""


class TextService:
    """Generates text with one EngineClient. All methods run in the client's event loop."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="text")
        self.is_starting = False
        self._gives_back = False
        self._short = _Lane(tokenizer, seconds=_SHORT_SECONDS)
        self._long = _Lane(tokenizer)
        self._grammars = _Lane(tokenizer, num_processes=_NUM_COMPILERS)  # where a hostile one holds up no text
        self._lanes = (self._short, self._long, self._grammars)

    async def start(self) -> None:
        """Start the client's engines and the process for short texts, together. `is_starting` until all are ready.

        Raises the error of the first part that fails, such as TokenizerError for a chat template that does not compile.
        """
        self.is_starting = True
        await asyncio.gather(self._short.run(lambda _: self._short.sandboxes[0].start()), self.client.start())
        self.is_starting = False

    @property
    def num_ended_processes(self) -> int:
        """Return how many processes for texts were ended at a limit, or killed by others."""
        return sum(sandbox.num_ended for lane in self._lanes for sandbox in lane.sandboxes)

    def close(self) -> None:
        """End the processes for texts."""
        for lane in self._lanes:
            for sandbox in lane.sandboxes:
                sandbox.close()

    async def off_loop(self, work: Callable[[], _Result]) -> _Result:
        """Return the result of `work`, which runs on one of a few threads, in the context of its caller, while the
        event loop continues.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, work)

    def give_back_memory(self) -> None:
        """Return freed memory to the system soon, after a large request has ended."""
        if not self._gives_back:
            self._gives_back = True
            asyncio.get_running_loop().call_later(_PAUSE, self._give_back_now)

    def _give_back_now(self) -> None:
        self._gives_back = False
        self._threads.submit(give_back_memory)

    async def encode(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        add_special_tokens: bool = True,
        max_model_len: int | None = None,
    ) -> PreparedRequest:
        """Return the request for a text or token ids. Raises InvalidRequestError if it is empty or no valid text, or
        PromptTooLongError, before all of it is read, if it surely exceeds `max_model_len` tokens.
        """

        def encoded(encoder: PromptEncoder) -> PreparedRequest:
            return encoder.encode(prompt, params, add_special_tokens=add_special_tokens, max_model_len=max_model_len)

        if not isinstance(prompt, str):
            return encoded(self._short.encoders[0])  # token ids, which no process reads
        return await self._run(self._lane(prompt), encoded)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams = GREEDY,
        options: ChatOptions = CHAT,
        *,
        add_special_tokens: bool = False,
        max_model_len: int | None = None,
    ) -> PreparedRequest:
        """Return the request for a conversation.

        Raises InvalidRequestError if the model has no template, or if the template refuses, takes too long or breaks
        the rules, PromptTooLongError as `encode`.
        """
        if self.tokenizer.chat_template is None:
            raise InvalidRequestError("the model has no chat template: use completions with plain prompts")

        def encoded(encoder: PromptEncoder) -> PreparedRequest:
            return encoder.encode_chat(
                messages, params, options, add_special_tokens=add_special_tokens, max_model_len=max_model_len
            )

        try:
            return await self._run(self._lane(messages, options.variables), encoded)
        except TokenizerError as error:  # the template's fault or the messages': others may work
            raise InvalidRequestError(f"the model's chat template failed: {error}", parameter="messages") from error

    async def compile(self, params: SamplingParams, options: ChatOptions = CHAT) -> SamplingParams:
        """See PromptEncoder.compile."""
        needs_calls = options.tool_choice.mode == "required" or any(tool.strict for tool in options.tools)
        if params.structured_outputs is None and not needs_calls:
            return params
        return await self._grammars.run(lambda encoder: encoder.compile(params, options))

    async def _run(self, lane: _Lane, work: Callable[[PromptEncoder], _Result]) -> _Result:
        """Return the result of `work` in a lane. What takes long among the short texts is done again in the other lane:
        none of them waits for it.
        """
        try:
            return await lane.run(work)
        except SplitfuseError as error:
            if lane is self._long or not isinstance(error.__cause__, StoppedError):
                raise
        return await self._long.run(work)

    def _lane(self, *content: Any) -> _Lane:
        """Return the lane for texts of this length, so that short ones never wait for long ones."""
        return self._short if _size(content, _SHORT) <= _SHORT else self._long

    def begin(self, requests: Sequence[PreparedRequest], *, request_id: str) -> list[Generation]:
        """Return the generations of several requests and all their choices, for `run`. Nothing is computed yet."""
        return [
            Generation(f"{request_id}-{index}.{choice}", request, self.tokenizer, index=index, choice=choice)
            for index, request in enumerate(requests)
            for choice in range(request.params.n)
        ]

    async def run(
        self,
        generations: Sequence[Generation],
        take: Take,
        *,
        scheduling: SchedulingOptions = DEFAULT_SCHEDULING,
        each_token: bool = False,
    ) -> None:
        """Call `take` with each generation and its new text, as it comes, and once more when it ends, perhaps with an
        empty text. With `each_token`, also when it has a new token without new text. Returns when all have ended.

        `take` is called by what reads the engine's reports. If it returns a function, more is taken only after what
        that function returns was awaited. Cancelling aborts what is unfinished. Raises InvalidRequestError,
        EngineUnavailableError and what `take` raises; a request that failed alone has the finish_reason ERROR and says
        why.
        """
        feed = _Feed(take, each_token=each_token)
        try:
            with ExitStack() as opened:
                for generation in generations:
                    stream = self._open(generation, scheduling)
                    opened.callback(stream.close)
                    feed.follow(generation, stream)
                await feed.finish()
        finally:
            for generation in generations:
                if generation.finish_reason is None:
                    generation.end(FinishReason.ABORT)

    def _open(self, generation: Generation, scheduling: SchedulingOptions) -> Stream:
        request = generation.request
        request.check(self.client.info.limits)
        return self.client.open(
            Add(
                generation.request_id,
                request.token_ids,
                request.params,
                generation.choice,
                scheduling,
                time.monotonic(),
                request.pooling,
                request.adapter,
            )
        )


class _Feed:
    """Turns the outputs of generations into text as they come, in the order in which they come."""

    def __init__(self, take: Take, *, each_token: bool) -> None:
        self._take = take
        self._each_token = each_token
        self._outputs: deque[tuple[Generation, Stream, RequestOutput | Exception]] = deque()
        self._num_running = 0
        self._pause: Pause | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()  # for `finish`: a pause, an error or the end

    def follow(self, generation: Generation, stream: Stream) -> None:
        """Follow one more generation."""
        generation.stream = stream
        self._num_running += 1
        stream.deliver = partial(self._deliver, generation, stream)
        stream.breakdown.add_done_callback(partial(self._settled, generation, stream))

    async def finish(self) -> None:
        """Return when all generations have ended; heed the pauses meanwhile. Raises the error that ends them."""
        while True:
            if self._pause is not None:
                await self._pause()
                self._pause = None
                self._take_outputs()
            elif self._error is not None:
                try:
                    raise self._error
                finally:
                    self._error = None  # its traceback refers to this object
            elif self._num_running:
                self._news.clear()
                await self._news.wait()
            else:
                return

    def _deliver(self, generation: Generation, stream: Stream, output: RequestOutput | Exception, _: float) -> None:
        self._outputs.append((generation, stream, output))
        if self._pause is None:
            self._take_outputs()

    def _settled(self, generation: Generation, stream: Stream, _: object) -> None:
        """Deliver the error of a stream that has failed, behind its outputs."""
        if stream.error is not None:
            self._deliver(generation, stream, stream.error, 0.0)

    def _take_outputs(self) -> None:
        while self._outputs and self._pause is None and self._error is None:
            generation, stream, output = self._outputs.popleft()
            if generation.finish_reason is not None:
                continue
            try:
                if isinstance(output, Exception):
                    self._error = output
                elif generation.push(output, stream.stop) or (self._each_token and output.token_ids):
                    self._pause = self._take(generation, generation.take())
            except Exception as error:
                self._error = error
            self._num_running -= generation.finish_reason is not None
        if self._pause is not None or self._error is not None or not self._num_running:
            self._news.set()


class _Lane:
    """Encodes texts, or compiles forms, in processes of its own: one at a time for each client, so that what a client
    sends holds up no other's for long.
    """

    def __init__(self, tokenizer: Tokenizer, *, seconds: float = SECONDS, num_processes: int = 1) -> None:
        self.sandboxes = [Sandbox(tokenizer, seconds=seconds) for _ in range(num_processes)]
        self.encoders = [PromptEncoder(tokenizer, sandbox) for sandbox in self.sandboxes]
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="encode")
        self._free: asyncio.Queue[PromptEncoder] = asyncio.LifoQueue()  # the last one used is ready
        for encoder in self.encoders:
            self._free.put_nowait(encoder)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, work: Callable[[PromptEncoder], _Result]) -> _Result:
        """Return the result of `work`. A caller that gives up leaves nothing behind while it waits for its turn."""
        turn = self._turns.setdefault(CLIENT.get(), asyncio.Lock())
        await turn.acquire()
        try:
            encoder = await self._free.get()
        except asyncio.CancelledError:
            turn.release()
            raise
        done = asyncio.get_running_loop().run_in_executor(self._threads, work, encoder)
        done.add_done_callback(partial(self._end, encoder, turn))  # not earlier, even if the caller has given up
        try:
            return await asyncio.shield(done)
        finally:
            del done  # it holds an error, whose traceback holds this frame, and the text

    def _end(self, encoder: PromptEncoder, turn: asyncio.Lock, done: asyncio.Future[Any]) -> None:
        self._free.put_nowait(encoder)
        turn.release()
        if not done.cancelled():
            done.exception()  # asyncio logs errors that nothing has looked at, such as those of callers that have left


def _size(content: Any, limit: int) -> int:
    """Return the characters and values in `content`, counted up to a number above `limit`."""
    rest, size = [content], 0
    while rest and size <= limit:
        match rest.pop():
            case str() as text:
                size += len(text)
            case Mapping() as mapping:
                rest.extend(islice(mapping.values(), limit))
            case Sequence() as items:
                rest.extend(islice(items, limit))
        size += 1
    return size
