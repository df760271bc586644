"""Defines the routes of OpenAI's Responses API, and keeps its answers in the server's store."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from splitfuse.errors import InvalidRequestError
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Dialect, Route, bearer_or_header_key, encode_json
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import GenerationRequest, errors_named, generate
from splitfuse.server.openai.dialect import ErrorBody, error_body
from splitfuse.server.paging import PAGE, ItemList, page_of, query_of
from splitfuse.server.responses.answers import ResponseAnswer, ResponseEvent, ResponsesResponder
from splitfuse.server.responses.items import MAX_ITEMS, Item, answer_id_of, with_ids
from splitfuse.server.responses.protocol import NAMES, PATH, ResponseRequest
from splitfuse.server.state import AppState
from splitfuse.server.store import StoredAnswer


class Deleted(msgspec.Struct, frozen=True):
    """Says that a response was deleted."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(msgspec.Struct, frozen=True):
    """Counts the tokens of an input."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class _Output(msgspec.Struct, frozen=True):
    """Holds what a later request goes on from of an answer."""

    output: list[Item]


_read_output = msgspec.json.Decoder(_Output).decode
_read_items = msgspec.json.Decoder(list[Item]).decode
_read_plain = msgspec.json.Decoder(list[dict[str, Any]]).decode


def typed_event(event: ResponseEvent) -> bytes:
    """Return a server-sent event with its type."""
    return b"event: " + event.type.encode() + b"\ndata: " + encode_json(event) + b"\n\n"


RESPONSES = Dialect(error=error_body, error_type=ErrorBody, key=bearer_or_header_key, event=typed_event)


async def respond(state: AppState, context: RequestContext, body: ResponseRequest) -> None:
    """Answer POST /v1/responses."""
    owner, store = context.owner, state.store
    stores = store.keeps(body.store, left_out=True)
    asked, request = await state.service.off_loop(lambda: _read(state, context, body, stores=stores))
    context.prompt = request.messages

    def keep(answer: ResponseAnswer) -> None:
        store.put(owner.name, answer.id, StoredAnswer(encode_json(answer), asked, body.previous_response_id))

    responder = ResponsesResponder(body, context.unique_id, state, lambda: context.num_tokens, keep if stores else None)
    context.stream_error = responder.failed_events
    await generate(state, context, request, responder)


async def count_input(state: AppState, context: RequestContext, body: ResponseRequest) -> None:
    """Answer POST /v1/responses/input_tokens."""
    _, request = await state.service.off_loop(lambda: _read(state, context, body, stores=False))
    with state.admission.admit(0), errors_named(request.names):
        work = request.encode(state.service)
        (prompt,) = await context.unless_gone(work, deadline=None)
    await context.answer(InputTokens(len(prompt.token_ids)))


def _read(
    state: AppState, context: RequestContext, body: ResponseRequest, *, stores: bool
) -> tuple[bytes, GenerationRequest]:
    """Return the items of a request as they are kept, if it `stores` its answer, and what to generate after them and
    those that it goes on from. Raises InvalidRequestError and RefusedError. It takes as long as the conversation.
    """
    before: list[Item] = []
    if (previous := body.previous_response_id) is not None:
        for each in state.store.chain(context.owner.name, previous, parameter="previous_response_id"):
            before += [*_read_items(each.asked), *_read_output(each.answer).output]
            if len(before) + len(body.items) > MAX_ITEMS:
                message = (
                    f"previous_response_id {previous!r} goes on from too many items: with those of input at most "
                    f"{MAX_ITEMS} are read, begin a new conversation"
                )
                raise InvalidRequestError(message, parameter="previous_response_id")
    items = _dereferenced(state, context, body.items)
    with errors_named(NAMES):
        request = body.to_generation(
            context.owner,
            [*before, *items],
            num_before=len(before),
            arrival_time=context.arrival,
            slo_enabled=state.service.client.info.slo_enabled,
        )
    asked = encode_json([_sent(item) for item in with_ids(items, context.unique_id)]) if stores else b""
    return asked, request


def _dereferenced(state: AppState, context: RequestContext, items: Sequence[Item]) -> list[Item]:
    """Return items, those of stored answers for references. Each answer is read once. Raises RefusedError (404) for a
    reference to an item that is not there.
    """
    found = list(items)
    wanted: dict[str | None, dict[str, list[int]]] = {}  # by answer and id, the places
    for index, item in enumerate(items):
        if item.kind == "item_reference":
            item.check(f"input[{index}]")
            assert item.id is not None
            wanted.setdefault(answer_id_of(item.id), {}).setdefault(item.id, []).append(index)
    for answer_id, places in wanted.items():
        if answer_id is not None:
            where = f"input[{next(iter(places.values()))[0]}].id"
            stored = state.store.find(context.owner.name, answer_id, parameter=where)
            for each in (*_read_output(stored.answer).output, *_read_items(stored.asked)):
                for index in places.pop(each.id or "", ()):
                    found[index] = each
        for item_id, (index, *_) in places.items():
            message = f"input[{index}].id {item_id!r:.200} is the id of no item of a stored response"
            raise RefusedError(404, message, code="answer_not_found", parameter=f"input[{index}].id")
    return found


def _sent(item: Item) -> dict[str, Any]:
    """Return an item as it is kept: with its fields, and its text in parts."""
    plain = {name: value for name, value in msgspec.to_builtins(item).items() if value is not None}
    if isinstance(text := plain.get("content"), str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        own: dict[str, Any] = {"annotations": []} if item.role == "assistant" else {}
        plain["content"] = [{"type": kind, "text": text, **own}]
    for name in ("content", "summary", "output"):
        if isinstance(parts := plain.get(name), list):
            plain[name] = [{key: value for key, value in part.items() if value is not None} for part in parts]
    return plain


async def stored_response(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/responses/{response_id}."""
    query = query_of(context, ("stream",))
    if query.get("stream", "false") not in ("false", "False", "0"):
        message = "stream=true needs a response in the background, of which there are none: leave it out"
        raise RefusedError(400, message, code="unsupported_parameter", parameter="stream")
    await context.answer(state.store.find(context.owner.name, _id(context)).answer)


