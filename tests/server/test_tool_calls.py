"""Calls of tools and thoughts in answers: streamed as they are whole, through OpenAI's own client.

What the model writes is forced by `structured_outputs`, which is the form of the answer as the model writes it.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from patience import PATIENCE
from running_server import RunningServer

import splitfuse

USER: Any = {"role": "user", "content": "How is the weather in Paris?"}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\"ris"}}\n</tool_call>'
BOTH = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'


@pytest.fixture
def ai(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


def create(ai: openai.OpenAI, text: str, **keywords: Any) -> Any:
    """An answer of this text, as far as max_tokens lets it come."""
    extra = {"structured_outputs": {"choice": [text]}, **keywords.pop("extra_body", {})}
    keywords = {"messages": [USER], "tools": TOOLS, "max_tokens": 200, **keywords}
    return ai.chat.completions.create(model="storyteller", extra_body=extra, **keywords)


def joined(chunks: Any) -> dict[str, Any]:
    """The choice that the chunks of a stream make."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    logprobs: list[Any] = []
    reasons = []
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            message["content"] += delta.content or ""
            message["reasoning"] += getattr(delta, "reasoning", None) or ""
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert call.type == "function" and call.index == len(message["calls"])
                    message["calls"].append([call.function.name, ""])
                message["calls"][call.index][1] += call.function.arguments
            logprobs += choice.logprobs.content if choice.logprobs else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    (reason,) = reasons
    return {**message, "reason": reason, "logprobs": [entry.token for entry in logprobs]}


def whole(answer: Any) -> dict[str, Any]:
    (choice,) = answer.choices
    message = choice.message
    calls = [[call.function.name, call.function.arguments] for call in message.tool_calls or ()]
    assert len({call.id for call in message.tool_calls or ()}) == len(calls)
    logprobs = [entry.token for entry in choice.logprobs.content] if choice.logprobs else []
    parts = {"content": message.content or "", "reasoning": getattr(message, "reasoning", None) or "", "calls": calls}
    return {**parts, "reason": choice.finish_reason, "logprobs": logprobs}


PARIS = ["weather", '{"city": "Pa\\"ris"}']


@pytest.mark.parametrize(
    ("text", "keywords", "expected"),
    [
        (BOTH, {}, {"content": "Let me see.", "calls": [PARIS, ["now", "{}"]], "reason": "tool_calls"}),
        (BOTH, {"parallel_tool_calls": False}, {"calls": [PARIS], "reason": "tool_calls"}),
        (BOTH, {"tool_choice": "none"}, {"content": BOTH, "calls": [], "reason": "stop"}),
        ("Just text", {}, {"content": "Just text", "calls": [], "reason": "stop"}),
        (BOTH, {"max_tokens": 52}, {"content": "Let me see.", "reason": "length"}),
        (BOTH, {"stop": "ris"}, {"content": "Let me see.", "calls": [["weather", '{"city": "Pa\\"']]}),
    ],
    ids=["content and calls", "one call", "none", "text", "length within a call", "stop string within a call"],
)
def test_calls_come_streamed_as_whole(ai: openai.OpenAI, text: str, keywords: Any, expected: dict[str, Any]) -> None:
    keywords = {"logprobs": True, **keywords}
    found = whole(create(ai, text, **keywords))
    assert joined(create(ai, text, **keywords, stream=True)) == found
    assert found | expected == found
    if "stop" in keywords:
        assert found["reason"] == "stop", "the call is not complete"
    if "max_tokens" in keywords:
        ((name, arguments),) = found["calls"]
        assert name == "weather" and '{"city": "Pa\\"ris"}'.startswith(arguments) and arguments


def test_content_is_null_if_there_are_only_calls(ai: openai.OpenAI) -> None:
    answer = create(ai, CALL)
    assert answer.choices[0].message.content is None and answer.choices[0].finish_reason == "tool_calls"
    arguments = answer.choices[0].message.tool_calls[0].function.arguments
    assert json.loads(arguments) == {"city": 'Pa"ris'}


