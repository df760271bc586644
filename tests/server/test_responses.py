"""OpenAI's Responses API with the unmodified `openai` client: items, events, stored answers, and what is refused."""

import json
import unittest.mock
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import openai
import pydantic
import pytest
from openai_clients import connect
from running_server import RunningServer, running_server

from splitfuse.config.server import ServerConfig
from splitfuse.errors import InvalidRequestError
from splitfuse.server.responses import endpoints
from splitfuse.server.responses.answers import EVENTS, ResponseAnswer, ResponseEvent
from splitfuse.server.responses.items import messages_of
from splitfuse.server.responses.protocol import ResponseRequest
from splitfuse.server.validation import decode
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    ToolCallStart,
)
from splitfuse.text.chat_formats.parser import MessageSource

MODEL = "storyteller"
PATH = "/v1/responses"
STORY = "Erik plays the cello. Anna keeps a goose."
QUESTION = f"{STORY}\n\nWho keeps a goose?"
SAMPLED: dict[str, Any] = {"model": MODEL, "temperature": 1.3, "top_p": 0.95, "extra_body": {"seed": 7}}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
LOGPROBS: Any = ["message.output_text.logprobs"]
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def post(server: RunningServer, **body: Any) -> httpx.Response:
    with server.http() as http:
        return http.post(PATH, json={"input": "Hi", "max_output_tokens": 2, **body})


def text_of(item: Any) -> str:
    text: str = item.content[0].text
    return text


def kind_of(item: Any) -> str:
    kind: str = item.content[0].type
    return kind


def without_ids(value: Any) -> Any:
    """What two answers to one request have in common."""
    if isinstance(value, dict):
        own = ("id", "item_id", "created_at", "completed_at", "call_id")
        return {name: without_ids(each) for name, each in value.items() if name not in own}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


# Answers -------------------------------------------------------------------------------------------------------------


def test_a_response_says_what_a_chat_does(ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **SAMPLED)
    answer = ai.responses.create(input=QUESTION, metadata={"a": "b"}, **SAMPLED)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.object, answer.model, answer.metadata) == ("completed", "response", MODEL, {"a": "b"})
    assert answer.usage is not None and chat.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    assert answer.usage.total_tokens == chat.usage.total_tokens
    (message,) = answer.output
    assert (message.type, message.status) == ("message", "completed")
    assert answer.id.removeprefix("resp_") == (message.id or "").removeprefix("msg_")[:32]


def test_a_stream_has_typed_events_in_order(ai: openai.OpenAI) -> None:
    keywords = {"input": QUESTION, "include": LOGPROBS, "top_logprobs": 1, **GREEDY}
    whole = ai.responses.create(**keywords)
    with ai.responses.stream(**keywords) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    count = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * count,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert count > 1
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == final.output_text
    (message,) = whole.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs or []
    assert [each.token for event in deltas for each in event.logprobs] == [each.token for each in logprobs]
    assert "".join(each.token for each in logprobs) == whole.output_text
    assert all(len(each.top_logprobs) == 1 for each in logprobs)
    ours, theirs = without_ids(final.to_dict()), without_ids(whole.to_dict())
    assert ours.pop("usage")["input_tokens"] == theirs.pop("usage")["input_tokens"]  # cached ones may differ
    for answer in ours, theirs:
        answer["output"][0]["content"][0].pop("parsed", None)
    assert ours == theirs


def test_logprobs_equal_those_of_a_chat(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    chat = ai.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **GREEDY).to_dict()
    answer = ai.responses.create(input=QUESTION, include=LOGPROBS, top_logprobs=2, **GREEDY).to_dict()
    *of_text, _ = chat["choices"][0]["logprobs"]["content"]
    assert answer["output"][0]["content"][0]["logprobs"] == of_text, "the EOS token is no part of the text"


def test_a_response_cut_off_is_incomplete(ai: openai.OpenAI) -> None:
    answer = ai.responses.create(input=QUESTION, max_output_tokens=2, **GREEDY)
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    *_, last = ai.responses.create(input=QUESTION, max_output_tokens=2, stream=True, **GREEDY)
    assert last.type == "response.incomplete" and last.response.output_text == answer.output_text


