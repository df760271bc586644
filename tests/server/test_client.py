"""Our own clients over a real socket: responses and errors equal those of a pipeline."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.clients.bridge import LoopThread
from splitfuse.clients.sse import DONE, EventParser
from splitfuse.clients.wire import error_in, error_of, prepare
from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.messages import Add
from splitfuse.errors import (
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    RequestQuarantinedError,
    RequestTooLargeError,
    ServerError,
    SplitfuseError,
)
from splitfuse.text.kwargs import DEFAULT_MAX_NEW_TOKENS

PROMPT = "Erik plays the cello.\n\nOnce upon a time"
TURNS = [{"role": "user", "content": "Erik plays the cello.\n\nWhat does Erik play?"}]
LONG = {"max_new_tokens": 1500, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The place of these tests' deployments: none of the user's own is seen."""
    path = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture
def client(server: RunningServer) -> Iterator[splitfuse.Client]:
    with splitfuse.client(server.url) as client:
        yield client


def essence(responses: Any) -> list[tuple[Any, ...]]:
    """What a client and a pipeline must agree in."""
    return [
        (r.index, r.choice, r.generated_text, r.prompt_length, r.generated_length, r.finish_reason) for r in responses
    ]


# The same as a pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "n": 3, "temperature": 1.0, "seed": 7},
        {"max_new_tokens": 12, "do_sample": True, "seed": 7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"max_new_tokens": 20, "stop": ["a", "the"], "min_new_tokens": 2},
        {"max_new_tokens": 12, "presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"max_new_tokens": 12, "logit_bias": {100: 5.0, 200: -5}, "stop_token_ids": [300]},
        {"max_length": 30, "ignore_eos": True},
        {"max_length": 40, "max_new_tokens": 5},
        {"max_new_tokens": 6, "return_full_text": True},
    ],
    ids=lambda keywords: "-".join(keywords),
)
def test_responses_equal_a_pipelines(
    client: splitfuse.Client, pipe: splitfuse.Pipeline, keywords: dict[str, Any]
) -> None:
    prompts = [PROMPT, "The market"]
    assert essence(client(prompts, **keywords)) == essence(pipe(prompts, **keywords))


def test_the_default_length_equals_a_pipelines(client: splitfuse.Client, pipe: splitfuse.Pipeline) -> None:
    almost_full = (list(pipe.tokenizer.encode(PROMPT)) * 2048)[:2040]
    responses = client(almost_full, ignore_eos=True)
    assert essence(responses) == essence(pipe(almost_full, ignore_eos=True)) and responses[0].generated_length == 8
    assert prepare(PROMPT)[0].clamp_max_tokens(10, 4096).params.max_tokens == DEFAULT_MAX_NEW_TOKENS


