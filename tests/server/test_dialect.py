"""A dialect brings its own keys, errors and events; nothing of OpenAI's is left in them."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from running_server import running_server

from splitfuse.config.server import ServerConfig
from splitfuse.errors import InvalidRequestError
from splitfuse.server import app
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import PIECE_BYTES, Dialect, LazyList, Route, encode_json, json_pieces
from splitfuse.server.state import AppState


class Complaint(msgspec.Struct, frozen=True):
    oops: str
    status: int
    request: str


class Line(msgspec.Struct, frozen=True):
    text: str


LINES = Dialect(
    error=lambda answer: Complaint(answer.message, answer.status, answer.request_id),
    error_type=Complaint,
    key=lambda headers: headers.get(b"x-key", b""),
    id_headers=(b"request-name",),
    event=lambda line: encode_json(line) + b"\n",
    end=b"end\n",
    end_description=", and end at the end",
    stream_type="text/plain",
)


async def lines(_: AppState, context: RequestContext) -> None:
    await context.send_events([Line("a")])
    await context.end_events()


async def refuse(_: AppState, __: RequestContext) -> None:
    raise InvalidRequestError("never")


async def break_off(_: AppState, context: RequestContext) -> None:
    await context.send_events([Line("a")])
    raise InvalidRequestError("no more")


async def break_off_otherwise(state: AppState, context: RequestContext) -> None:
    context.stream_error = lambda error: [Line("b"), Line(error.message)]
    await break_off(state, context)


async def forget(_: AppState, context: RequestContext) -> None:
    await context.answer(Line("forgotten"))


def test_a_dialect_brings_its_keys_errors_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {"/lines": lines, "/refuse": refuse, "/break": break_off, "/break/otherwise": break_off_otherwise}
    query = {"limit": {"type": "integer"}}
    own = (
        *(Route("GET", path, handler, "x", None, dialect=LINES, query=query) for path, handler in handlers.items()),
        Route("DELETE", "/lines", forget, "x", Line, dialect=LINES),
    )
    monkeypatch.setattr(app, "ROUTES", own + app.ROUTES)
    with running_server(ServerConfig(api_key=("k",)), num_blocks=200) as server, server.http() as http:
        anonymous = http.get("/lines", headers={"authorization": "Bearer k"})
        assert anonymous.status_code == 401 and anonymous.json()["status"] == 401
        http.headers.update({"x-key": "k", "x-request-id": "r1"})
        answer = http.get("/lines")
        assert answer.text == '{"text":"a"}\nend\n'
        assert answer.headers["request-name"] == "r1" and "x-request-id" not in answer.headers
        refused = http.get("/refuse")
        assert (refused.status_code, refused.json()) == (400, {"oops": "never", "status": 400, "request": "r1"})
        assert http.get("/break").text == '{"text":"a"}\n{"oops":"no more","status":400,"request":"r1"}\n'
        assert http.get("/break/otherwise").text == '{"text":"a"}\n{"text":"b"}\n{"text":"no more"}\n'
        assert http.delete("/lines").json() == {"text": "forgotten"}
        other = http.post("/lines")
        assert (other.status_code, other.headers["allow"]) == (405, "GET, HEAD, DELETE")
        assert http.get("/version").json()["error"]["code"] == "invalid_api_key"
        operations = http.get("/openapi.json", headers={"authorization": "Bearer k"}).json()["paths"]["/lines"]
        assert operations.keys() == {"get", "delete"}
        assert operations["get"]["parameters"] == [{"name": "limit", "in": "query", "schema": {"type": "integer"}}]
        schema = operations["get"]["responses"]["401"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Complaint"}


def test_a_lazy_list_is_written_as_a_list_is() -> None:
    for items in ([], [None], [Line("\0"), {"a": [1.5]}, "b"]):
        whole = encode_json({"x": "\0", "first": items, "nested": {"second": [items, 3]}, "last": "\0"})

        def lazy(items: list[Any] = items) -> Any:
            return LazyList(iter(items))

        def content() -> Any:
            return {"x": "\0", "first": lazy(), "nested": {"second": [lazy(), 3]}, "last": "\0"}

        assert encode_json(content()) == b"".join(json_pieces(content())) == whole


def test_items_of_a_lazy_list_are_made_as_pieces_are_taken() -> None:
    made: list[int] = []

    def items() -> Iterator[str]:
        for number in range(50):
            made.append(number)
            yield "x" * (PIECE_BYTES // 4)

    pieces = json_pieces({"items": LazyList(items())})
    sizes = [len(next(pieces))]
    assert len(made) == 4
    sizes += map(len, pieces)
    assert len(made) == 50 and max(sizes) < 2 * PIECE_BYTES and len(sizes) == 13


def test_what_is_neither_data_nor_a_lazy_list_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="cannot be written as JSON"):
        encode_json({"x": object()})
