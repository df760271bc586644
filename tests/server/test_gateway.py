"""The gateway: what it passes on, to which cell, and what becomes of requests that a cell does not answer."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from patience import PATIENCE
from running_server import RunningServer, running_server
from scripted_cells import METRICS, Asked, ScriptedCells, answer, begin_stream, end_stream, scripted_cells, serving
from server_process import server_process, wait_until

from splitfuse.clients.client import server_engines, server_state
from splitfuse.clients.http_stream import Address
from splitfuse.config.server import GatewayConfig, ServerConfig
from splitfuse.deploy import registry
from splitfuse.errors import ConfigError
from splitfuse.gateway.app import Gateway
from splitfuse.gateway.cell import GONE_SECONDS, Cell
from splitfuse.gateway.prefixes import PromptPrefixes, prefixes_of

CHAT = "/v1/chat/completions"
PROMPT = {"model": "m", "prompt": "Once upon a time"}
EVENTS = [b'data: {"id":"cmpl-1","text":"a"}\n\n', b'data: {"id":"cmpl-1","text":"b"}\n\n']


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(limited())


# What is passed on ----------------------------------------------------------------------------------------------------


def test_requests_and_answers_are_passed_on_as_they_are() -> None:
    async def act(asked: Asked) -> None:
        await answer(asked, b'{ "text":\t"\xc3\xa9" }', 201, content_type="application/json", x_own="7")

    async def test() -> None:
        async with scripted_cells(act, 1) as cells:
            body = b'{"prompt": "Once",\n "max_tokens": 3}'
            headers = {"authorization": "Bearer secret", "x-request-id": "mine", "content-type": "application/json"}
            got = await cells.http.post("/v1/completions?a=%20b", content=body, headers=headers)
            (asked,) = cells.asked
            assert (asked.method, asked.path, asked.body) == ("POST", "/v1/completions?a=%20b", body)
            assert {name: asked.headers[name] for name in headers} == headers
            assert asked.headers["via"] == "1.1 splitfuse-gateway" and asked.headers["host"] in cells.urls[0]
            assert (got.status_code, got.content) == (201, b'{ "text":\t"\xc3\xa9" }')
            assert (got.headers["x-own"], got.headers["x-request-id"]) == ("7", "mine")
            assert got.headers["x-splitfuse-cell"] == "0"
            headers = {"connection": "keep-alive, X-Own", "x-own": "1", "proxy-authorization": "Basic eA=="}
            await cells.http.post("/v1/completions", content=b"{}", headers=headers)
            assert not {"x-own", "proxy-authorization"} & set(cells.asked[1].headers)
            again = await cells.http.head("/v1/models")
            assert again.status_code == 201 and not again.content

    run(test)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_streams_are_passed_on_byte_by_byte(size: int) -> None:
    sent = b"".join(EVENTS) + b": keep-alive\n\n" + b"data: [DONE]\n\n" + b"no end"

    async def act(asked: Asked) -> None:
        await begin_stream(asked, *(sent[at : at + size] for at in range(0, len(sent), size)))
        await end_stream(asked)

    async def test() -> None:
        async with scripted_cells(act) as cells:
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert got.content == sent and got.headers["content-type"].startswith("text/event-stream")

    run(test)


def test_events_are_passed_on_as_they_come_and_a_client_that_leaves_ends_its_request() -> None:
    left = asyncio.Event()

    async def act(asked: Asked) -> None:
        await begin_stream(asked, EVENTS[0])
        assert not await asked.reader.read()  # until the gateway closes
        left.set()

    async def test() -> None:
        async with scripted_cells(act) as cells:
            async with cells.http.stream("POST", "/v1/completions", json=PROMPT) as stream:
                pieces = stream.aiter_raw()
                assert await anext(pieces) == EVENTS[0]  # while the cell goes on with its answer
            await left.wait()
            while any(each.num_open for each in cells.cells) or cells.gateway.admission.num_requests:
                await asyncio.sleep(0)

    run(test)


# Cells that do not answer ---------------------------------------------------------------------------------------------


def test_a_request_whose_cell_is_lost_is_tried_at_the_others_each_once() -> None:
    async def act(asked: Asked) -> None:
        if len(cells.asked) == 3:
            await answer(asked)

    async def test() -> None:
        nonlocal cells
        async with scripted_cells(act, 3) as cells:
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert got.status_code == 200 and sorted(each.cell for each in cells.asked) == [0, 1, 2]
            lost = [each.cell for each in cells.asked[:2]]
            assert [each.is_ready for each in cells.cells] == [number not in lost for number in range(3)]
            assert all(each.body == cells.asked[0].body for each in cells.asked)
            await cells.look()
            assert all(each.is_ready for each in cells.cells)
            cells.asked.clear()

            async def close(_: Asked) -> None:
                pass

            cells.act = close
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert (got.status_code, got.headers["retry-after"]) == (503, "1")
            assert got.json()["error"]["code"] == "engine_unavailable" and len(cells.asked) == 3

    cells: ScriptedCells
    run(test)


def test_an_answer_that_is_cut_before_it_was_passed_on_is_asked_for_elsewhere() -> None:
    async def act(asked: Asked) -> None:
        if len(cells.asked) == 1:
            asked.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n" + b'{"ok"')
        else:
            await answer(asked)

    async def test() -> None:
        nonlocal cells
        async with scripted_cells(act) as cells:
            assert (await cells.http.post("/v1/completions", json=PROMPT)).json() == {"ok": True}

    cells: ScriptedCells
    run(test)


@pytest.mark.parametrize("path", ["/v1/completions", CHAT, "/v1/responses", "/v1/messages"])
def test_a_stream_whose_cell_is_lost_ends_with_an_error_event(path: str) -> None:
    async def act(asked: Asked) -> None:
        await begin_stream(asked, EVENTS[0], EVENTS[1][:20])  # and closes in the midst of an event

    async def test() -> None:
        async with scripted_cells(act) as cells:
            got = await cells.http.post(path, json={"input": "Once", "stream": True})
            assert got.status_code == 200 and got.content.startswith(EVENTS[0])
            last = got.content.removeprefix(EVENTS[0]).decode()
            found = re.fullmatch(r"(?:event: (\w+)\n)?data: (\{.*\})\n\n", last)
            assert found is not None, last
            event = json.loads(found[2])
            error = event if path == "/v1/responses" else event["error"]
            assert "was lost in the midst of the answer: send the request again" in error["message"]
            assert found[1] == ("error" if path in ("/v1/responses", "/v1/messages") else None)
            assert len(cells.asked) == 1, "what has begun is not sent again"

    run(test)


def test_a_cell_without_room_gives_to_another_and_one_is_asked_while_all_are_full() -> None:
    async def act(asked: Asked) -> None:
        if len(cells.asked) > 1:
            await answer(asked)
        else:
            await answer(asked, b'{"error":{"message":"full"}}', 429, retry_after="9")

    async def refuse(asked: Asked) -> None:
        await answer(asked, b'{"error":{"message":"full"}}', 429, retry_after=str(7 + asked.cell))

    async def test() -> None:
        nonlocal cells
        async with scripted_cells(act) as cells:
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200
            assert sorted(each.cell for each in cells.asked) == [0, 1]
            first = cells.asked[0].cell
            assert (await cells.http.post("/v1/completions", json=PROMPT)).headers["x-splitfuse-cell"] == str(1 - first)
            cells.asked.clear()
            cells.act = refuse
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert (got.status_code, got.headers["retry-after"]) == (429, str(7 + 1 - first)), "the first is not asked"
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert got.status_code == 429 and len(cells.asked) == 2, "one is asked, whether it has room again"
            cells.act = answer
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200

    cells: ScriptedCells
    run(test)


def test_a_request_for_an_answer_on_time_or_none_does_not_make_a_cell_full() -> None:
    async def act(asked: Asked) -> None:
        is_late = b"on_time" in asked.body
        await answer(asked, b"{}", 429 if is_late else 200, retry_after=str(5 - asked.cell))

    async def test() -> None:
        async with scripted_cells(act) as cells:
            got = await cells.http.post("/v1/completions", json={**PROMPT, "splitfuse_on_time_only": True})
            assert (got.status_code, got.headers["retry-after"], len(cells.asked)) == (429, "4", 2), "the sooner one"
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200

    run(test)


def test_a_request_too_large_for_all_keeps_no_other_away_and_is_sent_to_three() -> None:
    async def act(asked: Asked) -> None:
        await answer(asked, b"{}", 429 if b"large" in asked.body else 200, retry_after="60")

    async def test() -> None:
        async with scripted_cells(act, 5) as cells:
            got = await cells.http.post("/v1/completions", json={**PROMPT, "user": "large"})
            assert got.status_code == 429 and len(cells.asked) == 3
        async with scripted_cells(act) as cells:
            assert (await cells.http.post("/v1/completions", json={**PROMPT, "user": "large"})).status_code == 429
            assert all(each.is_full for each in cells.cells)
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200

    run(test)


def test_a_draining_cell_gets_no_new_requests() -> None:
    async def act(asked: Asked) -> None:
        if asked.cell in draining:
            await answer(asked, b'{"error":{"code":"draining"}}', 503, retry_after="1")
        else:
            await answer(asked)

    async def test() -> None:
        async with scripted_cells(act) as cells:
            draining.append(int((await cells.http.post("/v1/completions", json=PROMPT)).headers["x-splitfuse-cell"]))
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200, "before it is looked at"
            cells.ready[draining[0]] = b'{"stage":"draining","fraction":0.0}'
            await cells.look()
            assert cells.cells[draining[0]].state == "draining"
            cells.asked.clear()
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 200
            assert [each.cell for each in cells.asked] == [1 - draining[0]]
            cells.ready[1 - draining[0]] = b"{}"
            await cells.look()
            got = await cells.http.get("/ready")
            assert (got.status_code, got.json()["stage"]) == (503, "no cell takes requests")
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 503

    draining: list[int] = []
    run(test)


def test_requests_of_a_silent_cell_are_given_up() -> None:
    now = 0.0

    async def test() -> None:
        nonlocal now
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
            cell = Cell(0, url, Address.of(url), clock=lambda: now)
            with cell.lent() as limit, pytest.raises(TimeoutError):
                async with limit:
                    await cell.look()
                    assert cell.state == "unreachable" and not limit.expired()
                    now = GONE_SECONDS
                    await cell.look()
                    await cell.look()
                    await asyncio.Event().wait()
        assert cell.num_open == 0

    run(test)


def test_a_cell_whose_metrics_do_not_come_keeps_its_load_and_its_requests() -> None:
    async def test() -> None:
        async with scripted_cells(answer, 1) as cells:
            cells.metrics = None
            with cells.cells[0].lent() as limit:
                async with limit:
                    await cells.look()
                    assert cells.cells[0].is_ready and not limit.expired()
            cells.cells[0].num_ready_engines = 0  # as at the first look
            await cells.look()
            assert cells.cells[0].state == "its /metrics do not come"

    run(test)


@pytest.mark.parametrize(
    ("metrics", "ready", "state"),
    [
        (METRICS + b"splitfuse:num_requests_running 1e400\nsplitfuse:num_requests_waiting NaN\n", None, "ready"),
        (b"splitfuse:engine_ready --\n", None, "no engine is ready"),
        (METRICS, b"HTTP/1.1 503 X\r\ncontent-length: 100000\r\n\r\n" + 100_000 * b"[", "its /ready has status 503"),
        (METRICS, b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "unreachable"),
        (METRICS, b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n", "unreachable"),
        (METRICS, b"SSH-2.0-OpenSSH\r\n\r\n", "unreachable"),
    ],
)
def test_a_cell_that_answers_oddly_ends_nothing(metrics: bytes, ready: bytes | None, state: str) -> None:
    async def test() -> None:
        async with scripted_cells(answer, 1) as cells:
            cells.metrics, cells.raw_ready = metrics, ready
            await cells.look()
            assert cells.cells[0].state == state and cells.cells[0].load == 0.0

    run(test)


def test_open_requests_are_told_when_the_gateway_ends() -> None:
    async def act(asked: Asked) -> None:
        await begin_stream(asked, EVENTS[0])
        assert not await asked.reader.read()

    async def test() -> None:
        async with scripted_cells(act, config=ServerConfig(max_body_mib=1.0)) as cells:
            body = {**PROMPT, "user": 200_000 * "x"}
            async with cells.http.stream("POST", "/v1/completions", json=body) as stream:
                pieces = stream.aiter_raw()
                assert await anext(pieces) == EVENTS[0]
                assert cells.gateway.admission.bodies.used == 0, "the body is kept no longer"
                cells.gateway.end()
                assert b"the gateway is ending: send the request again" in b"".join([each async for each in pieces])

    run(test)


# What one cell alone has ----------------------------------------------------------------------------------------------


def test_stored_answers_stay_with_their_cell() -> None:
    name = "resp_" + 32 * "0"

    async def act(asked: Asked) -> None:
        if asked.method == "POST":
            await answer(asked, json.dumps({"id": name, "cell": asked.cell}, separators=(",", ":")).encode())
        else:
            await answer(asked, b"{}", 200 if asked.cell == 1 else 404)

    async def test() -> None:
        async with scripted_cells(act, 3) as cells:
            home = (await cells.http.post("/v1/responses", json={"input": "Hi"})).json()["cell"]
            cells.asked.clear()
            for text in ("a", "b", "c", "d", "e", "f"):
                body = {"input": text, "previous_response_id": name}
                assert (await cells.http.post("/v1/responses", json=body)).json()["cell"] == home
            assert (await cells.http.get(f"/v1/responses/{name}/input_items")).headers["x-splitfuse-cell"] == str(home)
            assert len(cells.asked) == 7, "no other cell was asked"

            other = "resp_" + 32 * "1"  # as after a restart of the gateway: the cells are asked
            cells.asked.clear()
            item = {"type": "item_reference", "id": f"msg_{32 * '1'}0"}
            assert (await cells.http.post("/v1/responses", json={"input": [item]})).json()["cell"] == 1
            assert sorted(each.method for each in cells.asked) == ["HEAD", "HEAD", "HEAD", "POST"]
            assert (await cells.http.delete(f"/v1/responses/{other}")).headers["x-splitfuse-cell"] == "1"
            assert len(cells.asked) == 5
            got = await cells.http.get(f"/v1/splitfuse/requests/{name}")
            assert got.headers["x-splitfuse-cell"] == "1"

            cells.ready[1] = b"{}"
            await cells.look()
            got = await cells.http.get(f"/v1/responses/{other}")
            assert (
                got.status_code == 503 and "is in cell 1, which takes no requests now" in got.json()["error"]["message"]
            )
            got = await cells.http.get(f"/v1/responses/resp_{32 * '2'}")
            assert got.status_code == 503 and "in no cell that can be asked" in got.json()["error"]["message"]

    run(test)


def test_what_no_cell_has_is_refused_by_a_cell_in_its_own_words() -> None:
    async def act(asked: Asked) -> None:
        await answer(asked, b'{"error":"not here"}', 404)

    async def test() -> None:
        async with scripted_cells(act) as cells:
            got = await cells.http.get("/v1/chat/completions/chatcmpl-none%0d%0aX-Evil:%201")
            assert (got.status_code, got.json()) == (404, {"error": "not here"})
            assert {each.path for each in cells.asked} == {"/v1/chat/completions/chatcmpl-none%0d%0aX-Evil:%201"}
            assert not any("x-evil" in each.headers for each in cells.asked)
            got = await cells.http.post("/v1/responses", json={"input": "Hi", "previous_response_id": "none"})
            assert (got.status_code, got.json()) == (404, {"error": "not here"})

    run(test)


@pytest.mark.parametrize("path", ["/scale", "/drain", "/console", "/v1/load_lora_adapter", "/v1/splitfuse/trace"])
def test_what_is_about_one_server_is_not_passed_on(path: str) -> None:
    async def test() -> None:
        async with scripted_cells(answer) as cells:
            got = await cells.http.post(path, json={})
            assert got.status_code == 400 and "call it at that server's own address" in got.json()["error"]["message"]
            got = await cells.http.get("/v1/models", headers={"via": "1.1 splitfuse-gateway"})
            assert got.status_code == 400 and "must be servers, not gateways" in got.json()["error"]["message"]
            assert not cells.asked

    run(test)


# The gateway itself ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_knows() -> None:
    async def test() -> None:
        async with scripted_cells(answer) as cells:
            cells.metrics = METRICS + (
                b"splitfuse:num_requests_running 3.0\nsplitfuse:num_requests_waiting 1.0\n"
                b"splitfuse:step_seconds_sum 20.0\nsplitfuse:request_seconds_count 10.0\n"
                b"splitfuse:time_to_first_token_seconds_sum 7.0\nsplitfuse:queue_seconds_sum 2.0\n"
                b"splitfuse:prompt_tokens_total 1500.0\nsplitfuse:cached_tokens_total 500.0\n"
            )
            await cells.look()
            assert {(each.load, each.request_seconds, each.token_seconds) for each in cells.cells} == {
                (8.0, 2.0, 0.005)
            }
            await cells.http.post("/v1/completions", json=PROMPT)
            await cells.http.post("/drain", json={})
            shown = (await cells.http.get("/metrics")).text
            assert 'splitfuse:gateway_cell_load_seconds{cell="0"} 8.0' in shown
            assert re.search(r'splitfuse:gateway_answers_total\{cell="[01]",status="200"\} 1.0', shown)
            assert 'splitfuse:gateway_refused_total{kind="unsupported_route"} 1.0' in shown
            assert (await cells.http.get("/health")).json() == {"status": "ok"}
            listed = (await cells.http.get("/engines", headers={"host": "127.0.0.1"})).json()["engines"]
            assert [(each["role"], each["state"], each["running"]) for each in listed] == [("cell", "ready", 3)] * 2
            assert (await cells.http.get("/engines", headers={"host": "other"})).status_code == 403
            cells.gateway.admission.drain()
            assert (await cells.http.get("/ready")).json()["stage"] == "draining"
            got = await cells.http.post("/v1/messages", json={})
            assert got.status_code == 503 and got.json()["type"] == "error"

    run(test)


def test_it_refuses_what_is_too_much() -> None:
    async def test() -> None:
        config = ServerConfig(max_queued_requests=1, max_body_mib=0.001)
        async with scripted_cells(hold, config=config) as cells:
            assert (await cells.http.post("/v1/completions", content=2000 * b"x")).status_code == 413
            first = asyncio.create_task(cells.http.post("/v1/completions", json=PROMPT))
            await held.wait()
            got = await cells.http.post("/v1/completions", json=PROMPT)
            assert (got.status_code, got.headers["retry-after"]) == (429, "1")
            go.set()
            assert (await first).status_code == 200

    async def hold(asked: Asked) -> None:
        held.set()
        await go.wait()
        await answer(asked)

    held, go = asyncio.Event(), asyncio.Event()
    run(test)


def test_cells_with_keys_are_read_with_a_key() -> None:
    async def test() -> None:
        async with scripted_cells(answer, 1) as cells:
            cells.metrics_key = "secret"
            await cells.look()
            assert "give the gateway a key of it with --server-key-file" in cells.cells[0].state
            assert (await cells.http.post("/v1/completions", json=PROMPT)).status_code == 503
            cells.metrics = b"vllm:something 1.0\n"
            cells.metrics_key = None
            await cells.look()
            assert "are not those of a splitfuse server" in cells.cells[0].state
        async with scripted_cells(answer, 1, key="secret") as cells:
            cells.metrics_key = "secret"
            await cells.look()
            assert cells.cells[0].is_ready

    run(test)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "server is missing: give the URL of each server, such as --server http://10.0.0.2:8000"),
        ({"server": ("10.0.0.2:8000",)}, "server must be the URL of a server, such as http://10.0.0.2:8000, not '10."),
        ({"server": ("http://a/v1",)}, "server must be the URL of a server"),
        ({"server": ("http://a:99999",)}, "server must be the URL of a server"),
        ({"server": ("http://a..b",)}, "server must be the URL of a server"),
        ({"server": ("http://a", "http://a/")}, "server http://a is given twice: give each once"),
        ({"server": ("http://a",), "server_certificate": "c.pem"}, "server_certificate is for servers at https"),
        ({"server": ("http://a",), "max_open_requests": 0}, "max_open_requests must be at least 1, not 0"),
        ({"server": ("http://a",), "tls_key": "key.pem"}, "tls_certificate and tls_key go together"),
        ({"server": ("http://a",), "drain_timeout": 0.0}, "drain_timeout must be"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        GatewayConfig.from_settings(settings)


# Prefixes -------------------------------------------------------------------------------------------------------------


def names(**body: Any) -> set[bytes]:
    return {name for name, _ in prefixes(**body).names}


def prefixes(**body: Any) -> PromptPrefixes:
    return prefixes_of(json.dumps(body).encode(), salt=b"key")


def test_a_conversation_begins_with_all_of_its_last_turn() -> None:
    turns = [{"role": "system", "content": 300 * "x"}, {"role": "user", "content": 200 * "y"}]
    more = [{"role": "assistant", "content": "z"}, {"role": "user", "content": "w"}]
    for field in ("messages", "input"):
        before = prefixes(model="m", **{field: turns})
        assert before.names[-1][1] == 1.0
        assert {name for name, _ in before.names} < names(model="m", temperature=1, **{field: turns + more})
    assert not names(model="m", messages=turns) & names(model="adapter", messages=turns)
    assert not names(messages=turns) & names(messages=turns, tools=[{"type": "function"}])
    assert not names(messages=turns) & names(messages=turns, system="Be brief")


def test_texts_and_token_ids_share_what_they_begin_with() -> None:
    assert names(prompt=400 * "x") & names(prompt=300 * "x" + "y")
    assert not names(prompt=99 * "x" + "a" + 200 * "x") & names(prompt=300 * "x")
    ids = prefixes(prompt=[*range(500)])
    assert ids.num_tokens == 500 and {name for name, _ in ids.names} & names(prompt=[*range(400)])
    assert prefixes(prompt="").names and prefixes(prompt="a").names != prefixes(prompt="b").names
    assert prefixes_of(b"", salt=b"a").names != prefixes_of(b"", salt=b"b").names


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b'{"messages": [1, "a"]}', b'{"a": 1}', b"\xff", b"[" * 9999])
def test_a_body_of_any_kind_has_a_prefix(body: bytes) -> None:
    assert prefixes_of(body, salt=b"").names


# Real servers ---------------------------------------------------------------------------------------------------------


STORY = "Erik plays the cello. Anna lives in Oakford and keeps a goose. Max is a baker and walks to the mill each day."


def test_all_dialects_are_answered_by_real_cells(server: RunningServer) -> None:
    greedy: dict[str, Any] = {"model": "storyteller", "temperature": 0}
    question = [{"role": "user", "content": f"{STORY}\n\nWho keeps a goose?"}]

    async def ask(url: str) -> tuple[str, list[str], str, str, int, list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as ai:
            whole = await ai.completions.create(prompt=STORY, max_tokens=12, **greedy)
            stream = await ai.chat.completions.create(messages=question, stream=True, max_tokens=12, **greedy)
            deltas = [each.choices[0].delta.content or "" async for each in stream if each.choices]
            first = await ai.responses.create(input=question, max_output_tokens=12, **greedy)
            then = await ai.responses.create(input="And who bakes?", previous_response_id=first.id, **greedy)
            assert (await ai.responses.retrieve(first.id)).id == first.id
            cached = then.usage.input_tokens_details.cached_tokens if then.usage else 0
            vectors = await ai.embeddings.create(model="storyteller", input="A goose", encoding_format="float")
            return whole.choices[0].text, deltas, first.output_text, then.output_text, cached, vectors.data[0].embedding

    with running_server(ServerConfig(port=0)) as other:

        async def test() -> None:
            cells = [Cell(n, each.url, Address.of(each.url)) for n, each in enumerate((server, other))]
            gateway = Gateway(cells, ServerConfig())
            await asyncio.gather(*(each.look() for each in cells))
            async with serving(gateway, ServerConfig()) as url:
                passed, direct = await ask(url), await ask(server.url)
                assert (*passed[:4], passed[5]) == (*direct[:4], direct[5]) and passed[4] > 0
                async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as http:
                    body = {"model": "storyteller", "max_tokens": 5, "messages": question}
                    told = await http.post("/v1/messages", json=body)
                    assert told.json()["role"] == "assistant"
                    bad = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
                    assert bad.status_code == 400 and bad.json()["error"]["param"] == "max_tokens"
                    assert (await http.get("/no/such")).status_code == 404
                    found = await http.get(f"/v1/splitfuse/requests/{told.headers['x-request-id']}")
                    assert found.status_code == 200 and found.json()["phases"]
                await asyncio.gather(*(each.look() for each in cells))
                assert {each.state for each in cells} == {"ready"}
                assert sum(each.token_seconds for each in cells) > 0

        run(test)
        other.assert_idle()


def test_the_command_passes_requests_on_until_a_signal(server: RunningServer, tmp_path: Path) -> None:
    log = tmp_path / "gateway.err"
    name = f"gateway-{server.port}"
    command = [sys.executable, "-m", "splitfuse.cli", "gateway", "--port", "0", "--name", name, "--server", server.url]
    with log.open("wb") as err, subprocess.Popen(command, stderr=err) as process:
        try:
            wait_until(lambda: "passes requests on at" in log.read_text() or process.poll() is not None)
            found = re.search(r"passes requests on at (http\S+)", log.read_text())
            assert found is not None, log.read_text()
            with httpx.Client(base_url=found[1], timeout=PATIENCE, trust_env=False) as http:
                got = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 2})
                assert got.status_code == 200 and got.headers["x-splitfuse-cell"] == "0"
            (entry,) = [each for each in registry.deployments() if each.name == name]
            assert server_state(entry) == "ready"
            (shown,) = server_engines(entry, None) or []
            assert (shown["role"], shown["address"]) == ("cell", server.url)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, log.read_text()
        finally:
            process.kill()


@pytest.mark.slow
def test_a_cell_that_is_killed_breaks_its_streams_and_no_others(tmp_path: Path) -> None:
    """Two servers, each a process: what is cut says so, and all that follows is answered."""

    async def stream(http: httpx.AsyncClient, number: int) -> tuple[str, bytes]:
        """The cell of a long answer, and the end of that."""
        body = {"prompt": f"{number} " * 40, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as got:
            assert got.status_code == 200
            begun.append(number)
            content = await got.aread()
        return got.headers["x-splitfuse-cell"], content[-300:]

    async def test() -> None:
        cells = [Cell(n, url, Address.of(url)) for n, url in enumerate(urls)]
        gateway = Gateway(cells, ServerConfig())
        await asyncio.gather(*(each.look() for each in cells))
        watching = asyncio.create_task(gateway.watch())
        async with (
            serving(gateway, ServerConfig()) as url,
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as http,
        ):
            streams = [asyncio.create_task(stream(http, number)) for number in range(12)]
            while len(begun) < len(streams):
                await asyncio.sleep(0.01)
            servers[0].process.kill()
            for cell, end in await asyncio.gather(*streams):
                is_cut = b"was lost in the midst of the answer" in end
                assert is_cut or end.endswith(b"data: [DONE]\n\n"), end
                assert cell == "0" or not is_cut
            for number in range(12):
                got = await http.post("/v1/completions", json={"prompt": f"{number} " * 40, "max_tokens": 2})
                assert got.status_code == 200 and got.headers["x-splitfuse-cell"] == "1"
        watching.cancel()

    begun: list[int] = []
    flags = ("--num-threads", "1", "--max-num-seqs", "16")
    with server_process(tmp_path, "cell-a", *flags) as a, server_process(tmp_path, "cell-b", *flags) as b:
        servers = (a, b)
        urls = [each.client().url for each in servers]
        run(test)
