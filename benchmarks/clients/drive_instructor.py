"""Tries instructor: answers as pydantic objects, by tools, by JSON and by JSON schema, and streamed parts of them."""

from __future__ import annotations

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

from benchmarks.clients.features import KEY, MODEL, STORY, V1, check, feature, run

ASK = [{"role": "user", "content": STORY}]


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=99)


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=V1, api_key=KEY, max_retries=0, timeout=120), mode=mode)


@feature("tools")
def tools() -> None:
    made = client(instructor.Mode.TOOLS).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Person, max_retries=0
    )
    check(isinstance(made, Person), made)


@feature("structured output")
def schema() -> None:
    made = client(instructor.Mode.JSON_SCHEMA).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Person, max_retries=0
    )
    check(isinstance(made, Person), made)


@feature("streamed tools")
def partial() -> None:
    parts = list(
        client(instructor.Mode.TOOLS).chat.completions.create_partial(
            model=MODEL, messages=ASK, response_model=Person, max_retries=0
        )
    )
    check(parts and parts[-1].age is not None, parts[-1:])


run()
