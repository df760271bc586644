"""The pipeline: prompts in every form, responses and streams; every keyword is honoured or refused by name."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from readable_answers import PROMPT, READABLE, texts

import splitfuse
from splitfuse.core.events import StepRecord
from splitfuse.core.request_output import FinishReason
from splitfuse.errors import ConfigError, InvalidRequestError, ModelError, ModelNotFoundError, TokenizerError
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.kwargs import SAMPLING_KEYWORDS


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64)


def refusal(pipe: splitfuse.Pipeline, prompts: Any = PROMPT, **keywords: Any) -> InvalidRequestError:
    """The error of a call in which nothing may have run."""
    steps: list[StepRecord] = []
    unsubscribe = pipe.engine.events.subscribe(StepRecord, steps.append)
    with pytest.raises(InvalidRequestError) as error:
        pipe(prompts, **keywords)
    unsubscribe()
    assert not steps and not pipe.engine.has_unfinished
    return error.value


# Prompts and responses -----------------------------------------------------------------------------------------------


def test_a_response_has_every_field(pipe: splitfuse.Pipeline) -> None:
    [response] = pipe(PROMPT, **READABLE, logprobs=2, prompt_logprobs=0)
    assert str(response) == response.generated_text == pipe.tokenizer.decode(response.token_ids)
    assert response.prompt_length == len(pipe.tokenizer.encode(PROMPT))
    assert response.generated_length == len(response.token_ids) == 12
    assert (response.finish_reason, response.finish_reason == "length") == (FinishReason.LENGTH, True)
    assert response.logprobs is not None and response.prompt_logprobs is not None
    assert [entry.token_id for entry in response.logprobs] == list(response.token_ids)
    assert all(len(entry.top) == 2 for entry in response.logprobs)
    assert [entry.token_id for entry in response.prompt_logprobs] == list(pipe.tokenizer.encode(PROMPT)[1:])
    assert (response.index, response.choice, response.stop_string, response.error) == (0, 0, None, None)
    timings = response.timings
    assert len(timings.tokens) == 12 and timings.finished is not None
    assert timings.arrival <= timings.tokens[0] <= timings.tokens[-1] <= timings.finished
    assert timings.time_to_first_token is not None and timings.total is not None
    assert 0 <= timings.time_to_first_token <= timings.total


def test_logprobs_are_only_there_if_asked_for(pipe: splitfuse.Pipeline) -> None:
    [response] = pipe(PROMPT, max_new_tokens=2)
    assert response.logprobs is None and response.prompt_logprobs is None


def test_one_prompt_many_and_token_ids_are_the_same(pipe: splitfuse.Pipeline) -> None:
    other = "Once upon a time"
    ids, other_ids = pipe.tokenizer.encode(PROMPT), pipe.tokenizer.encode(other)
    first, second = pipe(PROMPT, **READABLE), pipe(other, **READABLE)
    wanted = texts(first + second)
    assert texts(pipe([PROMPT, other], **READABLE)) == wanted
    assert texts(pipe((PROMPT, other), **READABLE)) == wanted
    assert texts(pipe([list(ids), other_ids], **READABLE)) == wanted
    assert texts(pipe([PROMPT, list(other_ids)], **READABLE)) == wanted
    assert texts(pipe(list(ids), **READABLE)) == texts(pipe(ids, **READABLE)) == texts(first)


def test_a_conversation_one_or_many(pipe: splitfuse.Pipeline) -> None:
    turn = {"role": "user", "content": PROMPT}
    [wanted] = texts(pipe(PROMPT, chat=True, **READABLE))
    assert texts(pipe([turn], chat=True, **READABLE)) == [wanted]
    assert texts(pipe([[turn], PROMPT], chat=True, **READABLE)) == [wanted, wanted]


def test_stream_pieces_are_the_responses(pipe: splitfuse.Pipeline) -> None:
    prompts = [PROMPT, "Once upon a time"]
    responses = pipe(prompts, n=2, **READABLE)
    assert [(r.index, r.choice) for r in responses] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    streamed: dict[tuple[int, int], str] = {}
    last: dict[tuple[int, int], splitfuse.Response] = {}
    for piece in pipe(prompts, n=2, stream=True, **READABLE):
        key = (piece.index, piece.choice)
        assert key not in last, "a piece after the last"
        streamed[key] = streamed.get(key, "") + piece.text
        if piece.response is not None:
            last[key] = piece.response
    assert [streamed[r.index, r.choice] for r in responses] == texts(responses)
    assert [last[r.index, r.choice].token_ids for r in responses] == [r.token_ids for r in responses]


def test_a_pipeline_answers_while_a_stream_is_open(pipe: splitfuse.Pipeline) -> None:
    [wanted] = texts(pipe(PROMPT, **READABLE))
    stream = pipe(PROMPT, stream=True, **READABLE)
    text = next(stream).text
    assert texts(pipe(PROMPT, **READABLE)) == [wanted]
    assert text + "".join(piece.text for piece in stream) == wanted


def test_dropping_a_stream_frees_its_blocks(pipe: splitfuse.Pipeline) -> None:
    stream = pipe([PROMPT] * 3, stream=True, **READABLE)
    next(stream)
    del stream
    assert pipe.engine.allocator.num_held == 0 and not pipe.engine.has_unfinished


def test_return_full_text_puts_the_prompt_before_the_answer(pipe: splitfuse.Pipeline) -> None:
    [short], [full] = pipe(PROMPT, **READABLE), pipe(PROMPT, return_full_text=True, **READABLE)
    assert full.generated_text == PROMPT + short.generated_text
    assert (full.token_ids, full.generated_length) == (short.token_ids, short.generated_length)


def test_a_bar_goes_to_standard_error_when_asked(pipe: splitfuse.Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe([PROMPT] * 3, max_new_tokens=1)
    assert capfd.readouterr() == ("", "")
    pipe([PROMPT] * 3, max_new_tokens=1, progress=True)
    captured = capfd.readouterr()
    assert "3/3" in captured.err and not captured.out


def test_loading_shows_the_memory_plan_and_a_bar_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    splitfuse.pipeline(num_blocks=70, progress=True)
    captured = capfd.readouterr()
    kernels, weights, *_ = captured.err.splitlines()
    assert "kernels" in kernels and weights.startswith("weights")
    assert "have" in captured.err and "Loading weights" in captured.err
    splitfuse.pipeline(num_blocks=70)
    assert capfd.readouterr() == ("", "") != captured


def test_one_request_may_fail_alone(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    pipe = splitfuse.pipeline(tmp_path, tokenizer=str(BUNDLED_MODEL), dtype="float32")
    poisoned = 96
    pipe.engine.executor.decoder.weights.embed[poisoned] = math.nan
    responses = pipe([[1, 2], [1, poisoned], [3]], max_new_tokens=4, logit_bias={poisoned: -100})
    assert [r.finish_reason for r in responses] == ["length", "error", "length"]
    assert responses[1].error == "the model computed unusable logits: NaN among them"
    assert responses[1].token_ids == () and responses[0].error is None


# Keywords ------------------------------------------------------------------------------------------------------------


def test_lengths(pipe: splitfuse.Pipeline) -> None:
    length = len(pipe.tokenizer.encode(PROMPT))
    usual = {"ignore_eos": True}
    assert pipe(PROMPT, max_new_tokens=5, **usual)[0].generated_length == 5
    assert pipe(PROMPT, max_length=length + 3, **usual)[0].generated_length == 3
    assert pipe(PROMPT, max_length=length + 3, max_new_tokens=5, **usual)[0].generated_length == 3
    assert pipe(PROMPT, max_length=length + 8, max_new_tokens=5, **usual)[0].generated_length == 5
    assert pipe.prepare(PROMPT)[0].params.max_tokens == 1024
    assert pipe.prepare(PROMPT * 60)[0].params.max_tokens == 2048 - len(pipe.tokenizer.encode(PROMPT * 60))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_length": 5}, r"max_length 5 leaves nothing to generate after a prompt of \d+ tokens"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1, not 0"),
        ({"max_length": "9"}, "max_length must be a whole number of at least 1, not '9'"),
        ({"max_length": True}, "max_length must be a whole number of at least 1, not True"),
        ({"max_length": 3000}, "max_length 3000 exceeds the model's 2048"),
        ({"max_length": 24, "min_new_tokens": 20}, "min_new_tokens 20 does not fit: max_length 24 leaves . after a"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to"),
        (
            {"max_new_tokens": 5000},
            ".* too long for max_new_tokens 5000: .* max_new_tokens can be at most",
        ),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, r"min_new_tokens must be at most max_new_tokens \(4\), not 9"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number from 0 to"),
        ({"do_sample": False, "top_p": 0.5}, "top_p 0.5 has no effect with do_sample=False"),
        ({"do_sample": True, "temperature": 0}, "temperature 0 is greedy and contradicts do_sample=True"),
        ({"do_sample": "no"}, "do_sample must be True or False, not 'no'"),
        ({"temperature": math.nan}, "temperature must be a number from 0 to 100, not nan"),
        ({"top_p": 0}, "top_p must be a number above 0 up to 1, not 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"min_p": 2}, "min_p must be a number from 0 to 1, not 2"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0 up to 100"),
        ({"logit_bias": {3072: 1}}, "logit_bias has the token id 3072, but the model's are from 0 to 3071"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping of token ids to numbers"),
        ({"stop": ["a", ""]}, "stop must be a list of non-empty strings"),
        ({"stop": 5}, "stop must be a list of non-empty strings, not 5"),
        ({"stop_token_ids": [3072]}, "stop_token_ids has the token id 3072"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"prompt_logprobs": 500}, "prompt_logprobs must be a whole number from 0 to 128"),
        ({"n": 0}, "n must be a whole number from 1 to 128"),
        ({"chat": "yes"}, "chat must be True or False"),
        ({"return_full_text": 1}, "return_full_text must be True or False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_invalid_keyword_is_refused_by_its_name(
    pipe: splitfuse.Pipeline, keywords: dict[str, Any], message: str
) -> None:
    error = refusal(pipe, **keywords)
    assert error.parameter in keywords
    assert re.match(message, str(error)), str(error)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_tokens", "max_new_tokens"),
        ("min_tokens", "min_new_tokens"),
        ("temprature", "temperature"),
        ("stops", "stop"),
        ("streaming", "stream"),
        ("return_fulltext", "return_full_text"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_one(pipe: splitfuse.Pipeline, wrong: str, right: str) -> None:
    assert str(refusal(pipe, **{wrong: 5})) == f"unknown keyword {wrong!r}; did you mean {right!r}?"


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'block_sizes'; did you mean 'block_size'"):
        splitfuse.pipeline(block_sizes=5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "the prompt is empty: it must have at least one character"),
        ([], "the list of prompts is empty"),
        ([[]], "the prompt is empty: it must have at least one token"),
        (None, "prompts must be a text or a list, not None"),
        (5, "prompts must be a text or a list, not 5"),
        (b"text", "prompts must be a text or a list, not b'text'"),
        ([1, "a"], "a prompt must be a text or a list of token ids, not"),
        ([True], "a prompt must be a text or a list of token ids, not"),
        ([3072], "prompt has the token id 3072"),
        (
            "a" * 20_000,
            r".* the prompt has more than 2048 tokens: .* takes at most 2047",
        ),
    ],
    ids=range(10),
)
def test_an_invalid_prompt_is_refused(pipe: splitfuse.Pipeline, prompts: Any, message: str) -> None:
    error = refusal(pipe, prompts)
    assert re.match(message, str(error)), str(error)


@pytest.mark.parametrize(("bad", "reason"), [("", "is empty"), ([-1], "token id -1"), (5, "not 5")])
def test_a_bad_prompt_is_named_by_its_index_and_none_runs(pipe: splitfuse.Pipeline, bad: Any, reason: str) -> None:
    message = str(refusal(pipe, [PROMPT, PROMPT, bad]))
    assert message.startswith("prompt 2: ") and reason in message


def test_random_choice_follows_from_the_keywords(pipe: splitfuse.Pipeline) -> None:
    def params(**keywords: Any) -> splitfuse.SamplingParams:
        return pipe.prepare(PROMPT, **keywords)[0].params

    assert params().temperature == params(seed=1).temperature == params(do_sample=False).temperature == 0
    assert params(do_sample=False, temperature=0).temperature == 0
    assert params(do_sample=True).temperature == params(top_p=0.9).temperature == params(top_k=5).temperature == 1
    assert params(min_p=0.1, temperature=0.5).temperature == params(do_sample=True, temperature=0.5).temperature == 0.5
    assert params(top_p=0.9, top_k=5, min_p=0.1).top_p == 0.9


def test_help_shows_every_sampling_keyword() -> None:
    shown = inspect.signature(splitfuse.Pipeline.prepare).parameters
    assert {"max_length", "do_sample", *SAMPLING_KEYWORDS} <= shown.keys() and "keywords" not in shown
    assert all(keyword in (splitfuse.Pipeline.prepare.__doc__ or "") for keyword in SAMPLING_KEYWORDS)


def test_every_way_to_ask_for_greedy_is_the_same(pipe: splitfuse.Pipeline) -> None:
    wanted = texts(pipe(PROMPT, max_new_tokens=8))
    for keywords in ({"do_sample": False}, {"temperature": 0}, {"top_k": 1}, {"do_sample": True, "top_k": 1}):
        assert texts(pipe(PROMPT, max_new_tokens=8, **keywords)) == wanted


def test_choices_with_a_seed_are_reproducible(pipe: splitfuse.Pipeline) -> None:
    first, again = (texts(pipe(PROMPT, n=3, **READABLE)) for _ in range(2))
    assert first == again and len(set(first)) == 3
    assert texts(pipe(PROMPT, n=3, **{**READABLE, "seed": 6})) != first


def test_without_a_seed_choices_are_not_repeated(pipe: splitfuse.Pipeline) -> None:
    runs = {texts(pipe(PROMPT, **{**READABLE, "seed": None}))[0] for _ in range(4)}
    assert len(runs) > 1


def test_logit_bias_forces_a_token(pipe: splitfuse.Pipeline) -> None:
    [response] = pipe(PROMPT, max_new_tokens=4, logit_bias={1000: 100})
    assert response.token_ids == (1000,) * 4


def test_penalties_are_honoured(pipe: splitfuse.Pipeline) -> None:
    forced: dict[str, Any] = {"logit_bias": {1000: 100.0, 1001: 60.0}, "max_new_tokens": 4}
    assert pipe(PROMPT, **forced)[0].token_ids == (1000,) * 4
    assert pipe(PROMPT, repetition_penalty=10, **forced)[0].token_ids[:2] == (1000, 1001)
    params = pipe.prepare(PROMPT, presence_penalty=1.5, frequency_penalty=-0.5)[0].params
    assert (params.presence_penalty, params.frequency_penalty) == (1.5, -0.5)


def test_stop_token_ids_and_one_stop_string_as_text(pipe: splitfuse.Pipeline) -> None:
    [response] = pipe(PROMPT, logit_bias={1000: 100}, stop_token_ids=[1000])
    assert (response.token_ids, response.finish_reason, response.stop_string) == ((1000,), "stop", None)
    [free] = pipe(PROMPT, **READABLE)
    [stopped] = pipe(PROMPT, stop=free.generated_text[5:8], **READABLE)
    assert stopped.stop_string == free.generated_text[5:8]
    assert texts(pipe(PROMPT, stop=None, stop_token_ids=None, **READABLE)) == [free.generated_text]


def test_settings_reach_the_engine_and_every_step_is_observed() -> None:
    steps: list[StepRecord] = []
    pipe = splitfuse.pipeline(
        dtype="float32",
        max_num_batched_tokens=8,
        block_size=16,
        num_blocks=130,
        observer=steps.append,
    )
    pipe(PROMPT, max_new_tokens=1)
    assert steps[0].plan.num_tokens == steps[0].plan.token_budget == 8 and steps[0].measured_seconds > 0.0
    assert (pipe.engine.allocator.block_size, pipe.engine.allocator.num_blocks) == (16, 130)


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    for file in BUNDLED_MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pipe = splitfuse.pipeline(tmp_path)
    with pytest.raises(TokenizerError, match="no chat template; use plain prompts"):
        pipe(PROMPT, chat=True)
    assert len(pipe(PROMPT, max_new_tokens=1)) == 1


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        splitfuse.pipeline(tmp_path / "nothing")


def test_a_folder_without_config_is_called_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"has no config\.json: it is neither a model folder .* nor one of GGUF"
    ):
        splitfuse.pipeline(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"model\.gguf is empty: it is not a GGUF file"):
        splitfuse.pipeline(tmp_path)
