"""What is expected of an answer by those that ended, and the slack that it has by that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.answers import Answers
from splitfuse.core.slo.gaps import MeanTarget, MovingAverageTarget, PercentileTarget
from splitfuse.core.slo.targets import SloTargets
from splitfuse.core.slo.usual_step import MOST_LOOKED_AT


def request(max_tokens: int = 100) -> Request:
    scheduling = SchedulingOptions(targets=SloTargets(ttft=1.0, tpot=0.1), arrival_time=0.0)
    return Request("r", (1,) * 10, SamplingParams(), max_tokens, seed=0, scheduling=scheduling)


def ended(num_gaps: int, gap: float, reason: FinishReason = FinishReason.STOP) -> Request:
    made = request()
    for number in range(num_gaps + 1):
        made.slo.observe_token(0.5 + number * gap)
    made.finish_reason = reason
    return made


def first_gap(answers: Answers, max_tokens: int = 100) -> float:
    """Return how long the first gap of a new answer may be."""
    new = request(max_tokens)
    answers.expect(new)
    new.slo.observe_token(0.0)
    return new.slo.deadline


def test_nothing_is_expected_until_enough_answers_have_ended() -> None:
    answers = Answers()
    for number in range(MOST_LOOKED_AT):
        assert first_gap(answers) == pytest.approx(0.1)
        for reason in (FinishReason.ABORT, FinishReason.ERROR, FinishReason.MOVED):
            answers.end(ended(1, 0.01, reason))
        answers.end(ended(20 + number, 0.06))
    assert first_gap(answers) == pytest.approx(0.1 + 19 * 0.04)  # 20 gaps at least, of 0.06 s
    assert first_gap(answers, max_tokens=6) == pytest.approx(0.1 + 4 * 0.04)
    assert first_gap(answers, max_tokens=1) == pytest.approx(0.1)
    answers.end(ended(0, 0.0))  # a single token: nothing is sure then
    assert first_gap(answers) == pytest.approx(0.1)


def test_answers_that_were_slow_give_no_slack() -> None:
    answers = Answers()
    for _ in range(MOST_LOOKED_AT):
        answers.end(ended(20, 0.11))
    assert first_gap(answers) == pytest.approx(0.1)


@given(st.integers(0, 40), st.floats(0.0, 0.2), st.lists(st.booleans(), max_size=30))
def test_a_mean_is_met_if_the_answer_goes_on_as_expected(num_gaps: int, mean: float, waits: list[bool]) -> None:
    target = MeanTarget(0.1)
    target.expect(num_gaps, mean)
    for takes_all in waits[: num_gaps - 1]:
        longest = target.longest_next()
        target.add(longest if takes_all and longest > mean else mean)
    if mean <= 0.1:
        for _ in range(num_gaps - len(waits[: num_gaps - 1])):
            target.add(mean)
        assert not target.is_missed


def test_a_percentile_counts_the_gaps_that_are_expected() -> None:
    target = PercentileTarget(0.1, 99.0)
    assert target.longest_next() == 0.1
    target.expect(100, 0.05)
    assert target.longest_next() == math.inf
    target.add(5.0)
    assert target.longest_next() == 0.1
    for _ in range(99):
        target.add(0.1)
    assert not target.is_missed


def test_a_moving_average_is_judged_at_each_token() -> None:
    target = MovingAverageTarget(0.1)
    target.expect(100, 0.01)
    assert target.longest_next() == pytest.approx(0.1)