def test_a_stream_that_breaks_off_ends_with_its_error(ai: openai.OpenAI) -> None:
    endless = {"ignore_eos": True, "splitfuse_deadline": 0.5}
    *_, last = ai.responses.create(model=MODEL, input="Hi", stream=True, extra_body=endless)
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error is not None and "splitfuse_deadline" in last.response.error.message
    assert last.response.error.code == "server_error"
    assert last.response.output_text and last.response.usage is not None
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(last.response.id)


def test_text_format_is_kept_to_and_parsed(ai: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        age: int = pydantic.Field(ge=0, le=99)

    answer = ai.responses.parse(input=QUESTION, text_format=Person, **SAMPLED)
    assert isinstance(answer.output_parsed, Person) and answer.text is not None
    assert answer.text.format is not None and answer.text.format.type == "json_schema"
    again = ai.responses.parse(
        input=[*answer.output, {"role": "user", "content": "Who?"}], text_format=Person, **GREEDY
    )
    assert isinstance(again.output_parsed, Person)
    any_json = ai.responses.create(
        input=QUESTION, text={"format": {"type": "json_object"}}, max_output_tokens=9, **GREEDY
    )
    assert any_json.output_text.startswith("{")


# Thoughts and calls --------------------------------------------------------------------------------------------------

SCRIPT: tuple[Sequence[MessageEvent], ...] = (
    [ReasoningDelta("I ")],
    [ReasoningDelta("think"), ContentDelta("So")],
    [ContentDelta(" it is."), ToolCallStart(0, "call_a", "weather"), ArgumentsDelta(0, '{"city"')],
    [ArgumentsDelta(0, ':"Paris"}')],
    [ToolCallStart(1, "call_b", "weather"), ArgumentsDelta(1, "{}")],
)


class ScriptedParser:
    """Says the script however the text is cut: as much at each piece as there are pieces, and the rest at the end."""

    def __init__(self) -> None:
        self._rest = list(SCRIPT)

    def feed(self, text: str) -> list[MessageEvent]:
        return list(self._rest.pop(0)) if text and self._rest else []

    def finish(self) -> list[MessageEvent]:
        rest, self._rest = self._rest, []
        return [event for events in rest for event in events]


def test_thoughts_and_calls_are_items_of_their_own(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MessageSource, "parser", lambda _: ScriptedParser())
    whole = ai.responses.create(input=QUESTION, **GREEDY)
    events = list(ai.responses.create(input=QUESTION, stream=True, **GREEDY))
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    for answer in whole, last.response:
        thought, message, first, second = (item.to_dict() for item in answer.output)
        assert without_ids(thought) == {
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I think"}],
        }
        assert message["content"][0]["text"] == "So it is." == answer.output_text
        assert (first["call_id"], first["name"], first["arguments"]) == ("call_a", "weather", '{"city":"Paris"}')
        assert (second["call_id"], second["arguments"], second["status"]) == ("call_b", "{}", "completed")
    indexes = [event.output_index for event in events if event.type == "response.output_item.added"]
    assert indexes == [0, 1, 2, 3]
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [item.id for item in last.response.output]
    cut = ai.responses.create(input=QUESTION, max_output_tokens=3, **GREEDY)
    assert [item.status for item in cut.output] == ["completed"] * 3 + ["incomplete"]


def test_outputs_of_calls_go_on_from_stored_calls(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MessageSource, "parser", lambda _: ScriptedParser())
        first = ai.responses.create(input=QUESTION, tools=[WEATHER], **GREEDY)
    outputs: Any = [
        {"type": "function_call_output", "call_id": "call_a", "output": "sunny"},
        {"type": "function_call_output", "call_id": "call_b", "output": [{"type": "input_text", "text": "rainy"}]},
    ]
    tool = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}
    calls = [
        {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    messages: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "So it is.", "reasoning_content": "I think", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_b", "content": "rainy"},
    ]
    chat = ai.chat.completions.create(messages=messages, tools=[tool], **GREEDY)
    references: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
    for more in (
        {"previous_response_id": first.id, "input": outputs},
        {"input": [{"role": "user", "content": QUESTION}, *first.output, *outputs]},
        {"input": [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in first.output), *outputs]},
        {"input": [{"role": "user", "content": QUESTION}, *references, *outputs]},
    ):
        answer = ai.responses.create(tools=[WEATHER], **more, **GREEDY)
        assert answer.usage is not None and chat.usage is not None
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert answer.output_text == chat.choices[0].message.content
        assert answer.tools[0].to_dict() == WEATHER


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\"ris"}}\n</tool_call>'


