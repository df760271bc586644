"""What clients of OpenAI's and vLLM's APIs send and look for, beyond what these APIs need."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.config.server import ServerConfig
from splitfuse.core.limits import EngineLimits
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError, OverloadedError
from splitfuse.server import generate
from splitfuse.server.admission import Admission
from splitfuse.server.errors import answer_to
from splitfuse.server.openai.endpoints import ABSENT, MANY_TOKENS
from splitfuse.server.openai.protocol import ChatRequest, plain_messages
from splitfuse.server.validation import decode

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of Anna."}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "a cat " * 3000


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": LONG}),
        (COMPLETIONS, {"prompt": [7] * 2048}),
        (COMPLETIONS, {"prompt": [7] * 2000, "max_tokens": 49}),
        (COMPLETIONS, {"prompt": [7] * 2000, "min_tokens": 49}),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
        (CHAT, {"messages": [{"role": "user", "content": LONG * 100}], "stream": True}),
    ],
)
def test_an_overflow_has_the_words_that_clients_look_for(http: httpx.Client, path: str, body: Any) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    # ExceptionCheckers.is_error_str_context_window_exceeded of litellm 1.110.2, which aider asks too
    assert error["message"].lower().startswith("this model's maximum context length is 2048 tokens")
    # _handle_openai_bad_request of langchain-openai 1.7.4
    assert "prompt is too long" in error["message"]


def test_a_prompt_too_long_for_the_cache_says_so_in_these_words() -> None:
    limits = EngineLimits(max_model_len=2048, vocab_size=100, num_blocks=4, block_size=32)
    with pytest.raises(InvalidRequestError, match="the prompt is too long for this cache") as refusal:
        limits.check([7] * 200, SamplingParams(max_tokens=1))
    assert answer_to(refusal.value).code == "request_too_large"


@pytest.mark.parametrize("rate", [0.001, 3.0, 7.0, 1000.0])
def test_retry_after_agrees_with_its_sentence(rate: float) -> None:
    admission = Admission(ServerConfig(max_queued_tokens=100))
    admission.progressed(1000, 1000 / rate)
    with admission.admit(95), pytest.raises(OverloadedError) as refusal, admission.admit(15):
        pass
    answer = answer_to(refusal.value)
    assert f"try again in {answer.headers['retry-after']} s" in answer.message


def test_a_wrong_entry_of_a_mapping_is_named(http: httpx.Client) -> None:
    for bias, param, message in (
        ({"5": 1, "six": 1}, "logit_bias", "not 'six'"),
        ({"5": 1, "-1": 1}, "logit_bias", "not -1"),
        ({"5": 1, "99999": 1}, "logit_bias", "token id 99999"),
        ({"5": 1, "6": "x"}, "logit_bias[6]", "logit_bias[6] must be a number, not a string"),
        ({"5": 1, "6": 101}, "logit_bias[6]", "logit_bias[6] must be a number from -100 to 100, not 101"),
    ):
        error = http.post(CHAT, json={"messages": MESSAGES, "logit_bias": bias}).json()["error"]
        assert error["param"] == param and message in error["message"]


# Routes and keys -----------------------------------------------------------------------------------------------------


def test_absent_routes_of_openai_are_no_404(http: httpx.Client) -> None:
    for route in ABSENT:
        for path in (route, route + "/abc/def"):
            if path == CHAT:
                continue
            for method in ("GET", "POST", "DELETE"):
                answer = http.request(method, path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_route"), path
                assert path in answer.json()["error"]["message"]
    for path in ("/v1", "/v1/", "/nowhere", "/v1/embeddingsx", "/embeddings", "/v1/engines", "/v1/completions/1"):
        assert http.get(path).status_code == 404


def test_a_key_may_be_in_either_header() -> None:
    with running_server(ServerConfig(api_key=("k1", "k2")), num_blocks=200) as server, server.http() as http:

        def status(**headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return http.get("/v1/models", headers=named).status_code

        assert status(x_api_key="k1") == status(x_api_key="k1", authorization="Bearer k1") == 200
        assert status(x_api_key="", authorization="Bearer k1") == status(x_api_key="k1", authorization="Basic x") == 200
        assert status(x_api_key="wrong") == status(x_api_key="wrong", authorization="Bearer k1") == 401
        assert status(x_api_key="k1", authorization="Bearer wrong") == 401
        for keys in (("k1", "k2"), ("k2", "k1"), ("k1", "wrong"), ("wrong", "k1")):
            twice = [("authorization", f"Bearer {key}") for key in keys]
            assert http.get("/v1/models", headers=twice).status_code == 401
            assert http.get("/v1/models", headers=[("x-api-key", key) for key in keys]).status_code == 401
        answer = http.get("/v1/models", headers={"x-api-key": "k1", "authorization": "Bearer k2"})
        assert answer.status_code == 401 and "different API keys" in answer.json()["error"]["message"]


def test_keys_that_differ_matter_only_where_one_is_required(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"x-api-key": "a", "authorization": "Bearer b"}).status_code == 200


# Parameters ----------------------------------------------------------------------------------------------------------


def events_of(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and lines[-1] == "[DONE]", answer.text
    return [json.loads(line) for line in lines[:-1]]


def refusal_of(answer: httpx.Response) -> tuple[str, str]:
    """The parameter and the message of a 400."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("include_usage", [True, False])
