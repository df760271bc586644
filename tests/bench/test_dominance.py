"""benchmarks/dominance: points, judging, ratios, resuming; and points at which no other policy has more goodput."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.dominance import __main__ as command
from benchmarks.dominance import compare
from benchmarks.dominance.compare import OTHERS, OUR_SYSTEM, Comparison, Line, Outcome, Settings
from benchmarks.dominance.loop import PlannedRequest, System, drive
from benchmarks.dominance.points import MAX_NUM_SEQS, Scenario, grid
from splitfuse.bench.results import MeasuredRequest
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator.machines import MACHINES

QUICK = Settings(requests=150, seeds=1, most_seeds=1)


def scenario(name: str) -> Scenario:
    return next(each for each in grid() if str(each) == name)


# Points at which ours is ahead with some margin, of all kinds of machines, workloads, loads and SLOs.
ROBUST = [
    "0.5b-int8/paper-small/32 clients/ttft 1.953ms/token, itl 166.7ms",
    "0.5b-int8/azure-code/80%/ttft 2, p99 30",
    "0.5b-int8/chat/8 clients/ttft 20/token, p95 3",
    "0.5b-bf16/paper-small/16 clients/ttft 1.953ms/token, itl 166.7ms",
    "a100-70b/two-classes/120%/ttft 5/token, p99 30",
    "opt-13b/azure-code-2k/75%/ttft 2/token, tpot 1.5",
    "opt-66b/azure-code-2k/75%/ttft 1.2, tpot 1.5",
    "splitwise-a100/azure-code/50%/ttft 5/token, itl 10",
    "splitwise-h100/azure-code/100%/ttft 5/token, p99 10",
]
LONG = [  # with so many steps that each takes 8 to 20 s
    "0.5b-int8-avx2/4k-prompts/50%/ttft 1.2, itl 1.5",
    "0.5b-int8-avx2/two-classes-long/80%/ttft 1.2/token, itl 3",
    "7b-int8-avx2/azure-code/90%/ttft 20/token, p90 10",
]


@pytest.mark.parametrize("name", [*ROBUST, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_no_other_policy_has_more_goodput(name: str) -> None:
    ((point, slo),) = command.chosen([name])
    comparison = Comparison(point, slo)
    for line in compare.complete(point, [slo], [], QUICK):
        comparison.add(line)
    assert comparison.ratio()[0] >= command.ENOUGH, command.row(comparison)


def test_grid_has_200_distinct_points() -> None:
    names = [f"{each}/{slo}" for each in grid() for slo in each.slos]
    assert len(names) == len(set(names)) >= 200
    assert {each.machine for each in grid()} == set(MACHINES) - {"a100-70b-vllm-0.2"}
    for each in grid():
        for slo in each.slos:
            assert len(each.targets(slo)) == len(each.requests_of.classes)
        assert each.clients or 0.25 * each.capacity <= each.rate <= 1.5 * each.capacity


def test_capacity_is_what_full_steps_sustain() -> None:
    point = scenario("0.5b-int8/azure-conv/120%")
    sessions = point.requests_of.sessions(400, 1)
    scheduler = System("splitfuse", 1024).make_scheduler(
        point.calibration, max_num_seqs=MAX_NUM_SEQS, caches_prefixes=False
    )
    records = drive(scheduler, point.calibration, sessions, arrivals=[0.0] * len(sessions))
    throughput = len(records) / max(record.done for record, _ in records)
    assert throughput == pytest.approx(point.capacity, rel=0.1)


def test_clients_send_their_next_request_when_answered() -> None:
    machine = MACHINES["0.5b-int8"]
    scheduler = OTHERS[-1].make_scheduler(machine, max_num_seqs=4, caches_prefixes=False)
    sessions = [[PlannedRequest((0,) * 100, 3), PlannedRequest((0,) * 120, 2)] for _ in range(4)]
    records = [record for record, _ in drive(scheduler, machine, sessions, clients=2)]
    assert [len(record.token_times) for record in records if record.num_prompt_tokens == 100] == [3] * 4
    answers = sorted(record.done for record in records)
    assert [record.sent for record in records[2:]] == [math.nextafter(done, math.inf) for done in answers[:6]]


def test_next_requests_wait_for_the_step_that_follows_an_answer() -> None:
    machine = MACHINES["0.5b-int8"]
    scheduler = System("splitfuse", 512).make_scheduler(machine, max_num_seqs=4, caches_prefixes=False)
    long, short = [PlannedRequest((0,) * 600, 1)], [PlannedRequest((0,) * 16, 1)]
    records = [record for record, _ in drive(scheduler, machine, [short, long, short], clients=2)]
    # The first step has the short prompt and a part of the long one, the second the rest of that.
    first, second, third = records
    assert third.sent == pytest.approx(first.done) and third.token_times[0] > second.token_times[0]


def test_requests_beyond_the_limit_are_refused() -> None:
    machine = MACHINES["0.5b-int8"]
    scheduler = OTHERS[-1].make_scheduler(machine, max_num_seqs=4, caches_prefixes=False)
    sessions = [[PlannedRequest((0,) * 64, 2)] for _ in range(5)]
    records = drive(scheduler, machine, sessions, arrivals=[0.0, 0.0, 0.0, 0.001, 9.0], max_unfinished=2)
    assert [record.error for record, _ in records] == [None, None, "refused", "refused", None]


def test_requests_are_judged_within_the_window() -> None:
    times = [(0.5, 0.6), (2.5, 2.6), (2.3, 2.9), (3.1, 3.2)]  # the second has a late first token, the third a late gap
    records = [(MeasuredRequest(i, float(i), 10, times[i]), 0) for i in range(4)]
    outcome = compare.judge(records, [SloTargets(ttft=1.0, itl=0.25)], clients=0)
    batches = [(0.0, 0), (0.0, 0), (0.0, 0), (1.0, 1), (0.0, 0), (0.0, 0), (1.0, 0), (0.0, 0), (0.0, 0), (1.0, 0)]
    assert outcome == Outcome(3.0, sent=3, met=1, late_first=1, longest=pytest.approx(1.6), batches=batches)
    assert outcome.late_gaps == 1 and outcome.goodput == pytest.approx(1 / 3)


def test_ratio_is_of_equal_seeds_and_its_interval_of_batches() -> None:
    point = scenario("0.5b-int8/chat/8 clients")
    comparison = Comparison(point, point.slos[0])

    def add(system: str, *met: int, seed: int = 1) -> None:
        outcome = Outcome(1.0 * len(met), 100, sum(met), 0, 1.0, [(1.0, each) for each in met])
        comparison.add(Line("", str(point), system, seed, {str(point.slos[0]): outcome}))

    add(str(OUR_SYSTEM), 55, 66, 77)
    for other in OTHERS:
        add(str(other), 0, 0, 0)
    assert comparison.ratio() == (math.inf, math.inf) and comparison.is_certain
    add(str(OTHERS[0]), 50, 60, 70)
    add(str(OTHERS[0]), 500, 600, 700, seed=2)
    assert comparison.best_other == str(OTHERS[0]) and comparison.goodput(str(OTHERS[0])) == 330.0
    ratio, half_width = comparison.ratio()
    assert ratio == pytest.approx(1.1) and half_width == pytest.approx(0.0, abs=1e-9)
    add(str(OUR_SYSTEM), 45, 66, 60)
    ratio, half_width = comparison.ratio()
    assert ratio == pytest.approx(0.95) and half_width > compare.HALF_WIDTH and not comparison.is_certain
    # As many in less time are more: the ratio of sums, and its change by each batch, to first order.
    ours = Outcome(8.0, 100, 180, 0, 1.0, [(2.0, 50), (3.0, 60), (3.0, 70)])
    comparison.add(Line("", str(point), str(OUR_SYSTEM), 1, {str(point.slos[0]): ours}))
    misses = [1.0 / 8.0 * 2.0, -1.0 / 8.0, -1.0 / 8.0]
    deviation = math.sqrt(sum(each**2 for each in misses) / 2)
    assert comparison.ratio() == (pytest.approx(3 / 8), pytest.approx(3 / 8 * 4.303 * deviation / math.sqrt(3)))


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = command.chosen(["7b", "short", "4 clients"])
    settings = Settings(requests=20, seeds=1, most_seeds=1, tag="a")
    out = tmp_path / "runs.jsonl"
    first = command.run_all(points, settings, out, processes=1)
    assert len(out.read_text().splitlines()) == len(OTHERS) + len(points)
    ran = []
    run = compare.run
    monkeypatch.setattr(compare, "run", lambda *args: ran.append(str(args[2])) or run(*args))
    again = command.run_all(points, settings, out, processes=1)
    assert not ran and [each.ratio() for each in again] == [each.ratio() for each in first]
    command.run_all(points, Settings(requests=20, seeds=1, most_seeds=1, tag="b"), out, processes=1)
    assert ran == [str(OUR_SYSTEM)] * len(points)
    text = command.summary(again)
    assert f"of {len(points)} points have at least 0.98" in text and "prefill-first 2048" in text


def test_runs_that_were_judged_without_batches_are_run_again(tmp_path: Path) -> None:
    points = command.chosen(["7b", "short", "4 clients"])[:1]
    settings = Settings(requests=20, seeds=1, most_seeds=1, tag="a")
    out = tmp_path / "runs.jsonl"
    first = command.run_all(points, settings, out, processes=1)
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    for line in lines[:-1]:  # of the others: ours would be run again by its tag
        for outcome in line["outcomes"].values():
            del outcome["batches"]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = command.run_all(points, settings, out, processes=1)
    assert [each.ratio() for each in again] == [each.ratio() for each in first]
    assert len(out.read_text().splitlines()) == len(lines) + len(OTHERS)