def forced(text: str) -> dict[str, Any]:
    """What makes the model write this text."""
    return {**GREEDY, "tools": [WEATHER], "extra_body": {"structured_outputs": {"choice": [text]}}}


def test_calls_are_read_from_what_the_model_writes(ai: openai.OpenAI) -> None:
    request = forced(f"Let me see.\n{CALL}\n{CALL}")
    whole = ai.responses.create(input=QUESTION, **request)
    message, first, second = whole.output
    assert whole.output_text == "Let me see." and message.type == "message"
    assert first.type == second.type == "function_call" and first.call_id != second.call_id
    assert json.loads(first.arguments) == json.loads(second.arguments) == {"city": 'Pa"ris'}
    with ai.responses.stream(input=QUESTION, **request) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response().to_dict()
    assert len(deltas) > 4 and "".join(deltas) == first.arguments + second.arguments
    for item in final["output"]:  # type: ignore[attr-defined]
        item.pop("parsed_arguments", None)
        item.get("content", [{}])[0].pop("parsed", None)
    assert without_ids(final["output"]) == without_ids(whole.to_dict()["output"])


def test_logprobs_show_no_further_calls_than_the_answer(ai: openai.OpenAI) -> None:
    request = {**forced(f"Let me see.\n{CALL}\n{CALL}"), "parallel_tool_calls": False}
    plain = ai.responses.create(input=QUESTION, **request)
    scored = ai.responses.create(input=QUESTION, include=LOGPROBS, **request)
    assert [item.type for item in plain.output] == [item.type for item in scored.output] == ["message", "function_call"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_required_calls_are_made_and_cut_off_ones_are_incomplete(ai: openai.OpenAI, choice: Any) -> None:
    properties = {"city": {"enum": ["Paris", "Rome"]}}
    parameters = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    tools: Any = [{**WEATHER, "parameters": parameters}]
    keywords: dict[str, Any] = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, **GREEDY}
    answer = ai.responses.create(input=QUESTION, **keywords)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert answer.status == "completed" and call.status == "completed"
    cut = ai.responses.create(input=QUESTION, max_output_tokens=(answer.usage.output_tokens - 20), **keywords)  # type: ignore[union-attr]
    assert cut.status == "incomplete" and cut.output[-1].status == "incomplete"  # type: ignore[union-attr]
    assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"
    error: Any = {"type": "function_call_output", "call_id": cut.output[-1].call_id, "output": "no JSON"}  # type: ignore[union-attr]
    sent: Any = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in cut.output), error]
    counts = [
        ai.responses.input_tokens.count(model=MODEL, **again).input_tokens
        for again in ({"input": sent}, {"input": [error], "previous_response_id": cut.id}, {"input": sent[:1]})
    ]
    assert counts[0] == counts[1] > counts[2]


@pytest.mark.parametrize("arguments", ['{"city": }', '["Paris"]', '{"city": NaN}'])
def test_a_call_that_cannot_be_read_is_incomplete(ai: openai.OpenAI, arguments: str) -> None:
    written = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    answer = ai.responses.create(input=QUESTION, **forced(written))
    (call,) = answer.output
    assert (answer.status, call.type, call.status) == ("completed", "function_call", "incomplete")
    assert ai.responses.create(input="Go on.", previous_response_id=answer.id, max_output_tokens=1, **GREEDY)


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("a", "b")]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}', "async": False},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "long"}]},
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "A", "annotations": []}],
            "status": "completed",
        },
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No"}], "phase": None},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": "c"},
    ]
    request = decode(ResponseRequest, json.dumps({"input": items}).encode())
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert messages_of(request.items, num_before=0) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "", "reasoning_content": "short", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "one", "name": "f"},
        {"role": "assistant", "content": "A", "reasoning_content": "long"},
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": "c"},
    ]


