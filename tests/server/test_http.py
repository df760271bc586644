"""The server over HTTP: every route, malformed bodies, bounds, keys, disconnecting clients, dying engines."""

import asyncio
import gzip
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import PATIENCE, RunningServer, running_server

import splitfuse
from splitfuse.config.server import ServerConfig
from splitfuse.engine.step_runner import MAX_BROKEN_STEPS
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import ConfigError
from splitfuse.server import connections
from splitfuse.server.app import ROUTES
from splitfuse.text.sandbox import Sandbox

PROMPT = "Once upon a time"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and answer.headers["x-request-id"]
    return dict(body["error"])


def events_of(answer: httpx.Response) -> list[Any]:
    """The events of a stream; what is no JSON as text."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# The small routes ----------------------------------------------------------------------------------------------------


def test_small_routes(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"stage": "ready", "fraction": 1.0}
    assert http.get("/version").json() == {"version": splitfuse.__version__}
    (model,) = http.get("/v1/models").json()["data"]
    assert model == http.get(f"/v1/models/{model['id']}").json()
    assert (model["id"], model["object"], model["max_model_len"]) == ("storyteller", "model", 2048)
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and "vllm:num_requests_running" in metrics.text


def test_detokenize_inverts_tokenize(http: httpx.Client) -> None:
    text = "Anna hält 3 Bienen 🐝"
    tokens = http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    plain = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert tokens["tokens"] == [0, *plain]
    shown = http.post("/detokenize", json={"tokens": tokens["tokens"], "skip_special_tokens": False}).json()
    assert shown == {"prompt": "<|bos|>" + text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()["tokens"]
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(chat)
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ):
        assert error_of(http.post("/tokenize", json=body))["param"] == param
    for token in (-1, 3072, 2**31, 2**70):
        error = error_of(http.post("/detokenize", json={"tokens": [token]}))
        assert error["param"] == "tokens"
        assert error["message"] == f"tokens has the token id {token}, but the model's are from 0 to 3071"
        for name, value in (("stop_token_ids", [token]), ("logit_bias", {str(token): 1})):
            error = error_of(http.post(COMPLETIONS, json={"prompt": "a", name: value}))
            known = f"{name} has the token id {token}, but the model's are from 0 to 3071"
            other = f"{name} must be token ids of the model, from 0 on, not {token}"
            assert (error["param"], error["message"]) == (name, known if token == 3072 else other)
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    for path in ("/", "/docs", "/redoc", "/v1", "/v1/completions/", "/v2/models", "/metrics/../etc/passwd", "/%00"):
        answer = http.get(path)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "no_such_route")
    for path, meant in (
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/models", "did you mean /v1/models?"),
        ("/v1/health", "did you mean /health?"),
        ("/v3/models", "/openapi.json lists all"),
    ):
        answer = http.post(path, json={})
        assert (answer.status_code, error_of(answer)["message"]) == (404, f"there is no such route; {meant}")
    for method, path in (("GET", COMPLETIONS), ("DELETE", "/v1/models"), ("POST", "/health"), ("PUT", "/ready")):
        answer = http.request(method, path)
        assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"]
    assert http.head("/health").status_code == 200


def test_valid_request_ids_are_returned(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 129, "", 'a"b', "ü".encode()):
        given = http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)
    twice = [http.post(COMPLETIONS, json=SHORT, headers={"x-request-id": "same"}) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in twice] == ["same", "same"]
    assert len({answer.json()["id"] for answer in twice}) == 2


def test_requests_before_the_engine_is_ready_are_503() -> None:
    with running_server() as server, server.http() as http:
        server.call(server.client.close())
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()["stage"]) == (503, "dead")
        answer = http.post(COMPLETIONS, json=SHORT)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("late", ["texts", "engine"])
def test_requests_before_all_has_started_are_503(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    may_start = threading.Event()

    async def start(_: AsyncEngine) -> None:  # another engine, where the first is ready
        if late == "engine":
            await asyncio.to_thread(may_start.wait, PATIENCE)

    with running_server() as server, server.http() as http:
        monkeypatch.setattr(Sandbox, "start", lambda _: late == "texts" and may_start.wait(PATIENCE))
        monkeypatch.setattr(AsyncEngine, "start", start)
        starting = asyncio.run_coroutine_threadsafe(server.service.start(), server.loop)
        server.wait_until(lambda: server.service.is_starting)
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()["stage"]) == (503, "starting")
        answer = http.post(COMPLETIONS, json=SHORT)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        may_start.set()
        starting.result(PATIENCE)
        assert http.get("/ready").status_code == 200
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200


def test_draining_finishes_running_requests_and_refuses_new() -> None:
    with running_server() as server, server.http() as http:
        with http.stream("POST", COMPLETIONS, json={**LONG, "max_tokens": 300, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            server.admission.drain()
            assert (http.get("/ready").status_code, http.get("/ready").json()["stage"]) == (503, "draining")
            answer = http.post(COMPLETIONS, json=SHORT)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        server.call(asyncio.wait_for(server.admission.wait_empty(), PATIENCE))


# Bodies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b'{"prompt": "a"} {}', id="two"),
        pytest.param(b'{"prompt": "a", "temperature": NaN}', id="nan"),
        pytest.param(b'{"prompt": "a", "temperature": Infinity}', id="infinity"),
        pytest.param(b'{"prompt": "a", "temperature": 1e999}', id="huge"),
        pytest.param(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", id="digits"),
        pytest.param(b'{"prompt": "a", "seed": 18446744073709551616}', id="seed"),
        pytest.param(b'{"prompt": "a", "seed": -2}', id="negative-seed"),
        pytest.param(b'{"prompt": "a", "n": 1.5}', id="fraction"),
        pytest.param(b'{"prompt": "a", "n": true}', id="bool"),
        pytest.param(b'{"prompt": [true, false]}', id="bools"),
        pytest.param(b'{"prompt": "\xff"}', id="latin"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', id="surrogate-bytes"),
        pytest.param(b'{"prompt": "\\ud800"}', id="lone-surrogate"),
        pytest.param(b'{"prompt": "\\udc00\\ud800"}', id="reversed-surrogates"),
        pytest.param(b'{"prompt": "a", "\\ud800": 1}', id="surrogate-key"),
        pytest.param(b'{"prompt": "a", "max_tokens": 3.0, "\\ud800": 1}', id="surrogate-key-in-plain-json"),
        pytest.param(b'{"prompt": "a", "max_tokens": 3.0, "stop": "\\ud800"}', id="high-surrogate-in-plain-json"),
        pytest.param(b'{"prompt": "a", "max_tokens": 3.0, "stop": "\\udc00"}', id="low-surrogate-in-plain-json"),
        pytest.param(b'{"prompt": "a", "max_tokens": 3.0, "user": "\xed\xa0\x80"}', id="surrogate-bytes-in-plain-json"),
        pytest.param(b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", id="nested"),
        pytest.param(b'{"prompt": "a", "suffix": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", id="nested-any"),
        pytest.param(b'{"prompt": "a", "suffix": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", id="objects"),
        pytest.param(b'{"prompt": "a", "logit_bias": {"x": 1}}', id="bias-key"),
        pytest.param(b'{"prompt": "a", "logit_bias": {"1": null}}', id="bias-value"),
        pytest.param(b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}', id="long-name"),
        pytest.param(b'{"prompt": [[[1]]]}', id="deep-prompt"),
        pytest.param(b'{"prompt": [[]]}', id="empty-ids"),
        pytest.param(b'{"prompt": [1e400]}', id="huge-id"),
        pytest.param(b'{"prompt": [18446744073709551616]}', id="big-id"),
        pytest.param(b'{"prompt": [-1]}', id="negative-id"),
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(b"\x1f\x8b\x08" + b"\x00" * 30, id="gzip"),
    ],
)
def test_a_malformed_body_is_a_400(http: httpx.Client, body: bytes) -> None:
    answer = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error" and len(answer.content) < 2000
    assert http.post(COMPLETIONS, json=SHORT).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [None],
        [[]],
        [{}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "audio", "text": "x"}]}],
        [{"role": "user", "content": "x", "extra": 1}],
        [{"role": "user", "content": "x"}] * 4097,
    ],
)
def test_invalid_messages_are_a_400_naming_them(http: httpx.Client, messages: Any) -> None:
    answer = http.post(CHAT, json={"messages": messages})
    assert answer.status_code == 400 and error_of(answer)["param"].startswith("messages")


def test_a_too_large_body_is_refused_with_any_header() -> None:
    with running_server(ServerConfig(max_body_mib=0.01)) as server, server.http() as http:
        large = json.dumps({"prompt": "a" * 20_000}).encode()
        pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))
        for content in (large, pieces):  # with Content-Length, and chunked
            answer = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
            assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200


def test_only_bodies_declared_as_json_are_read(http: httpx.Client) -> None:
    body = json.dumps(SHORT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = http.post(COMPLETIONS, content=body, headers={"content-type": kind})
        assert (answer.status_code, error_of(answer)["code"]) == (415, "no_json")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert http.post(COMPLETIONS, content=body, headers={"content-type": kind}).status_code == 200
    answer = http.post(COMPLETIONS, content=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert answer.status_code == 415 and "Content-Encoding 'gzip': send it plain" in error_of(answer)["message"]
    assert http.post(COMPLETIONS, content=body, headers={"content-encoding": "Identity"}).status_code == 200
    assert http.post(COMPLETIONS, content=body).status_code == 200  # not called anything
    assert http.post(COMPLETIONS, content=body, headers={"origin": "http://elsewhere"}).status_code == 415


def test_bytes_that_are_not_http_are_harmless(server: RunningServer, http: httpx.Client) -> None:
    host, port = http.base_url.host, http.base_url.port
    for data in (
        b"\x00\xff" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            connection.sendall(data)
    with socket.create_connection((host, port), timeout=PATIENCE) as connection:  # goes in the middle of its body
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    server.wait_for_record(status=499, error="ClientGoneError")
    assert http.post(COMPLETIONS, json=SHORT).status_code == 200


# Answers -------------------------------------------------------------------------------------------------------------


def test_timing_is_returned_on_request(http: httpx.Client) -> None:
    body = {**SHORT, "max_tokens": 5, "n": 2, "prompt": PROMPT * 20, "splitfuse_timing": True}
    timing = http.post(COMPLETIONS, json=body).json()["splitfuse_timing"]
    counts = {"steps", "cached_tokens", "draft_tokens", "accepted_tokens", "resumed", "on_loan"}
    assert timing.keys() == {"queued", "first_token", "gaps", "slo_met", "phases"} | counts
    assert timing["slo_met"] is None
    assert 0 < timing["queued"] <= timing["first_token"] and len(timing["gaps"]) == 8
    assert all(gap >= 0 for gap in timing["gaps"]) and timing["steps"] >= 10
    events = events_of(http.post(COMPLETIONS, json={**body, "stream": True}))
    assert events[-1] == "[DONE]" and events[-2]["choices"] == [] and "usage" not in events[-2]
    again = events[-2]["splitfuse_timing"]
    assert again["cached_tokens"] > 300 and len(again["gaps"]) == 8
    assert "splitfuse_timing" not in http.post(COMPLETIONS, json=SHORT).json()


def test_a_stream_is_events_ending_with_done(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    events = events_of(answer)
    assert events[-1] == "[DONE]" and all(event["object"] == "chat.completion.chunk" for event in events[:-1])
    assert len({event["id"] for event in events[:-1]}) == 1


def read_stream(server: RunningServer, head: str) -> tuple[bytes, bytes]:
    """Head and body of the answer to LONG as a stream, over a connection that is closed."""
    content = json.dumps({**LONG, "temperature": 0, "stream": True}).encode()
    with server.http() as http, socket.socket() as connection:
        connection.settimeout(PATIENCE)
        connection.connect((http.base_url.host, http.base_url.port))
        lines = f"POST {COMPLETIONS} {head}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(lines.encode() + content)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    top, _, body = answer.partition(b"\r\n\r\n")
    return top, body


def text_of(stream: bytes) -> str:
    lines = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n") if line]
    assert lines.pop() == b"[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_a_stream_has_no_chunks_in_http_1_0(server: RunningServer, http: httpx.Client) -> None:
    head, body = read_stream(server, "HTTP/1.0")
    assert b"transfer-encoding" not in head.lower()
    assert text_of(body) == http.post(COMPLETIONS, json={**LONG, "temperature": 0}).json()["choices"][0]["text"]


def test_events_that_have_to_wait_come_in_order(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, write = count(), connections.write_chunk

    def write_chunk(*arguments: Any) -> bool:
        return next(numbers) % 3 != 1 and write(*arguments)

    monkeypatch.setattr(connections, "write_chunk", write_chunk)
    head, body = read_stream(server, "HTTP/1.1\r\nhost: x\r\nconnection: close")
    assert b"transfer-encoding: chunked" in head.lower() and next(numbers) > 3
    chunks = body.split(b"\r\n")[1::2]  # JSON has none
    whole = http.post(COMPLETIONS, json={**LONG, "temperature": 0}).json()["choices"][0]["text"]
    assert text_of(b"".join(chunks)) == whole


def test_a_refused_stream_is_a_plain_error(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={**SHORT, "stream": True, "prompt": [1] * 3000})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


def test_cached_tokens_of_a_prompt_are_counted(http: httpx.Client) -> None:
    body = {**SHORT, "prompt": "A prompt that was never sent before. " * 20}
    cached = [
        http.post(COMPLETIONS, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)
    ]
    assert cached[0] == 0 and cached[1] >= 64


def test_requests_are_logged_without_prompts_and_texts(server: RunningServer, http: httpx.Client) -> None:
    http.post(COMPLETIONS, json={**SHORT, "prompt": "a secret", "n": 2}, headers={"x-request-id": "logged"})
    record = server.wait_for_record(request_id="logged")
    assert (record["route"], record["status"], record["generated_tokens"]) == (COMPLETIONS, 200, 8)
    assert record["finish_reasons"] == {"length": 2} and record["steps"] >= 8
    http.post(COMPLETIONS, json={"prompt": "a secret", "n": -1}, headers={"x-request-id": "refused"})
    record = server.wait_for_record(request_id="refused")
    assert (record["status"], record["error"]) == (400, "invalid_type")
    http.get("/v1/models/secret", headers={"x-request-id": "other"})
    assert server.wait_for_record(request_id="other")["route"] == "/v1/models/{model:path}"
    assert "secret" not in server.log.getvalue()
    assert 'splitfuse:refused_total{kind="invalid_type"' in http.get("/metrics").text


# Who goes, and what dies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_disconnected_client_leaves_nothing_behind(server: RunningServer, path: str, stream: bool) -> None:
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": [PROMPT, "The"]}
    body = json.dumps({**LONG, "n": 3, "stream": stream, **prompt} | ({"prompt": None} if path == CHAT else {}))
    body = json.dumps({name: value for name, value in json.loads(body).items() if value is not None})
    count = 3 if path == CHAT else 6
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with server.http() as http:
        address = (http.base_url.host, http.base_url.port)
    with server.held(server.nothing_runs):
        with socket.create_connection(address, timeout=PATIENCE) as client:
            client.sendall(head.encode() + body.encode())
            server.wait_until_running(count)
        server.assert_idle()
    record = server.wait_for_record(route=path, status=499)
    assert record["finish_reasons"] == {"abort": count}  # and not as it would have ended by itself


def test_a_disconnect_during_tokenization_is_noticed(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, go_on = threading.Event(), threading.Event()
    encoder = server.service._short.encoders[0]
    encode = encoder._tokenize

    def slow(text: str, **keywords: Any) -> tuple[int, ...]:
        encoding.set()
        assert go_on.wait(PATIENCE)
        return encode(text, **keywords)

    monkeypatch.setattr(encoder, "_tokenize", slow)
    with server.http() as http:
        body = json.dumps({"prompt": "word " * 1000})
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=PATIENCE) as client:
            client.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert encoding.wait(PATIENCE)
            for path in ("/health", "/ready", "/metrics"):  # none of these waits for the tokenizer
                assert http.get(path).status_code == 200
        server.wait_until(lambda: not server.server.server_state.tasks)
        go_on.set()
        server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request(http: httpx.Client, server: RunningServer, stream: bool) -> None:
    with server.held(server.nothing_runs):
        answer = http.post(COMPLETIONS, json={**LONG, "n": 2, "splitfuse_deadline": 0.5, "stream": stream})
    if stream and answer.status_code == 200:  # on a very slow machine the stream has not begun by then
        error = events_of(answer)[-1]["error"]
    else:
        assert answer.status_code == 408
        error = error_of(answer)
    assert (error["code"], error["param"]) == ("deadline_exceeded", "splitfuse_deadline")
    server.assert_idle()
    assert server.wait_for_record(error="deadline_exceeded")["finish_reasons"] == {"abort": 2}
    assert http.post(COMPLETIONS, json={**SHORT, "splitfuse_deadline": 60}).status_code == 200
    for bad in (0, -1, "1", 1e9):
        assert error_of(http.post(COMPLETIONS, json={**SHORT, "splitfuse_deadline": bad}))["param"] == (
            "splitfuse_deadline"
        )


@pytest.mark.parametrize("stream", [False, True])
def test_broken_steps_end_requests_then_the_engine(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as server, server.http() as http:
        submit, num_left = server.engine.executor.submit, 20

        def broken(plan: Any) -> Any:
            nonlocal num_left
            num_left -= 1
            if num_left <= 0:
                raise RuntimeError("/home/someone/weights at 0x7f00deadbeef of 10.1.2.3:80 is gone\nTraceback")
            return submit(plan)

        monkeypatch.setattr(server.engine.executor, "submit", broken)
        for number in range(MAX_BROKEN_STEPS):
            is_last = number == MAX_BROKEN_STEPS - 1
            answer = http.post(COMPLETIONS, json={**LONG, "stream": stream})
            if stream and number == 0:
                events = events_of(answer)
                assert answer.status_code == 200 and len(events) > 5 and events[-1] != "[DONE]"
                error = events[-1]["error"]
            else:
                assert answer.status_code == (503 if is_last else 500)
                error = error_of(answer)
            assert error["code"] == ("engine_unavailable" if is_last else "request_failed")
            assert ("died" if is_last else "the forward step failed") in error["message"]
            for secret in ("home", "someone", "dead", "10.1", "Traceback"):
                assert secret not in error["message"]
        assert http.post(COMPLETIONS, json=SHORT).status_code == 503
        assert http.get("/ready").status_code == 503


def test_a_failed_request_does_not_affect_others(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfuse.core.plan import ChunkResult

    submit = server.engine.executor.submit

    def failing(plan: Any) -> Any:
        failed = ChunkResult(error="the logits have NaN")
        handle = submit(plan)
        bad = {c.request_id: failed for c in plan.chunks if 77 in c.token_ids}
        handle.result = handle.taken() | bad
        return handle

    monkeypatch.setattr(server.engine.executor, "submit", failing)
    with server.http() as http:
        answer = http.post(COMPLETIONS, json={**SHORT, "prompt": [77]})
        assert (answer.status_code, error_of(answer)["code"]) == (500, "request_failed")
        assert "NaN" in error_of(answer)["message"]
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200


def test_an_internal_error_is_logged_and_hides_its_message(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("the secret of /etc/passwd")

    monkeypatch.setattr(server.service, "encode", broken)
    with server.http() as http, caplog.at_level(logging.ERROR, "splitfuse.server"):
        answer = http.post(COMPLETIONS, json=SHORT, headers={"x-request-id": "fault-1"})
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert "secret" not in answer.text and "passwd" not in answer.text and "ValueError" not in answer.text
    assert "fault-1" in caplog.text and "the secret of /etc/passwd" in caplog.text and "Traceback" in caplog.text


# Who may ask ---------------------------------------------------------------------------------------------------------


def test_every_route_but_three_requires_a_key() -> None:
    with running_server(ServerConfig(api_key=("right key",))) as server, server.http() as http:
        routes = [(route.method, route.path) for route in ROUTES]
        for method, path in (*routes, ("GET", "/nowhere"), ("GET", "/health/../v1/models")):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right key"}):
                answer = http.request(method, path.replace("{model:path}", "storyteller"), headers=headers)
                if path in ("/health", "/ready", "/api/hello"):
                    assert answer.status_code == 200
                    continue
                if path in ("/console", "/console/{file}"):  # files without secrets, where there is a console
                    assert answer.status_code == 404
                    continue
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                if not path.startswith("/v1/messages"):  # whose errors have another form
                    assert error_of(answer)["code"] == "invalid_api_key"
        for value in ("Bearer right key", "bearer  right key"):
            assert http.get("/v1/models", headers={"authorization": value}).status_code == 200
        for value in ("Bearer \xff", "Bearer", "Basic right key"):
            assert http.get("/v1/models", headers={"authorization": value.encode("latin-1")}).status_code == 401


def test_a_key_file_must_exist_and_have_a_key(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    empty.chmod(0o600)
    for file, message in ((tmp_path / "none", "cannot be read"), (empty, "has no key in it")):
        with pytest.raises(ConfigError, match=message), running_server(ServerConfig(api_key_file=str(file))):
            pass


def test_only_allowed_origins_pass_cors() -> None:
    preflight = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = "access-control-allow-origin"
    with running_server() as server, server.http() as http:
        assert http.options(COMPLETIONS, headers=preflight).status_code == 405
        assert allowed not in http.get("/health", headers={"origin": "https://page.example"}).headers
    config = ServerConfig(allow_origin=("https://page.example",), api_key=("k",))
    with running_server(config) as server, server.http() as http:
        answer = http.options(COMPLETIONS, headers=preflight)
        assert (answer.status_code, answer.headers[allowed]) == (200, "https://page.example")
        answer = http.post(COMPLETIONS, json=SHORT, headers={"origin": "https://page.example"})
        assert (answer.status_code, answer.headers[allowed]) == (401, "https://page.example")
        assert allowed not in http.get("/health", headers={"origin": "https://other.example"}).headers


# Token ids -----------------------------------------------------------------------------------------------------------


def test_streamed_token_ids_equal_the_answers(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    (expected,) = pipe(PROMPT, max_new_tokens=12, ignore_eos=True)
    body = {**SHORT, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    (whole,) = http.post(COMPLETIONS, json=body).json()["choices"]
    assert tuple(whole["token_ids"]) == tuple(expected.token_ids)
    events = events_of(http.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
    pieces = [choice["token_ids"] for event in events for choice in event["choices"]]
    assert [token for piece in pieces for token in piece] == whole["token_ids"]
    assert all(len(piece) == 1 for piece in pieces[:-1])
    assert "token_ids" not in http.post(COMPLETIONS, json=SHORT).json()["choices"][0]
    (none,) = http.post(COMPLETIONS, json={**body, "max_tokens": 0, "stop": whole["text"][:1]}).json()["choices"]
    assert (none["text"], none["token_ids"], none["finish_reason"]) == ("", [], "length")


def test_a_token_with_held_back_text_has_an_event(http: httpx.Client) -> None:
    bee = http.post("/tokenize", json={"prompt": "\U0001f41d", "add_special_tokens": False}).json()["tokens"]
    assert len(bee) > 1  # no single token is a whole character
    bias = {str(token): 100 for token in bee[:1]}  # the first byte of one, again and again
    body = {**SHORT, "logit_bias": bias, "stream": True, "return_token_ids": True, "max_tokens": 3}
    events = events_of(http.post(COMPLETIONS, json=body))[:-1]
    told = [(choice["text"], choice["token_ids"]) for event in events for choice in event["choices"]]
    assert [ids for _, ids in told] == [bee[:1]] * 3
    assert told[0][0] == ""


def test_token_ids_end_where_a_stop_string_begins(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    (long,) = pipe(PROMPT, max_new_tokens=30, ignore_eos=True)
    stop = long.generated_text[10:14]
    body = {**SHORT, "max_tokens": 30, "ignore_eos": True, "stop": stop, "return_token_ids": True}
    (whole,) = http.post(COMPLETIONS, json=body).json()["choices"]
    assert 0 < len(whole["token_ids"]) < 30 and whole["finish_reason"] == "stop"
    events = events_of(http.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
    assert [token for e in events for choice in e["choices"] for token in choice["token_ids"]] == whole["token_ids"]


def test_a_template_that_holds_the_interpreter_fails_one_chat() -> None:
    holds = "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}"
    with running_server() as server, server.http() as http:
        server.service.tokenizer.chat_template = (
            f"{{% if messages[0].content == 'hold' %}}{holds}{{% endif %}}{{{{ messages[0].content }}}}"
        )
        server.service._short.sandboxes[0]._seconds = server.service._long.sandboxes[0]._seconds = 0.1
        chat = {"messages": [{"role": "user", "content": "hold"}], "max_tokens": 1}
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(http.post, CHAT, json=chat)
            server.wait_until(lambda: server.service._short.sandboxes[0].pid is not None)
            with server.http() as other:
                assert other.get("/health").status_code == 200
            answer = held.result()
        assert answer.status_code == 400
        assert (
            "template failed: the chat template was stopped: it ran for more than 0.1 s" in error_of(answer)["message"]
        )
        server.service._short.sandboxes[0]._seconds = 20.0
        chat["messages"] = [{"role": "user", "content": "go on"}]
        assert http.post(CHAT, json=chat).status_code == 200
        server.assert_idle()
