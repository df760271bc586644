"""What clients of OpenAI's and vLLM's APIs send and look for, beyond what these APIs need."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_server import RunningServer, running_server

from splitfuse.config import ServerConfig
from splitfuse.core.limits import EngineLimits
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError, OverloadedError
from splitfuse.server.admission import Admission
from splitfuse.server.errors import answer_to
from splitfuse.server.openai.endpoints import ABSENT

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
        answer = http.get("/v1/models", headers={"x-api-key": "k1", "authorization": "Bearer k2"})
        assert answer.status_code == 401 and "different API keys" in answer.json()["error"]["message"]


def test_keys_that_differ_matter_only_where_one_is_required(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"x-api-key": "a", "authorization": "Bearer b"}).status_code == 200
