"""Predictions that follow the machine: soon, without swinging, and not after every noise."""

import math
from dataclasses import replace
from random import Random

import pytest

from splitfuse.core.slo.cost_model import CostModel, Features
from splitfuse.core.slo.latency_predictor import IN_TIME, MAX_SAFETY_FACTOR, MIN_SAFETY_FACTOR, LatencyPredictor

COST = CostModel(floor=0.01, per_token=0.001)
STEP = Features(tokens=90)  # 0.1 s
SHORT = Features(tokens=1)  # 0.011 s


def ratio(forecast: LatencyPredictor, step: Features = STEP) -> float:
    """How many times longer it takes than the cost model says."""
    return forecast.seconds(step) / COST.seconds(step)


@pytest.mark.parametrize("step", [STEP, SHORT])
@pytest.mark.parametrize("change", [0.25, 0.5, 0.8, 1.0, 1.3, 2.0, 4.0])
def test_a_lasting_change_is_followed_without_overshooting(change: float, step: Features) -> None:
    forecast = LatencyPredictor(COST)
    ratios = []
    for _ in range(150):
        forecast.observe(step, COST.seconds(step) * change)
        ratios.append(ratio(forecast, step))
    assert ratios[-1] == pytest.approx(change, rel=0.01)
    low, high = min(1.0, change), max(1.0, change)
    assert all(low - 1e-9 <= each <= high + 1e-9 for each in ratios)
    assert ratios == pytest.approx(sorted(ratios, reverse=change < 1.0))


@pytest.mark.parametrize(("floor", "beyond"), [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (0.5, 1.5)])
def test_short_and_long_steps_are_followed_apart(floor: float, beyond: float) -> None:
    rng, forecast = Random(0), LatencyPredictor(COST)
    for _ in range(3000):
        step = STEP if rng.random() < 0.1 else SHORT
        forecast.observe(step, floor * COST.floor + beyond * (COST.seconds(step) - COST.floor))
    assert forecast.factors == pytest.approx((floor, beyond), rel=0.02)


def test_what_is_learned_of_short_steps_is_not_all_forgotten_for_long_ones() -> None:
    forecast = LatencyPredictor(COST)
    for _ in range(200):
        forecast.observe(SHORT, 2 * COST.seconds(SHORT))
    assert ratio(forecast, SHORT) == pytest.approx(2.0, rel=0.01)
    assert 1.1 < ratio(forecast, STEP) < 2.0


def test_one_disturbed_step_moves_it_by_little() -> None:
    forecast = LatencyPredictor(COST)
    forecast.observe(STEP, 30.0)
    assert ratio(forecast) < 1.03


def test_noise_leaves_it_where_it_is() -> None:
    rng, forecast = Random(0), LatencyPredictor(COST)
    ratios = []
    for _ in range(2000):
        forecast.observe(STEP, 0.1 * rng.lognormvariate(0.0, 0.2))
        ratios.append(ratio(forecast))
    assert min(ratios) > 0.85 and max(ratios) < 1.15


def test_tokens_within_counts_with_the_correction() -> None:
    forecast = LatencyPredictor(COST)
    for _ in range(300):
        forecast.observe(STEP, 0.2)
    count = forecast.tokens_within(0.2, Features(), start=0, most=500)
    assert count == pytest.approx(90, abs=2)
    assert forecast.seconds(Features(tokens=count)) <= 0.2 < forecast.seconds(Features(tokens=count + 1))


def test_times_that_are_none_are_left_out() -> None:
    forecast = LatencyPredictor(COST)
    forecast.observe(STEP, 0.0)
    forecast.observe(STEP, -1.0)
    assert forecast.factors == (1.0, 1.0)


@pytest.mark.parametrize("noise", [0.06, 0.1, 0.14])
def test_steps_planned_with_the_margin_end_in_time(noise: float) -> None:
    rng, forecast = Random(0), LatencyPredictor(COST)
    late = []
    for _ in range(20_000):
        taken = COST.seconds(STEP) * rng.lognormvariate(0.0, noise)
        late.append(taken > forecast.seconds(STEP) / forecast.safety_factor)
        forecast.observe(STEP, taken)
    assert sum(late[2000:]) / len(late[2000:]) == pytest.approx(1.0 - IN_TIME, abs=0.004)


def test_the_margin_begins_with_the_scatter_that_was_calibrated() -> None:
    assert LatencyPredictor(COST).safety_factor == pytest.approx(MAX_SAFETY_FACTOR)
    scattering = LatencyPredictor(replace(COST, noise=0.1))
    assert scattering.safety_factor == pytest.approx(math.exp(-2.326 * 0.1), rel=1e-3)
    assert LatencyPredictor(replace(COST, noise=9.0)).safety_factor == pytest.approx(MIN_SAFETY_FACTOR)


def test_the_margin_returns_after_a_disturbance() -> None:
    forecast = LatencyPredictor(COST)
    for _ in range(100):
        forecast.observe(STEP, 2.0 * forecast.seconds(STEP))
    assert forecast.safety_factor == pytest.approx(MIN_SAFETY_FACTOR)
    for _ in range(2500):
        forecast.observe(STEP, forecast.seconds(STEP))
    assert forecast.safety_factor == pytest.approx(MAX_SAFETY_FACTOR)


def test_short_steps_say_little_of_the_margin() -> None:
    forecast = LatencyPredictor(COST)
    for _ in range(10):
        forecast.observe(SHORT, 1.5 * forecast.seconds(SHORT))
    assert forecast.safety_factor > 0.88
