"""Tries openai-agents: an agent over Responses and over chat, with a tool and a typed output."""

from __future__ import annotations

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from benchmarks.clients.features import KEY, MODEL, STORY, V1, check, feature, run

set_tracing_disabled(disabled=True)


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


@function_tool
def save(person: Person) -> str:
    """Save a person."""
    return f"saved {person}"


def models() -> list[OpenAIResponsesModel | OpenAIChatCompletionsModel]:
    """Models with connections of their own: each trial has its event loop."""
    client = AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0, timeout=120)
    kinds = (OpenAIResponsesModel, OpenAIChatCompletionsModel)
    return [kind(model=MODEL, openai_client=client) for kind in kinds]


@feature("responses")
async def responses() -> None:
    agent = Agent(name="a", model=models()[0])
    check((await Runner.run(agent, STORY)).final_output)


@feature("chat")
async def chat() -> None:
    agent = Agent(name="a", model=models()[1])
    check((await Runner.run(agent, STORY)).final_output)


@feature("tools")
async def tools() -> None:
    for model in models():
        settings = ModelSettings(tool_choice="required", parallel_tool_calls=False)
        agent = Agent(
            name="a", model=model, tools=[save], model_settings=settings, tool_use_behavior="stop_on_first_tool"
        )
        check("saved" in (await Runner.run(agent, STORY)).final_output)


@feature("structured output")
async def structured() -> None:
    for model in models():
        agent = Agent(name="a", model=model, output_type=Person)
        check(isinstance((await Runner.run(agent, STORY)).final_output, Person))


@feature("stream")
async def stream() -> None:
    agent = Agent(name="a", model=models()[0])
    result = Runner.run_streamed(agent, STORY)
    check([event async for event in result.stream_events()] and result.final_output)


run()
