"""The server's routes as an OpenAPI document, made from the types that decode and encode, so that it is true.

It decides how the document is put together, and holds the answers of the small routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from splitfuse.errors import EngineDiedError
from splitfuse.server.errors import ErrorBody
from splitfuse.server.explain import Explanation
from splitfuse.server.openai.endpoints import AppState
from splitfuse.server.openai.protocol import NEUTRAL, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from splitfuse.server.openai.responses import ChatCompletion, ChatCompletionChunk, Completion
from splitfuse.version import __version__


class Health(msgspec.Struct, frozen=True):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """`ready`, or what is being waited for: `fraction` of it is done, 0 to 1."""

    stage: str
    fraction: float


class Version(msgspec.Struct, frozen=True):
    """Of the server's software."""

    version: str


class Model(msgspec.Struct, frozen=True):
    """A model that can be asked."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: Literal["splitfuse"] = "splitfuse"


class ModelList(msgspec.Struct, frozen=True):
    """All models: one."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct, frozen=True):
    """The tokens of a prompt. `max_model_len` is the most that prompt and answer may come to."""

    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(msgspec.Struct, frozen=True):
    """The text of tokens."""

    prompt: str


_BODIES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_ANSWERS = (
    *(Completion, ChatCompletion, ChatCompletionChunk, Health, Readiness, Version),
    *(ModelList, Model, Tokenized, Detokenized, Explanation, ErrorBody),
)
_PREFIX = "#/components/schemas/"


def document(state: AppState) -> dict[str, Any]:
    """OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "splitfuse", "version": __version__},
        "paths": {
            "/v1/completions": {"post": _generating("Continue prompts", CompletionRequest, Completion, Completion)},
            "/v1/chat/completions": {
                "post": _generating("Answer a conversation", ChatRequest, ChatCompletion, ChatCompletionChunk)
            },
            "/v1/models": {"get": _operation("Models", ModelList, 401, 503)},
            "/v1/models/{model}": {
                "get": {
                    **_operation("One model", Model, 401, 404, 503),
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/v1/splitfuse/requests/{request}": {
                "get": {
                    **_operation("Where the time of a request went that has ended", Explanation, 401, 404),
                    "parameters": [{"name": "request", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/tokenize": {"post": _asking("Text to tokens", TokenizeRequest, Tokenized)},
            "/detokenize": {"post": _asking("Tokens to text", DetokenizeRequest, Detokenized)},
            "/health": {"get": {**_operation("The process lives", Health), "security": []}},
            "/ready": {
                "get": {
                    "summary": "Requests are taken",
                    "responses": {
                        "200": _answer("They are", Readiness),
                        "503": _answer("Not now", Readiness),
                    },
                    "security": [],
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Metrics for Prometheus",
                    "responses": {
                        "200": {"description": "Its text format", "content": {"text/plain": {"schema": {}}}},
                        "401": _answer(_STATUSES[401], ErrorBody),
                    },
                }
            },
            "/version": {"get": _operation("Version of the server", Version, 401)},
            "/openapi.json": {
                "get": {
                    "summary": "This document",
                    "responses": {
                        "200": {"description": "OpenAPI", "content": {"application/json": {"schema": {}}}},
                        "401": _answer(_STATUSES[401], ErrorBody),
                    },
                }
            },
        },
        "components": {
            "schemas": _schemas(state),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


_STATUSES = {
    400: "A parameter that cannot be honoured",
    401: "No key, or one that is not valid",
    404: "No such model, or request",
    408: "splitfuse_deadline has passed",
    413: "The body is too large",
    415: "The body is not called JSON",
    429: "No room now: Retry-After says when there may be",
    500: "The request failed while it ran",
    503: "No engine is ready",
}


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _PREFIX + kind.__name__}


def _answer(description: str, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _operation(summary: str, answer: type[msgspec.Struct], *errors: int) -> dict[str, Any]:
    refused = {str(status): _answer(_STATUSES[status], ErrorBody) for status in errors}
    return {"summary": summary, "responses": {"200": _answer("Done", answer), **refused}}


def _asking(summary: str, body: type[msgspec.Struct], answer: type[msgspec.Struct], *errors: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(body)}}
    return {
        **_operation(summary, answer, 400, 401, 404, 413, 415, *errors, 500, 503),
        "requestBody": {"required": True, "content": content},
    }


def _generating(
    summary: str, body: type[msgspec.Struct], answer: type[msgspec.Struct], event: type[msgspec.Struct]
) -> dict[str, Any]:
    operation = _asking(summary, body, answer, 408, 429)
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {"description": f"With stream: events, whose data are a {event.__name__} each, and [DONE] at the end"}
    }
    return operation


def _schemas(state: AppState) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components((*_BODIES, *_ANSWERS), ref_template=_PREFIX + "{name}")
    for kind, neutral in NEUTRAL.items():
        for name, values in neutral.items():
            schemas[kind.__name__]["properties"][name] = {"enum": list(values), "description": "Not supported"}
    token = {"type": "integer", "minimum": 0}
    try:
        model, limits = state.model, state.service.client.info.limits
    except EngineDiedError:  # not ready yet
        pass
    else:
        token["maximum"] = limits.vocab_size - 1
        for kind in _BODIES:
            schemas[kind.__name__]["properties"]["model"] = {"enum": [model, None]}
        for kind in (CompletionRequest, ChatRequest):
            for name in {"max_tokens", "max_completion_tokens", "min_tokens"} & set(kind.__struct_fields__):
                schemas[kind.__name__]["properties"][name]["anyOf"][0]["maximum"] = limits.max_model_len - 1
    _describe_prompts(schemas, token, state.config.max_prompts)
    schemas["TokenizeRequest"] = _either_of_two(schemas["TokenizeRequest"])
    return dict(schemas)


def _either_of_two(schema: Mapping[str, Any]) -> dict[str, Any]:
    """TokenizeRequest as TokenizeRequest.check understands it."""
    kinds = []
    for needed, others in (
        ("prompt", ("add_special_tokens",)),
        ("messages", ("add_generation_prompt", "chat_template_kwargs")),
    ):
        properties = {name: schema["properties"][name] for name in ("model", needed, *others)}
        properties[needed] = next(s for s in properties[needed]["anyOf"] if s != {"type": "null"})
        kinds.append({"type": "object", "properties": properties, "required": [needed], "additionalProperties": False})
    return {"title": "TokenizeRequest", "description": schema["description"], "oneOf": kinds}


def _describe_prompts(schemas: Mapping[str, Any], token: Mapping[str, Any], max_prompts: int) -> None:
    """What the types alone do not say."""
    text, tokens = {"type": "string", "minLength": 1}, {"type": "array", "items": token, "minItems": 1}
    completion, chat, detokenize = (
        schemas[kind.__name__]["properties"] for kind in (CompletionRequest, ChatRequest, DetokenizeRequest)
    )
    completion["prompt"] = {
        "anyOf": [
            text,
            tokens,
            *({"type": "array", "items": kind, "minItems": 1, "maxItems": max_prompts} for kind in (text, tokens)),
        ]
    }
    detokenize["tokens"] = {"type": "array", "items": token}
    for properties in (completion, chat):
        for name in ("logit_bias", "stop_token_ids"):
            for schema in properties[name]["anyOf"]:
                if schema["type"] == "object":
                    schema["propertyNames"] = {"pattern": "^(0|[1-9][0-9]*)$"}
                elif schema["type"] == "array":
                    schema["items"] = token