@pytest.mark.parametrize("arguments", ['{"city": }', '["Paris"]', '{"city": NaN}'])
def test_a_call_that_cannot_be_read_is_no_reason(ai: openai.OpenAI, arguments: str) -> None:
    (choice,) = create(ai, f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>').choices
    assert choice.finish_reason == "stop" and choice.message.tool_calls[0].function.arguments.startswith(arguments)
    error: Any = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "no JSON"}
    assert create(ai, "Sorry", messages=[USER, choice.message, error]).choices[0].message.content == "Sorry"


def test_arguments_are_streamed_as_they_come(ai: openai.OpenAI) -> None:
    deltas = [
        call.function.arguments
        for chunk in create(ai, CALL, stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert deltas[0] == "" and len(deltas) > 6


def test_an_answer_goes_back_with_the_results(ai: openai.OpenAI) -> None:
    turn = create(ai, BOTH).choices[0].message
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "20 degrees"} for call in turn.tool_calls]
    answer = create(ai, "It is warm", messages=[USER, turn, *results])
    assert answer.choices[0].message.content == "It is warm"


def test_the_stream_helper_reads_calls(ai: openai.OpenAI) -> None:
    extra: Any = {"structured_outputs": {"choice": [BOTH]}}
    messages, tools = [USER], TOOLS
    with ai.chat.completions.stream(
        model="storyteller", messages=messages, tools=tools, max_tokens=200, extra_body=extra
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [tuple(PARIS), ("now", "{}")]


def test_pipeline_and_client_give_calls_too(server: RunningServer, pipe: splitfuse.Pipeline) -> None:
    form = {"structured_outputs": {"choice": [BOTH]}, "chat": True, "tools": TOOLS, "max_new_tokens": 200}
    with splitfuse.client(server.url) as client:
        streams = [list(pipe("Hi", stream=True, **form)), list(client("Hi", stream=True, **form))]
        found = [*client("Hi", **form), *(pieces[-1].response for pieces in streams)]
        assert ["".join(piece.text for piece in pieces) for pieces in streams] == ["Let me see."] * 2
        for response in found:
            assert response is not None and response.finish_reason == "stop"
            calls = [(call.name, json.loads(call.arguments)) for call in response.tool_calls]
            assert response.generated_text == "Let me see." and calls == [("weather", {"city": 'Pa"ris'}), ("now", {})]
        result = {"role": "tool", "tool_call_id": response.tool_calls[0].call_id, "content": "warm"}
        turns = [USER, response.message, result]
        parsed = json.loads(json.dumps(turns))
        for call in parsed[1]["tool_calls"]:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        (prompt,) = {pipe.prepare(each, chat=True)[0].token_ids for each in (turns, parsed)}
        lengths = {client(each, chat=True, max_new_tokens=1)[0].prompt_length for each in (turns, parsed)}
    assert lengths == {len(prompt)}


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"tools": TOOLS}, "tools needs chat=True"),
        ({"chat": True, "tools": "weather"}, "tools must be a list of tools, not 'weather'"),
        ({"chat": True, "tools": [{"name": "f", "parameter": {}}]}, r"tools\[0\].parameter is unknown; did you mean"),
        ({"chat": True, "tools": [{"name": 3}]}, r"tools\[0\].name must be a str, not 3"),
        ({"chat": True, "tools": TOOLS, "tool_choice": "nov"}, "tool_choice names 'nov'.*did you mean 'now'"),
        ({"chat": True, "reasoning_max_tokens": -1}, "reasoning_max_tokens must be a whole number from 0, not -1"),
        ({"chat": True, "reasoning_effort": "high"}, "has no thoughts"),
    ],
)
def test_keywords_of_a_call_are_checked(pipe: splitfuse.Pipeline, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(splitfuse.InvalidRequestError, match=words):
        pipe("Hi", **keywords)


LIMITED: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
WEATHER_ONLY: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "now"}), (WEATHER_ONLY, {"weather"})])
def test_required_calls_are_made(ai: openai.OpenAI, choice: Any, names: set[str]) -> None:
    keywords: Any = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 150, "seed": 1}
    asked: Any = {"model": "storyteller", "messages": [USER], "tools": LIMITED, **keywords}
    answer = ai.chat.completions.create(**asked, n=4)
    found = [whole(answer.model_copy(update={"choices": [each]})) for each in answer.choices]
    assert joined(ai.chat.completions.create(**asked, stream=True)) == found[0]
    for each in found:
        ((name, arguments),) = each["calls"]
        assert each["content"] == "" and each["reason"] == "tool_calls"
        assert json.loads(arguments) in ([{"city": "Paris"}, {"city": "Rome"}] if name == "weather" else [{}])
    assert {each["calls"][0][0] for each in found} == names


