"""Endpoints over real sockets: our server, and the ways in which other servers report tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.bench.endpoint import Endpoint, spread
from splitfuse.bench.load import closed_loop
from splitfuse.bench.target import Answer
from splitfuse.bench.workload import Chat, Independent, Lengths, LoadRequest, Prompt, TokenIds, Words
from splitfuse.config.server import ServerConfig
from splitfuse.errors import ConfigError, RequestFailedError, ServerError

PROMPT = (7, 40, 1900, 8, 12)


def asked(prompt: Prompt, max_tokens: int) -> LoadRequest:
    return LoadRequest("x", 0, 0, prompt, max_tokens)


async def answer_of(endpoint: Endpoint, request: LoadRequest) -> Answer:
    await endpoint.start()
    return await endpoint.ask(request)


# Ours ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Any:
    with running_server() as server:
        yield server


def test_our_server_returns_token_ids(server: RunningServer) -> None:
    endpoint = Endpoint(server.url)
    answer = asyncio.run(answer_of(endpoint, asked(PROMPT, 9)))
    assert (answer.error, answer.num_prompt_tokens, len(answer.token_times)) == (None, 5, 9)
    (expected,) = splitfuse.pipeline()([list(PROMPT)], max_new_tokens=9, ignore_eos=True)
    assert answer.tokens == tuple(expected.token_ids)
    assert endpoint.about["token_times"] == "token_ids" and endpoint.about["ignores_eos"]
    assert (endpoint.room, endpoint.about["model"]) == (2048, "storyteller")


def test_load_on_our_server(server: RunningServer) -> None:
    async def run() -> None:
        endpoint = Endpoint(server.url, vocab_size=3072)
        await endpoint.start()
        workload = Independent(Lengths(60, 6, room=endpoint.room), endpoint.vocabulary)
        point = await closed_loop(endpoint, workload, clients=4, requests=10)
        assert all(record.error is None and record.token_times for record in point.records)

    asyncio.run(run())
    server.assert_idle()


def test_rejected_request_has_the_reason(server: RunningServer) -> None:
    answer = asyncio.run(answer_of(Endpoint(server.url), asked(PROMPT, 5000)))
    assert answer.error is not None and "max_tokens" in answer.error and not answer.token_times


def test_errors_have_a_message(server: RunningServer) -> None:
    for endpoint, sentence in (
        (Endpoint("http://127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (Endpoint(server.url, model="gpt"), "does not serve model 'gpt', only storyteller"),
        (Endpoint(f"{server.url}/v3"), "returned no list of models"),
    ):
        with pytest.raises(ServerError, match=sentence):
            asyncio.run(endpoint.start())
    for url in ("127.0.0.1:8000", "ftp://a", "http://", "http://a:99999", "http://[::1"):
        with pytest.raises(ConfigError, match="invalid server URL"):
            Endpoint(url)


def test_server_with_api_keys() -> None:
    with running_server(ServerConfig(api_key=("secret",)), num_blocks=200) as locked:
        with pytest.raises(ServerError, match="requires an API key"):
            asyncio.run(Endpoint(locked.url).start())
        answer = asyncio.run(answer_of(Endpoint(locked.url, api_key="secret"), asked(PROMPT, 3)))
        assert len(answer.token_times) == 3


# Others' ways to tell of tokens --------------------------------------------------------------------------------------

Events = Callable[[dict[str, Any]], list[dict[str, Any]] | None]
"""A body's answer: its events, or None if it is refused."""


