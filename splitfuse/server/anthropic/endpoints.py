"""Defines the routes of Anthropic's dialect."""

from __future__ import annotations

import functools

import msgspec

from splitfuse.server.anthropic.answers import MessagesAnswer, MessagesEvent, MessagesResponder
from splitfuse.server.anthropic.dialect import ANTHROPIC
from splitfuse.server.anthropic.protocol import NAMES, CountTokensRequest, MessagesRequest
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route
from splitfuse.server.generate import MAX_LENGTHS, GenerationRequest, errors_named, generate, reading_at_most
from splitfuse.server.state import AppState

PATH = "/v1/messages"
"""Path of this dialect's routes: errors about others below it are written in its shape too."""


class TokenCount(msgspec.Struct, frozen=True):
    """Counts the tokens of a conversation, as the model would read it."""

    input_tokens: int


class Hello(msgspec.Struct, frozen=True):
    """Answers clients that ask whether the server is there."""

    message: str = "hello"


async def messages(state: AppState, context: RequestContext, body: MessagesRequest) -> None:
    """Answer POST /v1/messages."""
    slo_enabled = state.service.client.info.slo_enabled

    def read() -> GenerationRequest:
        return body.to_generation(context.owner, arrival_time=context.arrival, slo_enabled=slo_enabled)

    request = await state.convert(context, read)
    context.prompt = request.messages
    responder = MessagesResponder(body, f"msg_{context.unique_id}", lambda: context.num_tokens)
    await generate(state, context, request, responder)


async def count_tokens(state: AppState, context: RequestContext, body: CountTokensRequest) -> None:
    """Answer POST /v1/messages/count_tokens. Its text takes its turn among those of the queued requests, so it counts
    as one.
    """
    conversation, options = await state.convert(context, body.conversation)
    body.form()
    most = MAX_LENGTHS * state.service.client.info.limits.max_model_len
    with state.admission.admit(0), reading_at_most(most), errors_named(NAMES):
        work = state.service.encode_chat(conversation, options=options, max_model_len=most)
        prompt = await context.unless_gone(work, deadline=None)
    await context.answer(TokenCount(len(prompt.token_ids)))


async def hello(_: AppState, context: RequestContext) -> None:
    """Answer GET and HEAD /api/hello, by which Claude Code looks whether the server is there."""
    await context.answer(Hello())


_route = functools.partial(Route, dialect=ANTHROPIC)

ROUTES = (
    _route("POST", PATH, messages, "Answer a conversation", MessagesAnswer, MessagesRequest, MessagesEvent),
    _route("POST", PATH + "/count_tokens", count_tokens, "Count tokens", TokenCount, CountTokensRequest),
    _route("GET", "/api/hello", hello, "Whether the server is there", Hello, needs_key=False, is_logged=False),
)
"""Route table of this dialect."""
