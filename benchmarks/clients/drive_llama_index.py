"""Tries llama-index: chat, streams, structured output, tools, embeddings, through its client of OpenAI-like servers."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

from benchmarks.clients.features import KEY, MODEL, STORY, V1, check, feature, run

llm = OpenAILike(
    model=MODEL,
    api_base=V1,
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=2048,
    max_tokens=200,
    max_retries=0,
)
ASK = [ChatMessage(role="user", content=STORY)]


class Person(BaseModel, extra="forbid"):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


def save(name: str, age: int) -> str:
    """Save a person."""
    return f"saved {name}, {age}"


@feature("chat")
def chat() -> None:
    check(llm.chat(ASK).message.content)


@feature("stream")
def stream() -> None:
    check(list(llm.stream_chat(ASK))[-1].message.content)


@feature("structured output")
def structured() -> None:
    check(isinstance(llm.as_structured_llm(Person).chat(ASK).raw, Person))


@feature("tools")
def tools() -> None:
    answer = llm.chat_with_tools(
        [FunctionTool.from_defaults(save, fn_schema=Person)], user_msg=STORY, tool_required=True
    )
    (call, *_) = llm.get_tool_calls_from_response(answer)
    check(set(call.tool_kwargs) == {"name", "age"}, call)


@feature("embeddings")
def embeddings() -> None:
    plain = OpenAILikeEmbedding(model_name=MODEL, api_base=V1, api_key=KEY)
    check(len(plain.get_text_embedding("a dog")) > 1)


run()
