"""Tries anthropic-python: messages, streams, tools, counting tokens."""

from __future__ import annotations

from anthropic import Anthropic

from benchmarks.clients.features import KEY, MODEL, SCHEMA, STORY, URL, check, feature, run

client = Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
ASK = [{"role": "user", "content": STORY}]
TOOL = {"name": "save", "description": "Save a person", "input_schema": SCHEMA}


@feature("chat")
def chat() -> None:
    answer = client.messages.create(model=MODEL, max_tokens=16, messages=ASK, system="Be short.")
    check(answer.content[0].text and answer.usage.output_tokens, answer)


@feature("stream")
def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=16, messages=ASK) as events:
        check("".join(events.text_stream))
        check(events.get_final_message().stop_reason in ("max_tokens", "end_turn"))


@feature("tools")
def tools() -> None:
    first = client.messages.create(
        model=MODEL, max_tokens=200, messages=ASK, tools=[TOOL], tool_choice={"type": "tool", "name": "save"}
    )
    check(first.stop_reason == "tool_use", first)
    calls = [block for block in first.content if block.type == "tool_use"]  # several, unless they are forbidden
    check(calls and all(set(call.input) == {"name", "age"} for call in calls), calls)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "saved"} for call in calls]
    turns = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = client.messages.create(model=MODEL, max_tokens=16, messages=turns, tools=[TOOL])
    check(second.stop_reason, second)


@feature("streamed tools")
def streamed_tools() -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=ASK, tools=[TOOL], tool_choice={"type": "any"}
    ) as events:
        message = events.get_final_message()
    check(any(block.type == "tool_use" and block.input for block in message.content), message)


@feature("count tokens")
def count_tokens() -> None:
    check(client.messages.count_tokens(model=MODEL, messages=ASK, tools=[TOOL]).input_tokens > 10)


run()
