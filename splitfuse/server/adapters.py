"""Defines the routes by which an administrator loads and unloads LoRA adapters, as vLLM names them."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from splitfuse.config.values import ADAPTER_NAME
from splitfuse.errors import InvalidRequestError
from splitfuse.server.auth import check_admin
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route
from splitfuse.server.errors import RefusedError
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.openai.endpoints import Model, describe_model
from splitfuse.server.state import AppState
from splitfuse.server.validation import Body


class LoadLoraRequest(Body, kw_only=True, frozen=True):
    """Asks to load an adapter: POST /v1/load_lora_adapter. Requests choose it by `model: lora_name`."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=128)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096, description="Folder on the server, or Hub name")]
    load_inplace: Annotated[bool, Meta(description="Replaces an adapter of that name")] | None = None


class UnloadLoraRequest(Body, kw_only=True, frozen=True):
    """Asks to unload an adapter: POST /v1/unload_lora_adapter. Requests that have it go on with it."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=128)]


class UnloadedModel(msgspec.Struct, frozen=True):
    """Says that an adapter is no model of the server any more."""

    id: str
    deleted: Literal[True] = True
    object: Literal["model"] = "model"


async def load(state: AppState, context: RequestContext, body: LoadLoraRequest) -> None:
    """Answer POST /v1/load_lora_adapter."""
    check_admin(context.owner, "adapters are loaded and unloaded")
    name, client = body.lora_name, state.service.client
    if not ADAPTER_NAME.fullmatch(name):
        message = f"lora_name must be made of letters, digits and . _ : / @ + -, not {name!r:.200}"
        raise InvalidRequestError(message, parameter="lora_name")
    if name == state.model:
        raise InvalidRequestError(f"lora_name {name!r} is the name of the model itself", parameter="lora_name")
    if name in client.adapters and not body.load_inplace:
        message = f"there is an adapter {name!r:.200} already: set load_inplace to true to replace it"
        raise InvalidRequestError(message, parameter="lora_name")
    await client.load_adapter(name, body.lora_path)
    await context.answer(describe_model(state, name))


async def unload(state: AppState, context: RequestContext, body: UnloadLoraRequest) -> None:
    """Answer POST /v1/unload_lora_adapter."""
    check_admin(context.owner, "adapters are loaded and unloaded")
    state.service.client.check_not_loading(body.lora_name)
    if body.lora_name not in state.service.client.adapters:
        message = f"there is no adapter {body.lora_name!r:.200} here; GET /v1/models lists all"
        raise RefusedError(404, message, code="model_not_found", parameter="lora_name")
    state.service.client.unload_adapter(body.lora_name)
    await context.answer(UnloadedModel(body.lora_name))


_route = functools.partial(Route, dialect=OPENAI)

ROUTES = (
    _route(
        *("POST", "/v1/load_lora_adapter", load, "Load a LoRA adapter", Model, LoadLoraRequest),
        errors=(403,),
    ),
    _route(
        *("POST", "/v1/unload_lora_adapter", unload, "Unload a LoRA adapter", UnloadedModel, UnloadLoraRequest),
        errors=(403,),
    ),
)
"""Route table of adapters."""
