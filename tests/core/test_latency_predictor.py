"""Predictions follow the machine: soon, without oscillating, and not after every noise."""

import math
from dataclasses import replace
from random import Random
from statistics import median

import pytest

from splitfuse.core.slo.cost_model import CostModel, StepCounts, StepFeatures
from splitfuse.core.slo.latency_predictor import IN_TIME, MAX_SAFETY_FACTOR, MIN_SAFETY_FACTOR, LatencyPredictor

COST = CostModel(floor=0.01, per_token=0.001)
STEP = StepFeatures(tokens=90)  # 0.1 s
SHORT = StepFeatures(tokens=1)  # 0.011 s


def ratio(predictor: LatencyPredictor, step: StepFeatures = STEP) -> float:
    """How many times longer it takes than the cost model says."""
    return predictor.seconds(step) / COST.seconds(step)


@pytest.mark.parametrize("step", [STEP, SHORT])
@pytest.mark.parametrize("change", [0.25, 0.5, 0.8, 1.0, 1.3, 2.0, 4.0])
def test_a_lasting_change_is_followed_without_overshooting(change: float, step: StepFeatures) -> None:
    predictor = LatencyPredictor(COST)
    ratios = []
    for _ in range(150):
        predictor.observe(step, COST.seconds(step) * change)
        ratios.append(ratio(predictor, step))
    assert ratios[-1] == pytest.approx(change, rel=0.01)
    low, high = min(1.0, change), max(1.0, change)
    assert all(low - 1e-9 <= each <= high + 1e-9 for each in ratios)
    assert ratios == pytest.approx(sorted(ratios, reverse=change < 1.0))


@pytest.mark.parametrize(("floor", "beyond"), [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (0.5, 1.5)])
def test_short_and_long_steps_are_followed_apart(floor: float, beyond: float) -> None:
    rng, predictor = Random(0), LatencyPredictor(COST)
    for _ in range(3000):
        step = STEP if rng.random() < 0.1 else SHORT
        predictor.observe(step, floor * COST.floor + beyond * (COST.seconds(step) - COST.floor))
    assert predictor.factors == pytest.approx((floor, beyond), rel=0.02)


def test_what_short_steps_teach_counts_for_long_ones_too() -> None:
    predictor = LatencyPredictor(COST)
    for _ in range(200):
        predictor.observe(SHORT, 2 * COST.seconds(SHORT))
    assert ratio(predictor, SHORT) == pytest.approx(2.0, rel=0.01)
    assert 1.1 < ratio(predictor, STEP) < 2.0


def test_one_disturbed_step_moves_it_by_little() -> None:
    predictor = LatencyPredictor(COST)
    predictor.observe(STEP, 30.0)
    assert ratio(predictor) < 1.03


@pytest.mark.parametrize("seed", range(20))
def test_an_estimate_is_corrected_within_a_hundred_steps(seed: int) -> None:
    """Each coefficient is off, and those of contexts are off by more; decodes and chunks of prompts come mixed."""
    rng = Random(seed)
    truth = CostModel(
        floor=0.013, per_token=0.0001, knee=19, per_token_beyond=0.0004, per_row=3e-5, per_pair=6e-8, per_kv_token=3e-7,
        per_request=3e-5,
    )  # fmt: skip
    estimate = truth.scaled(lambda: 1.4 * rng.uniform(0.7, 1.4))
    estimate = replace(estimate, knee=rng.uniform(8, 40), per_pair=0.0, per_kv_token=6e-7, per_request=0.0)
    predictor, errors = LatencyPredictor(estimate), []
    for _ in range(200):
        step = StepFeatures()
        for _ in range(rng.randint(1, 16)):
            step = step.plus(start=rng.randint(512, 576), count=1, rows=1)
        if rng.random() < 0.4:
            step = step.plus(start=rng.choice((0, 256)), count=rng.randint(16, 512), rows=0)
        seconds = truth.seconds(step) * rng.lognormvariate(0.0, 0.05)
        errors.append(abs(predictor.observe(step, seconds) / seconds - 1.0))
    assert median(errors[100:]) < 0.15 and predictor.num_observed == 200
    step = StepFeatures().plus(start=0, count=300, rows=1)
    assert predictor.corrected.seconds(step) == pytest.approx(predictor.seconds(step))


def test_noise_leaves_it_where_it_is() -> None:
    rng, predictor = Random(0), LatencyPredictor(COST)
    ratios = []
    for _ in range(2000):
        predictor.observe(STEP, 0.1 * rng.lognormvariate(0.0, 0.2))
        ratios.append(ratio(predictor))
    assert min(ratios) > 0.85 and max(ratios) < 1.15


def test_tokens_within_counts_with_the_correction() -> None:
    predictor = LatencyPredictor(COST)
    for _ in range(300):
        predictor.observe(STEP, 0.2)
    count = predictor.tokens_within(0.2, StepCounts(), 0, 500)
    assert count == pytest.approx(90, abs=2)
    assert predictor.seconds(StepFeatures(tokens=count)) <= 0.2 < predictor.seconds(StepFeatures(tokens=count + 1))


def test_times_which_are_not_positive_are_ignored() -> None:
    predictor = LatencyPredictor(COST)
    predictor.observe(STEP, 0.0)
    predictor.observe(STEP, -1.0)
    assert predictor.factors == (1.0, 1.0)


@pytest.mark.parametrize("noise", [0.06, 0.1, 0.14])
def test_steps_planned_with_the_safety_factor_end_in_time(noise: float) -> None:
    rng, predictor = Random(0), LatencyPredictor(COST)
    late = []
    for _ in range(20_000):
        taken = COST.seconds(STEP) * rng.lognormvariate(0.0, noise)
        late.append(taken > predictor.seconds(STEP) / predictor.safety_factor)
        predictor.observe(STEP, taken)
    assert sum(late[2000:]) / len(late[2000:]) == pytest.approx(1.0 - IN_TIME, abs=0.004)


def test_the_safety_factor_starts_from_the_calibrated_noise() -> None:
    assert LatencyPredictor(COST).safety_factor == pytest.approx(MAX_SAFETY_FACTOR)
    scattering = LatencyPredictor(replace(COST, noise=0.1))
    assert scattering.safety_factor == pytest.approx(math.exp(-2.326 * 0.1), rel=1e-3)
    assert LatencyPredictor(replace(COST, noise=9.0)).safety_factor == pytest.approx(MIN_SAFETY_FACTOR)


def test_the_safety_factor_returns_after_a_disturbance() -> None:
    predictor = LatencyPredictor(COST)
    for _ in range(100):
        predictor.observe(STEP, 2.0 * predictor.seconds(STEP))
    assert predictor.safety_factor == pytest.approx(MIN_SAFETY_FACTOR)
    for _ in range(2500):
        predictor.observe(STEP, predictor.seconds(STEP))
    assert predictor.safety_factor == pytest.approx(MAX_SAFETY_FACTOR)


def test_short_steps_hardly_move_the_safety_factor() -> None:
    predictor = LatencyPredictor(COST)
    for _ in range(10):
        predictor.observe(SHORT, 1.5 * predictor.seconds(SHORT))
    assert predictor.safety_factor > 0.88