def test_calls_of_one_id_name_the_second() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    request = decode(ResponseRequest, json.dumps({"input": [call, call]}).encode())
    with pytest.raises(InvalidRequestError, match="as that of a call before it") as raised:
        messages_of(request.items, num_before=0)
    assert raised.value.parameter == "input[1].call_id"


# What is kept --------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_stored_response(ai: openai.OpenAI) -> None:
    first = ai.responses.create(input=STORY, instructions="Be brief.", max_output_tokens=4, **GREEDY)
    second = ai.responses.create(input="Who?", previous_response_id=first.id, max_output_tokens=4, **GREEDY)
    third = ai.responses.create(input="Why?", previous_response_id=second.id, instructions="Sing.", **GREEDY)
    texts = ("Sing.", STORY, first.output_text, "Who?", second.output_text, "Why?")
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages: Any = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    chat = ai.chat.completions.create(messages=messages, **GREEDY)
    assert third.output_text == chat.choices[0].message.content and third.usage is not None
    assert chat.usage is not None and third.usage.input_tokens == chat.usage.prompt_tokens
    count = ai.responses.input_tokens.count(
        model=MODEL, input="Why?", previous_response_id=second.id, instructions="Sing."
    )
    assert (count.input_tokens, count.object) == (chat.usage.prompt_tokens, "response.input_tokens")
    with pytest.raises(openai.BadRequestError) as raised:
        ai.responses.input_tokens.count(model=MODEL, input="Why?", extra_body={"reasoning": {"effort": "high"}})
    assert raised.value.param == "reasoning.effort"
    ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="goes on from"):
        ai.responses.create(input="And?", previous_response_id=third.id, **GREEDY)


