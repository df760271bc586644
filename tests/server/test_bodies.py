"""Bodies: how many bytes of all are held together, what JSON may make of one, and how long one may take."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_server import PATIENCE, RunningServer, running_server

from splitfuse.config.server import ServerConfig
from splitfuse.errors import OverloadedError
from splitfuse.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from splitfuse.server.bodies import BYTES_PER_VALUE, FREE_BYTES, MAX_VALUES, BodyBudget, _num_values, decoded_size
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.openai.protocol import ChatRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"prompt": "Once", "max_tokens": 1}
MIB = 2**20


# The budget ----------------------------------------------------------------------------------------------------------


def test_the_first_bytes_of_a_body_are_free() -> None:
    budget = BodyBudget(0)
    assert budget.hold(FREE_BYTES, held=0) == 0 == budget.used
    with pytest.raises(OverloadedError, match="try again in 1 s"):
        budget.hold(FREE_BYTES + 1, held=0)


def test_bodies_being_read_go_on_where_new_ones_are_refused() -> None:
    budget = BodyBudget(4 * MIB)
    old = budget.hold(FREE_BYTES + MIB, held=0)
    other = budget.hold(FREE_BYTES + 2 * MIB, held=0)
    with pytest.raises(OverloadedError, match=f"holds {3 * MIB} bytes of requests") as refusal:
        budget.hold(FREE_BYTES + 1, held=0)
    assert refusal.value.retry_after == 1.0
    old = budget.hold(FREE_BYTES + 2 * MIB, held=old)
    assert budget.used == 4 * MIB == old + other
    with pytest.raises(OverloadedError):
        budget.hold(FREE_BYTES + 2 * MIB + 1, held=old)
    budget.release(old)
    budget.release(other)
    assert budget.used == 0


@pytest.mark.parametrize("mib", [0.001, 1, 16, 1000])
def test_any_body_that_is_accepted_fits_an_empty_budget(mib: float) -> None:
    budget, largest = BodyBudget.of(ServerConfig(max_body_mib=mib)), int(mib * MIB)
    held = budget.hold(largest, held=0)
    budget.hold(4 * largest + min(4 * largest, MAX_VALUES) * BYTES_PER_VALUE, held=held)


# Values --------------------------------------------------------------------------------------------------------------


def count(value: Any) -> int:
    """Commas, and four for each array and object."""
    if isinstance(value, dict):
        return 4 + max(len(value) - 1, 0) + sum(map(count, value.values()))
    if isinstance(value, list):
        return 4 + max(len(value) - 1, 0) + sum(map(count, value))
    return 0


JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a,[]{}"\\\n\u00e9'), max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)


@given(JSON, st.booleans(), st.integers(0, 16), st.integers(1, 16))
def test_values_are_counted_outside_of_texts(value: Any, ascii_only: bool, most: int, piece: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitfuse.server.bodies.MAX_VALUES", most)
        patch.setattr("splitfuse.server.bodies._PIECE", piece)
        assert (_num_values(body) > most) == (count(value) > most)


def test_commas_in_a_text_are_no_values() -> None:
    text = "a,[{" * MAX_VALUES
    assert decoded_size(json.dumps({"prompt": text}).encode()) < 2 * len(text)
    escaped = '\\",' * MAX_VALUES
    assert decoded_size(json.dumps({"prompt": escaped}).encode()) < 3 * len(escaped)


def test_a_text_with_wide_characters_counts_four_times() -> None:
    for ascii_only in (True, False):
        body = json.dumps({"prompt": "x" * 1000 + "\U0001f41d"}, ensure_ascii=ascii_only).encode()
        assert decoded_size(body) >= 4 * len(body)


@pytest.mark.parametrize("unit", ["[],", "{},", '{"a":0},', "1,", '"",', '",",', "[[],0],"])
def test_too_many_values_are_refused_before_they_are_decoded(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfuse.server.bodies.MAX_VALUES", 4096)
    with pytest.raises(RefusedError, match="the body has more than 4096 values") as refusal:
        decoded_size(b'{"prompt":[' + unit.encode() * 4097 + b"0]}")
    assert refusal.value.status == 413
    decoded_size(b'{"prompt":[' + unit.encode() * 256 + b"0]}")


# Over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(ServerConfig(max_body_mib=1)) as server:
        server.admission.bodies.most = 4 * MIB
        yield server
        server.assert_idle()


def begin(server: RunningServer, sent: int, whole: int) -> socket.socket:
    """A connection that has sent so many bytes of a body."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {whole}\r\n\r\n"
    )
    connection.sendall(head.encode() + b'{"prompt":"' + b"a" * (sent - 11))
    return connection


