"""Tries pydantic-ai: an agent with text, with a typed output by a tool and by a schema."""

from __future__ import annotations

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from benchmarks.clients.features import KEY, MODEL, STORY, V1, check, feature, run

provider = OpenAIProvider(base_url=V1, api_key=KEY)
chat_model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = {"max_tokens": 300, "seed": 1, "parallel_tool_calls": False}


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


@feature("chat")
async def chat() -> None:
    check((await Agent(chat_model).run(STORY, model_settings=SETTINGS)).output)


@feature("stream")
async def stream() -> None:
    async with Agent(chat_model).run_stream(STORY, model_settings=SETTINGS) as result:
        check([text async for text in result.stream_text(delta=True)])


@feature("tools")
async def tools() -> None:
    agent = Agent(chat_model, output_type=Person)  # by a call of a tool that the answer must have
    check(isinstance((await agent.run(STORY, model_settings=SETTINGS)).output, Person))


@feature("structured output")
async def native() -> None:
    agent = Agent(chat_model, output_type=NativeOutput(Person))
    check(isinstance((await agent.run(STORY, model_settings=SETTINGS)).output, Person))


@feature("responses")
async def responses() -> None:
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), output_type=Person)
    check(isinstance((await agent.run(STORY, model_settings={"max_tokens": 300})).output, Person))


run()
