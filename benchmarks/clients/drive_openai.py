"""Tries openai-python: completions, chat, parsed answers, tools, responses, embeddings."""

from __future__ import annotations

import json

from openai import OpenAI
from pydantic import BaseModel, Field

from benchmarks.clients.features import KEY, MODEL, SCHEMA, STORY, V1, check, feature, run

client = OpenAI(base_url=V1, api_key=KEY, max_retries=0, timeout=120)
ASK = [{"role": "user", "content": STORY}]
TOOL = {"type": "function", "function": {"name": "save", "description": "Save a person", "parameters": SCHEMA}}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


@feature("models")
def models() -> None:
    check(MODEL in [model.id for model in client.models.list()])


@feature("completions")
def completions() -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, logprobs=2)
    check(answer.choices[0].text and answer.usage.completion_tokens == 8, answer)


@feature("chat")
def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=16)
    check(answer.choices[0].message.content, answer)


@feature("stream")
def stream() -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=16, stream=True, stream_options=options)
    )
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices) and chunks[-1].usage, chunks[-1])


@feature("structured output")
def parse() -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, temperature=1, seed=1)
    check(isinstance(answer.choices[0].message.parsed, Person), answer)


@feature("tools")
def tools() -> None:
    first = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", seed=1)
    choice = first.choices[0]
    check(choice.finish_reason == "tool_calls", choice)
    (call, *_) = choice.message.tool_calls
    check(set(json.loads(call.function.arguments)) == {"name", "age"}, call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "saved"}
    messages = [*ASK, choice.message, *({**result, "tool_call_id": each.id} for each in choice.message.tool_calls)]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=16)
    check(second.choices[0].finish_reason, second)


@feature("streamed tools")
def streamed_tools() -> None:
    named = {"type": "function", "function": {"name": "save"}}
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}], tool_choice=named
    ) as events:
        events.until_done()
        message = events.get_final_completion().choices[0].message
    check(json.loads(message.tool_calls[0].function.arguments), message)


@feature("responses")
def responses() -> None:
    first = client.responses.create(model=MODEL, input=STORY, max_output_tokens=16)
    check(first.output_text, first)
    second = client.responses.create(model=MODEL, input="Go on.", previous_response_id=first.id, max_output_tokens=16)
    check(second.output_text, second)
    kinds = [event.type for event in client.responses.create(model=MODEL, input=STORY, stream=True)]
    check(kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds)


@feature("responses: parse, tools")
def responses_parse() -> None:
    parsed = client.responses.parse(model=MODEL, input=STORY, text_format=Person, temperature=1)
    check(isinstance(parsed.output_parsed, Person), parsed)
    tool = {"type": "function", "name": "save", "parameters": SCHEMA, "strict": True}
    called = client.responses.create(model=MODEL, input=STORY, tools=[tool], tool_choice="required")
    check(any(item.type == "function_call" for item in called.output), called)


@feature("embeddings")
def embeddings() -> None:
    answer = client.embeddings.create(model=MODEL, input=["a dog", "a cat"])
    check(len(answer.data) == 2 and len(answer.data[0].embedding) > 1, answer)


run()
