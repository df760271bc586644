"""Generates for any dialect: encodes, checks and admits a request, runs it, and answers through a `Responder`."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from splitfuse.core.limits import ENCODER, ONE_LEFT, EngineLimits
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.errors import (
    InvalidRequestError,
    PromptTooLongError,
    RequestFailedError,
    SloUnattainableError,
    SplitfuseError,
)
from splitfuse.server.context import RequestContext, TokenCounts
from splitfuse.server.explain import Timing, timing_with_phases
from splitfuse.server.state import AppState
from splitfuse.text.chat_formats.message import MessageEvent
from splitfuse.text.chat_options import CHAT, ChatOptions
from splitfuse.text.generation import Generation
from splitfuse.text.kwargs import clamp_max_tokens
from splitfuse.text.prompts import Message, PreparedRequest
from splitfuse.text.service import Pause, TextService

MANY_LOGPROBS = 4096
"""Number of log-probabilities from which on an answer is written off the event loop, which it would hold up."""

FORM = "structured_outputs"
"""Name of the form of an answer in SamplingParams, and in errors about it."""

TOOLS = "tools"
"""Name of the tools, whose calls are a form of an answer too, in requests of every API."""

MAX_LENGTHS = 16
"""Number of the model's lengths up to which a text is read whose tokens are cut or only counted."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Says what to generate, in no dialect: from plain or tokenized prompts or from messages, and how."""

    params: SamplingParams
    scheduling: SchedulingOptions
    prompts: Sequence[str | Sequence[int]] = ()
    messages: Sequence[Message] | None = None
    chat: ChatOptions = CHAT
    keep_tokens: int | None = None
    """Number of tokens to keep of each prompt, its last ones; -1: as many as leave room for the answer; None: all."""
    drops_messages: bool = False
    """Flag that drops the oldest turns of a conversation, as many as do not fit."""
    default_max_tokens: int | None = None
    """Number of tokens to generate if params leave it open. None: all that model and cache have room for."""
    deadline: float | None = None
    """Seconds after its arrival at which the request is given up."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of parameters in the request, for errors: see `errors_named`."""
    stream: bool = False
    each_token: bool = False
    """Flag that gives the responder each token of a stream, even one whose text is held back."""
    include_timing: bool = False
    include_output: bool = True
    """Flag that makes the generated text a part of the answer."""

    @property
    def num_prompts(self) -> int:
        """Return the number of prompts; messages are one."""
        return len(self.prompts) if self.messages is None else 1

    @property
    def places(self) -> list[str]:
        """Return how errors call each prompt: by its number if there are several, else not at all."""
        return [f"prompt[{index}]" for index in range(self.num_prompts)] if self.num_prompts > 1 else [""]

    async def encode(self, service: TextService) -> list[PreparedRequest]:
        """Return a request for each prompt. Raises InvalidRequestError."""
        max_model_len, limits = service.client.info.limits.max_model_len, service.client.open_limits
        params = await service.compile(self.params, self.chat)
        limit = max_model_len if self.keep_tokens is None else MAX_LENGTHS * max_model_len
        with reading_at_most(limit) if self.keep_tokens is not None else nullcontext():
            if self.messages is None:
                encoded = []
                for place, each in zip(self.places, self.prompts, strict=True):
                    with blamed(place):
                        encoded.append(await service.encode(each, params, max_model_len=limit))
            else:
                if self.drops_messages:
                    encoded = [await self._encode_latest(service, params, self.messages, limits)]
                else:
                    encoded = [await service.encode_chat(self.messages, params, self.chat, max_model_len=limit)]
        if (keep := self.keep_tokens) is None:
            return encoded
        if keep == -1:
            keep = max(limits.max_model_len - (self.params.max_tokens or 1), 1)
        return [replace(each, token_ids=each.token_ids[-keep:]) for each in encoded]

    async def _encode_latest(
        self, service: TextService, params: SamplingParams, messages: Sequence[Message], limits: EngineLimits
    ) -> PreparedRequest:
        """Return the request for the messages without the oldest turns, as few as make them fit; for the last turn if
        that does not fit either. A turn begins with a user's message; system messages before the first one stay.
        """
        first = next((index for index, each in enumerate(messages) if each["role"] != "system"), 0)
        starts = [first, *(i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")]
        room = limits.room - (params.max_tokens or 1)

        async def encoded(start: int) -> PreparedRequest:
            kept = [*messages[:first], *messages[start:]]
            return await service.encode_chat(kept, params, self.chat, max_model_len=limits.max_model_len)

        found, low, high = None, 0, len(starts) - 1
        middle = 0  # usually all fits
        while low < high:
            try:
                fitting = await encoded(starts[middle])
                fits = len(fitting.token_ids) <= room
            except PromptTooLongError:
                fits = False
            if fits:
                found, high = fitting, middle
            else:
                low = middle + 1
            middle = (low + high) // 2
        return found or await encoded(starts[high])


@contextmanager
def reading_at_most(limit: int) -> Iterator[None]:
    """Say of a text of more than `limit` tokens that it is not read, rather than that it exceeds the model."""
    try:
        yield
    except PromptTooLongError as error:
        message = f"the text has more than {limit} tokens, {MAX_LENGTHS} times the model's length: send less of it"
        raise PromptTooLongError(message, parameter="prompt") from error


@contextmanager
def blamed(place: str, *, generates: bool = True) -> Iterator[None]:
    """Make errors about a prompt name the place in the body that it came from, if it is given."""
    try:
        yield
    except InvalidRequestError as error:
        if place and error.parameter in ("prompt", "messages", "max_tokens"):
            error.parameter = place
            error.args = (f"{place}: {str(error) if generates else str(error).removesuffix(ONE_LEFT)}",)
        raise


@contextmanager
def errors_named(names: Mapping[str, str]) -> Iterator[None]:
    """Make errors about parameters that are raised inside name them as the request does: `names` has its names of
    parameters, and of words with which messages begin, by those of SamplingParams and ChatOptions.
    """
    try:
        yield
    except InvalidRequestError as error:
        place, message = error.parameter or "", str(error)
        for words, ours in names.items():
            parameter = words.partition(" ")[0]
            if place == parameter or place.startswith(f"{parameter}."):
                words = words if place == parameter else place
                error.parameter = ours.partition(" ")[0]
                if "_" in words or message.startswith(f"{words} "):
                    error.args = (message.replace(words, ours),)
                break
        raise


def form_names(name: str) -> dict[str, str]:
    """Return the names for `errors_named` of a form that the request gives by a name, if it has one, and of tools."""
    names = {f"{FORM}.{TOOLS}": TOOLS}
    return names if name == FORM else {**names, FORM: name or TOOLS}


class Responder(ABC):
    """Writes the answer to one request: `whole`, or as `events` and `last_events`. Each event is an object for JSON."""

    @abstractmethod
    def whole(self, generations: Sequence[Generation], counts: TokenCounts, timing: Timing | None) -> Any:
        """Return the answer; `generations` have ended and come in the order of prompts and choices."""

    @abstractmethod
    def events(self, generation: Generation, text: str) -> Iterable[Any]:
        """Yield the events for `text`, which is new in a generation, or for its end."""

    @abstractmethod
    def last_events(self, counts: TokenCounts, timing: Timing | None) -> Iterable[Any]:
        """Yield the events that follow the end of all generations."""


class MessageResponder(Responder):
    """Writes answers to conversations, which consist of thoughts, content and calls of tools."""

    def events(self, generation: Generation, text: str) -> Iterable[Any]:
        """See Responder."""
        return self.message_events(generation, generation.read(text))

    @abstractmethod
    def message_events(self, generation: Generation, news: Sequence[MessageEvent]) -> Iterable[Any]:
        """Yield the events for `news` in an answer, or for its end."""


async def generate(state: AppState, context: RequestContext, request: GenerationRequest, responder: Responder) -> None:
    """Run a request and answer it. Raises what `Responder`s cannot answer: InvalidRequestError, OverloadedError, ..."""
    if len(request.prompts) > (limit := state.config.max_prompts):
        message = f"prompt has {len(request.prompts)} prompts; this server takes at most {limit} in one request"
        raise InvalidRequestError(message, parameter="prompt")
    if not state.service.client.info.limits.generates:
        raise InvalidRequestError(f"{ENCODER}: use /v1/embeddings, /v1/rerank or /v1/score")
    context.shows_output = request.include_output
    with errors_named(request.names):
        await context.unless_gone(_run(state, context, request, responder), deadline=request.deadline)


async def _run(state: AppState, context: RequestContext, request: GenerationRequest, responder: Responder) -> None:
    service, admission, n = state.service, state.admission, request.params.n
    limits, open_limits = service.client.info.limits, service.client.open_limits
    with ExitStack() as admitted:
        admitted.callback(await admission.reserve(0, request.num_prompts * n))
        encoded = await request.encode(service)
        encoded = [replace(each, adapter=context.adapter) for each in encoded]
        prepared = []
        for place, each in zip(request.places, encoded, strict=True):
            with blamed(place):
                prepared.append(_sized(limits, open_limits, each, request.default_max_tokens))
        num_tokens = sum((len(each.token_ids) + (each.params.max_tokens or 0)) * n for each in prepared)
        num_logprobs = sum(map(_num_logprobs, prepared))
        admitted.callback(await admission.reserve(num_tokens, 0, num_logprobs=num_logprobs))
        context.admitted = True
        context.generations = service.begin(prepared, request_id=context.unique_id)
        is_large = num_logprobs > MANY_LOGPROBS
        compute = service.off_loop if is_large else _at_once
        if is_large:
            admitted.callback(service.give_back_memory)
        each_token = request.stream and request.each_token
        state.explanations.begin(context)
        if request.stream:
            admitted.callback(asyncio.create_task(context.keep_alive()).cancel)

        async def send_large(events: Callable[[], Iterable[Any]]) -> None:
            await context.send_events(await service.off_loop(partial(_written, context, events)))

        def take(generation: Generation, text: str) -> Pause | None:
            check_not_failed(generation)
            if not request.stream:
                return None
            events = partial(responder.events, generation, text)
            return partial(send_large, events) if is_large else context.send_now(_written(context, events))

        await service.run(context.generations, take, scheduling=request.scheduling, each_token=each_token)
        timing = await timing_with_phases(context) if request.include_timing else None
        if request.stream:
            last = partial(responder.last_events, context.num_tokens, timing)
            await context.send_events(await compute(partial(_written, context, last)))
            await context.end_events()
        else:
            counts = context.num_tokens
            whole = await compute(lambda: responder.whole(context.generations, counts, timing))
            if is_large:
                await context.answer_in_pieces(whole, service.off_loop)
            else:
                await context.answer(whole)


def _written(context: RequestContext, events: Callable[[], Iterable[Any]]) -> list[bytes]:
    """Return events as they are sent, each written before the next one is made."""
    return list(map(context.dialect.event, events()))


def _sized(
    limits: EngineLimits, open_limits: EngineLimits, prepared: PreparedRequest, default_max_tokens: int | None
) -> PreparedRequest:
    """Return a request with max_tokens settled, such that an engine which is ready can hold it, if one can. Raises
    InvalidRequestError for what the model cannot honour.
    """
    if prepared.params.max_tokens is None:
        most = max(open_limits.room, limits.room if len(prepared.token_ids) >= open_limits.room else 0)
        room = most - len(prepared.token_ids)
        params = clamp_max_tokens(prepared.params, default_max_tokens or room, room)
        prepared = replace(prepared, params=params)
    prepared.check(limits)
    return prepared


def check_not_failed(generation: Generation) -> None:
    """Raise the reason why a generation has failed, if it has."""
    if generation.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise _failure(generation)


def _failure(generation: Generation) -> SplitfuseError:
    reason, retry_after = generation.error or "it was ended", generation.retry_after
    if retry_after is None:
        return RequestFailedError(f"the request failed while it ran: {reason}")
    if retry_after == math.inf:
        return InvalidRequestError(reason, parameter=FORM if FORM in reason else "splitfuse_on_time_only")
    return SloUnattainableError(reason, retry_after=retry_after)


def _num_logprobs(prepared: PreparedRequest) -> int:
    """Return the most log-probabilities that an answer can have."""
    params = prepared.params
    generated = 0 if params.logprobs is None else (params.max_tokens or 0) * (params.logprobs + 1)
    echoed = 0 if params.prompt_logprobs is None else len(prepared.token_ids) * (params.prompt_logprobs + 1)
    return (generated + echoed) * params.n


async def _at_once(work: Callable[[], _Result]) -> _Result:
    return work()
