"""Turns text into text with an engine of this thread: encodes, steps, detokenizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from splitfuse.core.request_output import FinishReason
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, Finish
from splitfuse.errors import InvalidRequestError
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.tokenizer import Tokenizer


class TextGenerator:
    """Generates text for many requests at once with an engine of this thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._generations: dict[str, Generation] = {}  # unfinished
        self._news: dict[str, Generation] = {}  # those with news that `stream` has not given yet
        self._num_requests = 0

    def add(self, request: PreparedRequest, *, index: int = 0) -> list[Generation]:
        """Accept a request: return one Generation for each of its `params.n` choices.

        Raises InvalidRequestError, and changes nothing, if the engine cannot serve it.
        """
        request.check(self.engine.limits)
        number, self._num_requests = self._num_requests, self._num_requests + 1
        generations = [
            Generation(f"text-{number}.{choice}", request, self.tokenizer, index=index, choice=choice)
            for choice in range(request.params.n)
        ]
        for generation in generations:
            name, choice = generation.request_id, generation.choice
            self.engine.add(
                Add(name, request.token_ids, request.params, choice, pooling=request.pooling, adapter=request.adapter)
            )
        self._generations |= {generation.request_id: generation for generation in generations}
        return generations

    def stream(self, generations: Iterable[Generation]) -> Iterator[tuple[Generation, str]]:
        """Run until all of these have ended. Yields each with its new text, step by step, and once more when it ends,
        perhaps with an empty text. Several streams may take turns: a step for one is a step for all.

        If the caller stops iterating, also by an error or Ctrl-C, what is unfinished is aborted and its blocks freed.
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
            try:
                has_news = generation.push(output, partial(self._stop, generation.request_id))
            except InvalidRequestError as error:  # of a decoder that fails on these tokens: others have theirs
                generation.fail(str(error))
                self.engine.abort(generation.request_id)
                has_news = True
            if has_news:
                self._news[generation.request_id] = generation
            if generation.finish_reason is not None:
                del self._generations[generation.request_id]
        for request_id in [name for name in self._generations if not self.engine.is_unfinished(name)]:
            generation = self._news[request_id] = self._generations.pop(request_id)
            generation.end(FinishReason.ABORT)  # by a caller of the engine itself

    def _stop(self, request_id: str, num_tokens: int) -> None:
        self.engine.finish(Finish(request_id, FinishReason.STOP, num_tokens))

    def abort(self, generation: Generation) -> None:
        """End a generation that is not wanted any more. One that has ended is left as it is."""
        self.engine.abort(generation.request_id)
        self._news.pop(generation.request_id, None)
        if self._generations.pop(generation.request_id, None):
            generation.end(FinishReason.ABORT)
