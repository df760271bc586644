"""`splitfuse tune --place`: the search finds what an exhaustive one finds, and says when not to split."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from splitfuse.bench.target import Target
from splitfuse.bench.workload import Independent, Lengths, Workload
from splitfuse.cli.commands import app
from splitfuse.config.engine import SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator.bounds import STREAM, Bounds
from splitfuse.simulator.deployment import Link, SimulationConfig
from splitfuse.simulator.parallel import HOST_SECONDS, MEETING_SECONDS, tensor_parallel
from splitfuse.simulator.placement import Part, Placement, Search, Space, placements, search
from splitfuse.simulator.rates import PRECISION, Goal
from splitfuse.simulator.simulate import SimulatedTarget, prompt_ids

COST = CostModel(floor=0.020, per_token=0.00004, knee=64, per_token_beyond=0.0001, per_kv_token=6e-7)
CALIBRATION = Calibration(
    name="by hand", cost=COST, num_blocks=4000, block_size=16, max_model_len=4096, kv_bytes_per_token=1000.0
)
SPACE = Space(machines=2, budgets=(256, 1024), link=Link(1e9))
LONE = COST.seconds(StepFeatures().plus(start=0, count=1000, rows=1))
TIGHT = {"ttft": f"{1.25e3 * LONE:.0f}ms", "itl": "45ms/p99"}
LOOSE = {"ttft": "2s", "tpot": "100ms"}
"""SLOs that a prompt cannot meet in steps with decodes, whose hand-over is a gap of up to two steps; and easy ones."""


def workload(target: Target) -> Workload:
    return Independent(Lengths(1000, 60, 0.1, target.room), target.vocabulary)


def engine_of(targets: dict[str, str], calibration: Calibration = CALIBRATION) -> SimulationConfig:
    scheduler = SchedulerConfig(max_num_seqs=64, **targets)  # type: ignore[arg-type]
    return SimulationConfig(calibration=calibration, scheduler=scheduler, enable_prefix_caching=False)


def goal_of(targets: dict[str, str]) -> Goal:
    return Goal.of(SloTargets.parse(**targets), 0.9, 24)


def bounds_of(targets: dict[str, str], engine: SimulationConfig) -> Bounds:
    return Bounds(workload(SimulatedTarget(engine)), goal_of(targets))


def searched(
    targets: dict[str, str], space: Space = SPACE, calibration: Calibration = CALIBRATION, **how: Any
) -> Search:
    return search(engine_of(targets, calibration), workload, space, goal_of(targets), **how)


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "splits"), [(TIGHT, True), (LOOSE, False)], ids=["tight", "loose"])
def test_search_finds_what_an_exhaustive_one_finds(targets: dict[str, str], splits: bool) -> None:
    few: list[None] = []
    many: list[None] = []
    found = searched(targets, on_trial=lambda: few.append(None))
    all_of_them = searched(targets, exhaustive=True, on_trial=lambda: many.append(None))
    assert not any(each.is_bound for each in all_of_them.found)
    assert [each.placement for each in found.found] == [each.placement for each in all_of_them.found]
    best = max(each.rate for each in all_of_them.found)
    assert best / PRECISION <= found.best.rate <= best * PRECISION
    assert found.best.placement.is_split is all_of_them.best.placement.is_split is splits
    for pruned, whole in zip(found.found, all_of_them.found, strict=True):
        if pruned.is_bound:
            assert whole.rate <= PRECISION * pruned.rate
        else:
            assert whole.rate == pytest.approx(pruned.rate, rel=PRECISION - 1)
    assert len(few) < 0.4 * len(many), "those which are not better are given up after one load, or without any"
    engine = engine_of(targets)
    bounds = bounds_of(targets, engine)
    for each in all_of_them.found:
        assert each.rate <= bounds.largest_rate(each.placement.deployment(engine, SPACE).machines)


def test_bounds_count_the_least_work() -> None:
    """Steps of a thousand tokens share a floor; the smallest nine tenths must be computed by the last deadline."""
    engine = engine_of(LOOSE)
    bounds = bounds_of(LOOSE, engine)
    split = Placement(
        (Part(EngineRole.PROMPT, 1, 1, 256, keeps_slo=False), Part(EngineRole.GENERATION, 1, 1, 256, keeps_slo=False))
    )
    narrow = bounds.largest_rate(split.deployment(engine, SPACE).machines)
    per_token = COST.per_token + (COST.floor + COST.per_token_beyond * (256 - COST.knee)) / 256
    lengths = sorted(len(prompt_ids(workload(SimulatedTarget(engine)).first(STREAM, 6 + n))) for n in range(24))[:22]
    work = sum(per_token * length + COST.per_kv_token * length for length in lengths)
    assert narrow == pytest.approx(24 / (work - 2.0), rel=1e-6)
    assert bounds.largest_rate(replace_budget(split, 1024).deployment(engine, SPACE).machines) > narrow
    assert bounds_of({"tpot": "100ms"}, engine).largest_rate(split.deployment(engine, SPACE).machines) == inf
    assert bounds.capacity(split.deployment(engine, SPACE).machines) < narrow


def test_first_tokens_alone_bound_machines_that_do_both() -> None:
    """Without a target for answers, what prompts need until their deadlines is still known; of generation, nothing."""
    targets = {"ttft": "2s"}
    engine, bounds = engine_of(targets), bounds_of(targets, engine_of(targets))
    split = Placement(
        (Part(EngineRole.PROMPT, 1, 1, 256, keeps_slo=False), Part(EngineRole.GENERATION, 1, 1, 256, keeps_slo=False))
    )
    mixed = Placement((Part(EngineRole.MIXED, 1, 1, 256, keeps_slo=False),))
    prompts_alone = bounds.largest_rate(split.deployment(engine, SPACE).machines)
    assert bounds.largest_rate(mixed.deployment(engine, SPACE).machines) == prompts_alone < inf
    two = Placement((Part(EngineRole.MIXED, 2, 1, 256, keeps_slo=False),))
    assert bounds.largest_rate(two.deployment(engine, SPACE).machines) > prompts_alone


def replace_budget(placement: Placement, budget: int) -> Placement:
    return Placement(tuple(replace(part, budget=budget) for part in placement.parts))


def test_placements_use_all_machines() -> None:
    space = Space(machines=4, budgets=(256,), tensor_parallel=(1, 2), link=Link(1e9))
    found = list(placements(space))
    for placement in found:
        assert sum(part.engines * part.tensor_parallel for part in placement.parts) == 4
        roles = [part.role for part in placement.parts]
        assert roles == ([EngineRole.PROMPT, EngineRole.GENERATION] if placement.is_split else [EngineRole.MIXED])
    assert len(found) == len({str(each) for each in found}) == 4 + 6
    assert "2 prompt over 1" not in str(found) and "1 prompt over 2 machines each, budget 256" in str(found[-1])
    assert not any(each.is_split for each in placements(replace(space, link=None)))


def test_tensor_parallel_divides_all_but_the_meetings_and_the_host() -> None:
    two = tensor_parallel(CALIBRATION, 2, meeting_seconds=0.003)
    step = StepFeatures().plus(start=100, count=300, rows=1)
    assert two.cost.seconds(step) == pytest.approx(COST.seconds(step) / 2 + HOST_SECONDS / 2 + 0.003)
    assert tensor_parallel(CALIBRATION, 2).cost.floor == pytest.approx(two.cost.floor - 0.003 + MEETING_SECONDS)
    tiny = replace(CALIBRATION, cost=replace(COST, floor=HOST_SECONDS / 2))
    assert tensor_parallel(tiny, 2, meeting_seconds=0.0).cost.floor == HOST_SECONDS / 2
    assert two.num_blocks == 8000
    assert tensor_parallel(CALIBRATION, 1, meeting_seconds=0.003) is CALIBRATION


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(SPACE, machines=0), "--place 0 must be a number of machines from 1 to 64"),
        (lambda: replace(SPACE, budgets=(0,)), "--max-num-batched-tokens must be positive integers, not 0"),
        (lambda: replace(SPACE, tensor_parallel=(4,)), "--tensor-parallel 4 needs more machines than the 2"),
        (lambda: searched(LOOSE, calibration=replace(CALIBRATION, kv_bytes_per_token=0.0)), "--kv-bytes-per-token"),
        (lambda: searched({"ttft": "20ms"}), "no placement meets the SLO"),
        (lambda: tensor_parallel(CALIBRATION, 2, meeting_seconds=-1.0), "--meeting-time -1.0 must be"),
    ],
)
def test_impossible_search_is_rejected(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", "--machine", "opt-13b", "--requests", "12", "--tpot", "60ms", *arguments])


def test_command_says_whether_to_split(tmp_path: Path) -> None:
    out = tmp_path / "places.json"
    flags = ["--ttft", "1s", "--prompt", "600", "--generate", "8", "--max-num-batched-tokens", "512"]
    ended = command("--place", "2", "--link", "3e11", *flags, "--slo-attainment", "0.9", "--out", str(out))
    assert ended.exit_code == 0, ended.output
    assert "do not split prompts from generation: 2 mixed, budget 512" in ended.output.replace("\n", " ")
    assert len(json.loads(out.read_text())["found"]) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--place", "2"], "--place needs --link"),
        (["--link", "1e9"], "are for --place"),
        (["--place", "2", "--link", "1e9", "--max-num-seqs", "8,16"], "with one --max-num-seqs"),
        (["--place", "2", "--link", "-1"], "positive number of bytes/s, not -1"),
    ],
)
def test_command_rejects_flags_that_do_not_belong_together(flags: list[str], said: str) -> None:
    ended = command("--ttft", "1s", *flags)
    assert ended.exit_code == 1 and said in ended.output.replace("\n", " ")
