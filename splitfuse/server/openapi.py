"""Folds the route table, and the types that decode and encode, into the OpenAPI document, so that it is true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from splitfuse.server.dialect import Route
from splitfuse.server.validation import Body, SchemaBounds
from splitfuse.version import __version__

STATUSES = {
    200: "Done",
    400: "A parameter that cannot be honoured",
    401: "No API key, or one that is not valid",
    403: "The key does not allow it",
    404: "No such model, or request",
    408: "The deadline has passed, or the body did not come in time",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "The request was being computed at two deaths of an engine",
    429: "No room now: Retry-After says when there may be",
    500: "The request failed while it ran",
    503: "No engine is ready",
}
"""Descriptions of the statuses."""

_PREFIX = "#/components/schemas/"


def document(routes: Sequence[Route], bounds: SchemaBounds) -> dict[str, Any]:
    """Return the document of some routes, in OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "splitfuse", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(routes, bounds),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{"key": []}, {"header": []}, {}],
    }


def _operation(route: Route) -> dict[str, Any]:
    answers: list[tuple[int, type[msgspec.Struct] | None, str]] = []
    if route.is_supported:
        answers.append((200, route.answer, route.media_type))
    error = route.error or route.dialect.error_type
    answers += [(status, error, "application/json") for status in route.all_errors]
    operation: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            str(status): {"description": STATUSES[status], "content": {media_type: {"schema": _ref(kind)}}}
            for status, kind, media_type in answers
        },
    }
    names = [part[1:-1] for part in route.template.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": _ref(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.event is not None:
        events = f"With stream: events, whose data are a {route.event.__name__} each{route.dialect.end_description}"
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"description": events}}
    if not route.needs_key:
        operation["security"] = []
    return operation


def _ref(kind: type[msgspec.Struct] | None) -> dict[str, str]:
    return {} if kind is None else {"$ref": _PREFIX + kind.__name__}


def _schemas(routes: Sequence[Route], bounds: SchemaBounds) -> dict[str, Any]:
    kinds = {
        kind
        for route in routes
        for kind in (route.body, route.answer, route.event, route.error or route.dialect.error_type)
    }
    _, schemas = msgspec.json.schema_components(filter(None, kinds), ref_template=_PREFIX + "{name}")
    bodies = {body.__name__: body for body in _subclasses(Body)}
    return {
        name: bodies[name].refine_schema(schema, bounds) if name in bodies else schema
        for name, schema in sorted(schemas.items())
    }


def _subclasses(kind: type[Body]) -> Iterator[type[Body]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)
