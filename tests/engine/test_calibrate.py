"""Calibrations: what they are kept by, and that one is made of a real model's steps."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel, FitError, StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.calibrate import COARSE, FINE, Case, Grid, Timed, choose_grid, noise, run_calibration
from splitfuse.engine.engine import Engine
from splitfuse.errors import ConfigError, CostModelError, InvalidRequestError
from splitfuse.runtime.calibration import Calibration, cache_path, identify, load, load_cost_model, save
from splitfuse.simulator.machines import MACHINES

CALIBRATION = Calibration(
    name="by hand",
    cost=CostModel(floor=0.01, per_token=1e-4, error=FitError(0.02, 0.08, 30)),
    num_blocks=100,
    block_size=32,
    max_model_len=2048,
    identity={"model": "m"},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.from_settings(settings)


def test_a_missing_device_has_no_identity() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
        identify(config(device="cuda:99"))


def test_a_calibration_is_found_by_the_settings_that_matter(cache: Path) -> None:
    identity = identify(config())
    assert cache_path(identity).is_relative_to(cache / "splitfuse")
    save(CALIBRATION, cache_path(identity))
    assert load_cost_model(config()) == CALIBRATION
    same = config(max_num_batched_tokens=64, max_num_seqs=4, num_blocks=1000, enable_prefix_caching=False)
    assert load_cost_model(same) == CALIBRATION
    for other in (config(dtype="float32"), config(kernels="reference"), config(block_size=64)):
        with pytest.raises(CostModelError, match=r"no cost model is stored for .*storyteller.*splitfuse calibrate"):
            load_cost_model(other)


@pytest.mark.parametrize("text", ["", "{}", '{"name": "x", "cost": {"floor": -1, "per_token": 0}}'])
def test_a_file_with_something_else_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(CostModelError, match="holds no cost model"):
        load(file)


def test_profiling_a_real_model_reports_the_fit_error() -> None:
    calibration, checked = run_calibration(config(), seconds=0.5, progress=False)
    cost = calibration.cost
    assert cost.error is not None and cost.error.num_samples == len(checked) > 10
    assert cost.seconds(StepFeatures().plus(start=0, count=64, rows=1)) > cost.seconds(
        StepFeatures().plus(start=0, count=1, rows=1)
    )
    assert {timed.sample for timed in checked} < set(calibration.timed)
    assert calibration.max_model_len >= 1024 and calibration.num_blocks > 32
    assert {timed.case.name for timed in checked}.isdisjoint(case.name for case in FINE.fitted)
    save(calibration, cache_path(calibration.identity))
    assert load_cost_model(config()) == calibration


@pytest.mark.parametrize("short", [0.05, 0.3])
@pytest.mark.parametrize("long", [0.05, 0.1])
def test_noise_is_that_of_most_steps_not_of_those_run_most(long: float, short: float) -> None:
    random = Random(0)

    def timed(case: Case, deviation: float, runs: int) -> Timed:
        return Timed(case, tuple(0.1 * random.lognormvariate(0.0, deviation) for _ in range(runs)))

    cases = FINE.fitted
    many = [timed(case, long, 3) for case in [*cases] * 4]
    few = [timed(case, short, 30) for case in cases[:2]]
    assert noise(many + few) == pytest.approx(long, rel=0.15)


@pytest.mark.parametrize("grid", [FINE, COARSE])
def test_no_step_is_fitted_and_checked(grid: Grid) -> None:
    fitted, checking = ({case.features for case in cases} for cases in grid)
    assert not fitted & checking
    assert len(fitted) == len(grid.fitted) and len(checking) == len(grid.checking)


@pytest.mark.parametrize(
    ("floor", "per_token", "expected"),
    [
        (0.001, 1e-5, FINE.up_to(512)),
        (0.001, 4e-4, FINE.up_to(256)),
        (0.001, 8e-4, FINE.up_to(128)),
        (0.02, 6e-4, COARSE.up_to(256)),
        (0.02, 1e-3, COARSE.up_to(128)),
        (0.5, 1e-2, COARSE.up_to(64)),
    ],
)
def test_a_slow_machine_times_fewer_and_shorter_steps(floor: float, per_token: float, expected: Grid) -> None:
    class Runs:
        """Stands in for a machine whose steps take a fixed time."""

        def seconds(self, case: Case) -> float:
            return floor + per_token * case.features.tokens

    assert choose_grid(Runs(), FINE, COARSE, seconds=8.0) == expected  # type: ignore[arg-type]
    assert expected.is_enough


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_which_is_not_positive_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds must be"):
        run_calibration(config(), seconds=seconds, progress=False)


def test_an_engine_too_small_for_different_steps_is_refused() -> None:
    with pytest.raises(
        CostModelError,
        match=r"at least 24 .* but only .* fit an engine with 64 tokens a request.*raise --max-model-len",
    ):
        run_calibration(config(max_model_len=64, num_blocks=8, max_num_seqs=2), seconds=0.1, progress=False)


def test_the_published_machine_saturates_where_the_paper_says() -> None:
    cost = MACHINES["a100-70b"].cost

    def throughput(tokens: int) -> float:
        return tokens / cost.seconds(StepFeatures().plus(start=0, count=tokens, rows=1))

    assert throughput(256) > 0.85 * throughput(768) and throughput(32) < 0.3 * throughput(768)
    assert (
        0.015 < cost.seconds(StepFeatures().plus(start=100, count=1, rows=1)) < 0.045
    )  # a token a step: 22 to 66 a second
    assert MACHINES["a100-70b"].num_blocks * 32 > 400_000


def test_an_engine_with_slos_has_an_estimate_or_what_is_stored() -> None:
    settings = config(ttft="2ms/token", itl="250ms/p99", tpot="100ms", num_blocks=200)
    engine = Engine.load(settings)
    kept = engine.attainable()
    assert kept is not None and kept.estimated and engine.scheduler.policy.predictor is not None
    with pytest.raises(CostModelError):
        load_cost_model(settings)
    cost = CostModel(floor=0.001, per_token=1e-5, error=FitError(0.02, 0.08, 30))
    path = cache_path(identify(settings))
    save(replace(CALIBRATION, cost=cost), path)
    second = Engine.load(settings)
    predictor, kept = second.scheduler.policy.predictor, second.attainable()
    assert predictor is not None and predictor.cost == cost and kept is not None and not kept.estimated
    path.write_text("spoilt")
    third = Engine.load(settings).scheduler.policy.predictor
    assert third is not None and third.cost.error is None
    second.add_request("a", [5] * 100, SamplingParams(max_tokens=4, ignore_eos=True))
    request = second.scheduler.get("a")
    targets = SloTargets(itl=0.25, itl_percentile=99.0, tpot=0.1, ttft_per_token=0.002)
    assert request is not None and request.slo.targets == targets
    assert request.slo.deadline == pytest.approx(request.slo.arrival_time + 0.2)
    outputs = []
    while second.has_unfinished:
        outputs += second.step()
    assert sum(len(output.token_ids) for output in outputs) == 4


def test_an_engine_without_slos_refuses_targets() -> None:
    engine = Engine.load(config(num_blocks=200))
    with pytest.raises(InvalidRequestError, match="SLO scheduling is disabled"):
        engine.add_request(
            "a", [5], SamplingParams(max_tokens=4), scheduling=SchedulingOptions(targets=SloTargets(1.0, None))
        )
    engine.add_request("a", [5], SamplingParams(max_tokens=4), scheduling=SchedulingOptions(targets=SloTargets()))
    with pytest.raises(CostModelError):
        load_cost_model(config())
