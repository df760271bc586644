"""The cost model: the shape that it guarantees, and that a fit finds the coefficients that made the timings."""

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.plan import Chunk, StepPlan
from splitfuse.core.slo.cost_model import MIN_SAMPLES, CostModel, Sample, StepCounts, StepFeatures, features_of, fit
from splitfuse.errors import CostModelError
from splitfuse.runtime.calibration import Calibration, load, save

TRUE = CostModel(
    floor=8e-3,
    per_token=0.1e-3,
    knee=32.0,
    per_token_beyond=0.3e-3,
    per_row=20e-6,
    per_pair=100e-9,
    per_kv_token=0.5e-6,
    per_request=10e-6,
)
COEFFICIENTS = st.floats(0.0, 1e-2)
MODELS = st.builds(
    CostModel,
    floor=COEFFICIENTS,
    per_token=COEFFICIENTS,
    knee=st.floats(0.0, 512.0),
    per_token_beyond=COEFFICIENTS,
    per_row=COEFFICIENTS,
    per_pair=COEFFICIENTS,
    per_kv_token=COEFFICIENTS,
    per_request=COEFFICIENTS,
)
STEPS = st.builds(StepFeatures, *[st.integers(0, 10_000)] * 5)


def random_step(rng: Random) -> StepFeatures:
    """Generations at some contexts, and perhaps chunks of prompts."""
    step = StepFeatures()
    for _ in range(rng.choice((0, 1, 2, 4, 8, 16, 32))):
        step = step.plus(start=rng.randrange(2000), count=1, rows=1)
    for _ in range(rng.choice((0, 1, 1, 2)) or not step.tokens):
        step = step.plus(start=rng.choice((0, 0, 512, 1500)), count=rng.randint(2, 512), rows=rng.randrange(2))
    return step


def timed(rng: Random, count: int, *, noise: float, disturbed: float = 0.0, model: CostModel = TRUE) -> list[Sample]:
    """Return steps with times that are off by `noise`; a fraction `disturbed` took up to four times as long."""
    samples = []
    for step in (random_step(rng) for _ in range(count)):
        factor = rng.uniform(1.5, 4.0) if rng.random() < disturbed else rng.gauss(1.0, noise)
        samples.append(Sample(step, factor * model.seconds(step)))
    return samples


@given(MODELS, STEPS, st.integers(0, 4), st.integers(1, 1000))
def test_more_of_anything_never_takes_less(model: CostModel, step: StepFeatures, which: int, more: int) -> None:
    larger = step._replace(**{StepFeatures._fields[which]: step[which] + more})
    assert model.seconds(larger) >= model.seconds(step) - 1e-9


