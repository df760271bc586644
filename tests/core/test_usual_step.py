"""The length of steps without deadlines: the best of all for the requests that arrive meanwhile."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.usual_step import MOST_LOOKED_AT, Arrivals, usual_step
from splitfuse.core.slo.work_times import EFFICIENCY, MIN_EFFICIENCY, WorkTimes

COSTS = (
    CostModel(floor=0.01, per_token=0.001),  # a step of 0.04 s has three quarters of the throughput, one of 0.4 s 0.975
    CostModel(floor=0.03, per_token=47e-6, knee=2048.0, per_token_beyond=53e-6),
    CostModel(floor=0.01, per_token=1e-5, knee=512.0, per_token_beyond=1e-4, per_row=1e-5),
    CostModel(floor=0.02, per_token=0.0),
)


def times_of(cost: CostModel) -> WorkTimes:
    return WorkTimes(StepTimes(cost))


@given(st.sampled_from(COSTS), st.lists(st.floats(0.0, 2.0) | st.just(math.inf), min_size=1, max_size=8))
def test_no_other_step_has_a_higher_goodput(cost: CostModel, longest: list[float]) -> None:
    work_times = times_of(cost)
    least, most = work_times.efficient_step(MIN_EFFICIENCY), work_times.efficient_step(EFFICIENCY)

    def goodput(seconds: float) -> float:
        return work_times.efficiency(seconds) * sum(seconds <= each for each in longest)

    chosen = usual_step(work_times, longest)
    assert least <= chosen <= most
    best = max(goodput(least + (most - least) * part / 200) for part in range(201))
    assert goodput(chosen) >= (1.0 - 1e-9) * best


@pytest.mark.parametrize(
    ("longest", "seconds"),
    [
        ([], 0.4),
        ([math.inf] * 9, 0.4),
        ([0.1, 0.1], 0.1),
        ([0.1, 0.1, math.inf], 0.1),
        ([0.05, *[math.inf] * 9], 0.4),  # for a tenth of the requests a fifth of the throughput is too much
        ([0.05, 0.1], 0.05),
        ([0.001, 0.0], 0.4),  # none can be in time: the most are served
    ],
)
def test_steps_are_as_long_as_arrivals_can_wait(longest: list[float], seconds: float) -> None:
    assert usual_step(times_of(COSTS[0]), longest) == pytest.approx(seconds)


def test_a_request_says_how_long_its_step_could_have_been() -> None:
    arrivals = Arrivals()
    arrivals.accept(arrival_time=9.0, margin=0.5)  # the engine was idle
    arrivals.plan(9.0)
    arrivals.accept(arrival_time=9.25, margin=0.6)
    arrivals.accept(arrival_time=9.5, margin=0.25)
    arrivals.accept(arrival_time=9.5, margin=math.inf)
    arrivals.plan(10.0)
    arrivals.accept(arrival_time=8.0, margin=3.0)  # it was long on its way: it waited for no more than a whole step
    arrivals.accept(arrival_time=10.0, margin=-1.0)
    arrivals.accept(arrival_time=12.0, margin=-1.0)
    arrivals.plan(12.0)
    assert list(arrivals.longest_steps) == pytest.approx([math.inf, 0.8, 0.5, math.inf, 3.0, 0.0, 0.0])
    for number in range(100):
        arrivals.accept(arrival_time=12.0 + number, margin=1.0)
    arrivals.plan(112.0)
    assert len(arrivals.longest_steps) == MOST_LOOKED_AT


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("efficiency", [0.5, MIN_EFFICIENCY, 0.9, EFFICIENCY])
def test_the_efficiency_of_an_efficient_step_is_that(cost: CostModel, efficiency: float) -> None:
    work_times = times_of(cost)
    seconds = work_times.efficient_step(efficiency)
    assert work_times.efficiency(seconds) >= efficiency * (1.0 - 1e-9)
    assert work_times.efficiency(0.99 * seconds) < efficiency or cost.per_token == 0.0