def test_no_part_of_a_required_call_becomes_content(ai: openai.OpenAI) -> None:
    for length in range(1, 30, 2):
        for stream in (False, True):
            keywords: Any = {"tool_choice": "required", "max_tokens": length, "temperature": 0, "stream": stream}
            answer: Any = ai.chat.completions.create(model="storyteller", messages=[USER], tools=LIMITED, **keywords)
            assert (joined(answer) if stream else whole(answer))["content"] in ("", None)


def test_answer_of_a_form_may_call_tools_instead(ai: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    keywords: Any = {"response_format": form, "temperature": 2, "max_tokens": 150, "seed": 0, "n": 12}
    answer = ai.chat.completions.create(model="storyteller", messages=[USER], tools=LIMITED, **keywords)
    for choice in answer.choices:
        if choice.message.tool_calls:
            assert choice.message.content is None
        else:
            assert json.loads(choice.message.content or "") in ({"a": 1}, {"a": 2})
    kinds = {choice.finish_reason for choice in answer.choices}
    assert "stop" in kinds and kinds <= {"stop", "tool_calls", "length"}


def with_schema(**schema: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "and tool_choice both say"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex", "and tool_choice both say"),
        (with_schema(uniqueItems=True), "tools[0].function.parameters", "has the key 'uniqueItems' at #"),
        (with_schema(properties={"a": {"pattern": "("}}), "tools[0].function.parameters", "cannot be enforced"),
        (with_schema(description="x" * 200_000), "tools", "tools has 200"),
        (
            {
                "tools": [*TOOLS, *with_schema(uniqueItems=True)["tools"]],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
                },
            },
            f"tools[{len(TOOLS)}].function.parameters",
            "has the key 'uniqueItems' at #",
        ),
    ],
)
def test_a_call_that_cannot_be_required_says_why(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    with server.http() as http:
        sent = {"messages": [USER], "tool_choice": "required", "max_tokens": 5, **body}
        answer = http.post("/v1/chat/completions", json=sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error
        assert http.post("/v1/chat/completions", json={**sent, "tool_choice": "none", **NO_FORM}).status_code == 200


NO_FORM: dict[str, Any] = {"response_format": None, "guided_regex": None}


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "assistant", "content": "", "tool_calls": ["x"]}, r"messages\[0\].tool_calls\[0\] must be a mapping"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            r"messages\[0\].tool_calls\[0\].function.arguments must be a mapping or its JSON, not 3",
        ),
        ({"role": "tool", "content": "", "tool_call_id": "x"}, r"messages\[0\].tool_call_id is 'x'"),
    ],
)
def test_turns_of_a_call_are_checked(pipe: splitfuse.Pipeline, turn: dict[str, Any], words: str) -> None:
    with pytest.raises(splitfuse.InvalidRequestError, match=words):
        pipe([turn], chat=True)


class Weather(pydantic.BaseModel):
    """Tell the weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=7)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_parse_helper_validates_strict_calls(ai: openai.OpenAI, choice: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    assert tools[0]["function"]["strict"]
    for seed in range(2):
        answer = ai.chat.completions.parse(
            model="storyteller", messages=[USER], tools=tools, tool_choice=choice, max_tokens=200, seed=seed
        )
        for call in answer.choices[0].message.tool_calls or ():
            assert isinstance(call.function.parsed_arguments, Weather)
        assert answer.choices[0].message.tool_calls or choice == "auto"
