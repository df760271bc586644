"""Defines the routes of OpenAI's dialect, with vLLM's /tokenize and /detokenize."""

from __future__ import annotations

import functools
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from splitfuse.core.limits import check_token_ids
from splitfuse.server.context import RequestContext, TokenCounts
from splitfuse.server.dialect import Route, encode_json, lazy_list
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import MAX_LENGTHS, GenerationRequest, errors_named, generate, reading_at_most
from splitfuse.server.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    chat_options,
    plain_messages,
)
from splitfuse.server.openai.responders import ChatResponder, CompletionResponder, OpenAIResponder
from splitfuse.server.paging import PAGE, ItemList, page_of, query_of
from splitfuse.server.state import AppState
from splitfuse.server.store import StoredAnswer

STORED = "chat"
"""Kind of the stored answers to chats."""
MANY_TOKENS = 4096
"""Number of tokens from which on they are written off the event loop, which they would hold up."""


class Model(msgspec.Struct, frozen=True):
    """Describes a model that the server has. That of a LoRA adapter has the model that it belongs to as `parent`."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: Literal["splitfuse"] = "splitfuse"
    parent: str | None = None


class ModelList(msgspec.Struct, frozen=True):
    """Lists the model, and its LoRA adapters."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct, frozen=True):
    """Holds the tokens of a prompt. `max_model_len` bounds those of a prompt and its answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class TokenizerInfo(msgspec.Struct, frozen=True):
    """Holds the special tokens of the tokenizer, and the chat template."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class DeletedChat(msgspec.Struct, frozen=True):
    """Says that a stored answer was deleted."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True


class Detokenized(msgspec.Struct, frozen=True):
    """Holds the text of tokens."""

    prompt: str


async def completions(state: AppState, context: RequestContext, body: CompletionRequest | ChatRequest) -> None:
    """Answer POST /v1/completions and /v1/chat/completions."""
    slo_enabled = state.service.client.info.slo_enabled

    def read() -> GenerationRequest:
        return body.to_generation(context.owner, arrival_time=context.arrival, slo_enabled=slo_enabled)

    request = await state.convert(context, read)
    responder: OpenAIResponder

    def counts() -> TokenCounts:
        return context.num_tokens

    if isinstance(body, ChatRequest):
        context.prompt = request.messages
        keep = functools.partial(_keep, state, context, body) if state.store.keeps(body.store, left_out=False) else None
        responder = ChatResponder(body, f"chatcmpl-{context.unique_id}", state, counts, context.adapter, keep)
    else:
        context.prompt = body.prompt
        responder = CompletionResponder(
            body, f"cmpl-{context.unique_id}", state, counts, context.adapter, request.prompts
        )
    await generate(state, context, request, responder)


def _keep(state: AppState, context: RequestContext, body: ChatRequest, answer: ChatCompletion) -> None:
    asked = [
        {"id": f"{answer.id}-{number}", **{name: each for name, each in message.items() if each is not None}}
        for number, message in enumerate(msgspec.to_builtins(body.messages))
    ]
    stored = StoredAnswer(encode_json(answer), encode_json(asked), kind=STORED)
    state.store.put(context.owner.name, answer.id, stored)


async def stored_chat(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/chat/completions/{completion_id}."""
    query_of(context, ())
    await context.answer(state.store.find(context.owner.name, _id(context), kind=STORED).answer)


async def delete_chat(state: AppState, context: RequestContext) -> None:
    """Answer DELETE /v1/chat/completions/{completion_id}."""
    query_of(context, ())
    state.store.delete(context.owner.name, _id(context), kind=STORED)
    await context.answer(DeletedChat(_id(context)))


