"""Every second of a request belongs to one phase: exactly, on random loads; to the right one, in hand-made cases."""

from collections.abc import Sequence
from fractions import Fraction
from random import Random

import pytest
from scheduler_harness import Run, Workload

from splitfuse.core.latency.ledger import MAX_CO_SCHEDULED
from splitfuse.core.latency.phases import COMPUTING, LatencyPhase
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import NO_SLO, SloTargets

pytestmark = pytest.mark.interpreted  # times are fractions, so that sums are exact
COST = CostModel(floor=0.01, per_token=0.001)


def added_up_step_by_step(run: Run, name: str) -> dict[str, Fraction | float]:
    """The same by another way: each step and each pause for itself, by tokens."""
    breakdown = run.breakdowns[name]
    sums: dict[str, Fraction | float] = {"own": 0, "co_scheduled": 0, "others": 0}
    ended: float | Fraction = breakdown.opened
    for plan, planned, end in zip(run.plans, run.began, run.ended, strict=True):
        began = max(planned, ended)  # one that was in flight behind another began when that ended
        ended = max(end, ended)
        seconds = max(min(end, breakdown.closed) - max(began, breakdown.opened), 0)
        mine = sum(len(chunk.token_ids) for chunk in plan.chunks if chunk.request_id == name)
        share = seconds * Fraction(mine, plan.num_tokens)
        sums["own"] += share
        sums["co_scheduled" if mine else "others"] += seconds - share
    sums["between"] = breakdown.closed - breakdown.opened - sum(sums.values())
    return sums


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slo", [False, True])
def test_phases_of_random_workloads_add_up_exactly(depth: int, slo: bool) -> None:
    seen: set[LatencyPhase] = set()
    for seed in range(90):
        run = Workload(seed).run(depth, slo=slo, ticks=True)
        for name, breakdown in run.breakdowns.items():
            assert all(seconds > 0 for seconds in breakdown.phases.values())
            total = sum(breakdown.phases.values())
            seen |= set(breakdown.phases)
            if slo:  # predictions are no fractions
                assert total == pytest.approx(breakdown.closed - breakdown.opened)
                continue
            assert total == breakdown.closed - breakdown.opened
            expected = added_up_step_by_step(run, name)
            phases = breakdown.phases
            assert sum(phases.get(part, 0) for part in COMPUTING) == expected["own"]
            assert phases.get(LatencyPhase.CO_SCHEDULED, 0) == expected["co_scheduled"]
            assert phases.get(LatencyPhase.BETWEEN_STEPS, 0) == expected["between"]
    everything = {
        *(
            LatencyPhase.NO_SLOT,
            LatencyPhase.NO_BLOCKS,
            LatencyPhase.NO_BUDGET,
            LatencyPhase.PREEMPTED,
            LatencyPhase.RECOMPUTED,
            LatencyPhase.LEFT_OUT,
        ),
        *(LatencyPhase.PREFILL, LatencyPhase.DECODE, LatencyPhase.CO_SCHEDULED, LatencyPhase.BETWEEN_STEPS),
    }
    assert seen >= everything | ({LatencyPhase.OUTRANKED} if slo else set())


# The right part ------------------------------------------------------------------------------------------------------


def request(name: str, prompt: int, tokens: int, targets: SloTargets = NO_SLO) -> Request:
    """A prompt like no other."""
    ids = tuple(Random(name).choices(range(16), k=prompt))
    return Request(name, ids, SamplingParams(), tokens, seed=0, scheduling=SchedulingOptions(targets=targets))


class Timed(Run):
    """Runs steps of a second each, with pauses of a tenth."""

    def one_step(self) -> None:
        self.now += Fraction(1, 10)
        plan = self.scheduler.schedule(self.now)
        assert plan is not None
        self.plans.append(plan)
        self.now += 1
        handle = self.executor.submit(plan)
        for output in self.scheduler.update(plan, self.executor.collect(handle), self.now):
            if output.finish_reason is not None:
                self.note_breakdown(output.request_id)


def timed(requests: Sequence[Request], **settings: int) -> Timed:
    wanted = {"num_blocks": 100, "block_size": 4, "budget": 8, **settings}
    run = Timed.make(**wanted)  # type: ignore[arg-type]
    assert isinstance(run, Timed)
    run.now = Fraction(100)
    for each in requests:
        run.add(each)
    return run


