"""`splitfuse tune`: the search in simulation on a fixed cost model, and the command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from splitfuse.bench import metrics
from splitfuse.bench.measure import MakeWorkload
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Chat, Independent, Lengths, Loads, Workload
from splitfuse.cli.commands import app
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel, FitError, Sample, StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration, cache_path, identify, save
from splitfuse.simulator.deployment import SimulationConfig
from splitfuse.simulator.simulate import simulate
from splitfuse.simulator.tune import Tuning, curve, tune

COST = CostModel(floor=0.009, per_token=0.0, knee=19, per_token_beyond=0.42e-3, error=FitError(0.04, 0.1, 30))
TIMED = tuple(
    Sample(step, 1.02 * COST.seconds(step))
    for step in (
        *(StepFeatures().plus(start=0, count=count, rows=1) for count in (8, 64, 128)),
        StepFeatures().plus(start=512, count=64, rows=0),
        StepFeatures(4, 4, 128, 128, 4),
    )
)
CALIBRATION = Calibration(
    name="by hand", cost=COST, num_blocks=4000, block_size=32, max_model_len=4096, timed=TIMED, identity={"model": "m"}
)
LIMIT = 1 / (0.42e-3 * (512 + 16))
"""Requests a second that its arithmetic allows."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last search is of no more requests than those before."""
    monkeypatch.setattr("splitfuse.simulator.tune.REFINED", 1)


def simulation(calibration: Calibration = CALIBRATION, **targets: str) -> SimulationConfig:
    return SimulationConfig(calibration=calibration, scheduler=SchedulerConfig(**targets))  # type: ignore[arg-type]


def independent(target: Target) -> Workload:
    return Independent(Lengths(512, 16, room=target.room), target.vocabulary)


def short(target: Target) -> Workload:
    return Independent(Lengths(40, 4, room=target.room), target.vocabulary)


def tuned(of: SimulationConfig, make: MakeWorkload = independent, **settings: Any) -> Tuning:
    return tune(of, make, **{"budgets": (64, 256), "max_num_seqs": (32,), "requests": 30, **settings})


def test_curve_has_timed_steps_and_fit() -> None:
    points = {point.tokens: point for point in curve(CALIBRATION, (64, 256))}
    assert sorted(points) == [1, 8, 64, 128, 256]
    assert points[64].measured == pytest.approx(1.02 * points[64].predicted)
    assert points[64].tokens_per_second == pytest.approx(64 / points[64].measured)
    assert points[256].measured is None
    assert points[256].tokens_per_second == pytest.approx(256 / points[256].predicted)


@pytest.mark.slow
def test_found_load_meets_the_slo_and_a_larger_one_does_not() -> None:
    targets = {"ttft": "1s", "itl": "60ms"}
    tuning = tuned(simulation(**targets), max_num_seqs=(1, 32), requests=60)
    assert 0.4 * LIMIT < tuning.rate < LIMIT
    slo, fcfs = tuning.budgets[1].rate, tuning.budgets_fcfs[1].rate
    assert fcfs < 0.5 * slo, "steps of 256 tokens take 109 ms, unless SLO scheduling shortens them"
    assert tuning.max_num_seqs[0].rate < 0.9 * tuning.max_num_seqs[1].rate and tuning.chosen.max_num_seqs == 32
    on_time = {}
    for times in (0.8, 2.0):
        scheduler = SchedulerConfig(
            max_num_batched_tokens=tuning.chosen.max_num_batched_tokens,
            max_num_seqs=tuning.chosen.max_num_seqs,
            **targets,
        )
        results = simulate(
            SimulationConfig(calibration=CALIBRATION, scheduler=scheduler),
            independent,
            Loads(rate=(times * tuning.rate,), requests=400, repeat=1),
            system="",
            about={},
        )
        on_time[times] = metrics.mean(
            [metrics.meets_slo(r, SloTargets(1.0, 0.06)) for r in metrics.counted(results.points[0])]
        )
    assert on_time[0.8] > 0.95 > 0.9 > on_time[2.0]
    assert 2 <= tuning.clients < 64 and 0.5 * tuning.rate < tuning.clients_rate < LIMIT


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_half_the_speed_sustains_half_at_doubled_targets() -> None:
    slow = Calibration(name="", cost=COST.slower(2.0), num_blocks=4000, block_size=32, max_model_len=4096)
    fast = tuned(simulation(ttft="1s", itl="250ms"), budgets=(128,))
    slower = tuned(simulation(slow, ttft="2s", itl="500ms"), budgets=(128,))
    assert slower.rate == pytest.approx(fast.rate / 2, rel=0.05)
    assert slower.clients == fast.clients


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_without_ttft_target_a_load_must_be_kept_up_with() -> None:
    tuning = tuned(simulation(itl="250ms"), budgets=(128,), requests=100)
    assert 0.6 * LIMIT < tuning.rate < 1.1 * LIMIT
    assert tuning.clients == tuning.chosen.max_num_seqs


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "targets",
    [pytest.param({"itl": "1ms"}, marks=pytest.mark.slow), {"ttft": "10ms", "itl": "250ms"}, {"ttft": "1ms/token"}],
)
def test_infeasible_targets_are_rejected_with_feasible_ones(targets: dict[str, str]) -> None:
    slow = Calibration(name="", cost=COST.slower(4.0), num_blocks=4000, block_size=32, max_model_len=4096)
    with pytest.raises(ConfigError, match="cannot be met here") as refused:
        tuned(simulation(slow, **targets), short, budgets=(128,))
    assert " ".join(f"--{name} {value}" for name, value in targets.items()) in str(refused.value)
    possible = str(refused.value).partition("feasible targets: ")[2].split(" or ")[0]
    longer = dict(re.findall(r"--(\w+) (\S+)", possible))
    assert tuned(simulation(slow, **longer), short, budgets=(128,), requests=10).clients >= 1
    shorter = {name: shortened(target) if target != targets.get(name) else target for name, target in longer.items()}
    with pytest.raises(ConfigError, match="cannot be met here"):
        tuned(simulation(slow, **shorter), short, budgets=(128,))