def test_stored_responses_are_read_and_deleted(ai: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = ai.responses.create(input=items, max_output_tokens=3, **GREEDY)
    assert ai.responses.retrieve(answer.id) == answer
    *_, last = ai.responses.create(input=items, max_output_tokens=3, stream=True, **GREEDY)
    assert last.type == "response.incomplete" and ai.responses.retrieve(last.response.id) == last.response
    page = ai.responses.input_items.list(answer.id, limit=2)
    assert [text_of(item) for item in page.data] == ["c", "b"] and page.has_more
    assert [text_of(item) for item in page] == ["c", "b", "a"]
    ascending = list(ai.responses.input_items.list(answer.id, order="asc"))
    assert [kind_of(item) for item in ascending] == ["input_text", "output_text", "input_text"]
    with pytest.raises(openai.BadRequestError, match="only a response in the background"):
        ai.responses.cancel(answer.id)
    ai.responses.delete(answer.id)
    for call in (ai.responses.retrieve, ai.responses.delete, ai.responses.cancel, ai.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no stored answer") as raised:
            call(answer.id)
        assert raised.value.code == "answer_not_found"


def test_a_long_chain_is_refused_and_references_are_read_once(server: RunningServer, ai: openai.OpenAI) -> None:
    turns: Any = [{"role": "user", "content": "a"}] * 2048
    first = ai.responses.create(input=turns, truncation="auto", max_output_tokens=1, **GREEDY)
    message = first.output[0].to_dict()["id"]
    for more in {"input": turns}, {"input": [{"type": "item_reference", "id": message}] * 2048}:
        refused = post(server, **more, previous_response_id=first.id, truncation="auto")
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "previous_response_id")
        assert "at most 4096 are read" in error["message"]
    references = {"input": [{"type": "item_reference", "id": message}] * 32}
    with unittest.mock.patch.object(endpoints, "_read_output", wraps=endpoints._read_output) as read:
        assert post(server, **references).status_code == 200
    assert read.call_count == 1


def test_responses_are_stored_within_bounds_and_by_key() -> None:
    with running_server(ServerConfig(api_key=("a", "b"), max_stored_responses=2)) as server:
        ai, other = connect(server, api_key="a"), connect(server, api_key="b")
        kept = [ai.responses.create(input=text, max_output_tokens=1, **GREEDY).id for text in ("1", "2", "3")]
        unkept = ai.responses.create(input="4", max_output_tokens=1, store=False, **GREEDY)
        assert unkept.to_dict()["store"] is False
        for client, missing in ((ai, kept[0]), (ai, unkept.id), (other, kept[2])):
            for call in (client.responses.retrieve, client.responses.delete):
                with pytest.raises(openai.NotFoundError):
                    call(missing)
            with pytest.raises(openai.NotFoundError) as raised:
                client.responses.create(input="5", previous_response_id=missing, **GREEDY)
            assert raised.value.param == "previous_response_id"
        assert [ai.responses.retrieve(each).id for each in kept[1:]] == kept[1:]


def test_a_server_that_stores_nothing_says_so() -> None:
    with running_server(ServerConfig(max_stored_responses=0)) as server, connect(server) as ai:
        answer = ai.responses.create(input="1", max_output_tokens=1, **GREEDY)
        assert answer.to_dict()["store"] is False
        with pytest.raises(openai.BadRequestError, match="max-stored-responses 0") as raised:
            ai.responses.create(input="1", store=True, **GREEDY)
        assert raised.value.param == "store"
        with pytest.raises(openai.NotFoundError, match="max-stored-responses 0"):
            ai.responses.create(input="1", previous_response_id=answer.id, **GREEDY)


def test_what_is_not_compacted_says_so(server: RunningServer) -> None:
    with server.http() as http:
        answer = http.post(f"{PATH}/compact", json={"input": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_route")


def test_truncation_drops_the_oldest_turns(ai: openai.OpenAI) -> None:
    turns: Any = [
        {"role": role, "content": f"{number} " + "the " * 180} for number in range(8) for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Who?"}]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ai.responses.create(input=items, max_output_tokens=8, **GREEDY)
    answer = ai.responses.create(input=items, max_output_tokens=8, truncation="auto", **GREEDY)
    kept: Any = [items[0], *items[7:]]
    chat = ai.chat.completions.create(messages=kept, max_tokens=8, **GREEDY)
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.output_text == chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError):
        ai.chat.completions.create(messages=[items[0], *items[5:]], max_tokens=8, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ai.responses.create(input="the " * 4000, truncation="auto", **GREEDY)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": None}, "input", "must be a string or an array, not null"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": 3}, "input", "must be a string or an array"),
        ({"model": "other"}, "model", "there is no model"),
        ({"messages": []}, "messages", "they are the input of this route"),
        ({"max_tokens": 3}, "max_tokens", "it is max_output_tokens"),
        ({"response_format": {}}, "response_format", "it is text.format"),
        ({"verbosity": "low"}, "verbosity", "unknown parameter"),
        ({"background": True}, "background", "not supported: a response is made while"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id goes on"),
        ({"prompt": {"id": "p"}}, "prompt", "this server keeps no prompts"),
        ({"service_tier": "flex"}, "service_tier", "send"),
        ({"truncation": "some"}, "truncation", "must be auto or disabled"),
        ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
        ({"n": 2}, "n", "a response is one answer"),
        ({"top_logprobs": 2}, "top_logprobs", "needs message.output_text.logprobs in include"),
        ({"include": ["file_search_call.results"]}, "include[0]", "must be message.output_text.logprobs or"),
        ({"stream_options": {}}, "stream_options", "need stream: true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "send",
        ),
        (
            {"text": {"verbosity": "low"}},
            "text.verbosity",
            "text.verbosity 'low' is not supported: the model's chat template",
        ),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "reasoning.effort 'high' is not supported"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "must be none, minimal,"),
        ({"reasoning_max_tokens": 3}, "reasoning_max_tokens", "not known how this model writes thoughts"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "text.format and structured_outputs both say",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
        ({"max_output_tokens": 2047}, "max_output_tokens", "is too long for max_output_tokens 2047"),
        ({"input": "the " * 3000}, "input", "the prompt is too long"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "use text, json_object or json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "needs the type json_schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format.schema",
            "the key 'not' at #, which is not supported",
        ),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "thoughts are not summarized"),
        ({"tools": [{"type": "web_search", "filters": {}}]}, "tools[0].type", "use function"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "use function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "must match"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "named 'weather'"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading", "not supported"),
        (
            {"tools": [{**WEATHER, "strict": True, "parameters": {"type": "object", "not": {}}}]},
            "tools[0].parameters",
            "has the key 'not'",
        ),
        (
            {
                "tools": [WEATHER, {"type": "function", "name": "f", "parameters": {"type": "object", "not": {}}}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "f"}],
                },
            },
            "tools[1].parameters",
            "has the key 'not'",
        ),
        ({"tool_choice": "any"}, "tool_choice", "must be none, auto, required or an object"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.name", "is missing"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "wether"}}, "tool_choice", "mean 'weather'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "use function or allowed"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "name": "a", "tools": []}},
            "tool_choice.tools",
            "must not be empty",
        ),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "there is no stored answer 'resp_0'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    check_refused(server, body, param, words)