def phases_of(run: Run, name: str) -> dict[LatencyPhase, float]:
    breakdown = run.breakdowns[name]
    assert sum(breakdown.phases.values()) == breakdown.closed - breakdown.opened
    return breakdown.phases


def to_the_end(run: Timed) -> None:
    while run.scheduler.has_unfinished:
        run.one_step()


def test_a_request_alone_only_prefills_and_decodes() -> None:
    run = timed([request("a", 20, 3)])
    to_the_end(run)
    assert phases_of(run, "a") == {
        LatencyPhase.PREFILL: 3,
        LatencyPhase.DECODE: 2,
        LatencyPhase.BETWEEN_STEPS: Fraction(5, 10),
    }
    assert run.breakdowns["a"].co_scheduled == ()


def test_a_step_is_divided_by_tokens() -> None:
    run = timed([request("a", 2, 3), request("b", 14, 1)])
    to_the_end(run)  # aabbbbbb, abbbbbbb, ab
    assert phases_of(run, "a") == {
        LatencyPhase.PREFILL: Fraction(2, 8),
        LatencyPhase.DECODE: Fraction(1, 8) + Fraction(1, 2),
        LatencyPhase.CO_SCHEDULED: Fraction(6, 8) + Fraction(7, 8) + Fraction(1, 2),
        LatencyPhase.BETWEEN_STEPS: Fraction(3, 10),
    }
    assert run.breakdowns["a"].co_scheduled == (("b", 13),)  # a single token is no prompt chunk
    assert run.breakdowns["b"].co_scheduled == (("a", 2),)


def test_the_largest_co_scheduled_prompts_are_named() -> None:
    run = timed([request("a", 1, 9), *(request(f"p{n}", n, 1) for n in (2, 9, 5, 7, 3))])
    to_the_end(run)
    names = [name for name, _ in run.breakdowns["a"].co_scheduled]
    assert names == ["p9", "p7", "p5"] and len(names) == MAX_CO_SCHEDULED


def test_queued_for_a_slot_for_budget_or_for_blocks() -> None:
    run = timed([request("a", 8, 2), request("b", 2, 1)], max_num_seqs=1)
    to_the_end(run)
    assert phases_of(run, "b")[LatencyPhase.NO_SLOT] == 2
    run = timed([request("a", 16, 1), request("b", 2, 1)])
    to_the_end(run)
    assert phases_of(run, "b")[LatencyPhase.NO_BUDGET] == 2
    run = timed([request("a", 16, 2), request("b", 2, 1)], num_blocks=5, budget=20)
    to_the_end(run)
    assert phases_of(run, "b")[LatencyPhase.NO_BLOCKS] == 2 and LatencyPhase.NO_BUDGET not in phases_of(run, "b")


def test_preempted_and_recomputed() -> None:
    run = timed([request("a", 7, 14), request("b", 7, 14)], num_blocks=5, budget=16)
    to_the_end(run)
    assert LatencyPhase.PREEMPTED not in phases_of(run, "a")
    found = phases_of(run, "b")
    assert (found[LatencyPhase.LEFT_OUT_NO_BLOCKS], found[LatencyPhase.PREEMPTED], found[LatencyPhase.RECOMPUTED]) == (
        4,
        8,
        1,
    )
    assert run.breakdowns["b"].num_preemptions == 1


def test_decodes_beyond_the_budget_are_left_out() -> None:
    run = timed([request(name, 1, 4) for name in "abc"], budget=2)
    to_the_end(run)
    assert phases_of(run, "c")[LatencyPhase.NO_BUDGET] >= 1
    run = timed([request("a", 2, 6), request("b", 2, 3)], budget=4)
    run.one_step()
    run.scheduler.budget.tokens = 1
    run.one_step()
    to_the_end(run)
    assert phases_of(run, "b")[LatencyPhase.LEFT_OUT] >= 1