def shortened(target: str) -> str:
    """The target, and a tenth less."""
    number = re.match(r"[\d.]+", target)
    assert number is not None
    return f"{0.9 * float(number[0])}{target[number.end() :]}"


def test_infeasible_targets_name_only_what_misses_them() -> None:
    slow = Calibration(name="", cost=COST.slower(4.0), num_blocks=4000, block_size=32, max_model_len=4096)
    with pytest.raises(ConfigError) as refused:
        tuned(simulation(slow, ttft="10ms", itl="250ms"), short, budgets=(128,))
    said = str(refused.value).partition("; feasible targets: ")
    assert "even a lone request has a TTFT of up to 0.1" in said[0] and "inter-token" not in said[0]
    assert said[2].count("--itl 250ms") == 1 and " or " not in said[2], "the ITL target can stay"


@pytest.mark.usefixtures("quick")
def test_infeasible_gaps_are_rejected_by_their_measure() -> None:
    """A lone request has gaps of 36 ms."""
    slow = Calibration(name="", cost=COST.slower(4.0), num_blocks=4000, block_size=32, max_model_len=4096)
    for targets, said in (
        ({"tpot": "30ms"}, "even a lone request has a time per output token of up to 36 ms; feasible"),
        ({"itl": "30ms/p50"}, "even a lone request has as few as 0 % of its inter-token latencies within the target"),
    ):
        with pytest.raises(ConfigError, match="cannot be met here") as refused:
            tuned(simulation(slow, **targets), short, budgets=(128,), requests=10)
        assert said in str(refused.value)
        feasible = re.search(r"feasible targets: --(itl|tpot) ([\d.]+)ms(/p50)?$", str(refused.value))
        assert feasible is not None and 36 <= float(feasible[2]) < 60


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_conversations_are_tuned() -> None:
    def make(target: Target) -> Workload:
        return Chat(Lengths(100, 20, room=target.room), target.answer_vocabulary, 2)

    tuning = tune(simulation(ttft="1s", itl="250ms"), make, budgets=(128,), max_num_seqs=(32,), requests=20)
    assert 0 < tuning.rate < tuning.clients_rate  # each is two requests


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attainment": 0.0}, "--slo-attainment 0.0 must be above 0"),
        ({"budgets": (0,)}, "--max-num-batched-tokens must be positive integers, not 0"),
        ({"max_num_seqs": ()}, "--max-num-seqs must be positive integers, not none"),
        ({"requests": 0}, "--requests must be positive"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tuned(simulation(itl="250ms"), **settings)


def test_slo_is_met_if_all_targets_are() -> None:
    record = MeasuredRequest(0, 1.0, 10, (1.5, 1.6, 1.8))
    for targets, met in (
        (SloTargets(0.5, 0.25), True),
        (SloTargets(0.4, 0.25), False),
        (SloTargets(0.5, 0.15), False),
        (SloTargets(0.5, 0.16), True),  # on average 0.153 s
        (SloTargets(None, 0.25), True),
        (SloTargets(0.5, None), True),
        (SloTargets(tpot=0.16), True),  # gaps of 0.1 and 0.2 s
        (SloTargets(tpot=0.14), False),
        (SloTargets(itl=0.15, itl_percentile=50), True),
        (SloTargets(itl=0.15, itl_percentile=51), False),
        (SloTargets(itl=0.15, itl_percentile=50, tpot=0.14), False),
        (SloTargets(itl=0.05, itl_percentile=50, tpot=0.16), False),
    ):
        assert metrics.meets_slo(record, targets) is met
    assert not metrics.meets_slo(MeasuredRequest(0, 1.0, 10, (), "failed"), SloTargets(9.0))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.usefixtures("quick")
def test_command_prints_choice_and_reasons(tmp_path: Path) -> None:
    cost, out = tmp_path / "cost.json", tmp_path / "tuned.json"
    save(CALIBRATION, cost)
    ended = command(
        *("--ttft", "2ms/token", "--itl", "250ms/p99", "--tpot", "200ms", "--generate", "8"),
        *("--max-num-batched-tokens", "64,256", "--max-num-seqs", "32", "--requests", "20"),
        *("--cost-model", str(cost), "--quantization", "int8", "--no-enable-prefix-caching", "--out", str(out)),
    )
    assert ended.exit_code == 0, ended.output
    assert re.search(r"64 .* 28\.5 .* 27\.9 .* 22.. .*█", ended.stdout), "the curve"
    assert "error of the fit over held-out steps: median 4.0%" in ended.stdout
    assert "what this machine keeps of the SLO: " in ended.stdout and "of its TTFT target alone" in ended.stdout
    written = json.loads(out.read_text())["tuning"]
    budget, count = (written["chosen"][name] for name in ("max_num_batched_tokens", "max_num_seqs"))
    assert re.search(rf"{budget} .* {count} .* \S+ \* ", ended.stdout), "the chosen candidate"
    assert (
        "splitfuse serve --quantization int8 --ttft 2ms/token --itl 250ms/p99 --tpot 200ms --no-enable-prefix-caching "
        f"--max-num-batched-tokens {budget} --max-num-seqs {count}\n"
    ) in ended.stdout
    assert (f"sustains {written['rate']:.3g} requests/s (Poisson), or {written['clients']} clients") in ended.stdout
    assert "prompts of about 512 tokens and answers of 8" in ended.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_command_measures_the_found_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Calibration(
        name="bundled", cost=CostModel(floor=0.01, per_token=1e-3), num_blocks=400, block_size=32, max_model_len=1024,
        timed=TIMED, identity=identify(EngineConfig()),
    )  # fmt: skip
    save(kept, cache_path(kept.identity))
    ended = command(
        *("--ttft", "1s", "--itl", "1s", "--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--requests", "20"),
        *("--prompt", "24", "--generate", "4", "--measure"),
    )
    assert ended.exit_code == 0, ended.output
    assert re.search(r"measured at \S+ requests/s: \d+ of 100 met the SLO", ended.stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (),
            "tune requires an SLO: give --ttft, such as 1s or 2ms/token, --itl, such as 250ms or 250ms/p99, or --tpot",
        ),
        (("--itl", "250ms", "--num-speculative-tokens", "7"), "num_speculative_tokens must be 0 in a simulation"),
        (("--itl", "250ms", "--kv-memory-speed", "1e9", "--machine", "a100-70b"), "--kv-memory-speed needs"),
        (("--itl", "250ms", "--kv-bytes-per-token", "1e5"), "--kv-bytes-per-token is for --place, --kv-memory-tier"),
        (("--itl", "250ms", "--headroom", "-1"), "--headroom -1.0 must be a fraction"),
        (("--itl", "250ms", "--machine", "a100-70b", "--measure"), "--measure runs on this machine"),
        (("--itl", "250ms", "--max-num-batched-tokens", "x"), "--max-num-batched-tokens 'x' must be comma-separated"),
        (("--itl", "250ms", "--max-num-seqs", "8,0", "--machine", "a100-70b"), "--max-num-seqs must be positive"),
        (
            ("--itl", "1ms", "--machine", "a100-70b", "--requests", "9", "--generate", "8"),
            "--itl 1ms cannot be met here",
        ),
    ],
)
def test_command_errors_have_a_message(arguments: tuple[str, ...], said: str) -> None:
    ended = command(*arguments)
    assert ended.exit_code == 1
    assert said in ended.output
