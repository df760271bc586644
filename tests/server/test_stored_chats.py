"""Answers to chats that the server keeps because requests ask for it, read with the `openai` client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running_server import RunningServer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Anna"}]
REQUEST: dict[str, Any] = {"model": "storyteller", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}


@pytest.fixture
def ai(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_stored_chat_is_read_and_deleted(ai: openai.OpenAI) -> None:
    more = {"logprobs": True, "top_logprobs": 1, "n": 2, "extra_body": {"prompt_logprobs": 1}}
    answer = ai.chat.completions.create(store=True, metadata={"a": "b"}, **REQUEST, **more)
    assert ai.chat.completions.retrieve(answer.id) == answer and answer.to_dict()["metadata"] == {"a": "b"}
    assert answer.choices[1].logprobs is not None and answer.choices[1].logprobs.content
    messages = list(ai.chat.completions.messages.list(answer.id, limit=1))
    assert [(each.role, each.content) for each in messages] == [("system", "Be brief."), ("user", "Hi")]
    deleted = ai.chat.completions.delete(answer.id)
    assert (deleted.id, deleted.deleted) == (answer.id, True)
    for call in (ai.chat.completions.retrieve, ai.chat.completions.delete, ai.chat.completions.messages.list):
        with pytest.raises(openai.NotFoundError, match="there is no stored answer"):
            call(answer.id)


def test_a_stored_stream_is_the_answer_as_a_whole(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(store=True, n=2, **REQUEST)
    *_, last = ai.chat.completions.create(store=True, n=2, stream=True, **REQUEST)
    stored = ai.chat.completions.retrieve(last.id)
    assert stored.choices == whole.choices and stored.model == whole.model
    assert stored.usage is not None and whole.usage is not None
    assert stored.usage.completion_tokens == whole.usage.completion_tokens


def test_only_what_asks_for_it_is_stored_each_api_apart(ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(**REQUEST)
    stored = ai.chat.completions.create(store=True, **REQUEST)
    response = ai.responses.create(model="storyteller", input="Hi", max_output_tokens=1)
    for call, answer_id in (
        (ai.chat.completions.retrieve, chat.id),
        (ai.chat.completions.retrieve, response.id),
        (ai.responses.retrieve, stored.id),
        (ai.responses.delete, stored.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call(answer_id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.create(model="storyteller", input="Hi", previous_response_id=stored.id)
