"""A stream that is silent gets comments, which clients skip, and a head before its first token."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from running_server import PATIENCE, RunningServer, running_server
from server_load import http_request

import splitfuse
from splitfuse.clients.http_stream import Address, post_stream
from splitfuse.server import context

COMMENT = b": keep-alive\n\n"
COMPLETIONS, PROMPT = "/v1/completions", "Once upon a time"
BODY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20, "stream": True}
LONG: dict[str, Any] = {**BODY, "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningServer]:
    """A server for one request at a time, whose steps take longer than a stream may be silent."""
    with running_server(max_num_seqs=1) as server, pytest.MonkeyPatch.context() as patch:
        submit = server.engine.executor.submit

        def slowly(plan: Any) -> Any:
            time.sleep(0.002)
            return submit(plan)

        patch.setattr(server.engine.executor, "submit", slowly)
        patch.setattr(context, "SILENCE_SECONDS", 0.0005)
        yield server
        server.assert_idle()


@contextmanager
def streaming(server: RunningServer, **body: Any) -> Iterator[socket.socket]:
    """A connection on which a request has been sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        connection.sendall(http_request(COMPLETIONS, body))
        yield connection


def received(connection: socket.socket, until: bytes = b"\r\n0\r\n\r\n") -> bytes:
    data = b""
    while until not in data:
        piece = connection.recv(65536)
        assert piece, data[-500:]
        data += piece
    return data


def test_a_queued_stream_begins_and_stays_alive(narrow: RunningServer) -> None:
    is_closed = threading.Event()
    with narrow.held(is_closed.is_set), streaming(narrow, **LONG) as busy:
        received(busy, b"data: ")
        with streaming(narrow, **BODY) as queued:
            begun = received(queued, COMMENT)
            assert begun.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/event-stream" in begun
            assert b"data: " not in begun
            busy.close()
            is_closed.set()
            rest = received(queued)
    assert rest.count(b"data: {") > 3 and b"data: [DONE]" in rest
    assert rest.index(b"[DONE]") > rest.rindex(b"keep-alive"), "a comment came after the end"


def test_an_error_after_the_head_is_the_last_event(narrow: RunningServer) -> None:
    for deadline in (0.5, 5.0, 50.0):  # on a very slow machine the first passes before the head is sent
        with narrow.held(narrow.nothing_runs), streaming(narrow, **LONG, splitfuse_deadline=deadline) as stream:
            answer = received(stream, b"deadline_exceeded")
        if answer.startswith(b"HTTP/1.1 200"):
            break
    assert b"error" in answer[answer.rindex(b"data: ") :]


def test_clients_skip_comments(narrow: RunningServer, pipe: splitfuse.Pipeline) -> None:
    (expected,) = pipe(PROMPT, max_new_tokens=20, do_sample=False)
    with streaming(narrow, **BODY) as stream:
        assert received(stream).count(COMMENT) > 3
    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0) as ai:
        events = ai.completions.create(model="storyteller", **BODY)
        assert "".join(event.choices[0].text for event in events if event.choices) == expected.generated_text
    with splitfuse.client(narrow.url) as client:
        pieces = list(client(PROMPT, max_new_tokens=20, do_sample=False, stream=True))
        assert "".join(piece.text for piece in pieces) == expected.generated_text
    texts = []
    status, _ = asyncio.run(
        post_stream(
            Address.of(narrow.url),
            COMPLETIONS,
            json.dumps(BODY).encode(),
            lambda data, _: texts.append(json.loads(data)["choices"][0]["text"]),
            timeout=PATIENCE,
        )
    )
    assert status == 200 and "".join(texts) == expected.generated_text


def test_a_whole_answer_has_no_comment(narrow: RunningServer) -> None:
    with narrow.http() as http:
        answer = http.post(COMPLETIONS, json={**BODY, "stream": False})
        assert answer.json()["choices"][0]["text"] and answer.headers["content-length"]
