"""The two routes that generate: from a body to an answer, whole or in events, and to a record of how it went.

It decides the order: read, check, encode, admit, run, tell. It must not know how an answer looks on the wire.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import msgspec

from splitfuse.config import ServerConfig
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineState
from splitfuse.errors import EngineDiedError, InvalidRequestError, LateError, RequestFailedError, SplitfuseError
from splitfuse.server.access_log import RequestLog, RequestRecord
from splitfuse.server.admission import Admission
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError
from splitfuse.server.explain import Explanations, RequestTimeline
from splitfuse.server.metrics import Metrics
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest
from splitfuse.server.openai.responses import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    Heading,
    PromptTokensDetails,
    Timing,
    Usage,
)
from splitfuse.server.openai.validation import decode
from splitfuse.text.generation import Prompt, clamp_max_tokens
from splitfuse.text.service import ServedGeneration, TextService
from splitfuse.text.token_text import TokenPieces

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's

_LARGE_BODY = 65536  # bytes, from which on decoding would hold up others
_MANY_ENTRIES = 4096  # log-probabilities of an answer, likewise

_Body = TypeVar("_Body", bound=msgspec.Struct)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class AppState:
    """What all routes share."""

    service: TextService
    config: ServerConfig
    admission: Admission
    metrics: Metrics
    log: RequestLog
    started: int
    """Unix time."""
    explanations: Explanations = field(default_factory=Explanations)

    @property
    def model(self) -> str:
        """As requests call it. Raises EngineDiedError if that depends on an engine that was never ready."""
        return self.config.served_model_name or self.service.client.info.model

    @cached_property
    def pieces(self) -> TokenPieces:
        """Texts of single tokens."""
        return TokenPieces(self.service.tokenizer)

    async def read(self, context: RequestContext, kind: type[_Body]) -> _Body:
        """The request in a body. Raises RefusedError, ClientGoneError, and EngineDiedError if no engine is ready."""
        _check_content_type(context)
        body = await context.body(int(self.config.max_body_mib * 2**20))
        if len(body) < _LARGE_BODY:
            request = decode(kind, body)
        else:
            request = await self.service.off_loop(lambda: decode(kind, body))
        client = self.service.client
        if client.state is not EngineState.READY:
            raise EngineDiedError(f"no engine is ready: {self.stage[0]}; /ready says when one is")
        wanted: str | None = getattr(request, "model", None)
        if wanted not in (None, self.model):
            raise RefusedError(
                404,
                f"there is no model {wanted!r:.200} here; this server has {self.model!r}",
                code="model_not_found",
                parameter="model",
            )
        return request

    @property
    def stage(self) -> tuple[str, float]:
        """`ready` if requests are taken, else what is being waited for, and how far it has come."""
        client = self.service.client
        if self.admission.draining:
            return "draining", 0.0
        if client.state is EngineState.READY:
            return "ready", 1.0
        stage = client.stage
        return (client.state.value, 0.0) if stage.stage == "ready" else (stage.stage, stage.fraction)


async def completions(state: AppState, context: RequestContext) -> None:
    """POST /v1/completions."""
    request = await state.read(context, CompletionRequest)
    context.enter_phase(LatencyPhase.TOKENIZING)
    prompts, params = request.prompts(state.config.max_prompts), request.params()
    heading = Heading(f"cmpl-{context.unique_id}", int(time.time()), state.model)
    answer = CompletionAnswer(request, prompts, heading, state.service.tokenizer, state.pieces)
    context.prompt, context.shows_output = request.prompt, request.max_tokens != 0

    async def work() -> None:
        encoded = [await state.service.encode(prompt) for prompt in prompts]
        limited = [_limited(state, prompt, params, DEFAULT_MAX_TOKENS) for prompt in encoded]
        await _generate(state, context, request, list(zip(encoded, limited, strict=True)), answer)

    await context.unless_gone(work(), deadline=request.splitfuse_deadline)


async def chat(state: AppState, context: RequestContext) -> None:
    """POST /v1/chat/completions."""
    request = await state.read(context, ChatRequest)
    context.enter_phase(LatencyPhase.TOKENIZING)
    messages, params = request.plain_messages(), request.params()
    heading = Heading(f"chatcmpl-{context.unique_id}", int(time.time()), state.model)
    answer = ChatAnswer(request, heading, state.service.tokenizer, state.pieces)
    context.prompt = messages

    async def work() -> None:
        prompt = await state.service.encode_chat(messages, variables=request.chat_template_kwargs)
        limited = _limited(state, prompt, params, None)
        await _generate(state, context, request, [(prompt, limited)], answer)

    await context.unless_gone(work(), deadline=request.splitfuse_deadline)


def _limited(state: AppState, prompt: Prompt, params: SamplingParams, default: int | None) -> SamplingParams:
    """`params` with max_tokens settled: left out, `default` or, without one, all that model and cache have room for.

    Raises InvalidRequestError for what the model cannot honour.
    """
    if params.max_tokens is None:
        limits = state.service.client.info.limits
        limit = min(limits.max_model_len, limits.num_blocks * limits.block_size + 1)
        params = clamp_max_tokens(params, prompt, limit if default is None else default, limit)
    state.service.check(prompt, params)
    return params


async def _generate(
    state: AppState,
    context: RequestContext,
    request: CompletionRequest | ChatRequest,
    prompts: Sequence[tuple[Prompt, SamplingParams]],
    answer: Answer,
) -> None:
    slo_enabled = state.service.client.info.slo_enabled
    scheduling = request.scheduling(context.owner, arrival_time=context.arrival, slo_enabled=slo_enabled)
    num_tokens = sum((len(prompt.token_ids) + (params.max_tokens or 0)) * params.n for prompt, params in prompts)
    with state.admission.admit(num_tokens, sum(params.n for _, params in prompts)):
        context.admitted = True
        context.generations = state.service.begin(prompts, request_id=context.unique_id)
        is_large = sum(_num_entries(prompt, params) for prompt, params in prompts) > _MANY_ENTRIES
        made = state.service.off_loop if is_large else _at_once
        each_token = isinstance(request, CompletionRequest) and bool(request.stream and request.return_token_ids)
        state.explanations.begin(context)
        context.hand_over()
        pieces = state.service.run(context.generations, scheduling=scheduling, each_token=each_token)
        async with aclosing(pieces):
            async for generation, text in pieces:
                if generation.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise _failure(generation)
                if request.stream:
                    context.enter_phase(LatencyPhase.DETOKENIZING)
                    events = await made(lambda g=generation, t=text: list(answer.events(g, t)))  # type: ignore[misc]
                    context.enter_phase(LatencyPhase.CLIENT)
                    for event in events:
                        await context.event(event)
                    context.enter_phase(LatencyPhase.FROM_ENGINE)
        usage = usage_of(context)
        timing = await _timing_with_phases(context) if request.splitfuse_timing else None
        context.enter_phase(LatencyPhase.DETOKENIZING)
        if not request.stream:
            whole = await made(lambda: answer.whole(context.generations, usage, timing))
            context.enter_phase(LatencyPhase.CLIENT)
            await context.answer(whole)
            return
        context.enter_phase(LatencyPhase.CLIENT)
        if request.include_usage or timing is not None:
            await context.event(answer.last_event(usage if request.include_usage else None, timing))
        await context.end_events()


def _failure(generation: ServedGeneration) -> SplitfuseError:
    """Why a generation ended that should not have."""
    why, retry_after = generation.error or "it was ended", generation.retry_after
    if retry_after is None:
        return RequestFailedError(f"the request failed while it ran: {why}")
    if retry_after == math.inf:
        return InvalidRequestError(why, parameter="splitfuse_on_time_only")
    return LateError(why, retry_after=retry_after)


def _num_entries(prompt: Prompt, params: SamplingParams) -> int:
    """Log-probabilities in an answer, at most."""
    generated = 0 if params.logprobs is None else (params.max_tokens or 0) * (params.logprobs + 1)
    echoed = 0 if params.prompt_logprobs is None else len(prompt.token_ids) * (params.prompt_logprobs + 1)
    return (generated + echoed) * params.n


async def _at_once(work: Callable[[], _Result]) -> _Result:
    return work()


def usage_of(context: RequestContext) -> Usage:
    """Tokens of prompts and answers, so far."""
    prompt = sum(len(g.prompt.token_ids) for g in context.generations if g.choice == 0)
    cached: dict[int, int] = {}
    for g in context.generations:
        cached[g.index] = min(g.num_cached_tokens, cached.get(g.index, g.num_cached_tokens))
    completion = sum(len(g.token_ids) for g in context.generations) if context.shows_output else 0
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(sum(cached.values())))


def timing_of(context: RequestContext, phases: dict[LatencyPhase, float] | None = None) -> Timing:
    """What all choices of a request took, so far."""
    begun = context.begun
    first_steps = [g.first_step for g in begun if g.first_step is not None]
    first_tokens = [g.timings.tokens[0] for g in begun if g.timings.tokens]
    gaps = [b - a for g in begun for a, b in zip(g.timings.tokens, g.timings.tokens[1:], strict=False)]
    return Timing(
        queued=min(first_steps) - context.arrival if first_steps else None,
        first_token=min(first_tokens) - context.arrival if first_tokens else None,
        gaps=gaps,
        steps=sum(g.num_steps for g in begun),
        cached_tokens=sum(g.num_cached_tokens for g in begun),
        slo_met=all(kept) if (kept := [g.slo_met for g in begun if g.slo_met is not None]) else None,
        phases=phases or {},
    )


async def _timing_with_phases(context: RequestContext) -> Timing:
    """For an answer that tells of it: once the engine has said where the time went, which after a stop string may be a
    pass later.
    """
    if context.last is not None and context.last.stream is not None:
        await asyncio.shield(context.last.stream.spent)
    context.enter_phase(LatencyPhase.FROM_ENGINE)
    course = RequestTimeline.of(context)
    return timing_of(context, {} if course is None else course.phases())


def record_of(context: RequestContext, *, route: str, status: int, error: Exception | None) -> RequestRecord:
    """How a request went, when it has ended, which was at its last `enter_phase`."""
    usage, timing = usage_of(context), timing_of(context)
    return RequestRecord(
        request_id=context.request_id,
        route=route,
        status=status,
        total_seconds=context.since - context.arrival,
        key=context.owner.name,
        prompt_tokens=usage.prompt_tokens,
        generated_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        finish_reasons=tuple(_reason(g) for g in context.begun),
        error=error.code if isinstance(error, RefusedError) else None if error is None else type(error).__name__,
        queue_seconds=timing.queued,
        time_to_first_token_seconds=timing.first_token,
        inter_token_latency_seconds=tuple(timing.gaps),
        steps=timing.steps,
        slo_met=timing.slo_met,
    )


def _reason(generation: ServedGeneration) -> str:
    return (generation.finish_reason or FinishReason.ABORT).value


def _check_content_type(context: RequestContext) -> None:
    """A browser sends a page's text to any server without asking it first, unless the text is called JSON."""
    sent = context.headers.get(b"content-type")
    if sent is None and b"origin" not in context.headers:
        return
    if (sent or b"").partition(b";")[0].strip().lower() != b"application/json":
        raise RefusedError(415, "send JSON, with the header Content-Type: application/json", code="no_json")
