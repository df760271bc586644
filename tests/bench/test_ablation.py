"""benchmarks/policies.py: the budget of each policy, turns on a real engine, ratios."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_points import RESULTS, point

from benchmarks import policies
from splitfuse.bench import metrics
from splitfuse.bench.baselines import POLICIES
from splitfuse.bench.results import load
from splitfuse.bench.summary import rows
from splitfuse.bench.workload import Lengths
from splitfuse.config.engine import EngineConfig
from splitfuse.runtime.loading import load_model
from splitfuse.simulator.machines import MACHINES

PLAN = policies.Plan(
    clients=(4, 8),
    budgets=(256, 1024),
    max_num_seqs=32,
    requests=16,
    repeat=1,
    prompt_speed=metrics.PROMPT_TOKENS_PER_SECOND,
    lengths=Lengths(1024, 64),
    seed=0,
)


@pytest.mark.parametrize("policy", POLICIES)
def test_best_budget_has_the_lowest_itl_among_equals(policy: str) -> None:
    calibration = MACHINES["a100-70b"]
    best = policies.best_budget(PLAN, calibration, policy)
    kept, gaps = {}, {}
    for budget in PLAN.budgets:
        result = policies.simulated(PLAN, calibration, policy, budget)
        kept[budget] = sum(metrics.goodput(p, s) for p in result.points for s in metrics.SPEEDS)
        gaps[budget] = sum(row.itl[95] for row in rows(result))
    assert kept[best] >= (1 - policies.AS_GOOD) * max(kept.values())
    for other in PLAN.budgets:
        assert other == best or kept[other] < (1 - policies.AS_GOOD) * max(kept.values()) or gaps[best] <= gaps[other]


def test_policies_take_turns_on_one_real_engine(tmp_path: Path) -> None:
    settings = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "enable_prefix_caching": False}
    plan = replace(PLAN, clients=(1, 2), requests=4, lengths=Lengths(48, 6), repeat=2)
    order = [policies_of for *_, policies_of in policies._turns(plan)]
    assert order[0] == list(POLICIES) and order[1] == order[2] == list(POLICIES)[::-1] and order[3] == order[0]
    model = load_model(EngineConfig.from_settings(settings))
    results = policies.measured(plan, model, settings, dict.fromkeys(POLICIES, 64), tmp_path)
    assert list(results) == list(POLICIES)
    for policy, result in results.items():
        assert result.system == f"{policy}, budget 64"
        assert sorted((p.clients, p.repetition) for p in result.points) == [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert all(record.error is None for p in result.points for record in p.records)
        assert load(tmp_path / f"{policy}.json") == result


def test_ratios_compare_equal_loads() -> None:
    slower = replace(RESULTS, points=(point(2, 2.0), point(8, 8.0)))
    found = list(policies.ratios({policies.OURS: rows(slower), "static": rows(RESULTS)}))
    latency = {each.where: each.value for each in found if each.figure == "latency"}
    assert latency["2 clients"] == pytest.approx(0.5, rel=0.02) and latency["8 clients"] == pytest.approx(
        3 / 8, rel=0.02
    )
    assert policies.quotient(1.0, 0.0) == math.inf and math.isnan(policies.quotient(0.0, 0.0))


def test_command_simulates_a_published_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--simulate --machine a100-70b --clients 2,8 --max-num-batched-tokens 512 --requests 12 --repeat 1 "
        "--prompt 1024 --generate 32"
    )
    monkeypatch.setattr(sys, "argv", ["policies", "--out", str(tmp_path), *flags.split()])
    policies.main()
    told = capsys.readouterr().out
    for policy in POLICIES:
        assert json.loads((tmp_path / f"{policy}.json").read_text())["system"] == f"{policy}, budget 512"
        assert len(re.findall(rf"^ +[28] {re.escape(policy)} ", told, re.MULTILINE)) == (
            2 if policy == policies.OURS else 4
        )
    assert re.search(r"The paper's 3.7 times in ITL P95: ", told)
    assert (tmp_path / "report.html").stat().st_size > 10_000
