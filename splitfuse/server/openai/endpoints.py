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
from splitfuse.core.latency.ledger import LatencyPhase
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
class Server:
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

    async def read(self, exchange: RequestContext, kind: type[_Body]) -> _Body:
        """The request in a body. Raises RefusedError, ClientGoneError, and EngineDiedError if no engine is ready."""
        _check_content_type(exchange)
        body = await exchange.body(int(self.config.max_body_mib * 2**20))
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


async def completions(server: Server, exchange: RequestContext) -> None:
    """POST /v1/completions."""
    request = await server.read(exchange, CompletionRequest)
    exchange.turn(LatencyPhase.TOKENIZING)
    prompts, params = request.prompts(server.config.max_prompts), request.params()
    heading = Heading(f"cmpl-{exchange.unique_id}", int(time.time()), server.model)
    answer = CompletionAnswer(request, prompts, heading, server.service.tokenizer, server.pieces)
    exchange.prompt, exchange.shows_output = request.prompt, request.max_tokens != 0

    async def work() -> None:
        encoded = [await server.service.encode(prompt) for prompt in prompts]
        limited = [_limited(server, prompt, params, DEFAULT_MAX_TOKENS) for prompt in encoded]
        await _generate(server, exchange, request, list(zip(encoded, limited, strict=True)), answer)

    await exchange.unless_gone(work(), deadline=request.splitfuse_deadline)


async def chat(server: Server, exchange: RequestContext) -> None:
    """POST /v1/chat/completions."""
    request = await server.read(exchange, ChatRequest)
    exchange.turn(LatencyPhase.TOKENIZING)
    messages, params = request.plain_messages(), request.params()
    heading = Heading(f"chatcmpl-{exchange.unique_id}", int(time.time()), server.model)
    answer = ChatAnswer(request, heading, server.service.tokenizer, server.pieces)
    exchange.prompt = messages

    async def work() -> None:
        prompt = await server.service.encode_chat(messages, variables=request.chat_template_kwargs)
        limited = _limited(server, prompt, params, None)
        await _generate(server, exchange, request, [(prompt, limited)], answer)

    await exchange.unless_gone(work(), deadline=request.splitfuse_deadline)


def _limited(server: Server, prompt: Prompt, params: SamplingParams, default: int | None) -> SamplingParams:
    """`params` with max_tokens settled: left out, `default` or, without one, all that model and cache have room for.

    Raises InvalidRequestError for what the model cannot honour.
    """
    if params.max_tokens is None:
        limits = server.service.client.info.limits
        limit = min(limits.max_model_len, limits.num_blocks * limits.block_size + 1)
        params = clamp_max_tokens(params, prompt, limit if default is None else default, limit)
    server.service.check(prompt, params)
    return params


async def _generate(
    server: Server,
    exchange: RequestContext,
    request: CompletionRequest | ChatRequest,
    prompts: Sequence[tuple[Prompt, SamplingParams]],
    answer: Answer,
) -> None:
    slo_enabled = server.service.client.info.slo_enabled
    scheduling = request.scheduling(exchange.owner, arrival_time=exchange.arrival, slo_enabled=slo_enabled)
    num_tokens = sum((len(prompt.token_ids) + (params.max_tokens or 0)) * params.n for prompt, params in prompts)
    with server.admission.admit(num_tokens, sum(params.n for _, params in prompts)):
        exchange.admitted = True
        exchange.generations = server.service.begin(prompts, request_id=exchange.unique_id)
        is_large = sum(_num_entries(prompt, params) for prompt, params in prompts) > _MANY_ENTRIES
        made = server.service.off_loop if is_large else _at_once
        each_token = isinstance(request, CompletionRequest) and bool(request.stream and request.return_token_ids)
        server.explanations.begin(exchange)
        exchange.hand_over()
        pieces = server.service.run(exchange.generations, scheduling=scheduling, each_token=each_token)
        async with aclosing(pieces):
            async for generation, text in pieces:
                if generation.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise _failure(generation)
                if request.stream:
                    exchange.turn(LatencyPhase.DETOKENIZING)
                    events = await made(lambda g=generation, t=text: list(answer.events(g, t)))  # type: ignore[misc]
                    exchange.turn(LatencyPhase.CLIENT)
                    for event in events:
                        await exchange.event(event)
                    exchange.turn(LatencyPhase.FROM_ENGINE)
        usage = usage_of(exchange)
        timing = await _timing_with_parts(exchange) if request.splitfuse_timing else None
        exchange.turn(LatencyPhase.DETOKENIZING)
        if not request.stream:
            whole = await made(lambda: answer.whole(exchange.generations, usage, timing))
            exchange.turn(LatencyPhase.CLIENT)
            await exchange.answer(whole)
            return
        exchange.turn(LatencyPhase.CLIENT)
        if request.include_usage or timing is not None:
            await exchange.event(answer.last_event(usage if request.include_usage else None, timing))
        await exchange.end_events()


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


