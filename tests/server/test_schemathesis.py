"""Requests generated from the OpenAPI document, valid and malformed: none makes the server fail, and the answers match
the document.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from running_server import RunningServer, running_server
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from splitfuse.config import ServerConfig
from splitfuse.server.anthropic.conversation import OF_ROLE

TIMEOUT = 120.0  # seconds for one call
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
SHARE = {
    "/v1/completions": 4,
    "/v1/chat/completions": 4,
    "/v1/messages": 4,
    "/v1/messages/count_tokens": 1,
    "/v1/responses": 4,
    "/tokenize": 2,
    "/detokenize": 2,
    "/v1/models/{model}": 1,
}
"""Of all calls: the other routes take no parameters and are called a few times."""
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
CONFORM = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def examined() -> Iterator[RunningServer]:
    """Small bounds, so that some requests are beyond them."""
    with running_server(ServerConfig(max_body_mib=0.1, max_prompts=4, max_queued_tokens=20_000)) as server:
        yield server


def test_200_generated_requests(examined: RunningServer) -> None:
    _call(examined, 200)


@pytest.mark.slow
def test_2000_generated_requests(examined: RunningServer) -> None:
    _call(examined, 2000)


def _call(server: RunningServer, num_calls: int) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    unit = num_calls / (2 * sum(SHARE.values()))  # two modes; of some there are few
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if mode is GenerationMode.POSITIVE or "requestBody" in operation.definition.raw:  # else nothing is wrong
                most = round(unit * SHARE.get(operation.path, 0)) or 2
                _call_one(server, operation, mode, most, seen)
    server.assert_idle()
    print(f"{seen.total()} calls: {dict(sorted(seen.items()))}")
    assert seen.total() >= num_calls
    for path in GENERATING:
        assert seen[path, 200] and seen[path, 400], "neither good nor bad ones only"


def _call_one(
    server: RunningServer, operation: Any, mode: GenerationMode, most: int, seen: Counter[tuple[str, int]]
) -> None:
    settings = hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @settings
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        _be_brief(case.body, operation.path)
        if mode is GenerationMode.POSITIVE:
            _mind_roles(case.body)
        answer = case.call(base_url=server.url, timeout=TIMEOUT)
        case.validate_response(answer, checks=CHECKS.get_by_names(CONFORM))
        seen[case.operation.path, answer.status_code] += 1

    call()


def _be_brief(body: Any, path: str) -> None:
    """Valid requests may ask for more than is worth waiting for here."""
    if isinstance(body, dict):
        for name, most in (("n", 2), *((name, 6) for name in LENGTHS)):
            if type(body.get(name)) in (int, float):  # 3.0 is an integer in JSON
                body[name] = min(body[name], most)
        if path == "/v1/chat/completions" and body.get("max_tokens") is None:
            body.setdefault("max_completion_tokens", 6)
        if path == "/v1/responses" and body.get("max_output_tokens") is None:
            body["max_output_tokens"] = 6


OF_MODEL = ("tool_choice", "reasoning_effort", "verbosity", "reasoning_max_tokens", "thinking_token_budget")
"""Fields that need tools, or a model that thinks."""


def _mind_roles(body: Any) -> None:
    """What the document cannot say: a choice of tools needs tools, results of tools need calls, and what of messages
    depends on their roles.
    """
    if not isinstance(body, dict):
        return
    for name in OF_MODEL:
        body.pop(name, None)
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        for name in ("tool_call_id", "tool_calls", "refusal"):
            message.pop(name, None)
        if message["role"] == "tool":
            message["role"] = "user"
        role = message["role"]
        if role != "assistant":
            message["content"] = message.get("content") or "Hi"
            for name in ("reasoning", "reasoning_content"):
                message.pop(name, None)
        if role != "system":
            message.pop("clear_at", None)
        if "max_tokens" in body and isinstance(message.get("content"), list) and role in OF_ROLE:
            known = [block for block in message["content"] if block["type"] in OF_ROLE[role]]
            message["content"] = known or "Hi"
