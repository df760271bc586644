"""Thoughts in the engine: closed within their budget, followed by an answer, the same in any company."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
from forced_preemption import break_steps, force_preemptions
from guessed_drafts import guess_answers
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.core.reasoning import Reasoning
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.responses import Response

START, END, EOS = 1, 2, 4  # special tokens of the bundled model
WORDS = (300, 301)
FORM = {"regex": "[a-d]{2}( [a-d]){1,3}!"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[splitfuse.Pipeline]:
    yield splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights and the bundled one's tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    vocab_size = len(json.loads((Path(BUNDLED_MODEL) / "tokenizer.json").read_text())["model"]["vocab"])
    tiny_models.llama(vocab_size=vocab_size, eos_token_id=EOS).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(BUNDLED_MODEL) / name).read_bytes())
    return str(folder)


def thinking(pipe: splitfuse.Pipeline, prompt: str, reasoning: Reasoning, **settings: Any) -> PreparedRequest:
    (request,) = pipe.prepare(prompt, **settings)
    return replace(request, params=replace(request.params, reasoning=reasoning))


def run(pipe: splitfuse.Pipeline, requests: list[PreparedRequest]) -> list[Response]:
    responses = [piece.response for piece in pipe.run(requests) if piece.response is not None]
    check_scheduler(pipe.engine.scheduler)
    return sorted(responses, key=lambda each: (each.index, each.choice))


def outcome(response: Response) -> tuple[object, ...]:
    return response.token_ids, response.generated_text, response.finish_reason, response.error


def attempts(pipe: splitfuse.Pipeline, count: int) -> list[PreparedRequest]:
    """Requests that tend to open thoughts, to end within them, and to open them again."""
    rng = Random(5)
    requests = []
    for number in range(count):
        reasoning = Reasoning(
            start_token_ids=(START,),
            end_token_ids=(END,),
            is_open=rng.random() < 0.5,
            max_tokens=number % 8,
            close_token_ids=rng.choice([(), (*WORDS, END)]),
            answer_token_ids=rng.choice([(), (300, 301)]),
        )
        settings: dict[str, Any] = rng.choice([{}, {"structured_outputs": FORM}, {"top_p": 0.9, "min_new_tokens": 20}])
        bias = {START: 6.0 if reasoning.is_open else 20.0, EOS: rng.choice([0.0, 7.0])}
        prompt, seed = f"Once upon a time {number % 5}", rng.getrandbits(40)
        kwargs = {"max_new_tokens": 24, "temperature": 1.0, "seed": seed, "logit_bias": bias, **settings}
        requests.append(thinking(pipe, prompt, reasoning, **kwargs))
    return requests


@pytest.mark.parametrize("is_bundled", [True, False], ids=["bundled", "random"])
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_thought_closes_within_its_budget_and_is_answered(
    is_bundled: bool, count: int, random_model: str
) -> None:
    pipe = splitfuse.pipeline(BUNDLED_MODEL if is_bundled else random_model, dtype="float32")
    requests, num_thoughts, num_forms = attempts(pipe, count), 0, 0
    for request, response in zip(requests, run(pipe, requests), strict=True):
        params, reasoning, tokens = request.params, request.params.reasoning, list(response.token_ids)
        assert reasoning is not None and response.error is None
        answer = tokens
        if reasoning.is_open or tokens[0] == START:
            num_thoughts += 1
            begin, end = (0 if reasoning.is_open else 1), tokens.index(END)
            thought = tokens[begin:end]
            assert EOS not in thought
            words = list(WORDS) if reasoning.close_token_ids and thought[-2:] == list(WORDS) else []
            assert len(thought) - len(words) <= (reasoning.max_tokens or 0)
            answer = tokens[end + 1 :]
        assert answer
        if params.structured_outputs is not None:
            num_forms += 1
            answer = answer[len(reasoning.answer_token_ids) if len(answer) < len(tokens) else 0 :]
            text = pipe.tokenizer.decode(answer)
            assert response.finish_reason is FinishReason.STOP and re.fullmatch(FORM["regex"], text)
    assert num_thoughts > count / 2 and num_forms > count / 5


def test_thoughts_are_equal_alone_preempted_and_in_broken_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64)
    requests = [
        replace(request, params=replace(request.params, n=number % 2 + 1, logprobs=number % 3))
        for number, request in enumerate(attempts(pipe, 4))
    ]
    alone = [outcome(response) for request in requests for response in run(pipe, [request])]
    force_preemptions(pipe.engine)
    assert [outcome(response) for response in run(pipe, requests)] == alone

    break_steps(monkeypatch)
    del pipe.engine.step  # type: ignore[method-assign]
    assert [outcome(response) for response in run(pipe, requests)] == alone

    drafting = guess_answers(pipe.engine, requests, [tokens for tokens, *_ in alone])  # type: ignore[misc]
    assert [outcome(response) for response in run(pipe, requests)] == alone
    assert drafting.accepted > 50


def test_a_forced_token_has_the_logprob_that_the_model_gives_it(pipe: splitfuse.Pipeline) -> None:
    reasoning = Reasoning(end_token_ids=(END,), is_open=True, max_tokens=2, close_token_ids=(*WORDS, END))
    (response,) = run(pipe, [thinking(pipe, "Once upon", reasoning, max_new_tokens=8, logprobs=1, temperature=0.8)])
    assert response.token_ids[2:5] == (*WORDS, END) and response.logprobs is not None
    (prompt,) = pipe.prepare("Once upon")
    again = replace(prompt, token_ids=(*prompt.token_ids, *response.token_ids))
    (read,) = run(pipe, [replace(again, params=SamplingParams(max_tokens=1, prompt_logprobs=1))])
    assert read.prompt_logprobs is not None
    expected = read.prompt_logprobs[-len(response.token_ids) :]
    assert [entry.logprob for entry in response.logprobs] == pytest.approx([e.logprob for e in expected], abs=1e-3)


def test_a_budget_wins_over_penalties_bias_and_stop_tokens(pipe: splitfuse.Pipeline) -> None:
    reasoning = Reasoning(end_token_ids=(END,), is_open=True, max_tokens=3)
    settings: dict[str, Any] = {"logit_bias": {END: -100.0}, "stop_token_ids": [END], "min_new_tokens": 6}
    for temperature in (0.0, 1.0):
        request = thinking(pipe, "a", reasoning, max_new_tokens=9, temperature=temperature, seed=1, **settings)
        (response,) = run(pipe, [request])
        assert response.token_ids[3] == END and response.generated_length > 6 and response.error is None


def test_without_budget_or_form_a_thought_only_is_counted(pipe: splitfuse.Pipeline) -> None:
    (plain,) = pipe.prepare("Once", max_new_tokens=12, logit_bias={EOS: 9.0}, temperature=1.0, seed=7)
    wanted = run(pipe, [plain])[0]
    assert wanted.finish_reason is FinishReason.STOP and wanted.token_ids[-1] == EOS
    reasoning = Reasoning(end_token_ids=(END,), is_open=True)
    (response,) = run(pipe, [replace(plain, params=replace(plain.params, reasoning=reasoning))])
    assert outcome(response) == outcome(wanted)
    for change in ({"max_tokens": 11}, {"max_tokens": 0}):
        steered = replace(plain.params, reasoning=replace(reasoning, **change))
        (response,) = run(pipe, [replace(plain, params=steered)])
        assert END in response.token_ids and EOS not in response.token_ids[: response.token_ids.index(END)]


def test_a_thought_that_fills_max_tokens_ends_by_length(pipe: splitfuse.Pipeline) -> None:
    reasoning = Reasoning(end_token_ids=(END,), is_open=True, max_tokens=100)
    (generation,) = pipe.generator.add(thinking(pipe, "Once", reasoning, max_new_tokens=5, structured_outputs=FORM))
    list(pipe.generator.stream([generation]))
    assert generation.finish_reason is FinishReason.LENGTH and generation.num_reasoning_tokens == 5


def test_stop_strings_count_in_the_answer_alone(pipe: splitfuse.Pipeline) -> None:
    cat = pipe.tokenizer.encode(" cat", add_special_tokens=False)
    reasoning = Reasoning(end_token_ids=(END,), is_open=True, max_tokens=2, close_token_ids=(*cat, END))
    form = {"choice": ["a dog, a cat, a cow"]}
    request = thinking(pipe, "Once", reasoning, max_new_tokens=40, structured_outputs=form, stop=["cat", "cow"])
    (response,) = run(pipe, [request])
    assert response.stop_string == "cat" and response.generated_text.endswith(" cata dog, a ")


def test_a_stop_string_does_not_span_a_thought(pipe: splitfuse.Pipeline) -> None:
    def encode(text: str) -> tuple[int, ...]:
        return pipe.tokenizer.encode(text, add_special_tokens=False)

    (request,) = pipe.prepare("Once", stop=["cat", "sat"])
    reasoning = Reasoning(start_token_ids=(START,), end_token_ids=(END,), reopens=True)
    request = replace(request, params=replace(request.params, reasoning=reasoning))
    generation, stopped = Generation("a", request, pipe.tokenizer), list[int]()
    tokens = (*encode(" a ca"), START, *encode("t sat"), END, *encode("t"))
    for token in (*tokens, *encode(" sat"), *encode(" on")):
        if generation.finish_reason is None:
            generation.push(RequestOutput("a", (token,)), stopped.append)
    assert generation.text == " a cat satt " and generation.stop_string == "sat"
    assert generation.num_reasoning_tokens == len(encode("t sat")) and stopped == [len(generation.token_ids)]


def test_a_token_beyond_the_vocabulary_is_refused(pipe: splitfuse.Pipeline) -> None:
    size = pipe.engine.limits.vocab_size
    params = SamplingParams(reasoning=Reasoning(end_token_ids=(size,), is_open=True))
    with pytest.raises(InvalidRequestError, match=f"reasoning has the token id {size}, but"):
        pipe.engine.add_request("a", [1], params)
