"""Tries litellm: chat, streams, tools, structured output, embeddings, responses, Anthropic's messages."""

from __future__ import annotations

import json

import litellm

from benchmarks.clients.features import KEY, MODEL, SCHEMA, STORY, URL, V1, check, feature, run

TO = {"model": f"openai/{MODEL}", "api_base": V1, "api_key": KEY, "num_retries": 0}
ASK = [{"role": "user", "content": STORY}]
TOOL = {"type": "function", "function": {"name": "save", "description": "Save a person", "parameters": SCHEMA}}


@feature("chat")
def chat() -> None:
    check(litellm.completion(**TO, messages=ASK, max_tokens=16).choices[0].message.content)


@feature("stream")
def stream() -> None:
    chunks = list(litellm.completion(**TO, messages=ASK, max_tokens=16, stream=True))
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@feature("tools")
def tools() -> None:
    answer = litellm.completion(**TO, messages=ASK, tools=[TOOL], tool_choice="required", max_tokens=200)
    check(json.loads(answer.choices[0].message.tool_calls[0].function.arguments), answer)


@feature("structured output")
def structured() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(**TO, messages=ASK, response_format=form, max_tokens=200)
    check(set(json.loads(answer.choices[0].message.content)) == {"name", "age"}, answer)


@feature("embeddings")
def embeddings() -> None:
    check(len(litellm.embedding(**TO, input=["a dog", "a cat"], encoding_format="float").data) == 2)


@feature("responses")
def responses() -> None:
    check(litellm.responses(**TO, input=STORY, max_output_tokens=16).output)


@feature("messages")
async def messages() -> None:
    answer = await litellm.anthropic.messages.acreate(
        model=f"anthropic/{MODEL}", api_base=URL, api_key=KEY, messages=ASK, max_tokens=16
    )
    check(answer["content"][0]["text"], answer)


run()
