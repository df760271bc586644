"""Reads the parameters behind `?` in a path, and lists items page by page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec

from splitfuse.errors import InvalidRequestError, did_you_mean
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError

MAX_PAGE = 100
"""Number of items that one answer lists at most."""
PAGE: Mapping[str, Mapping[str, Any]] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "order": {"enum": ["asc", "desc"]},
}
"""Parameters of a list, for the OpenAPI document."""


class ItemList(msgspec.Struct, frozen=True):
    """Lists items, a page of them."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def query_of(context: RequestContext, known: Collection[str]) -> Mapping[str, str]:
    """Return the parameters behind `?`. Raises RefusedError for others than those known, and for one given twice."""
    query: dict[str, str] = {}
    for name, value in parse_qsl(context.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name not in known:
            message = f"unknown parameter {name!r:.200}{did_you_mean(name, known)}"
            raise RefusedError(400, message, code="unknown_parameter", parameter=name[:200])
        if name in query:
            raise InvalidRequestError(f"{name} is given twice behind ?: give it once", parameter=name)
        query[name] = value
    return query


def page_of(items: Sequence[dict[str, Any]], query: Mapping[str, str], *, order: Literal["asc", "desc"]) -> ItemList:
    """Return the page that a query asks for of items with ids, the oldest first; `order` is that of a query without.

    Raises InvalidRequestError for a query that is wrong.
    """
    limit, asked = query.get("limit", "20"), query.get("order", order)
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        message = f"limit must be a whole number from 1 to {MAX_PAGE}, not {limit!r:.80}"
        raise InvalidRequestError(message, parameter="limit")
    if asked not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, not {asked!r:.80}", parameter="order")
    ordered = list(items if asked == "asc" else reversed(items))
    ids = [item["id"] for item in ordered]
    start = 0
    if (after := query.get("after")) is not None:
        if after not in ids:
            message = f"after must be the id of an item of this list, not {after!r:.200}"
            raise InvalidRequestError(message, parameter="after")
        start = ids.index(after) + 1
    end = start + int(limit)
    data = ordered[start:end]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return ItemList(data, first, last, has_more=end < len(ordered))
