"""Anthropic's Messages API: conversations, whole and streamed answers, errors, what Claude Code sends."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.config.server import ServerConfig
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.models.sources.hub import open_model
from splitfuse.server.anthropic.answers import MessagesAnswer, MessagesResponder
from splitfuse.server.anthropic.dialect import named_event
from splitfuse.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from splitfuse.server.context import TokenCounts
from splitfuse.server.validation import decode
from splitfuse.text.chat_formats.formats import format_of
from splitfuse.text.chat_formats.message import Tool
from splitfuse.text.chat_formats.parser import MessageSource
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.tokenizer import Tokenizer

PATH = "/v1/messages"
GOOSE = "Erik plays the cello. Anna keeps a goose.\n\nWho keeps a goose?"
BODY: dict[str, Any] = {
    "model": "storyteller",
    "max_tokens": 30,
    "temperature": 0,
    "messages": [{"role": "user", "content": GOOSE}],
}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tell the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(each) if isinstance(each, str) else each for each in blocks]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {**user(*blocks), "role": "assistant"}


def system(*blocks: Any, **fields: Any) -> dict[str, Any]:
    return {**user(*blocks), "role": "system", **fields}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http(headers={"anthropic-version": "2023-06-01", "x-api-key": "none"}) as client:
        yield client


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named by its type."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parsed(answer.text)


def parsed(stream: str) -> list[dict[str, Any]]:
    events = []
    for event in stream.split("\n\n")[:-1]:
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events of a stream, whose order is checked."""
    first, *others, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    is_open = False
    inputs = ""
    for event in others:
        index, kind = event["index"], event["type"]
        assert index == len(message["content"]) - is_open and is_open == (kind != "content_block_start")
        if kind == "content_block_start":
            message["content"].append(event["content_block"])
            is_open, inputs = True, ""
        elif kind == "content_block_delta":
            block, change = message["content"][-1], event["delta"]
            match change.pop("type"):
                case "input_json_delta":
                    inputs += change["partial_json"]
                case _:
                    ((name, more),) = change.items()
                    block[name] += more
        else:
            is_open = False
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads(inputs) if inputs.endswith("}") else {}
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}


# Answers -------------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_pipelines_whole_and_streamed(http: httpx.Client, pipe: splitfuse.Pipeline) -> None:
    (alone,) = pipe([BODY["messages"]], chat=True, max_new_tokens=30)
    whole = http.post(PATH, json=BODY)
    assert whole.status_code == 200 and whole.headers["request-id"] == whole.headers["x-request-id"]
    answer = whole.json()
    assert answer["id"].startswith("msg_") and (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["content"] == [{"type": "text", "text": alone.generated_text}]
    assert (answer["model"], answer["stop_reason"], answer["stop_sequence"]) == ("storyteller", "end_turn", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == alone.prompt_length
    assert usage["output_tokens"] == alone.generated_length
    events = events_of(http.post(PATH, json={**BODY, "stream": True}))
    assert events[0]["message"]["usage"]["input_tokens"] == usage["input_tokens"]
    assert joined(events) == {**answer, "id": events[0]["message"]["id"]}
    counted = http.post(f"{PATH}/count_tokens", json={"model": "storyteller", "messages": BODY["messages"]})
    assert counted.json() == {"input_tokens": alone.prompt_length}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "reason", "sequence", "words"),
    [
        ({"max_tokens": 2}, "max_tokens", None, "Anna keeps"),
        ({"max_tokens": 0}, "max_tokens", None, None),
        ({"stop_sequences": ["dog", " goose"]}, "stop_sequence", " goose", "Anna keeps a"),
        ({"max_tokens": 10**9}, "end_turn", None, "Anna keeps a goose."),
        ({"top_k": 1, "temperature": 1, "top_p": 0.5}, "end_turn", None, "Anna keeps a goose."),
    ],
)
def test_a_stop_reason_says_why(
    http: httpx.Client, more: dict[str, Any], reason: str, sequence: str | None, words: str | None, stream: bool
) -> None:
    got = http.post(PATH, json={**BODY, **more, "stream": stream})
    answer = joined(events_of(got)) if stream else got.json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"] == ([] if words is None else [{"type": "text", "text": words}])


