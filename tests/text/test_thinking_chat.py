"""A chat with a model that thinks: the engine and the parser of the answer agree on where a thought ends."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import splitfuse
from splitfuse.core.request_output import FinishReason
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.generation import Generation
from splitfuse.text.kwargs import sampling_params
from splitfuse.text.prompts import ChatOptions, PromptEncoder

START, END, EOS = 2354, 2355, 4
FORM = {"regex": "[a-d]{2}( [a-d]){1,3}!"}
TALK = [{"role": "user", "content": "Who lives in the </think> village?"}]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[splitfuse.Pipeline]:
    """The bundled model with tokens for thoughts, of its padded vocabulary."""
    folder, source = tmp_path_factory.mktemp("thinking"), Path(BUNDLED_MODEL)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token_id, content in ((START, "<think>"), (END, "</think>")):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": token_id, "content": content})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if open %}<think>\n{% endif %}{# </think> #}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    yield splitfuse.pipeline(str(folder), dtype="float32")


def chats(pipe: splitfuse.Pipeline, count: int, **settings: Any) -> list[Generation]:
    """Generate answers with thoughts of up to 5 tokens, or of any number, that the template opens, or the model."""
    encoder, rng, generations = PromptEncoder(pipe.tokenizer), Random(3), list[Generation]()
    for number in range(count):
        is_open = number % 2 == 0
        opens = 30.0 if rng.random() < 0.6 and not is_open else -100.0
        bias = {START: opens, END: rng.choice([6.0, -9.0]), EOS: rng.choice([5.0, 0.0])}
        own = {"temperature": 1.0, "seed": number, "logit_bias": bias, "max_new_tokens": 40, **settings}
        params = encoder.compile(sampling_params(**own))
        request = encoder.encode_chat(TALK, params, ChatOptions(variables={"open": is_open}, reads_parts=True))
        assert request.params.reasoning is not None and request.params.reasoning.is_open is is_open
        reasoning = replace(request.params.reasoning, max_tokens=number % 6)
        generations += pipe.generator.add(replace(request, params=replace(request.params, reasoning=reasoning)))
    list(pipe.generator.stream(generations))
    return generations


@pytest.mark.parametrize("has_form", [True, False])
def test_content_begins_where_the_engine_begins_the_answer(pipe: splitfuse.Pipeline, has_form: bool) -> None:
    settings: dict[str, Any] = {"structured_outputs": FORM} if has_form else {"stop": ["village", "."]}
    num_thoughts, num_closed = 0, 0
    for number, generation in enumerate(chats(pipe, 20, **settings)):
        message, thought = generation.message, generation.request.params.thought()
        assert thought is not None
        inside = [token for token in generation.token_ids if not thought.push(token)]
        # White space around a thought belongs to neither part, and a model may repeat the marker that opens it.
        written, read = (re.sub(r"\s|<think>", "", text) for text in (pipe.tokenizer.decode(inside), message.reasoning))
        assert written.replace("</think>", "") == read
        assert generation.num_reasoning_tokens == thought.num_tokens <= number % 6
        num_thoughts += bool(read)
        num_closed += thought.num_tokens == number % 6 > 0
        if has_form:
            assert generation.finish_reason is FinishReason.STOP and re.fullmatch(FORM["regex"], message.content)
        else:
            assert "." not in message.content and "village" not in message.content
    assert num_thoughts > 2 and num_closed > 3


@pytest.mark.parametrize("prefill", ["Anna keeps <", "<think>\nwell</think>yes", "</th", "<tool_call>", "Hi\n"])
def test_answer_that_continues_a_text_is_what_was_generated(pipe: splitfuse.Pipeline, prefill: str) -> None:
    encoder, options = PromptEncoder(pipe.tokenizer), ChatOptions(False, True, reads_parts=True)
    talk = [*TALK, {"role": "assistant", "content": prefill}]
    for settings in ({}, {"structured_outputs": {"choice": [" no"]}, "logit_bias": {START: 50.0}}):
        params = encoder.compile(sampling_params(max_new_tokens=4, **settings))
        generations = pipe.generator.add(encoder.encode_chat(talk, params, options))
        list(pipe.generator.stream(generations))
        message = generations[0].message
        assert (message.content, message.reasoning) == (" no" if settings else generations[0].text, "")
