"""Bodies of requests, and that the OpenAPI document describes requests and answers truly."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from running_server import RunningServer

from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import (
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    MemoryPlanError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
)
from splitfuse.server.app import ROUTES
from splitfuse.server.errors import RefusedError, answer_to, without_secrets
from splitfuse.server.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from splitfuse.server.openai.protocol import ChatRequest, CompletionRequest, plain_messages
from splitfuse.server.validation import Body, decode

MESSAGES = [{"role": "user", "content": "Hi"}]


def completion(**body: Any) -> CompletionRequest:
    return decode(CompletionRequest, json.dumps({"prompt": "a", **body}).encode())


def chat(**body: Any) -> ChatRequest:
    return decode(ChatRequest, json.dumps({"messages": MESSAGES, **body}).encode())


def test_left_out_and_null_parameters_have_openais_defaults() -> None:
    nulls = {name: None for name in CompletionRequest.__struct_fields__ if name != "prompt"}
    for request in (completion(), completion(**nulls)):
        assert request.params() == SamplingParams(temperature=1.0)
    nulls = {name: None for name in ChatRequest.__struct_fields__ if name != "messages"}
    for chat_request in (chat(), chat(**nulls)):
        assert chat_request.params() == SamplingParams(temperature=1.0)


def test_every_parameter_arrives() -> None:
    given: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.1,
        "n": 3,
        "seed": 2**64 - 1,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    }
    lists = {"stop": ["x", "y"], "stop_token_ids": [1, 2]}
    bias = {"logit_bias": {"5": -1, "6": 2.5}}
    wanted = SamplingParams(**given, stop=("x", "y"), stop_token_ids=(1, 2), logit_bias={5: -1.0, 6: 2.5}, logprobs=4)
    assert completion(**given, **lists, **bias, logprobs=4).params() == wanted
    assert chat(**given, **lists, **bias, logprobs=True, top_logprobs=4).params() == wanted
    del given["max_tokens"]
    assert chat(**given, **lists, **bias, logprobs=True, top_logprobs=4, max_completion_tokens=9).params() == wanted
    assert completion(top_k=-1, stop="x").params() == SamplingParams(temperature=1.0, stop=("x",))
    assert completion(echo=True, logprobs=2).params().prompt_logprobs == 2
    assert completion(echo=True).params().prompt_logprobs is None
    assert completion(max_tokens=0).params().max_tokens == 1
    assert chat(logprobs=True).params().logprobs == 0


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_unsupported_parameters_are_refused_unless_neutral(kind: type[Body]) -> None:
    make: Any = completion if kind is CompletionRequest else chat
    for name, values in kind.NEUTRAL.items():
        for value in values:
            make(**{name: value})
        for value in (7, "something", {"a": 1}, [1]):
            with pytest.raises(RefusedError) as refusal:
                make(**{name: value})
            assert (refusal.value.status, refusal.value.parameter) == (400, name)
    with pytest.raises(RefusedError, match="unknown parameter 'surprise'") as refusal:
        make(surprise=1)
    assert refusal.value.parameter == "surprise"


def test_true_is_not_1() -> None:
    with pytest.raises(RefusedError):
        completion(best_of=True)
    with pytest.raises(RefusedError):
        chat(store=0)


def test_best_of_n_is_neutral() -> None:
    assert completion(n=3, best_of=3).params().n == 3
    with pytest.raises(RefusedError, match=r'suffix "x" is not supported: leave it out or send ""$'):
        completion(n=3, best_of=3, suffix="x")
    for n in (None, 2):
        with pytest.raises(RefusedError, match="best_of 3 is not supported"):
            completion(n=n, best_of=3)


def test_whole_numbers_may_have_a_decimal_point() -> None:
    request = completion(n=3.0, seed=7.0, prompt=[[1.0, 2], [3]], logit_bias={"4": 1.5}, max_tokens=16)
    assert (request.n, request.seed, request.prompt, request.logit_bias) == (3, 7, [[1, 2], [3]], {4: 1.5})
    with pytest.raises(RefusedError, match=r"n must be a whole number or null, not 3\.5"):
        completion(n=3.5, seed=7.0)


@pytest.mark.parametrize(
    ("make", "body", "message"),
    [
        (completion, {"temperature": "x"}, "temperature must be a number or null, not a string"),
        (completion, {"max_tokens": -1}, "max_tokens must be a whole number from 0 to 2147483647, not -1"),
        (completion, {"splitfuse_priority": "urgent"}, "splitfuse_priority must be high, low or normal, not 'urgent'"),
        (completion, {"logit_bias": {"x": 1}}, "logit_bias must have whole numbers as keys, not 'x'"),
        (
            completion,
            {"logit_bias": {"x": 1} | dict.fromkeys(map(str, range(1024)), 1)},
            "at most 1024 entries, not 1025",
        ),
        (completion, {"stop": [1] * 65}, "stop must have at most 64 items, not 65"),
        (completion, {"temperature": 1e300}, "temperature must be a number from 0 to 100, not 1e+300"),
        (completion, {"prompt": {}}, "prompt must be a string or an array, not an object"),
        (completion, {"tempature": 1}, "unknown parameter 'tempature'; did you mean 'temperature'?"),
        (completion, {"messages": []}, "'messages'; it is one of /v1/chat/completions, and this is /v1/completions"),
        (chat, {"prompt": "a"}, "'prompt'; it is one of /v1/completions, and this is /v1/chat/completions"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url is not supported: messages are text",
        ),
    ],
)
def test_mismatches_are_described_in_json_terms(
    make: Callable[..., object], body: dict[str, object], message: str
) -> None:
    with pytest.raises(RefusedError, match=re.escape(message)):
        make(**body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty: send a JSON object"),
        (b" \n", "the body is empty: send a JSON object"),
        (b"{", "the body is not valid JSON: "),
    ],
)
def test_a_body_without_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as refused:
        decode(CompletionRequest, body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_messages_of_other_roles_are_refused() -> None:
    request = chat(messages=[{"role": "function", "content": "x"}])
    with pytest.raises(InvalidRequestError, match=r"\[0\].role must be system, .*, assistant or tool, not"):
        plain_messages(request.messages)


def test_a_developer_message_becomes_a_system_message() -> None:
    request = chat(messages=[{"role": "developer", "content": "Be kind."}, *MESSAGES])
    assert plain_messages(request.messages) == [{"role": "system", "content": "Be kind."}, *MESSAGES]


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequestError("x", parameter="n"), 400, "invalid_request_error", "invalid_value", "n"),
        (
            PromptTooLongError("x", parameter="prompt"),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "prompt",
        ),
        (RefusedError(415, "x", code="no_json"), 415, "invalid_request_error", "no_json", None),
        (OverloadedError("x", retry_after=2.2), 429, "rate_limit_error", "rate_limit_exceeded", None),
        (EngineUnavailableError("x"), 503, "server_error", "engine_unavailable", None),
        (DrainingError("x"), 503, "server_error", "draining", None),
        (RequestFailedError("x"), 500, "server_error", "request_failed", None),
        (MemoryPlanError("x"), 500, "server_error", "internal_error", None),
        (ZeroDivisionError("x"), 500, "server_error", "internal_error", None),
    ],
)
def test_errors_become_answers(error: Exception, status: int, kind: str, code: str, param: str | None) -> None:
    answer = answer_to(error)
    assert (answer.status, answer.type, answer.code, answer.parameter) == (status, kind, code, param)
    assert answer.is_bug == (code == "internal_error")
    assert (answer.message == "x") != answer.is_bug
    assert answer.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)


def test_secrets_are_removed_from_messages() -> None:
    hidden = without_secrets(
        "OSError('/home/me/model.safetensors') at <Engine object at 0x7f1234abcd> of 192.168.1.7:5555, "
        "see lib/python3/x.py\n  File '/x'"
    )
    for secret in ("home", "model.safetensors", "0x7f", "192", "5555", "python3", "File"):
        assert secret not in hidden
    plain = "the logits of token 3 and/or 4 have NaN: 12.5 of 100"
    assert without_secrets(plain) == plain


# OpenAPI -------------------------------------------------------------------------------------------------------------


def routes_of(openapi: Any) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, item in openapi["paths"].items() for method in item}


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_the_document_has_every_route_and_schema(server: RunningServer) -> None:
    with server.http() as http:
        openapi = http.get("/openapi.json").json()
    assert routes_of(openapi) == {(route.method, route.template) for route in ROUTES}
    names = {reference.removeprefix("#/components/schemas/") for reference in references(openapi)}
    schemas = openapi["components"]["schemas"]
    assert names <= schemas.keys() and not [name for name in schemas if "." in name], "two types have one name"
    assert "200" not in openapi["paths"]["/v1/responses/{response_id}/cancel"]["post"]["responses"]
    properties = openapi["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties.keys() == set(ChatRequest.__struct_fields__)
    assert properties["functions"]["enum"] == [None, []]
    assert properties["model"]["enum"] == ["storyteller", None]


@pytest.mark.parametrize("kind", ["CompletionRequest", "ChatRequest"])
def test_documented_bounds_hold(server: RunningServer, kind: str) -> None:
    """Just within a documented bound is taken, just beyond it is refused by name."""
    path = "/v1/completions" if kind == "CompletionRequest" else "/v1/chat/completions"
    base: dict[str, Any] = {"prompt": "a"} if kind == "CompletionRequest" else {"messages": MESSAGES}
    base["max_tokens"] = 1
    num_bounds = 0
    with server.http() as http:
        schema = http.get("/openapi.json").json()["components"]["schemas"][kind]["properties"]
        needs = {"logprobs": {"logprobs": True}} if kind == "ChatRequest" else {}
        not_here = ("min_tokens", "max_completion_tokens", "reasoning_max_tokens", "thinking_token_budget")
        for name, described in schema.items():
            for choice in described.get("anyOf", []):
                if choice.get("type") not in ("integer", "number") or name in not_here:
                    continue
                step = 1 if choice["type"] == "integer" else 1e-6
                extra = {**base, **(needs["logprobs"] if name == "top_logprobs" else {})}
                for word, sign in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", -1)):
                    if word not in choice or (name, word) == ("max_tokens", "maximum"):
                        continue
                    num_bounds += 1
                    bound = choice[word]
                    within = bound + step if word == "exclusiveMinimum" else bound
                    beyond = bound if word == "exclusiveMinimum" else bound + sign * step
                    if name != "n" or word == "minimum":
                        answer = http.post(
                            path,
                            json={**extra, name: within, "splitfuse_deadline": 60}
                            | ({name: within} if name != "splitfuse_deadline" else {name: max(within, 60)}),
                        )
                        assert answer.status_code == 200, (name, within, answer.text)
                    answer = http.post(path, json={**extra, name: beyond})
                    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), (name, beyond)
    assert num_bounds > 15


def test_answers_match_the_types_in_the_document(server: RunningServer) -> None:
    def strict(kind: Any, data: bytes) -> None:
        """Decodes, and nothing is there that the type does not have."""
        assert msgspec.to_builtins(msgspec.json.decode(data, type=kind)) == json.loads(data)

    more = {"max_tokens": 3, "n": 2, "splitfuse_timing": True}
    events = {"stream": True, "stream_options": {"include_usage": True}}
    with server.http() as http:
        for path, body, whole, event in (
            ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True}, Completion, Completion),
            (
                "/v1/chat/completions",
                {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
                ChatCompletion,
                ChatCompletionChunk,
            ),
        ):
            strict(whole, http.post(path, json={**body, **more}).content)
            lines = http.post(path, json={**body, **more, **events}).content.split(b"\n\n")
            assert lines[-2:] == [b"data: [DONE]", b""]
            for line in lines[:-2]:
                strict(event, line.removeprefix(b"data: "))


def test_the_document_exists_before_the_engine_is_ready(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ready(_: Any) -> Any:
        raise EngineUnavailableError("the engine is not ready yet")

    monkeypatch.setattr(type(server.client), "info", property(not_ready))
    with server.http() as http:
        answer: httpx.Response = http.get("/openapi.json")
        assert answer.status_code == 200
        assert "enum" not in answer.json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]
        assert http.get("/v1/models").status_code == 503