def usage_of(exchange: RequestContext) -> Usage:
    """Tokens of prompts and answers, so far."""
    prompt = sum(len(g.prompt.token_ids) for g in exchange.generations if g.choice == 0)
    cached: dict[int, int] = {}
    for g in exchange.generations:
        cached[g.index] = min(g.num_cached_tokens, cached.get(g.index, g.num_cached_tokens))
    completion = sum(len(g.token_ids) for g in exchange.generations) if exchange.shows_output else 0
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(sum(cached.values())))


def timing_of(exchange: RequestContext, parts: dict[LatencyPhase, float] | None = None) -> Timing:
    """What all choices of a request took, so far."""
    begun = exchange.begun
    first_steps = [g.first_step for g in begun if g.first_step is not None]
    first_tokens = [g.timings.tokens[0] for g in begun if g.timings.tokens]
    gaps = [b - a for g in begun for a, b in zip(g.timings.tokens, g.timings.tokens[1:], strict=False)]
    return Timing(
        queued=min(first_steps) - exchange.arrival if first_steps else None,
        first_token=min(first_tokens) - exchange.arrival if first_tokens else None,
        gaps=gaps,
        steps=sum(g.num_steps for g in begun),
        cached_tokens=sum(g.num_cached_tokens for g in begun),
        on_time=all(kept) if (kept := [g.on_time for g in begun if g.on_time is not None]) else None,
        parts=parts or {},
    )


async def _timing_with_parts(exchange: RequestContext) -> Timing:
    """For an answer that tells of it: once the engine has said where the time went, which after a stop string may be a
    pass later.
    """
    if exchange.last is not None and exchange.last.stream is not None:
        await asyncio.shield(exchange.last.stream.spent)
    exchange.turn(LatencyPhase.FROM_ENGINE)
    course = RequestTimeline.of(exchange)
    return timing_of(exchange, {} if course is None else course.parts())


def record_of(exchange: RequestContext, *, route: str, status: int, error: Exception | None) -> RequestRecord:
    """How a request went, when it has ended, which was at its last `turn`."""
    usage, timing = usage_of(exchange), timing_of(exchange)
    return RequestRecord(
        request_id=exchange.request_id,
        route=route,
        status=status,
        total_seconds=exchange.since - exchange.arrival,
        key=exchange.owner.name,
        prompt_tokens=usage.prompt_tokens,
        generated_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        finish_reasons=tuple(_reason(g) for g in exchange.begun),
        error=error.code if isinstance(error, RefusedError) else None if error is None else type(error).__name__,
        queued_seconds=timing.queued,
        first_token_seconds=timing.first_token,
        inter_token_seconds=tuple(timing.gaps),
        steps=timing.steps,
        on_time=timing.on_time,
    )


def _reason(generation: ServedGeneration) -> str:
    return (generation.finish_reason or FinishReason.ABORT).value


def _check_content_type(exchange: RequestContext) -> None:
    """A browser sends a page's text to any server without asking it first, unless the text is called JSON."""
    sent = exchange.headers.get(b"content-type")
    if sent is None and b"origin" not in exchange.headers:
        return
    if (sent or b"").partition(b";")[0].strip().lower() != b"application/json":
        raise RefusedError(415, "send JSON, with the header Content-Type: application/json", code="no_json")