async def chat_messages(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/chat/completions/{completion_id}/messages: what was sent, the oldest first."""
    asked = state.store.find(context.owner.name, _id(context), kind=STORED).asked
    await context.answer(page_of(msgspec.json.decode(asked), query_of(context, PAGE), order="asc"))


def _id(context: RequestContext) -> str:
    answer_id: str = context.scope["path_params"]["completion_id"]
    return answer_id


def refuse_absent(path: str) -> None:
    """Raise RefusedError (400) for a path below a route of OpenAI's API that this server lacks. It is no 404, after
    which LiteLLM's proxy sends the model no requests of any client for some seconds.
    """
    for route in ABSENT:
        if path == route or path.startswith(route + "/"):
            routes = f"{CompletionRequest.PATH}, {ChatRequest.PATH} and /v1/responses"
            message = f"the route {path:.200} of OpenAI's API is not supported; this server generates text at {routes}"
            raise RefusedError(400, message, code="unsupported_route")


async def models(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/models."""
    await context.answer(ModelList([describe_model(state, each) for each in (None, *state.service.client.adapters)]))


async def model(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/models/{model}. Raises RefusedError (404) for another one."""
    name = context.scope["path_params"]["model"]
    await context.answer(describe_model(state, name if state.check_model(name) else None))


def describe_model(state: AppState, adapter: str | None = None) -> Model:
    """Return the entry of the model, or of an adapter by its name."""
    length = state.service.client.info.limits.max_model_len
    if adapter is None:
        return Model(state.model, state.started, length)
    return Model(adapter, state.started, length, parent=state.model)


async def tokenize(state: AppState, context: RequestContext, body: TokenizeRequest) -> None:
    """Answer POST /tokenize. Its text takes its turn among those of the queued requests, so it counts as one."""
    body.check()
    service, limit = state.service, state.service.client.info.limits.max_model_len
    most = MAX_LENGTHS * limit
    with state.admission.admit(0), reading_at_most(most):
        if (sent := body.messages) is not None:
            adds, messages = bool(body.add_special_tokens), await state.convert(context, lambda: plain_messages(sent))
            work = service.encode_chat(
                messages, options=chat_options(body), add_special_tokens=adds, max_model_len=most
            )
        elif not body.prompt:
            await context.answer(Tokenized(0, limit, [], [] if body.return_token_strs else UNSET))
            return
        else:
            work = service.encode(
                body.prompt, add_special_tokens=body.add_special_tokens is not False, max_model_len=most
            )
        with errors_named({"prompt": "messages"} if sent else {}):
            prompt = await context.unless_gone(work, deadline=None)
    ids = prompt.token_ids
    strings: list[str] | UnsetType = UNSET
    if body.return_token_strs:
        strings = lazy_list(service.tokenizer.token(token) or "" for token in ids)
    answer = Tokenized(len(ids), limit, lazy_list(ids), strings)
    if len(ids) > MANY_TOKENS:
        await context.answer_in_pieces(answer, service.off_loop)
    else:
        await context.answer(answer)


async def tokenizer_info(state: AppState, context: RequestContext) -> None:
    """Answer GET /tokenizer_info."""
    tokenizer = state.service.tokenizer
    bos, eos, pad, unk = (tokenizer.special_tokens.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk"))
    await context.answer(TokenizerInfo(bos, eos, pad, unk, tokenizer.chat_template))


async def detokenize(state: AppState, context: RequestContext, body: DetokenizeRequest) -> None:
    """Answer POST /detokenize."""
    vocab_size, tokenizer = state.service.client.info.limits.vocab_size, state.service.tokenizer

    def decoded() -> str:
        check_token_ids("tokens", body.tokens, vocab_size, parameter="tokens")
        return tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens is not False)

    with state.admission.admit(0):
        text = await context.unless_gone(state.service.off_loop(decoded), deadline=None)
    await context.answer(Detokenized(text))


ABSENT = (
    "/v1/chat/completions",  # lists of stored ones
    *(f"/v1/{name}" for name in ("conversations", "moderations", "audio", "images")),
    *(f"/v1/{name}" for name in ("videos", "realtime", "batches", "files", "uploads", "vector_stores", "containers")),
    *(f"/v1/{name}" for name in ("fine_tuning", "evals", "assistants", "threads", "chatkit", "skills", "organization")),
)
"""Routes of OpenAI's API that this server lacks, each with all paths below it."""

_route = functools.partial(Route, dialect=OPENAI)
_STORED = ChatRequest.PATH + "/{completion_id}"

ROUTES = (
    _route("POST", CompletionRequest.PATH, completions, "Continue prompts", Completion, CompletionRequest, Completion),
    _route(
        "POST", ChatRequest.PATH, completions, "Answer a conversation", ChatCompletion, ChatRequest, ChatCompletionChunk
    ),
    _route("GET", _STORED, stored_chat, "A stored answer", ChatCompletion, errors=(400, 404)),
    _route("DELETE", _STORED, delete_chat, "Forget a stored answer", DeletedChat, errors=(400, 404)),
    _route(
        *("GET", _STORED + "/messages", chat_messages, "Messages of a stored answer", ItemList),
        errors=(400, 404),
        query=PAGE,
    ),
    _route("GET", "/v1/models", models, "Models", ModelList, errors=(503,)),
    _route("GET", "/v1/models/{model:path}", model, "One model", Model, errors=(404, 503)),
    _route("POST", "/tokenize", tokenize, "Text to tokens", Tokenized, TokenizeRequest),
    _route("GET", "/tokenizer_info", tokenizer_info, "Special tokens and chat template", TokenizerInfo),
    _route("POST", "/detokenize", detokenize, "Tokens to text", Detokenized, DetokenizeRequest),
)
"""Route table of this dialect."""