@given(MODELS, st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_the_time_is_convex_in_the_tokens(model: CostModel, a: int, b: int, c: int) -> None:
    low, middle, high = sorted((a, b, c))
    if low < high:
        share = (middle - low) / (high - low)
        chord = (1 - share) * model.seconds(StepFeatures(low)) + share * model.seconds(StepFeatures(high))
        assert model.seconds(StepFeatures(middle)) <= chord + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_finds_the_coefficients_behind_noisy_timings(seed: int) -> None:
    rng = Random(seed)
    model = fit(timed(rng, 300, noise=0.02), held_out=timed(rng, 100, noise=0.02))
    assert model.error is not None and model.error.num_samples == 100
    assert model.error.median < 0.02 and model.error.p95 < 0.06
    assert model.floor == pytest.approx(TRUE.floor, rel=0.1)
    assert model.per_token + model.per_token_beyond == pytest.approx(0.4e-3, rel=0.1)
    assert model.per_pair == pytest.approx(TRUE.per_pair, rel=0.3)
    assert 16 <= model.knee <= 64


def test_without_noise_it_finds_them_exactly() -> None:
    rng = Random(1)
    samples = timed(rng, 200, noise=0.0)
    samples += [
        Sample(p, TRUE.seconds(p)) for p in (StepFeatures(32, 1, 32, 32, 1), StepFeatures(32))
    ]  # the knee itself
    model = fit(samples, held_out=timed(rng, 50, noise=0.0))
    assert model.error is not None and model.error.p95 < 1e-4
    for name in ("floor", "per_token", "per_token_beyond", "per_row", "per_pair", "per_kv_token"):
        assert getattr(model, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    assert model.knee == 32


def test_a_few_disturbed_timings_do_not_bend_it() -> None:
    rng = Random(2)
    model = fit(timed(rng, 300, noise=0.02, disturbed=0.1), held_out=timed(rng, 200, noise=0.0))
    assert model.error is not None and model.error.p95 < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_negative_whatever_the_timings(seed: int) -> None:
    rng = Random(seed)
    samples = [Sample(random_step(rng), rng.uniform(1e-3, 1.0)) for _ in range(60)]
    model = fit(samples, held_out=samples)  # CostModel itself refuses negative coefficients
    assert model.seconds(max(sample.features for sample in samples)) > 0.0


def test_steps_that_are_all_alike_are_predicted_by_their_time() -> None:
    step = StepFeatures().plus(start=100, count=1, rows=1)
    model = fit([Sample(step, 0.01)] * MIN_SAMPLES, held_out=[Sample(step, 0.01)])
    assert model.seconds(step) == pytest.approx(0.01)


def test_too_few_timings_are_refused() -> None:
    samples = timed(Random(0), MIN_SAMPLES - 1, noise=0.0)
    with pytest.raises(CostModelError, match="23 timed steps are too few to fit a cost model: at least 24"):
        fit(samples, held_out=samples)
    with pytest.raises(CostModelError, match="at least one timed step"):
        fit([*samples, samples[0]], held_out=[])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_which_is_not_positive_is_refused(seconds: float) -> None:
    with pytest.raises(CostModelError, match="a positive number of seconds"):
        Sample(StepFeatures(1), seconds)


def test_features_are_those_of_the_plan() -> None:
    chunks = (
        Chunk("generating", 99, (5,), (0, 1, 2, 3), 1, True),
        Chunk("prompt", 10, (1, 2, 3), (4,), 0, False),
    )
    expected = StepFeatures(tokens=4, rows=1, pairs=100 + (11 + 12 + 13), kv_tokens=100 + 13, requests=2)
    assert features_of(StepPlan(1, 256, chunks)) == expected


@given(
    MODELS,
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 600)), max_size=3),
    st.integers(0, 3000),
    st.integers(0, 600),
    st.floats(0.0, 10.0),
)
def test_tokens_within_is_the_largest_count_that_fits(
    model: CostModel, chunks: list[tuple[int, int]], start: int, most: int, seconds: float
) -> None:
    counts, step = StepCounts(), StepFeatures()
    for position, length in chunks:
        counts.add(position, length)
        step = step.plus(start=position, count=length, rows=1)
    assert counts.features == step
    count = model.tokens_within(seconds, counts, start, most)
    assert 0 <= count <= most
    if count:
        assert model.seconds(step.plus(start=start, count=count, rows=1)) <= seconds
    if count < most:
        assert model.seconds(step.plus(start=start, count=count + 1, rows=1)) > seconds


def test_calibrations_keep_it_as_json(tmp_path: Path) -> None:
    rng = Random(3)
    model = fit(timed(rng, 50, noise=0.02), held_out=timed(rng, 20, noise=0.02))
    for cost in (model, TRUE):
        made = Calibration(name="by hand", cost=cost, num_blocks=1, block_size=32, max_model_len=32)
        save(made, tmp_path / "calibration.json")
        assert load(tmp_path / "calibration.json").cost == cost


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", json.dumps({"floor": -1, "per_token": 0}), json.dumps({"floor": 1, "per_token": "x"})],
)
def test_json_of_anything_else_is_refused(text: str, tmp_path: Path) -> None:
    sizes = '"name": "x", "num_blocks": 1, "block_size": 32, "max_model_len": 32'
    (tmp_path / "calibration.json").write_text(f'{{"cost": {text}, {sizes}}}')
    with pytest.raises(CostModelError):
        load(tmp_path / "calibration.json")
