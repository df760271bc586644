"""Random bodies on the routes of a server, 10,000 on each: none is answered with an error of the server.

    python -m tests.soak.random_bodies [--count N] [--generated N] [--seed N] [ROUTE ...]

Half of the bodies are generated from the OpenAPI document, valid and malformed in turn; the others, which cost a tenth
of the time, are good bodies in which one to four values are replaced, left out, wrapped, doubled or moved. The model is
the bundled one with tokens for thoughts. A status from 500 up, an answer that the document does not know, and anything
that the server writes to its log is a failure, also within a stream; it is printed with the body that caused it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import httpx
import schemathesis
from generated_requests import be_brief, for_generated
from safetensors.torch import load_file
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from server_process import ServerProcess, server_process
from thinking_model import thinking_model
from tiny_adapters import ATTENTION, module_shapes, save_adapter

from splitfuse.models.sources.hub import BUNDLED_MODEL

KEY = "an-administrators-key"
TIMEOUT = 600.0  # a machine may be busy
FLAGS = ("--max-body-mib", "0.1", "--max-prompts", "8", "--max-queued-tokens", "100000", "--step-timeout", "600")
CONFORM = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
UNLOAD = "/v1/unload_lora_adapter"
BATCH = 250  # generated cases of a seed

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "units": {"enum": ["c", "f"]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "weather", "description": "Tells the weather", "parameters": WEATHER, "strict": True},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]
TOOLS = [{"type": "function", "function": each} for each in FUNCTIONS]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Once"}, {"type": "text", "text": "upon"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny.", "reasoning": "So."},
    {"role": "user", "content": "And then?"},
]
HI = [{"role": "user", "content": "Hi"}]
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 3, "stop": ["."], "min_tokens": 1}
SLO = {"ttft": 1.0, "ttft_per_token": 0.01, "itl": 0.1, "itl_percentile": 99, "tpot": 0.05}
CLAUDE_TOOLS: list[dict[str, Any]] = [
    {"name": "weather", "description": "Tells the weather", "input_schema": WEATHER, "strict": True},
    {"name": "now", "input_schema": {"type": "object"}, "defer_loading": True},
]
CLAUDE_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Once", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
            {"type": "text", "text": "And then?"},
        ],
    },
]
ITEMS: list[dict[str, Any]] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You tell stories."}]},
    {"role": "user", "content": "Once"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is.", "annotations": []}]},
    {"role": "user", "content": "And then?"},
]
RESPONSES_TOOLS = [{"type": "function", **each} for each in FUNCTIONS]
QUESTIONS = {
    "kind": {"type": "choice", "instructions": "What is it?", "criteria": {"cat": "It purrs.", "dog": None}},
    "good": {"type": "score", "instructions": ["How", {"good": "is it?"}], "criteria": ["bad", "fair", "good"]},
    "red": {"type": "noul", "instructions": "Is it red?", "criteria": {"true": "red", "false": "not red"}},
}


def good_bodies(adapter: str) -> dict[str, list[dict[str, Any]]]:
    """Bodies to change, for each route. Not all are accepted."""
    schema = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    messages: list[dict[str, Any]] = [
        {"messages": HI, "max_tokens": 4},
        {
            "messages": CLAUDE_TALK,
            "max_tokens": 4,
            "system": [{"type": "text", "text": "Tell."}],
            "tools": CLAUDE_TOOLS,
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "me"},
        },
        {
            "messages": HI,
            "max_tokens": 6,
            "tools": CLAUDE_TOOLS[:1],
            "tool_choice": {"type": "tool", "name": "weather"},
        },
        {
            "messages": HI,
            "max_tokens": 4,
            "stop_sequences": ["."],
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.5,
            "thinking": {"type": "disabled"},
            "stream": True,
        },
        {
            "messages": HI,
            "max_tokens": 6,
            "stream": True,
            "thinking": {"type": "disabled"},
            "output_config": {"format": {"type": "json_schema", "schema": WEATHER}, "effort": "low"},
        },
    ]
    return {
        "/v1/responses": [
            {"input": "Once upon a time", "max_output_tokens": 4},
            {
                "input": ITEMS,
                "tools": RESPONSES_TOOLS,
                "tool_choice": "auto",
                "instructions": "Tell.",
                "parallel_tool_calls": False,
                "max_output_tokens": 4,
                "metadata": {"a": "b"},
                "store": True,
            },
            {
                "input": "Hi",
                "max_output_tokens": 6,
                "stream": True,
                "reasoning": {"effort": "none"},
                "text": {"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}},
            },
            {
                "input": "Hi",
                "tools": RESPONSES_TOOLS,
                "tool_choice": {"type": "function", "name": "weather"},
                "stream": True,
                "max_output_tokens": 5,
                "include": ["message.output_text.logprobs"],
            },
            {
                "input": ITEMS[1:2],
                "tools": RESPONSES_TOOLS,
                "reasoning": {"effort": "low", "summary": "auto"},
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "now"}],
                },
            },
            {"input": "Hi", "max_output_tokens": 3, "previous_response_id": "resp_1", "temperature": 0.5, "top_p": 1},
        ],
        "/v1/messages": messages,
        "/v1/messages/count_tokens": [
            {name: value for name, value in each.items() if name not in ("max_tokens", "stream", "metadata")}
            for each in messages
        ],
        "/v1/embeddings": [
            {"input": "Once upon a time"},
            {"input": ["Once", "upon"], "encoding_format": "base64", "dimensions": 8, "user": "me"},
            {"input": [1, 2, 3], "encoding_format": "float", "splitfuse_priority": "high"},
            {"input": [[1, 2], [3]], "splitfuse_deadline": 5, "model": "tales"},
        ],
        "/v1/rerank": [
            {"query": "a cat", "documents": ["a dog", "a cat"], "top_n": 1, "return_documents": True},
            {"query": "a cat", "documents": [{"text": "a dog"}, "a cat"], "splitfuse_method": "cosine"},
            {"query": "q", "documents": ["d"], "splitfuse_method": "yes_no", "splitfuse_instruction": "Judge."},
        ],
        "/v1/score": [
            {"text_1": "a cat", "text_2": ["a dog", "a cat"]},
            {"text_1": ["a cat", "b"], "text_2": ["a dog", "a cat"], "splitfuse_method": "cosine"},
            {"text_1": "a cat", "text_2": "a dog", "splitfuse_method": "yes_no", "splitfuse_instruction": "Judge."},
        ],
        "/v1/systemone": [
            {"state": "The cat is red.", "questions": QUESTIONS},
            {"state": {"cat": {"colour": ["red", 1, None]}}, "questions": {"red": QUESTIONS["red"]}, "model": None},
            {"state": ["a", {"b": 1}], "questions": {"kind": QUESTIONS["kind"]}, "splitfuse_deadline": 5},
        ],
        "/v1/load_lora_adapter": [
            {"lora_name": "tales", "lora_path": adapter, "load_inplace": True},
            {"lora_name": "more", "lora_path": adapter + "/.", "load_inplace": True},
            {"lora_name": "none", "lora_path": "/nowhere"},
        ],
        UNLOAD: [{"lora_name": "tales"}, {"lora_name": "more"}],
        "/v1/chat/completions": [
            {"messages": TALK, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, **SAMPLING},
            {
                "messages": HI,
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
                "stream": True,
                "stream_options": {"include_usage": True},
                "reasoning_effort": "none",
            },
            {
                "messages": HI,
                "tools": TOOLS,
                "n": 2,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "now"}}],
                    },
                },
            },
            {
                "messages": HI,
                "response_format": schema,
                "stream": True,
                "chat_template_kwargs": {"enable_thinking": False},
            },
            {"messages": HI, "response_format": {"type": "json_object"}, "reasoning_effort": "low", "logprobs": True},
            {"messages": HI, "structured_outputs": {"regex": "[a-z]{1,9}"}, "reasoning_max_tokens": 2, "stream": True},
            {"messages": HI, "guided_choice": ["yes", "no"], "thinking_token_budget": 3, "stream": True},
            {"messages": HI, "structured_outputs": {"grammar": 'start: "a" "b"*'}, "reasoning_effort": "none"},
            {"messages": [*HI, {"role": "assistant", "content": "<think>Hm"}], "continue_final_message": True},
            {"messages": HI, "logprobs": True, "top_logprobs": 2, "logit_bias": {"7": 2}, "store": True, **SAMPLING},
        ],
        "/v1/completions": [
            {"prompt": ["Once", "upon"], "max_tokens": 4, "n": 2, "logprobs": 2, "echo": True, **SAMPLING},
            {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True, "guided_json": WEATHER, "return_token_ids": True},
            {"prompt": "Once", "max_tokens": 4, "structured_outputs": {"json": WEATHER}, "prompt_logprobs": 1},
            {"prompt": "Once", "max_tokens": 4, "splitfuse_slo": SLO, "splitfuse_timing": True},
        ],
    }


# Changes -------------------------------------------------------------------------------------------------------------


def odd_value(random: Random) -> Any:
    """A value that something may stumble over."""
    texts = ["", " ", "\0", "\ud800", "é", "😀", "<think>", "</think>", "<|user|>", "<|end|>", '{"a": }']
    texts += [
        "$ref",
        "none",
        "auto",
        "required",
        "text",
        "function",
        "json_schema",
        "user",
        "tool",
        "1e5",
        "../x",
        "%s",
    ]
    numbers = [0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**64), 10**400, 0.0, -0.5, 1e300, 1.0, float("inf"), float("nan")]
    nested: Any = None
    for _ in range(random.choice((1, 40, 200))):
        nested = [nested] if random.random() < 0.5 else {"properties": nested}
    schemas: list[Any] = [
        {"type": "string", "pattern": "(a+)+$"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "array", "items": {}, "minItems": 10**9},
        {"allOf": [{"minLength": n} for n in range(50)]},
        {"enum": ["<|user|>", "x</think>y", None, 1.5, {"a": [1]}]},
        {"not": {}},
        {"type": ["object", 3]},
    ]
    return random.choice(
        [random.choice(texts), random.choice(numbers), random.choice(schemas), True, False, None, [], {}, nested]
    )


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a body, with each of its keys."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(body: dict[str, Any], others: list[dict[str, Any]], random: Random) -> dict[str, Any]:
    """A copy of a body with a few changes."""
    body = deepcopy(body)
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        found = list(places(body))
        if not found:
            break
        container, key = random.choice(found)
        match random.randrange(8):
            case 0:
                del container[key]
            case 1 | 2:
                container[key] = odd_value(random)
            case 3:
                container[key] = random.choice(([container[key]], {"type": container[key]}))
            case 4:
                other, name = random.choice(list(places(random.choice(others))))
                container[key] = deepcopy(other[name])
            case 5 if isinstance(container, list):
                container[key:key] = [deepcopy(container[key])] * random.choice((1, 2, 100))
            case 5 | 6 if isinstance(container, dict):
                container[random.choice((f"{key}s", "a]b", "", "type", "x" * 300, "type\ud800"))] = odd_value(random)
            case _ if isinstance(container[key], str):
                text = container[key]
                container[key] = text[: random.randrange(len(text) + 1)] + str(odd_value(random))[:100]
    return body


# Calls ---------------------------------------------------------------------------------------------------------------


class Soak:
    """Calls the routes of one server, and counts the statuses of each."""

    def __init__(self, server: ServerProcess, url: str) -> None:
        self.server = server
        headers = {"authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False, headers=headers)
        document = self.http.get("/openapi.json").json()
        operations = (each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations())
        self.operations = {operation.path: operation for operation in operations if operation.method == "post"}
        self.seen: Counter[tuple[str, int]] = Counter()
        self.num_failures = 0
        self.logged = len(server.said)

    def generated(self, path: str, count: int, seed: int) -> None:
        """Call with cases of the document; there may be fewer of a small schema."""

        def call(case: Any) -> None:
            began = time.monotonic()
            answer = case.call(base_url=str(self.http.base_url), timeout=TIMEOUT, headers=dict(self.http.headers))
            error = ""
            try:
                case.validate_response(answer, checks=CHECKS.get_by_names(CONFORM))
            except BaseExceptionGroup as failures:
                error = str(failures.exceptions)
            self._note(path, answer.status_code, case.body, error, began)

        modes = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
        for number in range(count // BATCH):
            for_generated(self.operations[path], modes[number % 2], BATCH, call, seed=seed + number)

    def changed(self, path: str, count: int, seed: int, bodies: dict[str, list[dict[str, Any]]]) -> None:
        """Call with changes of good bodies."""
        everything = [body for each in bodies.values() for body in each]
        for number in range(count):
            random = Random(f"{path} {seed + number}")
            body = changed(random.choice(bodies[path]), everything, random)
            be_brief(body, path)
            if path == UNLOAD and number % 4 == 0:  # or there is soon none left
                self.http.post("/v1/load_lora_adapter", json=bodies["/v1/load_lora_adapter"][0])
            began = time.monotonic()
            answer = self.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            error = "no words" if answer.status_code != 200 and "message" not in answer.text else ""
            self._note(path, answer.status_code, body, error, began)

    def _note(self, path: str, status: int, body: Any, error: str, began: float) -> None:
        """Count a call; print it if it is a failure."""
        self.seen[path, status] += 1
        took = time.monotonic() - began
        said = self.server.said[self.logged :] if self.server.log.stat().st_size > self.logged else ""
        self.logged = self.server.log.stat().st_size
        if said or error or status >= 500:
            self.num_failures += 1
            print(f"FAILURE {path} {status}: {error[-3000:]}{said[-3000:]}\n  {json.dumps(body)[:3000]}", flush=True)
        elif took > 5:
            print(f"slow: {path} {status}: {took:.1f} s\n  {json.dumps(body)[:1000]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="bodies for each route")
    parser.add_argument("--generated", type=int, help="of these, from the document; left out: half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("routes", nargs="*", help="left out: all that take a body")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # for names that look like those of the Hub
    with tempfile.TemporaryDirectory(prefix="bodies-") as temporary:
        folder = Path(temporary)
        shapes = module_shapes(load_file(BUNDLED_MODEL / "model.safetensors"), ATTENTION)
        adapter = str(save_adapter(folder / "adapter", shapes))
        keys = folder / "keys"
        keys.write_text(f"{KEY} name=root admin=yes\n")
        keys.chmod(0o600)
        (folder / "model").mkdir()
        flags = ("--model", thinking_model(folder / "model"), "--lora", f"tales={adapter}", "--api-key-file", str(keys))
        bodies = good_bodies(adapter)
        with server_process(folder, f"soak-{folder.name}", *flags, *FLAGS) as server:
            server.wait_for("splitfuse serves ")
            url = server.said.partition(" on ")[2].split()[0]
            soak = Soak(server, url)
            for path in arguments.routes or bodies:
                began = time.monotonic()
                generated = arguments.count // 2 if arguments.generated is None else arguments.generated
                soak.generated(path, generated, arguments.seed)
                done = sum(count for (each, _), count in soak.seen.items() if each == path)
                soak.changed(path, arguments.count - done, arguments.seed, bodies)
                statuses = {status: count for (each, status), count in sorted(soak.seen.items()) if each == path}
                print(
                    f"{path}: {sum(statuses.values())} bodies, {statuses}; {time.monotonic() - began:.0f} s", flush=True
                )
    print(f"{soak.seen.total()} bodies, {soak.num_failures} failures")
    sys.exit(soak.num_failures > 0)


if __name__ == "__main__":
    main()
