"""Every sampling parameter: what it takes, and that a refusal names it."""

import math
from typing import Any

import pytest

from splitfuse.core.sampling_params import PARAMETERS, SamplingParams
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError

HUGE = 10**400
BEYOND_WORDS = 10**5000  # Python refuses to write it
NO_NUMBERS = [math.nan, math.inf, -math.inf, HUGE, -HUGE, BEYOND_WORDS, "1", True, None, [1]]
NO_INTEGERS = [-1, 1.0, *NO_NUMBERS]
NO_COUNTS = [value for value in NO_INTEGERS if value is not None]  # None: left out

REFUSED: dict[str, list[Any]] = {
    "max_tokens": [0, *NO_COUNTS],
    "min_tokens": NO_INTEGERS,
    "temperature": [-0.1, 100.1, *NO_NUMBERS],
    "top_p": [0, -0.1, 1.1, *NO_NUMBERS],
    "top_k": NO_INTEGERS,
    "min_p": [-0.1, 1.1, *NO_NUMBERS],
    "seed": [2**64, *NO_COUNTS],
    "presence_penalty": [-2.1, 2.1, *NO_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NO_NUMBERS],
    "repetition_penalty": [0, -1, 100.1, *NO_NUMBERS],
    "logit_bias": [
        None,
        [1],
        "1",
        5,
        *({token: 0.0} for token in NO_INTEGERS if not isinstance(token, list)),
        *({0: bias} for bias in (100.1, -100.1, *NO_NUMBERS)),
    ],
    "stop": ["text", None, 5, [""], [5], ["fine", None], {"a": 1}, ["a"] * 65],
    "stop_token_ids": ["12", None, 5, {1: 2}, *([token] for token in NO_INTEGERS)],
    "ignore_eos": ["no", 1, 0, None],
    "logprobs": [129, *NO_COUNTS],
    "prompt_logprobs": [129, *NO_COUNTS],
    "structured_outputs": [5, "text", [1], True, {"json": {}}],
    "n": [0, 129, *NO_INTEGERS],
}

TAKEN: dict[str, list[Any]] = {
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 5],
    "temperature": [0, 0.0, 1e-6, 1, 100],
    "top_p": [1e-6, 0.5, 1],
    "top_k": [0, 1, 2**31 - 1],
    "min_p": [0, 0.5, 1.0],
    "seed": [None, 0, 2**64 - 1],
    "presence_penalty": [-2, 0.5, 2.0],
    "frequency_penalty": [-2, 0.5, 2.0],
    "repetition_penalty": [0.1, 1, 100],
    "logit_bias": [{}, {0: -100}, {5: 100.0, 6: 1}],
    "stop": [(), ("a",), ["a", "b"], ("a",) * 64],
    "stop_token_ids": [(), (0,), [1, 2]],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 128],
    "prompt_logprobs": [None, 0, 128],
    "structured_outputs": [None, StructuredOutputs.of({"regex": "[0-9]+"})],
    "n": [1, 128],
}


def test_every_parameter_is_tested_here() -> None:
    assert REFUSED.keys() == TAKEN.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_parameter_and_valid_values(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises(InvalidRequestError, match=f"^{name} must be ") as refusal:
            SamplingParams(**{name: value})
        assert refusal.value.parameter == name
        assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", TAKEN)
def test_the_whole_range_is_accepted(name: str) -> None:
    for value in TAKEN[name]:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_min_tokens_must_be_at_most_max_tokens() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(InvalidRequestError, match=r"min_tokens must be at most max_tokens \(4\), not 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_params_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 1.0  # type: ignore[misc]