def test_an_answer_that_fills_the_context_says_so(http: httpx.Client) -> None:
    rambles = {**BODY, "max_tokens": 10**6, "system": "x " * 990}
    rambles["output_config"] = {"format": {"type": "json_schema", "schema": {"type": "string", "minLength": 9999}}}
    answer = http.post(PATH, json=rambles).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"
    too_long = http.post(PATH, json={**BODY, "system": "x " * 3000})
    assert too_long.status_code == 400 and "the prompt is too long" in too_long.json()["error"]["message"]


def test_a_conversation_goes_on_and_finds_its_prefix(http: httpx.Client) -> None:
    story = {**BODY, "system": "A story. " * 30}
    first = http.post(PATH, json=story).json()
    turns = [*story["messages"], {"role": "assistant", "content": first["content"]}, user("Who plays the cello?")]
    usage = http.post(PATH, json={**story, "messages": turns}).json()["usage"]
    assert usage["cache_read_input_tokens"] >= 64 and usage["cache_creation_input_tokens"] == 0


def test_an_assistants_last_turn_is_continued(http: httpx.Client) -> None:
    turns = [*BODY["messages"], {"role": "assistant", "content": "Anna keeps"}]
    assert http.post(PATH, json={**BODY, "messages": turns}).json()["content"] == [
        {"type": "text", "text": " a goose."}
    ]


def test_an_answer_keeps_to_a_form(http: httpx.Client) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"who": {"enum": ["Anna", "Erik"]}}}}
    form["schema"] |= {"required": ["who"], "additionalProperties": False}  # type: ignore[operator]
    for more in {"output_config": {"format": form}}, {"output_format": form}:
        (block,) = http.post(PATH, json={**BODY, **more}).json()["content"]
        assert json.loads(block["text"])["who"] in ("Anna", "Erik")


@pytest.mark.parametrize(
    ("choice", "stream"), [({"type": "tool", "name": "ask"}, False), ({"type": "any"}, True)], ids=["tool", "any"]
)
def test_a_required_call_is_made_and_answered(http: httpx.Client, choice: dict[str, Any], stream: bool) -> None:
    schema = {"type": "object", "properties": {"who": {"enum": ["Anna", "Erik"]}}, "required": ["who"]}
    ask = {"name": "ask", "input_schema": {**schema, "additionalProperties": False}}
    parallel = {"disable_parallel_tool_use": True}
    body = {**BODY, "max_tokens": 500, "tools": [ask], "tool_choice": choice | parallel, "stream": stream}
    got = http.post(PATH, json=body)
    answer = joined(events_of(got)) if stream else got.json()
    (call,) = answer["content"]
    assert (answer["stop_reason"], call["name"]) == ("tool_use", "ask")
    assert call["input"]["who"] in ("Anna", "Erik")
    turns = [*BODY["messages"], {"role": "assistant", "content": [call]}, user({**RESULT, "tool_use_id": call["id"]})]
    assert http.post(PATH, json={**BODY, "max_tokens": 2, "tools": [ask], "messages": turns}).status_code == 200


# The parts of answers ------------------------------------------------------------------------------------------------

THINKS = "<think>\nParis.\n</think>\n\nI look.\n"
CALLS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\"ris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_source(open_model(None))