def text(piece: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": None}], **more}


def usage(body: dict[str, Any], count: int) -> dict[str, Any]:
    prompt = body["prompt"]
    length = len(prompt.split()) * 2 if isinstance(prompt, str) else len(prompt)
    return {"usage": {"prompt_tokens": length, "completion_tokens": count}}


def only_usage_at_the_end(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    if unknown := set(body) - {
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "stream",
        "stream_options",
        "ignore_eos",
    }:
        assert unknown
        return None
    events = [text("ab") for _ in range(body["max_tokens"] // 2)]
    return [*events, {"choices": [], **usage(body, body["max_tokens"])}]


def continuous_usage(body: dict[str, Any]) -> list[dict[str, Any]]:
    """vLLM of before return_token_ids: what it does not know, it passes over."""
    if not body["stream_options"].get("continuous_usage_stats"):
        return only_usage_at_the_end({name: body[name] for name in body if name != "return_token_ids"}) or []
    counts = range(1, body["max_tokens"] + 1)
    return [text("a" if count % 2 else "", **usage(body, count)) for count in counts]


def llama_cpp(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Counts with `timings_per_token`; two tokens in an event, as of a character of two."""
    counts = range(2, body["max_tokens"] + 1, 2)
    timings = [{"prompt_n": 3, "cache_n": 2, "predicted_n": count} for count in counts]
    return [text("\u00e9", **({"timings": each} if "timings_per_token" in body else {})) for each in timings]


def no_ids(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    return None if not isinstance(body["prompt"], str) else only_usage_at_the_end(body)


def no_counts(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [text("a")] * body["max_tokens"]


def stops_early(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    return only_usage_at_the_end({**body, "max_tokens": min(body["max_tokens"], 8)})


def breaks(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    if body["max_tokens"] > 8:
        return [text("a"), {"error": {"message": "the engine died", "code": 500}}]
    return only_usage_at_the_end(body)


@asynccontextmanager
async def other_server(events: Events, models: dict[str, Any]) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(length)
        status, said = "200 OK", [json.dumps(models).encode()]
        if head.startswith(b"POST"):
            made = events(json.loads(body))
            if made is None:
                status, said = "400 Bad Request", [b'{"error": {"message": "unknown parameter"}}']
            else:
                said = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in made] + [b"data: [DONE]\n\n"]
        elif b"/props" in head:
            said = [b'{"default_generation_settings": {"n_ctx": 1280}}']
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n".encode())
        for piece in said:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.003)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def with_other(events: Events, act: Callable[[Endpoint], Awaitable[Any]], **models: Any) -> Any:
    async def run() -> Any:
        async with other_server(events, {"data": [{"id": "m", **models}]}) as url:
            return await act(Endpoint(url))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("events", "told", "distinct"),
    [
        (only_usage_at_the_end, "usage at the end", 5),
        (continuous_usage, "usage with each event", 10),
        (llama_cpp, "timings with each event", 5),
    ],
)
def test_tokens_are_counted_as_the_server_reports(events: Events, told: str, distinct: int) -> None:
    async def act(endpoint: Endpoint) -> None:
        answer = await answer_of(endpoint, asked(PROMPT, 10))
        assert endpoint.about["token_times"] == told
        assert (answer.error, answer.num_prompt_tokens, len(answer.token_times)) == (None, 5, 10)
        assert len(set(answer.token_times)) <= distinct and len(set(answer.token_times)) > 1
        assert list(answer.token_times) == sorted(answer.token_times)

    with_other(events, act)


def test_llama_cpp_reports_context_and_vocabulary() -> None:
    async def act(endpoint: Endpoint) -> None:
        await endpoint.start()
        assert (endpoint.room, endpoint.vocabulary) == (1280, TokenIds(32000))

    with_other(llama_cpp, act, meta={"n_vocab": 32000, "n_ctx_train": 4096})


def test_server_without_token_ids() -> None:
    async def act(endpoint: Endpoint) -> None:
        answer = await answer_of(endpoint, asked("one two three", 10))
        assert endpoint.vocabulary == Words(2.0) and endpoint.about["prompts"] == "text"
        assert (answer.num_prompt_tokens, len(answer.token_times), answer.tokens) == (6, 10, "ab" * 5)

    with_other(no_ids, act)


def test_conversations_are_text_if_answers_are() -> None:
    async def act(endpoint: Endpoint) -> None:
        await endpoint.start()
        assert (endpoint.vocabulary, endpoint.answer_vocabulary) == (TokenIds(1000), Words(2.0))
        chat = Chat(Lengths(10, 4), endpoint.answer_vocabulary, turns=2)
        first = chat.first("x", 0)
        second = chat.successor(first, (await endpoint.ask(first)).tokens)
        assert isinstance(first.prompt, str) and second is not None and isinstance(second.prompt, str)
        assert second.prompt.startswith(f"{first.prompt} {'a' * (first.max_tokens // 2 + first.max_tokens % 2)} ")

    with_other(continuous_usage, act)


def test_malformed_event() -> None:
    with pytest.raises(RequestFailedError, match="malformed event in the stream"):
        with_other(lambda _: [{"choices": 3}], Endpoint.start)


def test_server_without_token_counts() -> None:
    with pytest.raises(ServerError, match="reports neither token ids nor usage"):
        with_other(no_counts, Endpoint.start)


def test_server_that_rejects_everything() -> None:
    with pytest.raises(
        ServerError, match="rejects even the simplest stream of completions: status 400: unknown parameter"
    ):
        with_other(lambda _: None, Endpoint.start)


def test_short_or_broken_answers_are_errors() -> None:
    for events, why in ((stops_early, "8 tokens arrived instead of 20"), (breaks, "the engine died")):
        answer = with_other(events, lambda endpoint: answer_of(endpoint, asked(PROMPT, 20)))
        assert answer.error == why


@given(st.integers(0, 50), st.lists(st.floats(0, 10), max_size=50).map(sorted))
def test_tokens_are_spread_over_events(num_tokens: int, events: list[float]) -> None:
    times = spread(num_tokens, events)
    assert times == sorted(times) and set(times) <= set(events)
    if events and num_tokens:
        assert len(times) == num_tokens and times[0] == events[0]
        if num_tokens > 1:
            assert times[-1] == events[-1]
        if num_tokens == len(events):
            assert times == events
