"""Effort and verbosity as variables of chat templates, those of released models among them."""

import json
from typing import Any

import pytest
from packaged_tokenizers import folder

from splitfuse.errors import InvalidRequestError
from splitfuse.text.chat_template import variables_of
from splitfuse.text.variables import template_variables

HARMONY = "{% if reasoning_effort is not defined %}{% set reasoning_effort = 1 %}{% endif %}{{ reasoning_effort }}"


def variables(known: str, given: Any = None, *, thinks: bool = True, **asked: str) -> Any:
    names = known.split()
    return template_variables(
        given, effort=asked.get("effort"), verbosity=asked.get("verbosity"), known=names, thinks=thinks
    )


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        ("reasoning_effort", {"effort": "high"}, {"reasoning_effort": "high"}),
        ("enable_thinking", {"effort": "none"}, {"enable_thinking": False}),
        ("enable_thinking", {"effort": "minimal"}, {"enable_thinking": False}),
        ("thinking", {"effort": "none"}, {"thinking": False}),
        (
            "thinking reasoning_effort",
            {"effort": "none", "verbosity": "medium"},
            {"thinking": False, "reasoning_effort": "none"},
        ),
        ("verbosity", {"verbosity": "medium"}, {"verbosity": "medium"}),
        ("", {"verbosity": "medium"}, None),
    ],
)
def test_variables_that_a_template_knows_are_set(known: str, asked: dict[str, str], expected: Any) -> None:
    assert variables(known, **asked) == expected


def test_a_model_without_thoughts_needs_none() -> None:
    assert variables("", thinks=False, effort="none") is None
    assert variables("", {"x": 1}, thinks=False, effort="minimal") == {"x": 1}


@pytest.mark.parametrize(
    ("known", "asked", "words"),
    [
        ("", {"effort": "none"}, "does not let a request say how long to think"),
        ("enable_thinking", {"effort": "high"}, 'only knows whether to think; .* {"enable_thinking": true}'),
        ("reasoning_effort", {"effort": "hard"}, "reasoning_effort must be none, .* or max, not 'hard'"),
        ("", {"verbosity": "low"}, "verbosity 'low' is not supported"),
        ("verbosity", {"verbosity": "big"}, "verbosity must be low, medium or high, not 'big'"),
    ],
)
def test_what_a_template_does_not_know_is_refused(known: str, asked: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refusal:
        variables(known, **asked)
    assert refusal.value.parameter in ("reasoning_effort", "verbosity")


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"and chat_template_kwargs.enable_thinking contradict"):
        variables("enable_thinking", {"enable_thinking": True}, effort="none")
    assert variables("enable_thinking", {"enable_thinking": False}, effort="none") == {"enable_thinking": False}


def test_variables_are_found_in_templates() -> None:
    assert variables_of(HARMONY) == {"reasoning_effort"}
    config = json.loads((folder("qwen3") / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = variables_of(config["chat_template"])
    assert "enable_thinking" in found and "reasoning_effort" not in found