def answered(
    tokenizer: Tokenizer, words: str, reason: FinishReason, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer that a text is, whole and streamed by the token."""
    request = decode(MessagesRequest, json.dumps({**BODY, **more}).encode())
    thinker = replace(format_of(tokenizer.chat_template, {}), reasoning=("<think>", "</think>"))
    source = MessageSource(thinker, (Tool(name="weather"),))
    prepared = PreparedRequest((1,), SamplingParams(max_tokens=request.max_tokens), continues=False, message=source)
    counts = TokenCounts(7, 5, 4, 2)
    whole, streamed = (MessagesResponder(request, "msg_1", lambda: counts) for _ in range(2))
    generation = Generation("r", prepared, tokenizer)
    stream = b""
    *ids, last = tokenizer.encode(words, add_special_tokens=False)
    outputs = [*(RequestOutput("r", (each,)) for each in ids), RequestOutput("r", (last,), finish_reason=reason)]
    for output in outputs:
        if generation.push(output, lambda _: None):
            stream += b"".join(map(named_event, streamed.events(generation, generation.take())))
    stream += b"".join(map(named_event, streamed.last_events(counts, None)))
    again = Generation("r", prepared, tokenizer)
    for output in outputs:
        again.push(output, lambda _: None)
    answer = whole.whole([again], counts, None)
    assert isinstance(answer, MessagesAnswer)
    return json.loads(named_event(answer).split(b"data: ")[1]), joined(parsed(stream.decode()))


def test_thoughts_texts_and_calls_are_blocks(tokenizer: Tokenizer) -> None:
    whole, streamed = answered(tokenizer, THINKS + CALLS + CALLS, FinishReason.STOP)
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    thought, said, *calls = whole["content"]
    assert thought == {"type": "thinking", "thinking": "Paris.", "signature": "splitfuse"}
    assert said["text"].strip() == "I look."
    assert [(call["name"], call["input"]) for call in calls] == [("weather", {"city": 'Pa"ris'})] * 2
    assert calls[0]["id"] != calls[1]["id"] and whole["stop_reason"] == "tool_use"
    for each in (*calls, *streamed["content"][2:]):
        each["id"] = ""
    assert streamed == whole
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (3, 4)


def test_a_thought_that_is_not_shown_comes_back_by_its_signature(tokenizer: Tokenizer) -> None:
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    whole, streamed = answered(tokenizer, THINKS, FinishReason.STOP, **hidden)
    thought = whole["content"][0]
    assert whole == streamed and thought["thinking"] == "" and "Paris" not in thought["signature"]
    turns = [*BODY["messages"], assistant(thought, "Anna."), user("Why?")]
    assert conversation(messages=turns)[1] == {"role": "assistant", "reasoning_content": "Paris.", "content": "Anna."}
    for foreign in ("EqQBCgIYAhIM", "splitfuse.////", "splitfuse.é", "splitfuse.a"):
        turns = [*BODY["messages"], assistant({**thought, "signature": foreign}, "Anna.")]
        assert "reasoning_content" not in conversation(messages=turns)[1]


def test_a_call_that_is_cut_off_has_its_text_as_input(tokenizer: Tokenizer) -> None:
    whole, _ = answered(tokenizer, THINKS + CALLS[:60], FinishReason.LENGTH, max_tokens=1)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["content"][-1]["input"] == {"INVALID_JSON": CALLS[:60].partition('arguments": ')[2]}


@pytest.mark.parametrize("arguments", ['{"a": }', "[1]", "3", '{"a": NaN}', '{"a": "\\ud800"}'])
def test_a_call_that_cannot_be_read_is_none_to_run(tokenizer: Tokenizer, arguments: str) -> None:
    words = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    whole, _ = answered(tokenizer, words, FinishReason.STOP)
    (call,) = whole["content"]
    assert whole["stop_reason"] == "end_turn" and list(call["input"]) == ["INVALID_JSON"]
    assert call["input"]["INVALID_JSON"].startswith(arguments)
    again = conversation(messages=[*BODY["messages"], assistant(call), user({**RESULT, "tool_use_id": call["id"]})])
    assert again[1]["tool_calls"][0]["function"]["arguments"] == call["input"]


# Conversations -------------------------------------------------------------------------------------------------------


def conversation(**fields: Any) -> list[dict[str, Any]]:
    """The messages that a chat template gets."""
    body = {"model": "storyteller", "messages": BODY["messages"], **fields}
    return decode(CountTokensRequest, json.dumps(body).encode()).conversation()[0]


def test_calls_and_results_become_turns_of_their_own() -> None:
    parts = {**RESULT, "tool_use_id": "toolu_2", "content": [text("no"), text("city")], "is_error": True}
    thought = {"type": "thinking", "thinking": "Which?", "signature": "x"}
    unseen = {"type": "redacted_thinking", "data": "abc"}
    calls = assistant(unseen, thought, "I look.", USE, {**USE, "id": "toolu_2"})
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    assert conversation(messages=[user("Hi"), calls, user("And?", RESULT, parts), user("Well?")]) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Which?",
            "tool_calls": [{"id": f"toolu_{n}", "type": "function", "function": function} for n in (1, 2)],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny", "name": "weather"},
        {
            "role": "tool",
            "tool_call_id": "toolu_2",
            "content": [{"type": "text", "text": "Error: no"}, {"type": "text", "text": "city"}],
            "name": "weather",
        },
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "text", "text": "Well?"}]},
    ]


def test_system_messages_are_folded_where_they_stand() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=1a2b;"
    turns = [
        system("Be kind."),
        user("Hi"),
        system("Now", "short."),
        assistant("Hello"),
        system("Bye", clear_at="never"),
    ]
    folded = conversation(system=[text(billing), text(billing + "\nTell.")], messages=turns)
    assert [(each["role"], each["content"]) for each in folded] == [
        ("system", [{"type": "text", "text": "Tell."}, {"type": "text", "text": "Be kind."}]),
        (
            "user",
            [
                {"type": "text", "text": "Hi"},
                {"type": "text", "text": "<system-reminder>\nNow\nshort.\n</system-reminder>"},
            ],
        ),
        ("assistant", "Hello"),
        ("user", "<system-reminder>\nBye\n</system-reminder>"),
    ]
    until = system("Soon", clear_at="next_user_message")
    assert conversation(messages=[user("Hi"), until, assistant("Hello"), user("Bye")])[0]["content"] == "Hi"
    assert "Soon" in str(conversation(messages=[user("Hi"), until])[0]["content"])


def test_a_deferred_tool_is_shown_once_it_is_found(http: httpx.Client) -> None:
    search = {"name": "search", "input_schema": {"type": "object"}}
    body = {"model": "storyteller", "tools": [search, {**WEATHER, "defer_loading": True}]}
    found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "weather"}]}
    turns = [*BODY["messages"], assistant({**USE, "name": "search", "input": {}})]

    def count(**more: Any) -> int:
        answer = http.post(f"{PATH}/count_tokens", json={**body, **more})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["input_tokens"])

    before = count(messages=BODY["messages"])
    assert before == count(messages=BODY["messages"], tools=[search])
    assert count(messages=BODY["messages"], tool_choice={"type": "none"}) < before
    refused = {**BODY, **body, "tool_choice": {"type": "tool", "name": "weather"}}
    assert "has defer_loading" in http.post(PATH, json=refused).json()["error"]["message"]
    after = count(messages=[*turns, user(found)])
    assert after > count(messages=[*turns, user(RESULT)]) + 40


def test_thinking_and_effort_are_options_of_the_template() -> None:
    def options(**fields: Any) -> tuple[Any, ...]:
        body = {"model": "storyteller", "messages": BODY["messages"], **fields}
        chosen = decode(CountTokensRequest, json.dumps(body).encode()).conversation()[1]
        return chosen.wishes, chosen.reasoning_effort, chosen.max_reasoning_tokens

    assert options() == options(thinking={"type": "adaptive", "display": "omitted"}) == ({}, None, None)
    effort = {"effort": "max"}
    assert options(output_config=effort) == ({"reasoning_effort": "max"}, None, None)
    assert options(output_config=effort, thinking={"type": "disabled"}) == (None, "none", None)
    enabled = {"type": "enabled", "budget_tokens": 2000}
    assert options(thinking=enabled) == ({"enable_thinking": True, "thinking": True}, None, 2000)


# What is refused -----------------------------------------------------------------------------------------------------


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*BODY["messages"], *messages]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{**WEATHER, **fields}]}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "max_tokens must be a whole number, not null"),
        ({"max_tokens": -1}, "max_tokens must be a whole number from 0"),
        ({"temperature": 1.5}, "temperature must be a number from 0 to 1, not 1.5"),
        ({"stop_sequences": [""]}, "stop_sequences[0] must not be empty"),
        ({"stop": ["x"]}, "stop is not supported: it is stop_sequences of this route"),
        ({"seed": 1}, "seed is not supported: it is one of /v1/chat/completions"),
        ({"best_of": 2}, "unknown parameter 'best_of'"),
        ({"speed": "fast"}, 'speed "fast" is not supported: there is one speed'),
        ({"service_tier": "priority"}, "service_tier must be auto or standard_only"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"metadata": {"name": "x"}}, "unknown parameter 'metadata.name'"),
        ({"cache_control": {"type": "forever"}}, "cache_control is not supported: prompts stay"),
        (turns({"role": "robot", "content": "x"}), "messages[1].role must be user, assistant or system"),
        (turns(user({"type": "image", "source": {}})), "messages[1].content[0].source is not supported: conver"),
        (turns(user({"type": "document"})), "messages[1].content[0].type must be text or tool_result, not 'document'"),
        (turns(user(USE)), "messages[1].content[0].type must be text or tool_result, not 'tool_use'"),
        (turns(user({"type": "text"})), "messages[1].content[0].text is missing"),
        (turns(user({**text("x"), "thinking": "y"})), "messages[1].content[0].thinking needs the type thinking"),
        (turns(user(RESULT)), "messages[1].content[0].tool_use_id is 'toolu_1', which is the id of no call"),
        (turns(assistant("a", USE, USE)), "messages[1].content[2].id is 'toolu_1', as that of a call before it"),
        (
            turns(assistant(USE), user({**RESULT, "content": [{"type": "image"}]})),
            "messages[2].content[0].content[0].type must be text or tool_reference, not 'image'",
        ),
        (
            {
                **turns(
                    assistant(USE), user({**RESULT, "content": [{"type": "tool_reference", "tool_name": "wether"}]})
                ),
                **tool(),
            },
            "messages[2].content[0].content[0].tool_name is 'wether', which is none of the tools; did you mean",
        ),
        ({**tool(defer_loading=True), "tool_choice": {"type": "any"}}, "the tool 'weather' has defer_loading"),
        (
            {**tool(defer_loading=True), "tool_choice": {"type": "tool", "name": "weather"}},
            "the tool 'weather' has defer_loading",
        ),
        (turns(assistant(USE)), "messages must go on after a tool_use"),
        (turns(user("x") | {"clear_at": "never"}), "messages[1].clear_at must be never or next_user_message, of a"),
        (turns(system("x", clear_at="foo")), "not 'foo' of the role system"),
        ({"system": [{"type": "image"}]}, "system[0].type must be text, not 'image'"),
        (tool(type="web_search_20250305", max_uses=2), "tools[0].max_uses is not supported: this server runs no tools"),
        (tool(type="bash_20250124"), "tools[0].type must be custom, not 'bash_20250124': this server runs no tools"),
        (tool(input_schema=None), "tools[0].input_schema is missing"),
        (tool(input_schema={"type": "array"}), "tools[0].input_schema must be a schema of an object"),
        (
            {**tool(input_schema={"type": "object", "not": {}}), "tool_choice": {"type": "any"}},
            "tools[0].input_schema has the key 'not'",
        ),
        (
            {
                "tools": [
                    *tool(defer_loading=True)["tools"],
                    {"name": "f", "input_schema": {"type": "object", "not": {}}, "strict": True},
                ]
            },
            "tools[1].input_schema has the key 'not'",
        ),
        (tool(name="a b"), "tools[0].name must match"),
        (tool(input_examples=[{}]), "tools[0].input_examples is not supported"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({**tool(), "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({**tool(), "tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name needs the type tool"),
        ({**tool(), "tool_choice": {"type": "required"}}, "tool_choice.type must be auto, any, tool or none"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type must be enabled, adaptive or disabled"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1}},
            "thinking.budget_tokens must be a whole number from 1024",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "must be below max_tokens (30), not 2000"),
        (
            {"max_tokens": 1100, "thinking": {"type": "enabled", "budget_tokens": 1024}},
            "thinking.budget_tokens 1024 cannot be kept",
        ),
        ({"thinking": {"type": "adaptive", "budget_tokens": 2000}}, "budget_tokens needs the type enabled"),
        ({"thinking": {"type": "adaptive", "display": "full"}}, "thinking.display must be"),
        ({"output_config": {"effort": "most"}}, "output_config.effort must be low, medium, high, xhigh or max"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type must be json_schema"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object", "not": {}}}}},
            "output_config.format.schema",
        ),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits[0].type must be"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, 'edits[0].keep must be "all"'),
        ({"splitfuse_on_time_only": True}, "leave splitfuse_on_time_only out"),
    ],
)
def test_what_is_refused_is_named(http: httpx.Client, more: dict[str, Any], words: str) -> None:
    answer = http.post(PATH, json={**BODY, **more})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in body["error"]["message"], body
    assert body["request_id"] == answer.headers["request-id"]


def test_errors_have_the_types_of_their_statuses() -> None:
    config = ServerConfig(api_key=("sk-one",), max_body_mib=0.1, max_queued_requests=1)
    key = {"x-api-key": "sk-one"}
    with running_server(config, num_blocks=200) as server, server.http() as http:
        others = {
            (401, "authentication_error"): http.post(PATH, json=BODY),
            (404, "not_found_error"): http.post(PATH, json={**BODY, "model": "claude"}, headers=key),
            (405, "invalid_request_error"): http.get(PATH, headers=key),
            (413, "request_too_large"): http.post(PATH, json={**BODY, "system": "x" * 200_000}, headers=key),
            (403, "permission_error"): http.post(PATH, json={**BODY, "splitfuse_priority": "high"}, headers=key),
        }
        absent = {
            (401, "authentication_error"): http.get(f"{PATH}/batches"),
            (404, "not_found_error"): http.post(f"{PATH}/xyz", json={}, headers=key),
        }
        for (status, kind), answer in (*others.items(), *absent.items()):
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), answer.text
            assert answer.json()["type"] == "error" and answer.headers["request-id"]
        assert http.post(PATH, json=BODY, headers={"authorization": "Bearer sk-one"}).status_code == 200
        long = {**BODY, "max_tokens": 1000, "stream": True, "messages": [user("Tell me a story.")]}
        long["output_config"] = {"format": {"type": "json_schema", "schema": {"type": "string", "minLength": 9999}}}
        with http.stream("POST", PATH, json=long, headers=key) as stream:
            received = stream.iter_text()
            pieces = [next(received)]
            full = http.post(PATH, json=BODY, headers=key)
            assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(full.headers["retry-after"]) >= 1
            server.call(server.client.close())
            last = parsed("".join([*pieces, *received]))[-1]
            assert last["error"]["type"] in ("api_error", "overloaded_error") and last["request_id"]


# Claude Code ---------------------------------------------------------------------------------------------------------


def test_what_claude_code_sends_is_answered(http: httpx.Client) -> None:
    """The shape of a body of Claude Code 2.1.332, with texts of our own."""
    probe = http.head("/api/hello", headers={"x-api-key": ""})
    assert (probe.status_code, probe.content) == (200, b"")
    body = {
        "model": "storyteller",
        "messages": [user("<system-reminder>Be brief.</system-reminder>", GOOSE), system("# Environment\nA village.")],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.1c9; cc_entrypoint=sdk-cli;"},
            text("You answer."),
        ],
        "tools": [
            WEATHER | {"input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"}},
            {"name": "Placeholder", "description": "", "input_schema": {"type": "object"}, "defer_loading": True},
        ],
        "metadata": {"user_id": '{"device_id":"x","session_id":"y"}'},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive", "display": "updates", "block_binding": {}},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    answer = joined(
        events_of(http.post(f"{PATH}?beta=true", json=body, headers={"anthropic-beta": "effort-2025-11-24"}))
    )
    assert answer["stop_reason"] and answer["usage"]["output_tokens"]
