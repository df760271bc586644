"""Thoughts in chats: apart from the content, within their budget, before the form of an answer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from command_line import Run
from patience import PATIENCE
from running_server import RunningServer, running_server
from thinking_model import thinking_model

import splitfuse
from splitfuse.config.server import ServerConfig

USER: Any = {"role": "user", "content": "Erik plays the cello. Anna keeps a goose.\n\nWho keeps a goose?"}
TOOLS: Any = [{"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = thinking_model(tmp_path_factory.mktemp("thinking"))
    with running_server(ServerConfig(served_model_name="thinker"), model=folder, num_blocks=500) as server:
        yield server


@pytest.fixture(scope="module")
def ai(thinker: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


def ask(ai: openai.OpenAI, **keywords: Any) -> Any:
    names = ("reasoning_max_tokens", "thinking_token_budget", "include_reasoning", "structured_outputs")
    extra = {name: keywords.pop(name) for name in (*names, "chat_template_kwargs") if name in keywords}
    keywords = {"temperature": 0, "max_tokens": 60, **keywords}
    return ai.chat.completions.create(model="thinker", messages=[USER], extra_body=extra, **keywords)


def joined(chunks: Any) -> tuple[str, str, str]:
    parts = {"reasoning": "", "content": ""}
    reason = ""
    for chunk in chunks:
        (choice,) = chunk.choices
        for name in parts:
            parts[name] += getattr(choice.delta, name, None) or ""
        assert getattr(choice.delta, "reasoning_content", None) == getattr(choice.delta, "reasoning", None)
        reason = choice.finish_reason or reason
    return parts["reasoning"], parts["content"], reason


def whole(answer: Any) -> tuple[str, str, str]:
    (choice,) = answer.choices
    message = choice.message
    return getattr(message, "reasoning", None) or "", message.content or "", choice.finish_reason


def test_a_budget_closes_the_thought_and_the_model_answers(ai: openai.OpenAI) -> None:
    for name in ("reasoning_max_tokens", "thinking_token_budget"):
        answer = ask(ai, **{name: 3})
        reasoning, content, _ = whole(answer)
        assert reasoning and content and "think>" not in reasoning + content
        assert answer.usage.completion_tokens_details.reasoning_tokens == 3
        assert joined(ask(ai, **{name: 3}, stream=True)) == whole(answer)


def test_a_thought_that_fills_the_answer_ends_by_length(ai: openai.OpenAI) -> None:
    answer = ask(ai, max_tokens=3, reasoning_max_tokens=50)
    reasoning, content, reason = whole(answer)
    assert (content, reason) == ("", "length") and reasoning
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3


def test_thoughts_can_be_left_out_of_answers(ai: openai.OpenAI) -> None:
    reasoning, content, reason = whole(ask(ai, reasoning_max_tokens=3))
    for found in (
        whole(ask(ai, reasoning_max_tokens=3, include_reasoning=False)),
        joined(ask(ai, reasoning_max_tokens=3, include_reasoning=False, stream=True)),
    ):
        assert reasoning and found == ("", content, reason)


@pytest.mark.parametrize(
    "keywords",
    [
        {"reasoning_effort": "none"},
        {"reasoning_effort": "minimal"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=["none", "minimal", "switch"],
)
def test_a_model_can_be_told_not_to_think(ai: openai.OpenAI, keywords: dict[str, Any]) -> None:
    answer = ask(ai, **keywords)
    assert whole(answer)[:2] == ("", "Anna keeps a goose.")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_effort_that_the_template_does_not_know_is_refused(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="only knows whether to think") as refusal:
        ask(ai, reasoning_effort="high")
    assert refusal.value.param == "reasoning_effort"


def test_a_form_begins_after_the_thought(ai: openai.OpenAI) -> None:
    form = {"structured_outputs": {"regex": "[a-d]{3}!"}, "reasoning_max_tokens": 3}
    for found in (whole(ask(ai, **form)), joined(ask(ai, **form, stream=True))):
        reasoning, content, reason = found
        assert reasoning and len(content) == 4 and content.endswith("!") and reason == "stop"


def test_a_required_call_follows_the_thought(ai: openai.OpenAI) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "reasoning_max_tokens": 3}
    answer = ask(ai, **asked)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})
    assert choice.message.reasoning and choice.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"enable_thinkin": True}, "enable_thinkin is not read .*; did you mean 'enable_thinking'"),
        ({"zz": 1}, "zz is not read by the model's chat template: leave it out"),
        *(({name: []}, f"{name} is not one of") for name in ("messages", "tools", "documents")),
        ({"add_generation_prompt": False}, "add_generation_prompt is not one of"),
    ],
)
def test_variables_that_change_nothing_are_refused(ai: openai.OpenAI, variables: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"chat_template_kwargs.{words}") as refusal:
        ask(ai, chat_template_kwargs=variables)
    assert refusal.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("text", ["<|user|>", "</think>", "<think>", "<|end|>"])
def test_a_form_may_ask_for_the_text_of_a_control_token(ai: openai.OpenAI, text: str) -> None:
    properties = {"a": {"const": f"x{text}y"}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = whole(ask(ai, response_format=form, reasoning_effort="none", max_tokens=80))[1]
    assert json.loads(content) == {"a": f"x{text}y"}


def test_judgements_are_read_before_any_thought(tmp_path: Path) -> None:
    folder, questions = Path(thinking_model(tmp_path)), {"x": {"type": "noul", "instructions": "Is it so?"}}
    body = {"state": "s", "questions": questions}
    config, switch = (folder / "tokenizer_config.json").read_text(), "enable_thinking is not defined or enable_thinking"
    for condition, status in (("thinking is not defined or thinking", 200), ("true", 400)):
        (folder / "tokenizer_config.json").write_text(config.replace(switch, condition))
        with running_server(ServerConfig(), model=str(folder), num_blocks=100) as server, server.http() as http:
            answer = http.post("/v1/systemone", json=body)
            assert answer.status_code == status, answer.text
    assert "opens a thought" in answer.json()["error"]["message"]


def test_thoughts_and_logprobs_agree(ai: openai.OpenAI) -> None:
    answer = ask(ai, reasoning_max_tokens=3, logprobs=True)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_thoughts_that_are_left_out_have_no_logprobs(ai: openai.OpenAI) -> None:
    asked = {"reasoning_max_tokens": 3, "include_reasoning": False, "logprobs": True}
    answer = ask(ai, **asked)
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert "".join(tokens).removesuffix("<|end|>").strip() == answer.choices[0].message.content
    streamed = [
        entry.token
        for chunk in ask(ai, **asked, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == tokens


def test_pipeline_and_client_give_thoughts_apart(thinker: RunningServer) -> None:
    asked: dict[str, Any] = {"chat": True, "reasoning_max_tokens": 3, "max_new_tokens": 60}
    pipe = splitfuse.Pipeline(thinker.engine, thinker.service.tokenizer)
    prepared = pipe.prepare([USER], **asked)
    with splitfuse.client(thinker.url) as client:
        (remote,) = client([USER], **asked)
        pieces = list(client([USER], stream=True, **asked))
    assert prepared[0].params.reasoning is not None
    assert "".join(piece.reasoning for piece in pieces) == remote.reasoning != ""
    assert "".join(piece.text for piece in pieces) == remote.generated_text != ""
    with pytest.raises(splitfuse.InvalidRequestError, match="only knows whether to think"):
        pipe.prepare([USER], chat=True, reasoning_effort="low")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_chat_command_shows_thoughts_in_terminals(
    thinker: RunningServer, monkeypatch: pytest.MonkeyPatch, run: Run, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    question = USER["content"].replace("\n\n", " ")
    shown = run("chat", "--url", thinker.url, "--reasoning-max-tokens", 3, stdin=question).out
    thought, end, answer = shown.rpartition("\x1b[22m\n\n")
    assert bool(thought and end) == is_terminal and answer.strip() and "\x1b" not in answer
