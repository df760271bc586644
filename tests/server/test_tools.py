"""Tools in chats: how requests tell of them, and what is refused."""

import json
from typing import Any

import pytest
from running_server import RunningServer

from splitfuse.models.sources.hub import open_model
from splitfuse.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "How is the weather in Paris?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def call(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(call_id: str = "call_1", content: Any = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def prompt_of(server: RunningServer, **body: Any) -> str:
    with server.http() as http:
        answer = http.post("/tokenize", json={"messages": [USER], **body})
        assert answer.status_code == 200, answer.text
        return Tokenizer.from_source(open_model(None)).decode(answer.json()["tokens"], skip_special_tokens=False)


def test_the_bundled_template_writes_tools_calls_and_results(server: RunningServer) -> None:
    turns = [USER, assistant(call("weather", '{"city":"Paris"}')), result(), {"role": "user", "content": "And now?"}]
    assert prompt_of(server, messages=turns, tools=[NOW]) == (
        "<|bos|><|system|>You may call these tools:\n<tools>\n"
        '{"type": "function", "function": {"name": "now"}}\n</tools>\nA call is written so:\n<tool_call>\n'
        '{"name": <name>, "arguments": <object>}\n</tool_call><|end|><|user|>How is the weather in Paris?<|end|>'
        '<|assistant|><tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|end|>'
        "<|user|><tool_response>\nsunny\n</tool_response><|end|><|user|>And now?<|end|><|assistant|>"
    )


def test_tools_not_to_be_called_are_not_told_of(server: RunningServer) -> None:
    with server.http() as http:
        body = {"messages": [USER], "max_tokens": 1}
        lengths = [
            http.post(CHAT, json={**body, **more}).json()["usage"]["prompt_tokens"]
            for more in (
                {},
                {"tools": [WEATHER, NOW], "tool_choice": "none"},
                {"tools": [NOW]},
                {"tools": [WEATHER, NOW], "tool_choice": allowed("auto", "now")},
                {"tools": [WEATHER, NOW]},
            )
        ]
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3] < lengths[4]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, *messages]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (function(name="get weather"), "tools[0].function.name", "must match"),
        (function(name="x" * 129), "tools[0].function.name", "must match"),
        (
            function(parameters={"type": ["object", None]}),
            "tools[0].function.parameters",
            'of an object, with "type": "object", not ["object", null]',
        ),
        (function(parameters={"properties": []}), "tools[0].function.parameters", "properties that are an object"),
        (function(parameters="{}"), "tools[0].function.parameters", "must be an object or null, not a string"),
        (function(params={}), "tools[0].function.params", "unknown parameter"),
        ({"tools": "weather"}, "tools", "must be an array or null"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type", "must be function, not 'web'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].custom", "only functions are called"),
        ({"tools": [NOW, WEATHER, NOW]}, "tools", "has 2 tools named 'now'"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "must be none, auto, required or an object, not 'any'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": NOW}, "tool_choice", "names 'now', which is none of the tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        ({"tools": [NOW], "tool_choice": {"type": "now"}}, "tool_choice.type", "must be function or allowed_tools"),
        ({"tools": [NOW], "tool_choice": allowed("auto", "nov")}, "tool_choice", "did you mean 'now'?"),
        ({"tools": [NOW], "tool_choice": allowed("any", "now")}, "tool_choice.allowed_tools.mode", "auto or required"),
        (turns(result()), "messages[1].tool_call_id", "is the id of no call"),
        (turns(assistant(call("f", "{}", "a_1")), result("a_2")), "messages[2].tool_call_id", "mean 'a_1'?"),
        (turns({"role": "tool", "content": "x"}), "messages[1].tool_call_id", "is missing"),
        (turns({**USER, "tool_call_id": "a"}), "messages[1].tool_call_id", "needs the role tool, not user"),
        (turns({**USER, "tool_calls": [call("f", "{}")]}), "messages[1].tool_calls", "needs the role assistant"),
        (turns(assistant(call("f", "{}"), call("f", "{}"))), "messages[1].tool_calls[1].id", "an id of its own"),
        (
            turns({"role": "assistant", "reasoning": "a", "reasoning_content": "b"}),
            "messages[1].reasoning_content",
            "b and reasoning a are two names of one thing",
        ),
        (
            {**turns({**assistant(call("f", "{}")), "content": "hey"}), "continue_final_message": True},
            "continue_final_message",
            "cannot continue a message with tool_calls",
        ),
        (turns(assistant({**call("f", "{}"), "type": "x"})), "messages[1].tool_calls[0].type", "must be function"),
        (
            turns(assistant(call("f", "")), result(content=[{"type": "image_url", "image_url": {}}])),
            "messages[2].content[0].image_url",
            "messages are text",
        ),
    ],
)
def test_what_is_refused_names_its_place(server: RunningServer, body: dict[str, Any], param: str, words: str) -> None:
    with server.http() as http:
        answer = http.post(CHAT, json={"messages": [USER], "max_tokens": 1, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error


@pytest.mark.parametrize("arguments", ['{"a": ', '{"a": }}', "[1]", "3", "text", '{"a": NaN}', "[" * 9999])
def test_arguments_that_are_no_object_go_back_as_text(server: RunningServer, arguments: str) -> None:
    prompt = prompt_of(server, messages=[USER, assistant(call("now", arguments)), result()])
    assert f'"arguments": {json.dumps({"INVALID_JSON": arguments})}' in prompt


def test_an_id_may_come_again_after_its_result(server: RunningServer) -> None:
    prompt = prompt_of(server, messages=[USER, *(assistant(call("now", "{}")), result()) * 2])
    assert prompt.count('"name": "now"') == 2


def test_arguments_left_empty_are_none_and_results_may_be_parts(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "it is"}, {"type": "text", "text": "noon"}]
    prompt = prompt_of(server, messages=[USER, assistant(call("now", "")), result(content=parts)])
    assert '{"name": "now", "arguments": {}}' in prompt and "it is\nnoon" in prompt