async def delete_response(state: AppState, context: RequestContext) -> None:
    """Answer DELETE /v1/responses/{response_id}."""
    query_of(context, ())
    state.store.delete(context.owner.name, _id(context))
    await context.answer(Deleted(_id(context)))


async def cancel_response(state: AppState, context: RequestContext) -> None:
    """Answer POST /v1/responses/{response_id}/cancel: a stored response has ended."""
    state.store.find(context.owner.name, _id(context))
    message = "only a response in the background can be cancelled, of which there are none; close the connection of one"
    raise RefusedError(400, message, code="unsupported_route")


async def compact(_: AppState, __: RequestContext) -> None:
    """Answer POST /v1/responses/compact: the server keeps no compacted conversations."""
    message = "conversations are not compacted: truncation: auto drops the oldest turns that do not fit"
    raise RefusedError(400, message, code="unsupported_route")


async def input_items(state: AppState, context: RequestContext) -> None:
    """Answer GET /v1/responses/{response_id}/input_items: what was sent with that request, the newest first."""
    items = _read_plain(state.store.find(context.owner.name, _id(context)).asked)
    await context.answer(page_of(items, query_of(context, PAGE), order="desc"))


def _id(context: RequestContext) -> str:
    answer_id: str = context.scope["path_params"]["response_id"]
    return answer_id


_route = functools.partial(Route, dialect=RESPONSES)
_ONE = PATH + "/{response_id}"

ROUTES = (
    _route("POST", PATH, respond, "Answer a conversation of items", ResponseAnswer, ResponseRequest, ResponseEvent),
    _route("POST", PATH + "/input_tokens", count_input, "Tokens of an input", InputTokens, ResponseRequest),
    _route(
        *("POST", PATH + "/compact", compact, "Not supported: truncation drops turns", None),
        errors=(400,),
        is_supported=False,
    ),
    _route(
        *("GET", _ONE, stored_response, "A stored response", ResponseAnswer),
        errors=(400, 404),
        query={"stream": {"enum": [False]}},
    ),
    _route("DELETE", _ONE, delete_response, "Forget a stored response", Deleted, errors=(400, 404)),
    _route("GET", _ONE + "/input_items", input_items, "Input of a stored one", ItemList, errors=(400, 404), query=PAGE),
    _route(
        *("POST", _ONE + "/cancel", cancel_response, "Not supported: none runs in the background", None),
        errors=(400, 404),
        is_supported=False,
    ),
)
"""Route table of this dialect."""
