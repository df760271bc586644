"""Plain steps are one call of the kernels, others two; the tokens are those of two calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from backends import runnable

from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.models.decoder import Decoder
from splitfuse.runtime.executor import Executor

pytestmark = runnable("avx2")

PLAIN = {
    "greedy": SamplingParams(max_tokens=12, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=9, temperature=1.0, seed=1, ignore_eos=True),
    "filtered": SamplingParams(max_tokens=14, temperature=0.7, top_k=20, top_p=0.9, seed=2, ignore_eos=True),
}
OTHERS = PLAIN | {"penalty": SamplingParams(max_tokens=5, repetition_penalty=1.2, ignore_eos=True)}


def tokens_of(requests: dict[str, SamplingParams], *, at_once: bool = True) -> dict[str, tuple[int, ...]]:
    """The tokens of requests that are computed together, in chunks of few tokens."""
    engine = Engine.load(EngineConfig.from_settings({"device": "cpu", "num_blocks": 40, "max_num_batched_tokens": 16}))
    assert isinstance(engine.executor, Executor)
    assert engine.executor.decoder.chooses_at_once
    engine.executor.decoder.chooses_at_once = at_once
    engine.executor.keeps_plans = False  # else two calls are made, so that the next step is planned between them
    for place, (name, params) in enumerate(requests.items()):
        engine.add_request(name, [5 + place] * (3 + 20 * place), params)
    tokens: dict[str, tuple[int, ...]] = dict.fromkeys(requests, ())
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each way to compute a step was taken."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    for name in ("forward", "forward_and_choose"):
        monkeypatch.setattr(Decoder, name, counted(name, getattr(Decoder, name)))
    return counts


def test_plain_steps_are_one_call(calls: Counter[str]) -> None:
    wanted = tokens_of(PLAIN, at_once=False)
    assert set(calls) == {"forward"}
    calls.clear()
    assert tokens_of(PLAIN) == wanted
    assert set(calls) == {"forward_and_choose"}


def test_steps_with_a_request_that_is_not_plain_are_two_calls(calls: Counter[str]) -> None:
    wanted = tokens_of(OTHERS, at_once=False)
    calls.clear()
    assert tokens_of(OTHERS) == wanted
    assert set(calls) == {"forward", "forward_and_choose"}, "until the request with a penalty has come, and after it"