def check_refused(server: RunningServer, body: dict[str, Any], param: str, words: str) -> None:
    answer = post(server, **body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("item", "place", "words"),
    [
        ({"type": "file_search_call", "queries": []}, ".type", "use message, function_call,"),
        ({"role": "user"}, ".content", "is missing"),
        ({"role": "tool", "content": "a"}, ".role", "must be user, assistant, system or developer"),
        ({"role": "user", "content": []}, ".content", "must not be empty"),
        ({"role": "user", "content": "a", "call_id": "b"}, ".call_id", "nothing that an item of the type message has"),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            ".content[0].type",
            "use input_text",
        ),
        ({"role": "user", "content": [{"type": "output_text", "text": "x"}]}, ".content[0].type", "must be input_text"),
        ({"role": "user", "content": [{"type": "input_text"}]}, ".content[0]", "must have a text"),
        ({"type": "function_call", "call_id": "1", "name": "f"}, ".arguments", "is missing"),
        ({"type": "function_call_output", "call_id": "1", "output": "a"}, ".call_id", "is the id of no call"),
        ({"type": "item_reference", "id": "msg_1"}, ".id", "is the id of no item of a stored response"),
        ({"type": "item_reference", "id": "msg_" + "0" * 32 + "0"}, ".id", "there is no stored answer"),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": [1]}]},
            ".content[0].annotations",
            "leave it out",
        ),
    ],
)
def test_items_that_are_wrong_are_refused_by_name(
    server: RunningServer, item: dict[str, Any], place: str, words: str
) -> None:
    check_refused(server, {"input": [{"role": "user", "content": "a"}, item]}, f"input[1]{place}", words)


def test_what_requests_nothing_passes(server: RunningServer) -> None:
    body = {
        "background": False,
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
        "prompt_cache_key": "a",
        "reasoning": {"effort": None, "summary": "auto"},
        "safety_identifier": "b",
        "service_tier": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": "c",
    }
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    assert {
        name: answer.json()[name] for name in ("user", "safety_identifier", "prompt_cache_key", "max_tool_calls")
    } == {
        "user": "c",
        "safety_identifier": "b",
        "prompt_cache_key": "a",
        "max_tool_calls": 3,
    }
    left_out = post(
        server, **dict.fromkeys(ResponseRequest.__struct_fields__, None) | {"input": "Hi"} | {"max_output_tokens": 2}
    )
    assert left_out.status_code == 200, left_out.text


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=y", "after"), ("page=2", "page")],
)
def test_queries_that_are_wrong_are_refused_by_name(server: RunningServer, query: str, param: str) -> None:
    answer_id = post(server).json()["id"]
    with server.http() as http:
        answer = http.get(f"{PATH}/{answer_id}/input_items?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        streamed = http.get(f"{PATH}/{answer_id}?stream=true")
        assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")


def test_answers_match_the_types_in_the_document(server: RunningServer) -> None:
    body = {"include": LOGPROBS, "top_logprobs": 2, "splitfuse_timing": True, "tools": []}
    data = post(server, **body).content
    assert msgspec.to_builtins(msgspec.json.decode(data, type=ResponseAnswer)) == json.loads(data)
    events = post(server, **body, stream=True).text.split("\n\n")
    assert events[-1] == ""
    for event in events[:-1]:
        name, data_line = event.split("\n")
        text = data_line.removeprefix("data: ").encode()
        decoded = msgspec.json.decode(text, type=ResponseEvent)
        assert msgspec.to_builtins(decoded) == json.loads(text) and name == f"event: {decoded.type}"
        assert decoded.type in EVENTS
