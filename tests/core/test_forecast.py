"""Predictions that follow the machine: soon, without swinging, and not after every noise."""

from random import Random

import pytest

from splitfuse.core.cost_model import CostModel, Features
from splitfuse.core.forecast import Forecast

COST = CostModel(floor=0.01, per_token=0.001)
PASS = Features(tokens=90)  # 0.1 s


@pytest.mark.parametrize("change", [0.25, 0.5, 0.8, 1.0, 1.3, 2.0, 4.0])
def test_a_lasting_change_is_followed_without_overshooting(change: float) -> None:
    forecast = Forecast(COST)
    factors = []
    for _ in range(150):
        forecast.observe(PASS, 0.1 * change)
        factors.append(forecast.factor)
    assert factors[-1] == pytest.approx(change, rel=0.01)
    low, high = min(1.0, change), max(1.0, change)
    assert all(low - 1e-9 <= factor <= high + 1e-9 for factor in factors)
    assert factors == pytest.approx(sorted(factors, reverse=change < 1.0))


def test_one_disturbed_pass_moves_it_by_little() -> None:
    forecast = Forecast(COST)
    forecast.observe(PASS, 30.0)
    assert forecast.factor < 1.03


def test_noise_leaves_it_where_it_is() -> None:
    rng, forecast = Random(0), Forecast(COST)
    factors = []
    for _ in range(2000):
        forecast.observe(PASS, 0.1 * rng.lognormvariate(0.0, 0.2))
        factors.append(forecast.factor)
    assert min(factors) > 0.85 and max(factors) < 1.15


def test_tokens_within_counts_with_the_correction() -> None:
    forecast = Forecast(COST)
    for _ in range(300):
        forecast.observe(PASS, 0.2)
    count = forecast.tokens_within(0.2, Features(), start=0, most=500)
    assert count == pytest.approx(90, abs=2)
    assert forecast.seconds(Features(tokens=count)) <= 0.2


def test_times_that_are_none_are_left_out() -> None:
    forecast = Forecast(COST)
    forecast.observe(PASS, 0.0)
    forecast.observe(PASS, -1.0)
    assert forecast.factor == 1.0