def test_each_event_has_the_usage_so_far(http: httpx.Client, path: str, include_usage: bool) -> None:
    """guidellm sends this, and reads the numbers of tokens from it."""
    prompt: dict[str, Any] = {"prompt": [PROMPT, "The"]} if path == COMPLETIONS else {"messages": MESSAGES}
    body = {**prompt, "n": 2, "max_tokens": 5, "ignore_eos": True, "stream": True}
    options = {"include_usage": include_usage, "continuous_usage_stats": True, "include_obfuscation": False}
    events = events_of(http.post(path, json={**body, "stream_options": options}))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 5 * 2 * (2 if path == COMPLETIONS else 1) and counts[0] < 5
    assert {event["usage"]["prompt_tokens"] for event in events} == {events[-1]["usage"]["prompt_tokens"]}
    assert (events[-1]["choices"] == []) == include_usage
    options["continuous_usage_stats"] = False
    *events, last = events_of(http.post(path, json={**body, "stream_options": options}))
    assert [event.get("usage") for event in events] == [None] * len(events)
    assert ("usage" in last) == include_usage


def test_obfuscation_is_refused_in_a_sentence(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_obfuscation": True}}
    param, message = refusal_of(http.post(CHAT, json=body))
    assert param == "stream_options.include_obfuscation"
    assert message == f"{param} true is not supported: leave it out or send false"


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "hint",
    [
        {"reasoning_effort": "none"},
        {"verbosity": "medium"},
        {"service_tier": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "metadata": {"a": "b"}},
        {"prompt_cache_retention": "in-memory"},
        {"store": False, "parallel_tool_calls": True},
        {"logprobs": False, "top_logprobs": 0},
        {"tools": [TOOL], "tool_choice": "none"},
        {"functions": [TOOL["function"]], "function_call": "none"},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "use_beam_search": False},
    ],
    ids=lambda hint: next(iter(hint)),
)
def test_hints_that_ask_for_nothing_change_nothing(http: httpx.Client, hint: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    plain, hinted = (http.post(CHAT, json=each).json() for each in (body, body | hint))
    assert hinted["choices"] == plain["choices"]
    assert hinted["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ({"reasoning_effort": "low"}, 'leave it out or send "none"'),
        ({"verbosity": "high"}, 'send "medium"'),
        ({"reasoning_max_tokens": 5, "thinking_token_budget": 6}, "two names of one thing"),
        ({"service_tier": "flex"}, 'there is one tier, .* send "auto" or "default"'),
        ({"prompt_cache_retention": "24h"}, "as long as there is room"),
        ({"functions": [{}]}, "^functions is not supported: they are called by tools of the type function"),
        ({"function_call": "auto"}, "by tools, with a tool_choice"),
        ({"web_search_options": {}}, "^web_search_options is not supported: leave it out$"),
        ({"skip_special_tokens": False}, "skip_special_tokens false is not supported: leave it out or send true"),
    ],
)
def test_hints_that_ask_for_something_are_refused(http: httpx.Client, hint: dict[str, Any], words: str) -> None:
    param, message = refusal_of(http.post(CHAT, json={"messages": MESSAGES, **hint}))
    assert param == next(iter(hint)) and re.search(words, message), message


def test_a_refused_value_of_any_size_is_a_400(http: httpx.Client) -> None:
    for value in ("9" * 5000, "[" * 900 + "]" * 900, '"' + "x" * 10**6 + '"', "1e999"):
        content = '{"messages": [{"role": "user", "content": "x"}], "verbosity": ' + value + "}"
        answer = http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and len(answer.content) < 500, answer.text