def test_unfinished_bodies_are_bounded_together_and_the_old_ones_go_on(server: RunningServer) -> None:
    bodies, size = server.admission.bodies, FREE_BYTES + MIB // 2
    unfinished = []
    for number in range(6):
        unfinished.append(begin(server, size, MIB))
        server.wait_until(lambda number=number: bodies.used == (number + 1) * MIB // 2)  # type: ignore[misc]
    with server.http() as http:
        large = {"prompt": "a" * size, "max_tokens": 1}
        refused = http.post(COMPLETIONS, json=large)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200
        unfinished[0].sendall(b"a" * (MIB - size - 2) + b'"}')
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):  # head and body may come apart
            more = unfinished[0].recv(4096)
            assert more, answer
            answer += more
        assert b"context_length_exceeded" in answer
        for connection in unfinished:
            connection.close()
        server.wait_until(lambda: bodies.used == 0)
        assert http.post(COMPLETIONS, json=large).json()["error"]["code"] == "context_length_exceeded"


def test_a_body_holds_memory_until_its_request_ends(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, encoder = threading.Event(), server.service._short.encoders[0]
    encode = encoder._tokenize

    def slow(text: str, **keywords: Any) -> tuple[int, ...]:
        assert go_on.wait(PATIENCE)
        return encode(text, **keywords)

    monkeypatch.setattr(encoder, "_tokenize", slow)
    content = json.dumps(SHORT)[:-1] + " " * 2 * FREE_BYTES + "}"
    with server.http() as http, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, COMPLETIONS, content=content, headers={"content-type": "application/json"})
        server.wait_until(lambda: server.admission.num_requests == 1)
        assert server.admission.bodies.used >= len(content) - FREE_BYTES
        go_on.set()
        assert answer.result().status_code == 200
        server.wait_until(lambda: server.admission.bodies.used == 0)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": [[]] * 300_000}},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{}] * 300_000},
        {"messages": [{}] * 300_000},
    ],
)
def test_a_body_of_many_small_objects_is_refused(server: RunningServer, body: Any) -> None:
    content, most = json.dumps(body, separators=(",", ":")).encode(), server.admission.bodies.most
    server.admission.bodies.most = 64 * MIB
    with server.http() as http:
        answer = http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200
    server.admission.bodies.most = most


def test_a_body_that_does_not_come_is_a_408() -> None:
    pieces = [b'{"prompt":', b'"a"']

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

    async def read() -> None:
        context = RequestContext({"headers": []}, receive, send=None, dialect=OPENAI, unique_id="r")  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match=r"only 13 bytes in 0 s \(--client-timeout\)") as refusal:
            await context.body(MIB, BodyBudget(MIB), timeout=0.01)
        assert (refusal.value.status, refusal.value.code) == (408, "body_timeout")
        assert refusal.value.headers == {"connection": "close"}

    asyncio.run(read())


def test_every_route_with_a_body_documents_its_errors(server: RunningServer) -> None:
    with server.http() as http:
        paths: Any = http.get("/openapi.json").json()["paths"]
    posts = [methods["post"]["responses"] for methods in paths.values() if "requestBody" in methods.get("post", {})]
    assert posts and all({"408", "413", "429"} <= set(responses) for responses in posts)


@pytest.mark.parametrize(
    ("path", "kind", "name", "more"),
    [
        (CHAT, ChatRequest, "to_generation", {"max_tokens": 1}),
        ("/v1/messages", MessagesRequest, "to_generation", {"max_tokens": 1}),
        ("/v1/messages/count_tokens", CountTokensRequest, "conversation", {}),
    ],
)
def test_a_long_conversation_is_converted_off_the_event_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, kind: Any, name: str, more: dict[str, Any]
) -> None:
    convert, threads = getattr(kind, name), []

    def noted(*arguments: Any, **keywords: Any) -> Any:
        threads.append(threading.current_thread().name)
        return convert(*arguments, **keywords)

    monkeypatch.setattr(kind, name, noted)
    with server.http() as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        for count in (1, 4000):
            http.post(path, json={"model": model, "messages": [{"role": "user", "content": "Hi"}] * count, **more})
    short, long = threads
    assert long.startswith("text") and short == server._thread.name