def test_paced_and_outranked_under_slos() -> None:
    policy = DeadlinePolicy(LatencyPredictor(COST), token_budget=1000)
    run = Run.make(num_blocks=1000, block_size=16, budget=1000, policy=policy)
    run.add(request("oldest", 5, 60, SloTargets(1.0, 0.25)))
    run.add(request("stream", 5, 60, SloTargets(1.0, 0.25)))
    for _ in range(3):
        run.step()
    run.add(request("old", 300, 1))
    run.add(request("urgent", 300, 2, SloTargets(0.32, 0.25)))  # no time for a decode besides
    while run.scheduler.has_unfinished:
        run.step()
    for breakdown in run.breakdowns.values():
        assert sum(breakdown.phases.values()) == pytest.approx(breakdown.closed - breakdown.opened)
    assert run.breakdowns["old"].phases[LatencyPhase.OUTRANKED] > 0
    assert run.breakdowns["stream"].phases[LatencyPhase.PACED] > 0
    assert run.breakdowns["stream"].phases[LatencyPhase.DECODE] > 0
    assert dict(run.breakdowns["stream"].co_scheduled).keys() >= {"old", "oldest"}


def test_with_a_cost_model_a_share_is_the_cost_of_its_chunk() -> None:
    run = Run.make(
        num_blocks=1000, block_size=16, budget=100, policy=DeadlinePolicy(LatencyPredictor(COST), token_budget=100)
    )
    run.add(request("a", 10, 2))
    run.add(request("b", 30, 2))
    while run.scheduler.has_unfinished:
        run.step()
    assert run.breakdowns["a"].phases == pytest.approx(
        {
            LatencyPhase.PREFILL: 0.02,
            LatencyPhase.DECODE: 0.011,
            LatencyPhase.CO_SCHEDULED: 0.05 - 0.02 + 0.012 - 0.011,
        }
    )


# Times from outside --------------------------------------------------------------------------------------------------


def step(run: Timed, *, start: float, end: float) -> None:
    plan = run.scheduler.schedule(start)
    assert plan is not None
    run.scheduler.update(plan, run.executor.collect(run.executor.submit(plan)), end)


def test_a_request_joins_when_the_step_in_flight_ends() -> None:
    run = timed([])
    run.scheduler.add(request("a", 1, 9), 0)
    step(run, start=1, end=5)
    run.scheduler.add(request("b", 1, 9), 6, sent_time=2)
    run.scheduler.finish("b", FinishReason.ABORT, now=8)
    breakdown = run.latencies.pop("b")
    assert breakdown is not None and (breakdown.opened, breakdown.closed) == (2, 8)
    assert breakdown.phases == {
        LatencyPhase.TO_ENGINE: 1,
        LatencyPhase.JOINING: 3,
        LatencyPhase.BETWEEN_STEPS: 2,
    }


def test_seconds_after_a_request_was_given_up_do_not_count() -> None:
    def breakdown(ended: float) -> dict[LatencyPhase, float]:
        run = timed([])
        for each in (request("first", 8, 1), request("a", 2, 9), request("other", 6, 1)):
            run.scheduler.add(each, 0)
        step(run, start=0, end=4)
        step(run, start=4, end=8)
        run.scheduler.finish("a", FinishReason.ABORT, now=8, wanted_until=ended)
        closed = run.latencies.pop("a")
        assert closed is not None and closed.closed == ended and sum(closed.phases.values()) == pytest.approx(ended)
        return closed.phases

    assert breakdown(8) == {LatencyPhase.NO_BUDGET: 4, LatencyPhase.PREFILL: 1, LatencyPhase.CO_SCHEDULED: 3}
    assert breakdown(6) == {LatencyPhase.NO_BUDGET: 4, LatencyPhase.PREFILL: 0.5, LatencyPhase.CO_SCHEDULED: 1.5}
    assert breakdown(3) == {LatencyPhase.NO_BUDGET: 3}
    assert breakdown(0) == {LatencyPhase.NO_BUDGET: 0}


def test_an_aborted_request_has_a_breakdown() -> None:
    run = timed([request("a", 8, 9)])
    run.one_step()
    assert run.scheduler.finish("a", FinishReason.ABORT, now=run.now + 2)
    breakdown = run.latencies.pop("a")
    assert breakdown is not None and breakdown.phases == {
        LatencyPhase.PREFILL: 1,
        LatencyPhase.BETWEEN_STEPS: Fraction(21, 10),
    }
    assert not run.scheduler.finish("a", FinishReason.ABORT) and run.latencies.pop("a") is None