@pytest.mark.parametrize("value", [{"seed": 10**400}, {"stop_token_ids": [10**400]}, {"logit_bias": {"1" * 400: 1}}])
def test_a_whole_number_that_is_no_float_is_a_400(http: httpx.Client, value: dict[str, Any]) -> None:
    assert refusal_of(http.post(COMPLETIONS, json={"prompt": PROMPT, **value}))[0] == next(iter(value))
    # A mistake behind it makes the body be walked, to find the first one.
    assert refusal_of(http.post(COMPLETIONS, json={"prompt": PROMPT, **value, "stream": "x"}))[0] == "stream"


def test_seed_minus_1_is_a_new_one_each_time(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "temperature": 2}
    texts = {http.post(COMPLETIONS, json={**body, "seed": -1}).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1
    assert refusal_of(http.post(COMPLETIONS, json={**body, "seed": -2}))[0] == "seed"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}),
        (COMPLETIONS, {"prompt": [PROMPT, "The cat"], "logprobs": 3, "echo": True, "prompt_logprobs": 2}),
        (COMPLETIONS, {"prompt": PROMPT, "logprobs": 1, "echo": True, "max_tokens": 0}),
        (COMPLETIONS, {"prompt": PROMPT, "logprobs": 2, "echo": True, "stream": True, "stop": "e"}),
    ],
)
def test_many_logprobs_are_written_as_few_are(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    body = {"max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 5} | body

    def answered() -> tuple[httpx.Response, list[str]]:
        answer = http.post(path, json=body)
        data = re.sub(r'"(id|created)":("[^"]*"|\d+)', "", answer.text)
        return answer, sorted(data.splitlines())  # choices of a stream come in any order

    few, lines = answered()
    monkeypatch.setattr(generate, "MANY_LOGPROBS", 0)
    many, same = answered()
    assert few.status_code == many.status_code == 200 and lines == same
    if not body.get("stream"):
        assert "content-length" in few.headers and many.headers["transfer-encoding"] == "chunked"


def test_prompt_logprobs_are_those_of_a_pipeline(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    (alone,) = pipe(PROMPT, max_new_tokens=1, prompt_logprobs=2)
    assert alone.prompt_logprobs is not None
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "n": 2}
    for count, more in ((2, {}), (1, {"echo": True, "logprobs": 2}), (0, {})):
        for choice in http.post(COMPLETIONS, json={**body, "prompt_logprobs": count, **more}).json()["choices"]:
            first, *rows = choice["prompt_logprobs"]
            assert first is None and len(rows) == len(alone.prompt_logprobs)
            for row, each in zip(rows, alone.prompt_logprobs, strict=True):
                assert row[str(each.token_id)]["logprob"] == each.logprob
                ranked = {entry["rank"]: int(token) for token, entry in row.items() if entry["rank"]}
                assert ranked == {rank: token for rank, (token, _) in enumerate(each.top[:count], 1)}
                assert (
                    row[str(each.token_id)]["decoded_token"]
                    == pipe.tokenizer.decode([*pipe.tokenizer.letter, each.token_id])[1:]
                )
    chat = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in http.post(COMPLETIONS, json=body).json()["choices"][0]
    answer = http.post(COMPLETIONS, json={**body, "prompt_logprobs": 1, "stream": True})
    assert refusal_of(answer) == ("prompt_logprobs", "prompt_logprobs need stream: false")


def test_prompts_are_truncated_to_their_last_tokens(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    ids = list(pipe.tokenizer.encode(LONG))
    body = {"temperature": 0, "max_tokens": 4, "echo": True}
    wanted = http.post(COMPLETIONS, json={**body, "prompt": ids[-50:]}).json()
    for prompt in (LONG, ids):
        answer = http.post(COMPLETIONS, json={**body, "prompt": prompt, "truncate_prompt_tokens": 50}).json()
        assert answer["choices"] == wanted["choices"] and answer["usage"]["prompt_tokens"] == 50
        answer = http.post(COMPLETIONS, json={**body, "prompt": prompt, "truncate_prompt_tokens": -1}).json()
        assert answer["usage"]["prompt_tokens"] == 2044
    chat = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1, "truncate_prompt_tokens": 30}
    assert http.post(CHAT, json=chat).json()["usage"]["prompt_tokens"] == 30
    short = http.post(COMPLETIONS, json={**body, "prompt": PROMPT, "truncate_prompt_tokens": 50}).json()
    assert short["choices"] == http.post(COMPLETIONS, json={**body, "prompt": PROMPT}).json()["choices"]
    for count, words in ((0, "must be at least 1, or -1"), (-2, "from -1")):
        param, message = refusal_of(http.post(CHAT, json=chat | {"truncate_prompt_tokens": count}))
        assert param == "truncate_prompt_tokens" and words in message
    answer = http.post(COMPLETIONS, json={"prompt": LONG, "truncate_prompt_tokens": 2048})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


# Messages ------------------------------------------------------------------------------------------------------------


def tokens_of(http: httpx.Client, *messages: dict[str, Any], **options: Any) -> list[int]:
    answer = http.post("/tokenize", json={"messages": messages, **options})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["tokens"])


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "yes", "refusal": None}, "yes"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "a\nb"),
        ({"content": "yes", "reasoning_content": "because"}, "yes"),
        ({"content": "yes", "reasoning": "because"}, "yes"),
        ({"content": "yes", "tool_calls": [], "function_call": None, "audio": None, "annotations": []}, "yes"),
        ({"content": [{"type": "text", "text": "yes", "cache_control": {"type": "ephemeral"}}]}, "yes"),
        ({"content": "yes", "cache_control": {"type": "ephemeral", "ttl": "5m"}}, "yes"),
    ],
)
def test_messages_of_an_assistant(http: httpx.Client, message: dict[str, Any], content: str) -> None:
    wanted = tokens_of(http, *MESSAGES, {"role": "assistant", "content": content}, *MESSAGES)
    assert tokens_of(http, *MESSAGES, {"role": "assistant", **message}, *MESSAGES) == wanted


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "user"}, "content", "is missing"),
        ({"role": "system", "content": None}, "content", "is missing"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "content[0].type", "must be text, not"),
        ({"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}, "content[0]", "must have a refusal"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "content[0]", "must have a text"),
        ({"role": "assistant", "content": "a", "refusal": "b"}, "refusal", "leave one out"),
        ({"role": "user", "content": "a", "reasoning_content": "b"}, "reasoning_content", "needs the role assistant"),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            },
            "content[0].cache_control",
            'as long as there is room; leave it out or send {"type": "ephemeral"}',
        ),
    ],
)
def test_messages_that_are_refused(http: httpx.Client, message: dict[str, Any], param: str, words: str) -> None:
    found, sentence = refusal_of(http.post(CHAT, json={"messages": [message]}))
    assert found == f"messages[0].{param}" and words in sentence


