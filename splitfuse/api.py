"""Defines `pipeline()`: a model in this process, called as DeepSpeed-MII's.

Its keywords are in text/kwargs.py; `serve()` and `client()` are in clients/sync.py.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, overload

from tqdm import tqdm

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.engine import garbage
from splitfuse.engine.engine import Engine
from splitfuse.engine.guard import Guard
from splitfuse.errors import ConfigError, EngineUnavailableError, InvalidRequestError, RequestFailedError
from splitfuse.models.sources.hub import open_model
from splitfuse.runtime.loading import open_source
from splitfuse.runtime.machine import GIB, anonymous_bytes
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.text.chat_formats.message import AssistantMessage, ContentDelta, ReasoningDelta
from splitfuse.text.chat_options import CHAT_KEYWORDS, take_chat_options
from splitfuse.text.generation import Generation
from splitfuse.text.generator import TextGenerator
from splitfuse.text.kwargs import (
    SAMPLING_KEYWORDS,
    as_list,
    check_flags,
    refuse_unknown,
    resolve_max_tokens,
    sampling_params,
    sampling_signature,
    spelled_as_keywords,
)
from splitfuse.text.pooling.embeddings import check_dimensions, embedding, for_pooling
from splitfuse.text.prompts import Message, PreparedRequest, PromptEncoder
from splitfuse.text.responses import Piece, Response, in_order
from splitfuse.text.tokenizer import Tokenizer
from splitfuse.text.tools import template_messages

OTHER_KEYWORDS = ("do_sample", "max_length", "chat", "return_full_text", "stream", "progress", "adapter")
"""Keywords of a call that are no sampling parameters."""

Prompts = (
    str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message] | Sequence[Sequence[Message]]
)


def pipeline(
    model: str | Path | None = None,
    *,
    progress: bool = False,
    observer: Callable[[StepRecord], object] | None = None,
    **settings: Any,
) -> Pipeline:
    """Load a model and answer with it in this process.

    `model` is a folder, a GGUF file or a Hugging Face Hub name; left out, the small bundled model. `settings` are those
    of EngineConfig by name: `dtype="bfloat16"`, `max_num_batched_tokens=512`, `block_size=32`, and so on. With
    `progress`, the memory plan and a bar while loading go to standard error; `observer` is called with the StepRecord
    of every forward step. Raises ConfigError, ModelError or MemoryPlanError.

    >>> pipe = splitfuse.pipeline("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="bfloat16")
    >>> print(pipe("What is the capital of France?", chat=True, max_new_tokens=32)[0])
    """
    config = EngineConfig.from_settings({"model": str(model) if isinstance(model, Path) else model, **settings})
    if config.cache.kv_loans:
        raise ConfigError(
            "kv_loans needs other engines, which a pipeline has not: serve with replicas, or leave it out"
        )
    source = open_source(config)
    source.config()  # before the tokenizer: a folder that is no model should be called that
    other, revision = config.model.tokenizer, config.model.revision
    tokenizer = Tokenizer.from_source(source if other is None else open_model(other, revision, weights=False))
    engine = Engine.load(config, source, progress=progress, announce=_print_plan if progress else lambda _: None)
    engine.estimate_budget()
    if observer is not None:
        engine.events.subscribe(StepRecord, observer)
    if progress and (resident := anonymous_bytes()) is not None:
        planned = engine.model.plan.weights + engine.model.plan.activations
        print(
            f"resident     {resident / GIB:8.3f} GiB with Python and PyTorch, of {planned / GIB:.3f} GiB planned for "
            "weights and activations; the KV cache fills up in use",
            file=sys.stderr,
        )
    garbage.freeze()
    return Pipeline(engine, tokenizer)


class Pipeline:
    """Answers prompts with a model in this process. Call it as often as you like, from any thread.

    >>> pipe = splitfuse.pipeline()
    >>> first, second = pipe(["Once upon a time", "In a hole in the ground"], max_new_tokens=20)
    >>> for piece in pipe("Once upon a time", stream=True):
    ...     print(piece.text, end="")
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.generator = TextGenerator(engine, tokenizer)
        self._encoder = PromptEncoder(tokenizer)
        self._guard = Guard()
        self._finalizer = weakref.finalize(self, engine.close)  # at the latest when Python ends

    def close(self) -> None:
        """Let KV tiers have what was computed last, and give their folder back; nothing is answered from then on. It is
        done too when the pipeline is gone, or at the end of a `with` block. Without tiers there is nothing to do.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __call__(self, prompts: Prompts, *, stream: Literal[False] = False, **keywords: Any) -> list[Response]: ...
    @overload
    def __call__(self, prompts: Prompts, *, stream: Literal[True], **keywords: Any) -> Iterator[Piece]: ...

    def __call__(
        self, prompts: Prompts, *, stream: bool = False, progress: bool = False, **keywords: Any
    ) -> list[Response] | Iterator[Piece]:
        """Answer one prompt or many, together; `keywords` are those of `prepare`.

        Responses come in the order of the prompts, choices side by side; with `stream`, an iterator of Piece comes
        instead. With `progress`, a bar goes to standard error. A request that fails alone has finish_reason "error" and
        says why. Raises InvalidRequestError, before anything runs, for what cannot be honoured.
        """
        pieces = self.run(self.prepare(prompts, **keywords), progress=progress)
        if stream:
            return pieces
        return in_order(pieces)

    @sampling_signature
    def prepare(
        self,
        prompts: Prompts,
        *,
        max_length: int | None = None,
        chat: bool = False,
        return_full_text: bool = False,
        adapter: str | None = None,
        **keywords: Any,
    ) -> list[PreparedRequest]:
        """Check prompts and keywords, and return what `run` takes. Nothing is computed yet.

        A prompt is a text, a list of token ids or, with `chat`, a user's turn or a list of messages, which goes through
        the model's chat template. `max_length` bounds the tokens of prompt and answer together; without it and
        `max_new_tokens`, at most 1024 tokens are generated, or what the model leaves. `do_sample` False is greedy; left
        out, random choices follow from temperature, top_p, top_k or min_p. With `return_full_text`, the answer begins
        with the prompt. The keywords `tools`, `reasoning_effort` and the like (CHAT_KEYWORDS in text/chat_options.py)
        need `chat`; `adapter` is the name of a LoRA adapter that the engine has loaded. Raises InvalidRequestError for
        a keyword or prompt that cannot be honoured.
        """
        refuse_unknown(keywords, {*SAMPLING_KEYWORDS, *CHAT_KEYWORDS, *OTHER_KEYWORDS})
        check_flags(chat=chat, return_full_text=return_full_text)
        digest = "" if adapter is None else self._digest(adapter)
        options = take_chat_options(keywords, chat)
        params = self._encoder.compile(sampling_params(**keywords), options)
        listed = as_list(prompts, chat)
        prepared = []
        for index, prompt in enumerate(listed):
            try:
                most = self.engine.max_model_len
                if chat:
                    messages = prompt if isinstance(prompt, str) else template_messages(prompt)
                    request = self._encoder.encode_chat(messages, params, options, max_model_len=most)
                else:
                    request = self._encoder.encode(prompt, params, max_model_len=most)
                with spelled_as_keywords():
                    resolved = resolve_max_tokens(request.params, len(request.token_ids), most, max_length)
                    request = replace(request, params=resolved, return_full_text=return_full_text, adapter=digest)
                    request.check(self.engine.limits)
            except InvalidRequestError as error:
                if len(listed) > 1:
                    error.args = (f"prompt {index}: {error}",)
                raise
            prepared.append(request)
        return prepared

    def _digest(self, adapter: str) -> str:
        """Return the digest of a LoRA adapter by its name. Raises InvalidRequestError if none has it."""
        known = self.engine.adapters
        if adapter not in known:
            names = f"those that are: {', '.join(known)}" if known else "give pipeline() lora=['name=path']"
            raise InvalidRequestError(f"no adapter {adapter!r:.200} is loaded; {names}", parameter="adapter")
        return known[adapter]

    def run(self, requests: Sequence[PreparedRequest], *, progress: bool = False) -> Iterator[Piece]:
        """Run prepared requests together and yield their text as it comes; `Piece.index` counts `requests`.

        If the caller stops iterating, what is unfinished is aborted. Raises InvalidRequestError, before anything runs,
        for a request that this model cannot serve: one prepared for another, for example.
        """
        pieces = self._run(requests, progress)
        try:
            while True:
                with self._guard:  # between pieces another thread takes its turn: a step for one is a step for all
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
        finally:
            with suppress(EngineUnavailableError), self._guard:
                pieces.close()

    def _run(self, requests: Sequence[PreparedRequest], progress: bool) -> Generator[Piece, None, None]:
        generations: list[Generation] = []
        try:
            for index, request in enumerate(requests):
                generations += self.generator.add(request, index=index)
            with tqdm(total=len(generations), disable=not progress, unit="answer", file=sys.stderr) as bar:
                for generation, text in self.generator.stream(generations):
                    new, response = _new(generation, text), None
                    if generation.finish_reason is not None:
                        bar.update()
                        response = self._response(generation)
                    if new.content or new.reasoning or response is not None:
                        yield Piece(generation.index, generation.choice, new.content, response, new.reasoning)
        finally:
            for generation in generations:
                self.generator.abort(generation)

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> list[list[float]]:
        """Return an embedding of length 1 for each text, given as text or token ids: of a model that generates, the
        hidden state of the last token, of an encoder what its folder says. `dimensions` keeps the first numbers, for
        models that were trained for it; `adapter` is the name of a LoRA adapter that the engine has loaded.

        >>> first, second = pipe.embed(["Anna keeps a goose.", "The goose is white."])

        Raises InvalidRequestError, before anything runs, for what cannot be honoured, RequestFailedError.
        """
        size, limit = self.engine.model.spec.hidden_size, self.engine.max_model_len
        check_dimensions(dimensions, size)
        digest = "" if adapter is None else self._digest(adapter)
        listed = [texts] if isinstance(texts, str) else texts
        encoded = (self._encoder.encode(text, max_model_len=limit).token_ids for text in listed)
        prepared = [replace(for_pooling(token_ids), adapter=digest) for token_ids in encoded]
        for request in prepared:
            request.check(self.engine.limits)
        with self._guard:
            # An encoder attends to texts of one length together: those of a step have similar lengths.
            order = sorted(range(len(prepared)), key=lambda index: len(prepared[index].token_ids))
            added = {index: self.generator.add(prepared[index])[0] for index in order}
            generations = [added[index] for index in range(len(prepared))]
            for generation, _ in self.generator.stream(generations):
                if generation.error is not None:
                    raise RequestFailedError(generation.error)
        return [embedding(generation.values, dimensions).tolist() for generation in generations]

    def _response(self, generation: Generation) -> Response:
        assert generation.finish_reason is not None
        request, params = generation.request, generation.request.params
        before = self.tokenizer.decode(request.token_ids) if request.return_full_text else ""
        message = AssistantMessage(generation.text) if request.message is None else generation.message
        return Response(
            generated_text=before + message.content,
            reasoning=message.reasoning,
            tool_calls=message.tool_calls,
            prompt_length=len(request.token_ids),
            generated_length=len(generation.token_ids),
            finish_reason=generation.finish_reason,
            token_ids=tuple(generation.token_ids),
            logprobs=None if params.logprobs is None else tuple(generation.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(generation.prompt_logprobs),
            timings=generation.timings,
            index=generation.index,
            choice=generation.choice,
            stop_string=generation.stop_string,
            num_cached_tokens=generation.num_cached_tokens,
            error=generation.error,
        )


def _new(generation: Generation, text: str) -> AssistantMessage:
    """Return what new text adds to the parts of an answer."""
    if generation.request.message is None:
        return AssistantMessage(text)
    return AssistantMessage.of(e for e in generation.read(text) if isinstance(e, ContentDelta | ReasoningDelta))


def _print_plan(plan: MemoryPlan) -> None:
    print(plan, file=sys.stderr)