def test_token_ids_and_chats_equal_a_pipelines(client: splitfuse.Client, pipe: splitfuse.Pipeline) -> None:
    ids = list(pipe.tokenizer.encode(PROMPT))
    for prompts in (ids, [ids, ids[:3]]):
        assert essence(client(prompts, max_length=50)) == essence(pipe(prompts, max_length=50))
    for prompts in (TURNS, [TURNS, TURNS], "Who plays?", ["Who plays?"]):
        assert essence(client(prompts, chat=True, max_length=60)) == essence(pipe(prompts, chat=True, max_length=60))
    two = client([TURNS, "Who plays?"], chat=True, n=2, temperature=1.0, seed=3, max_length=60)
    assert essence(two) == essence(pipe([TURNS, "Who plays?"], chat=True, n=2, temperature=1.0, seed=3, max_length=60))


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logprobs_equal_a_pipelines(
    client: splitfuse.Client, pipe: splitfuse.Pipeline, chat: bool, stream: bool
) -> None:
    keywords: dict[str, Any] = {"logprobs": 3, "max_new_tokens": 5, "chat": chat, "temperature": 1.0, "seed": 1, "n": 2}
    prompt = "What does Erik play?" if chat else PROMPT
    wanted = pipe(prompt, **keywords)
    if stream:
        pieces = list(client(prompt, stream=True, **keywords))
        responses = [piece.response for piece in pieces if piece.response is not None]
    else:
        responses = client(prompt, **keywords)
    for response, other in zip(responses, wanted, strict=True):
        assert response.logprobs is not None and other.logprobs is not None
        assert "".join(entry.token for entry in response.logprobs).strip() == response.generated_text.strip()
        for entry, same in zip(response.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(same.logprob, abs=1e-5)
            assert [value for _, value in entry.top] == pytest.approx([value for _, value in same.top], abs=1e-5)
    assert client("What", max_new_tokens=2, n=2, temperature=1.0)[0].logprobs is None, "they were not asked for"


def test_pieces_join_to_the_responses(client: splitfuse.Client, pipe: splitfuse.Pipeline) -> None:
    prompts, keywords = [PROMPT, "The market"], {"max_new_tokens": 9, "n": 2, "temperature": 1.0, "seed": 4}
    wanted = essence(pipe(prompts, **keywords))
    pieces = list(client(prompts, stream=True, **keywords))
    heard: list[splitfuse.Piece] = []
    assert essence(client(prompts, streaming_fn=heard.append, **keywords)) == wanted
    for told in (pieces, heard):
        assert len(told) > 20, "it did not come in pieces"
        for index, choice, text, *_ in wanted:
            assert "".join(p.text for p in told if (p.index, p.choice) == (index, choice)) == text
    responses = sorted((p.response for p in pieces if p.response), key=lambda r: (r.index, r.choice))
    assert essence(responses) == wanted
    assert str(responses[0]) == responses[0].generated_text


def test_cached_tokens_are_reported(client: splitfuse.Client) -> None:
    prompt = "A long beginning, of more than a block of the cache. " * 8
    client(prompt, max_new_tokens=1)
    assert client(prompt, max_new_tokens=1)[0].num_cached_tokens >= 32


# Wherever it is called -----------------------------------------------------------------------------------------------


def test_the_blocking_client_works_within_an_event_loop(server: RunningServer, pipe: splitfuse.Pipeline) -> None:
    async def cell() -> None:
        with splitfuse.client(server.url) as client:
            assert essence(client(PROMPT, max_new_tokens=4)) == essence(pipe(PROMPT, max_new_tokens=4))
            assert "".join(p.text for p in client(PROMPT, stream=True, max_new_tokens=4)) == str(
                pipe(PROMPT, max_new_tokens=4)[0]
            )

    asyncio.run(cell())


def test_the_async_client(server: RunningServer, pipe: splitfuse.Pipeline) -> None:
    async def main() -> None:
        async with splitfuse.async_client(server.url) as client:
            assert await client.health() and await client.state() == "ready"
            wanted = essence(pipe([PROMPT, "The"], max_new_tokens=4))
            heard: list[splitfuse.Piece] = []
            assert essence(await client([PROMPT, "The"], max_new_tokens=4)) == wanted
            assert essence(await client([PROMPT, "The"], max_new_tokens=4, streaming_fn=heard.append)) == wanted
            streamed = [piece async for piece in client(PROMPT, max_new_tokens=4, stream=True)]
            assert "".join(piece.text for piece in streamed) == wanted[0][2]
            assert "".join(piece.text for piece in heard if piece.index == 0) == wanted[0][2]
            assert (await client.stats())["num_requests_running"] == 0
            many = await asyncio.gather(*(client(f"{number} apples", max_new_tokens=2) for number in range(20)))
            assert all(len(responses) == 1 for responses in many)
            async with aclosing(client(PROMPT, stream=True, **LONG)) as pieces:
                async for _ in pieces:
                    break
            with pytest.raises(InvalidRequestError, match="unknown keyword 'nonsense'"):
                await client(PROMPT, nonsense=1)
            with pytest.raises(ServerError, match="can only be ended where it runs"):
                await client.terminate_server()

    asyncio.run(main())


def test_many_threads_may_share_a_client(client: splitfuse.Client, pipe: splitfuse.Pipeline) -> None:
    wanted = essence(pipe(PROMPT, max_new_tokens=5))
    got: list[Any] = []
    threads = [
        threading.Thread(target=lambda: got.append(essence(client(PROMPT, max_new_tokens=5)))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted] * 16


def test_more_prompts_than_connections(client: splitfuse.Client) -> None:
    responses = client([f"{number} apples" for number in range(150)], max_new_tokens=1)
    assert [response.index for response in responses] == list(range(150))


# Ends before the end -------------------------------------------------------------------------------------------------


def test_a_stream_that_is_closed_is_aborted(client: splitfuse.Client, server: RunningServer) -> None:
    before = server.client.stats[0].num_generated_tokens
    with server.held(server.nothing_runs):
        pieces = client([PROMPT, "The"], stream=True, **LONG)
        next(pieces)
        pieces.close()
        server.assert_idle()
    assert server.client.stats[0].num_generated_tokens - before < 2 * 1500


def test_an_interrupted_call_is_aborted(client: splitfuse.Client, server: RunningServer) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    before = server.client.stats[0].num_generated_tokens
    with server.held(server.nothing_runs):
        with pytest.raises(KeyboardInterrupt):
            client([PROMPT] * 4, streaming_fn=interrupt, **LONG)
        server.assert_idle()
    assert server.client.stats[0].num_generated_tokens - before < 4 * 1500
    assert len(client("Once", max_new_tokens=1)) == 1, "the client is of no use any more"


def test_work_is_cancelled_if_an_interruption_comes_while_it_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hand_over, closed = asyncio.run_coroutine_threadsafe, threading.Event()

    def interrupted(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> None:
        monkeypatch.undo()
        hand_over(work, loop)
        raise KeyboardInterrupt

    async def items() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def close() -> None:
        pass

    thread = LoopThread(items, close)
    pieces = thread.iterate(items())
    assert next(pieces) == 1
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert closed.is_set()
    thread.end()


def test_a_missed_deadline_fails_only_its_request(client: splitfuse.Client) -> None:
    (response,) = client(PROMPT, deadline=0.001, **LONG)
    assert (response.finish_reason, response.generated_length) == ("error", 0)
    assert response.error is not None and "0.001 s have passed" in response.error


def test_a_closed_client_says_so(server: RunningServer) -> None:
    client = splitfuse.client(server.url)
    client.close()
    with pytest.raises(ServerError, match="this client is closed"):
        client("hello")


def test_a_fork_needs_a_client_of_its_own(client: splitfuse.Client, server: RunningServer) -> None:
    """Both processes would read from one connection."""
    assert client.health()
    loop = asyncio.new_event_loop()
    other = splitfuse.async_client(server.url)
    if (child := os.fork()) == 0:
        uses = [
            lambda: client("hello"),
            lambda: next(client("hello", stream=True)),
            client.health,
            client.terminate_server,
            lambda: loop.run_until_complete(other.health()),
            lambda: server.client.open(Add("a", (5,), SamplingParams())),
        ]
        refused = 0
        for use in uses:
            with suppress(ServerError, EngineUnavailableError):
                use()
                break
            refused += 1
        os._exit(len(uses) - refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loop.run_until_complete(other.close())
    loop.close()
    assert client.health()


def test_an_async_client_says_that_it_has_another_loop(server: RunningServer) -> None:
    client = splitfuse.async_client(server.url)
    assert asyncio.run(client.health())
    with pytest.raises(ServerError, match="belongs to another event loop: make a new one"):
        asyncio.run(client.health())


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"nonsense": 1}, InvalidRequestError, "unknown keyword 'nonsense'"),
        ({"max_new_token": 1}, InvalidRequestError, "did you mean 'max_new_tokens'"),
        ({"prompt_logprobs": 1}, InvalidRequestError, "unknown keyword 'prompt_logprobs'"),
        ({"temperature": -1}, InvalidRequestError, "temperature must be a number from 0"),
        ({"max_new_tokens": 5000}, PromptTooLongError, "too long for max_new_tokens 5000: .* max_new_tokens can"),
        ({"max_length": 2}, PromptTooLongError, "max_length 2 leaves nothing"),
        ({"max_length": 5000}, InvalidRequestError, "max_length 5000 exceeds the model's 2048"),
        ({"max_length": 0}, InvalidRequestError, "max_length must be a whole number"),
        (
            {"max_length": 20, "min_new_tokens": 19},
            InvalidRequestError,
            "min_new_tokens 19 does not fit: max_length 20 leaves",
        ),
        ({"logit_bias": {99999: 1}}, InvalidRequestError, "logit_bias has the token id 99999"),
        ({"chat": 1}, InvalidRequestError, "chat must be True or False"),
        ({"chat": True, "return_full_text": True}, InvalidRequestError, "return_full_text needs prompts of text"),
        (
            {"stream": True, "streaming_fn": print},
            InvalidRequestError,
            "stream and streaming_fn are mutually exclusive",
        ),
        ({"deadline": -1}, InvalidRequestError, "splitfuse_deadline"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_invalid_keywords_are_refused_by_name(
    client: splitfuse.Client, keywords: dict[str, Any], kind: type[SplitfuseError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        client(PROMPT, **keywords)
    assert type(caught.value) is kind


def test_invalid_prompts(client: splitfuse.Client) -> None:
    for prompts, message in (
        ([], "the list of prompts is empty"),
        ("", "the prompt is empty"),
        ([PROMPT, ""], "prompt 1: the prompt is empty"),
        ([PROMPT, [99999]], "prompt 1: prompt has the token id 99999"),
        ("word " * 3000, r"the prompt has \d+ tokens"),
        (5, "prompts must be a text or a list"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            client(prompts, max_new_tokens=2)
    with pytest.raises(InvalidRequestError, match="role"):
        client([{"role": "cat", "content": "meow"}], chat=True)


def test_a_full_server_reports_when_to_retry() -> None:
    with (
        running_server(ServerConfig(max_queued_requests=1), num_blocks=200) as server,
        splitfuse.client(server.url) as client,
        server.held(server.nothing_runs),
    ):
        pieces = client(PROMPT, stream=True, **LONG)
        next(pieces)
        with pytest.raises(OverloadedError) as caught:
            client(PROMPT)
        assert caught.value.retry_after >= 1
        server.loop.call_soon_threadsafe(server.admission.drain)
        server.wait_until(lambda: server.admission.draining)
        assert client.state() == "draining"
        with pytest.raises(DrainingError):
            client(PROMPT)
        pieces.close()


def test_unreachable_servers() -> None:
    with pytest.raises(ServerError, match=r"there is no deployment named 'nobody' .*; none is running"):
        splitfuse.client("nobody")
    with pytest.raises(ServerError, match="is not the URL of a server"):
        splitfuse.client("ftp://127.0.0.1")
    with splitfuse.client("http://127.0.0.1:9") as client, pytest.raises(ServerError, match="no server answers at"):
        client("hello")


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"type": "invalid_request_error", "code": "invalid_value", "param": "max_tokens"}, InvalidRequestError),
        (400, {"type": "invalid_request_error", "code": "context_length_exceeded"}, PromptTooLongError),
        (400, {"type": "invalid_request_error", "code": "request_too_large"}, RequestTooLargeError),
        (422, {"type": "invalid_request_error", "code": "request_quarantined"}, RequestQuarantinedError),
        (401, {"type": "invalid_request_error", "code": "invalid_api_key"}, ServerError),
        (404, {"type": "invalid_request_error", "code": "model_not_found"}, ModelNotFoundError),
        (408, {"type": "timeout_error", "code": "deadline_exceeded"}, RequestFailedError),
        (429, {"type": "rate_limit_error", "code": "rate_limit_exceeded"}, OverloadedError),
        (500, {"type": "server_error", "code": "request_failed"}, RequestFailedError),
        (503, {"type": "server_error", "code": "draining"}, DrainingError),
        (503, {"type": "server_error", "code": "engine_unavailable"}, EngineUnavailableError),
        (503, {"type": "service_unavailable", "code": None}, EngineUnavailableError),
    ],
)
def test_error_bodies_become_our_exceptions(status: int, error: dict[str, Any], kind: type[SplitfuseError]) -> None:
    error = {"message": "about max_tokens", "param": None, **error}
    raised = error_in(error, status, {"retry-after": "7"})
    assert type(raised) is kind
    if isinstance(raised, InvalidRequestError):
        assert str(raised) == "about max_new_tokens"
        assert raised.parameter == ("max_new_tokens" if error["param"] else None)
    if isinstance(raised, OverloadedError):
        assert raised.retry_after == 7
    if status not in (401, 408) and error["code"]:
        assert type(error_in(error)) is kind, "in a stream, there is no status"


def test_foreign_error_bodies() -> None:
    for content in (b"<html>Bad gateway</html>", b"{}", b"[]", b'{"error": 5}', b"\xff"):
        error = error_of(502, content, {})
        assert isinstance(error, ServerError) and "status 502" in str(error)


def test_events_end_at_line_feeds_alone_wherever_they_are_cut() -> None:
    text = 'data: {"text": "a\u2028b\x85c"}\n\ndata: {"text": "\u00e9\U0001f600"}\n\ndata: [DONE]\n\n'.encode()

    for size in range(1, len(text) + 1):
        parser = EventParser()
        found = [data for start in range(0, len(text), size) for data in parser.feed(text[start : start + size])]
        assert found.pop() == DONE
        assert list(map(json.loads, found)) == [{"text": "a\u2028b\x85c"}, {"text": "\u00e9\U0001f600"}]
