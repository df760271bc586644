"""A rough cost model is found at the start, of models of all kinds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from splitfuse.config.engine import EngineConfig
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.engine.calibrate import load_or_estimate
from splitfuse.engine.engine import Engine
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime import step_estimate
from splitfuse.runtime.calibration import Calibration, cache_path, identify, save
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.runtime.step_estimate import LARGE_SIZES, MANY, NOISE, SIZES, estimate_cost, from_times, has_long_steps


@pytest.mark.parametrize(
    "cost",
    [
        CostModel(floor=0.03, per_token=0.0, knee=40.0, per_token_beyond=0.001),
        CostModel(floor=0.03, per_token=0.0002, knee=20.0, per_token_beyond=0.001),
        CostModel(floor=0.01, per_token=0.001),
    ],
    ids=str,
)
def test_four_times_of_a_known_machine_give_it_back(cost: CostModel) -> None:
    def seconds(tokens: int) -> float:
        return cost.floor + cost.per_token * tokens + cost.per_token_beyond * max(tokens - cost.knee, 0.0)

    found = from_times({size: seconds(size) for size in SIZES})
    for tokens in (1, 16, 30, 50, 64, 192, 1000):
        got = found.floor + found.per_token * tokens + found.per_token_beyond * max(tokens - found.knee, 0.0)
        assert got == pytest.approx(seconds(tokens))


def test_disturbed_times_give_a_valid_model() -> None:
    """Nothing is negative, whatever the times are: CostModel checks it. More tokens always take longer in the end."""
    for times in ((1, 1, 1, 1), (4, 3, 2, 1), (1, 9, 2, 3), (9, 1, 2, 3), (1, 2, 3, 9), (1, 1, 1, 9)):
        found = from_times(dict(zip(SIZES, map(float, times), strict=True)))
        assert found.per_token + found.per_token_beyond > 0.0


@pytest.mark.parametrize("model", ["qwen3.5", "nemotron-h", "gemma4-unified-shared-keys", "deepseek-v3", "qwen3-moe"])
def test_some_layers_of_each_kind_can_be_timed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_estimate, "WEIGHT_BYTES", 1)
    tiny_models.make(model).save_pretrained(tmp_path)
    loaded = load_model(EngineConfig.from_settings({"model": str(tmp_path), "num_blocks": 64, "dtype": "bfloat16"}))
    timed, layers = [], loaded.spec.layers

    def seconds(model: LoadedModel, num_layers: int, chunks: Sequence[tuple[int, int]]) -> float:
        timed.append(set(layers[:num_layers]))
        return one_layer(model, num_layers, chunks)

    one_layer = step_estimate._seconds
    monkeypatch.setattr(step_estimate, "_seconds", seconds)
    estimate_cost(loaded)
    assert len(timed) >= len(SIZES) and all(kinds == set(layers) for kinds in timed)


def test_contexts_of_all_requests_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = CostModel(floor=0.01, per_token=0.0001, per_pair=1e-6, per_kv_token=1e-5)

    def seconds(model: LoadedModel, _: int, chunks: Sequence[tuple[int, int]]) -> float:
        step = StepFeatures()
        for start, count in chunks:
            step = step.plus(start=start, count=count, rows=0)
        return cost.seconds(step) / len(model.spec.layers)

    monkeypatch.setattr(step_estimate, "_seconds", seconds)
    model = load_model(EngineConfig.from_settings({"num_blocks": 64, "max_num_seqs": 2}))
    found = estimate_cost(model)
    assert found.per_pair == pytest.approx(cost.per_pair, rel=0.2) and found.noise == NOISE
    assert found.per_kv_token == pytest.approx(cost.per_kv_token, rel=0.2)
    assert not has_long_steps(model), "so its token budget stays as it is"


def test_short_contexts_add_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of some tokens takes no time that can be told from noise: here each step takes longer than the last."""
    steps = itertools.count(1)
    monkeypatch.setattr(step_estimate, "_seconds", lambda *_: 0.01 * next(steps))
    model = load_model(EngineConfig.from_settings({"num_blocks": 64}))
    found = estimate_cost(replace(model, spec=replace(model.spec, max_position=MANY)))
    assert found.per_pair == found.per_kv_token == 0.0


def test_a_machine_that_waits_for_memory_is_timed_with_longer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def seconds(*step: Any) -> float:
        """Stand in for a machine which takes as long for 400 tokens as for one."""
        timed.append(sum(count for _, count in step[-1]))
        return max(0.01, 0.01 * timed[-1] / 400)

    monkeypatch.setattr(step_estimate, "_seconds", seconds)
    found = estimate_cost(load_model(EngineConfig.from_settings({"num_blocks": 64})))
    assert set(LARGE_SIZES) < set(timed) and found.knee == pytest.approx(400)


def test_a_stored_calibration_goes_before_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = EngineConfig.from_settings({"num_blocks": 64, "max_num_seqs": 8})
    model = load_model(config)
    assert load_or_estimate(config, model).error is None
    engine = Engine(config, model)
    engine.estimate_budget()
    assert engine.scheduler.budget.tokens == 256
    monkeypatch.setattr(step_estimate, "WEIGHT_BYTES", 1)
    cost = CostModel(floor=1.0, per_token=1e-6)
    identity = identify(config, model.source)
    calibration = Calibration(name="x", cost=cost, num_blocks=64, block_size=32, max_model_len=512, identity=identity)
    save(calibration, cache_path(identity))
    assert load_or_estimate(config, model) == cost
    engine.estimate_budget()
    assert engine.scheduler.budget.tokens == engine.model.plan.max_num_batched_tokens == 2048
    assert not engine.slo_enabled
    given = EngineConfig.from_settings({"model": str(BUNDLED_MODEL), "num_blocks": 64, "max_num_batched_tokens": 100})
    engine = Engine.load(given)
    engine.estimate_budget()
    assert engine.scheduler.budget.tokens == 100