def test_reasoning_reaches_the_chat_template() -> None:
    body = {"messages": [{"role": "assistant", "content": "a", "reasoning": "b"}]}
    (message,) = plain_messages(decode(ChatRequest, json.dumps(body).encode()).messages)
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "b"}


def test_an_answer_continues_the_final_message(http: httpx.Client) -> None:
    """The halves of an answer, one after the other, are the answer."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    half = http.post(CHAT, json=body | {"max_tokens": 6}).json()["choices"][0]["message"]["content"]
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    messages = [*MESSAGES, {"role": "assistant", "content": half}]
    rest = http.post(CHAT, json={**body, "messages": messages, "max_tokens": 6, **continued}).json()
    assert half + rest["choices"][0]["message"]["content"] == whole
    assert rest["usage"]["prompt_tokens"] == len(tokens_of(http, *messages, **continued))
    param, message = refusal_of(http.post(CHAT, json=body | {**continued, "add_generation_prompt": True}))
    assert param == "continue_final_message" and "contradict" in message
    bare = http.post(CHAT, json=body | {"add_generation_prompt": False}).json()["usage"]["prompt_tokens"]
    assert bare == len(tokens_of(http, *MESSAGES, add_generation_prompt=False)) < len(tokens_of(http, *MESSAGES))


@pytest.mark.parametrize(
    ("path", "more"),
    [("/tokenize", {}), (COMPLETIONS, {"truncate_prompt_tokens": 9}), (CHAT, {"truncate_prompt_tokens": -1})],
)
def test_a_text_far_beyond_the_model_is_not_read(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, more: Any
) -> None:
    encoder, read = server.service._long.encoders[0], list[int]()
    tokenize = encoder._tokenize

    def counted(text: str, **keywords: Any) -> tuple[int, ...]:
        read.append(len(text))
        return tokenize(text, **keywords)

    monkeypatch.setattr(encoder, "_tokenize", counted)
    text = "a cat " * 300_000
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    error = http.post(path, json=prompt | more).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == ("messages" if path == CHAT else "prompt")
    assert error["message"] == "the text has more than 32768 tokens, 16 times the model's length: send less of it"
    assert sum(read) < len(text) / 4


def test_tokenize_takes_what_vllms_clients_send(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    plain = tokens_of(http, *MESSAGES)
    assert tokens_of(http, *MESSAGES, add_special_tokens=False) == plain
    assert tokens_of(http, *MESSAGES, add_special_tokens=True) == [pipe.tokenizer.bos_token_id, *plain]
    for body in ({"prompt": "Anna hält"}, {"messages": MESSAGES}):
        answer = http.post("/tokenize", json={**body, "return_token_strs": True}).json()
        assert answer["token_strs"] == [pipe.tokenizer.token(token) for token in answer["tokens"]]
        assert "token_strs" not in http.post("/tokenize", json=body).json()
    long = http.post("/tokenize", json={"prompt": LONG, "return_token_strs": True})
    assert long.headers["transfer-encoding"] == "chunked" and len(long.json()["tokens"]) > MANY_TOKENS
    assert long.json()["tokens"] == list(pipe.tokenizer.encode(LONG))
    assert long.json()["token_strs"] == [pipe.tokenizer.token(token) for token in long.json()["tokens"]]
    assert http.post("/tokenize", json={"prompt": "", "return_token_strs": True}).json()["token_strs"] == []
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["unk_token"]) == ("<|bos|>", "<|end|>", None)
    assert info["chat_template"] == pipe.tokenizer.chat_template


# Answers -------------------------------------------------------------------------------------------------------------


def test_usage_counts_the_tokens_of_a_stop_string(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    (free,) = pipe(PROMPT, max_new_tokens=30)
    stop = free.generated_text[20:29]
    (kept,) = pipe(PROMPT, max_new_tokens=30, stop=stop)
    lengths = [len(pipe.tokenizer.decode(free.token_ids[:count])) for count in range(30)]
    computed = next(count for count, length in enumerate(lengths) if length >= 29)
    assert kept.generated_length < computed
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": stop}
    usage = http.post(COMPLETIONS, json=body).json()["usage"]
    assert usage["completion_tokens"] == computed
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    assert events_of(http.post(COMPLETIONS, json=body))[-1]["usage"]["completion_tokens"] == computed


def test_usage_of_several_choices_and_cached_prompts(http: httpx.Client) -> None:
    body = {"prompt": [31] * 100, "n": 3, "max_tokens": 5, "ignore_eos": True, "temperature": 1}
    first, second = (http.post(COMPLETIONS, json=body).json()["usage"] for _ in range(2))
    assert (first["prompt_tokens"], first["completion_tokens"], first["total_tokens"]) == (100, 15, 115)
    assert (first["prompt_tokens_details"], second["prompt_tokens_details"]) == (
        {"cached_tokens": 0},
        {"cached_tokens": 96},
    )
    assert second["completion_tokens"] == 15


def test_a_stream_that_is_cut_logs_what_was_computed(server: RunningServer, http: httpx.Client) -> None:
    options = {"continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True, "stream_options": options}
    before = server.client.stats[0].num_generated_tokens
    with http.stream("POST", COMPLETIONS, json=body, headers={"x-request-id": "cut"}) as answer:
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line)
        seen = next(event["usage"]["completion_tokens"] for event in events if event["usage"]["completion_tokens"] > 9)
    record = server.wait_for_record(request_id="cut")
    server.assert_idle()
    computed = server.client.stats[0].num_generated_tokens - before
    assert record["status"] == 499 and seen <= record["generated_tokens"] <= computed < 1900


def test_the_fingerprint_is_in_every_answer(http: httpx.Client) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    found = set()
    for path, prompt in ((COMPLETIONS, {"prompt": PROMPT}), (CHAT, {"messages": MESSAGES})):
        body = {**prompt, "max_tokens": 2}
        found.add(http.post(path, json=body).json()["system_fingerprint"])
        found |= {event["system_fingerprint"] for event in events_of(http.post(path, json=body | stream))}
    assert len(found) == 1 and re.fullmatch("fp_[0-9a-f]{12}", found.pop())
