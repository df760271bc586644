"""Tries langchain-openai: chat, streams, with_structured_output, bind_tools, embeddings."""

from __future__ import annotations

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from benchmarks.clients.features import KEY, MODEL, STORY, V1, check, feature, run

chat_model = ChatOpenAI(base_url=V1, api_key=KEY, model=MODEL, max_retries=0, max_tokens=200, timeout=120)


class Person(BaseModel, extra="forbid"):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


@tool(args_schema=Person)
def save(name: str, age: int) -> str:
    """Save a person."""
    return f"saved {name}, {age}"


@feature("chat")
def chat() -> None:
    check(chat_model.invoke(STORY).content)


@feature("stream")
async def stream() -> None:
    check("".join([chunk.content async for chunk in chat_model.astream(STORY)]))


@feature("structured output")
def structured() -> None:
    for method in ("json_schema", "function_calling"):
        check(isinstance(chat_model.with_structured_output(Person, method=method).invoke(STORY), Person), method)


@feature("tools")
def tools() -> None:
    bound = chat_model.bind_tools([save], tool_choice="save")
    answer = bound.invoke(STORY)
    (call, *_) = answer.tool_calls
    check(call["name"] == "save" and set(call["args"]) == {"name", "age"}, call)
    results = [ToolMessage("saved", tool_call_id=each["id"]) for each in answer.tool_calls]
    check(chat_model.bind_tools([save]).invoke([HumanMessage(STORY), answer, *results]) is not None)


@feature("streamed tools")
def streamed_tools() -> None:
    whole = None
    for chunk in chat_model.bind_tools([save], tool_choice="required").stream(STORY):
        whole = chunk if whole is None else whole + chunk
    check(whole is not None and whole.tool_calls, whole)


@feature("embeddings")
def embeddings() -> None:
    plain = OpenAIEmbeddings(base_url=V1, api_key=KEY, model=MODEL, check_embedding_ctx_length=False)
    check(len(plain.embed_documents(["a dog", "a cat"])) == 2)


run()
