"""Requests generated from the OpenAPI document, valid and malformed: none makes the server fail, and the answers match
the document.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from generated_requests import for_generated
from running_server import RunningServer, running_server
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from splitfuse.config.server import ServerConfig

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
ENDLESS = ("/v1/splitfuse/trace", "/console/events")
"""Routes whose answers go on until the client leaves; test_trace_command.py and test_console.py read them."""
CONFORM = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def examined() -> Iterator[RunningServer]:
    """Small bounds, so that some requests are beyond them."""
    with running_server(ServerConfig(max_body_mib=0.1, max_prompts=4, max_queued_tokens=20_000)) as server:
        yield server


def test_120_generated_requests(examined: RunningServer) -> None:
    _call(examined, 120)


@pytest.mark.slow
def test_2000_generated_requests(examined: RunningServer) -> None:
    _call(examined, 2000)


def _call(server: RunningServer, num_calls: int) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    unit = num_calls / (2 * sum(SHARE.values()))  # two modes; of some there are few
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in ENDLESS:
            continue
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
    def call(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=TIMEOUT)
        case.validate_response(answer, checks=CHECKS.get_by_names(CONFORM))
        seen[case.operation.path, answer.status_code] += 1

    for_generated(operation, mode, most, call)
