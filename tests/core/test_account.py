"""Every second of a request belongs to one part: exactly, on random loads; to the right one, in cases made for it."""

from collections.abc import Sequence
from fractions import Fraction
from random import Random

import pytest
from scheduler_harness import Run, Workload

from splitfuse.core.latency.ledger import (
    MAX_CO_SCHEDULED,
    LatencyLedger,
    RequestLatency,
    StepTransitions,
    Transition,
)
from splitfuse.core.latency.phases import COMPUTING, LatencyPhase
from splitfuse.core.request import FinishReason, Request, SchedulingOptions
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import NO_SLO, SloTargets

COST = CostModel(floor=0.01, per_token=0.001)


def added_up_step_by_step(run: Run, name: str) -> dict[str, Fraction | float]:
    """The same by another way: each step and each pause for itself, by tokens."""
    spent = run.breakdowns[name]
    sums: dict[str, Fraction | float] = {"own": 0, "beside": 0, "others": 0}
    ended: float | Fraction = spent.opened
    for plan, planned, end in zip(run.plans, run.began, run.ended, strict=True):
        began = max(planned, ended)  # one that was in flight behind another began when that ended
        ended = max(end, ended)
        seconds = max(min(end, spent.closed) - max(began, spent.opened), 0)
        mine = sum(len(chunk.token_ids) for chunk in plan.chunks if chunk.request_id == name)
        share = seconds * Fraction(mine, plan.num_tokens)
        sums["own"] += share
        sums["beside" if mine else "others"] += seconds - share
    sums["between"] = spent.closed - spent.opened - sum(sums.values())
    return sums


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("promises", [False, True])
def test_on_random_loads_the_parts_add_up_exactly(depth: int, promises: bool) -> None:
    seen: set[LatencyPhase] = set()
    for seed in range(150):
        run = Workload(seed).run(depth, slo=promises, ticks=True)
        for name, spent in run.breakdowns.items():
            assert all(seconds > 0 for seconds in spent.phases.values())
            total = sum(spent.phases.values())
            seen |= set(spent.phases)
            if promises:  # predictions are no fractions
                assert total == pytest.approx(spent.closed - spent.opened)
                continue
            assert total == spent.closed - spent.opened
            expected = added_up_step_by_step(run, name)
            parts = spent.phases
            assert sum(parts.get(part, 0) for part in COMPUTING) == expected["own"]
            assert parts.get(LatencyPhase.CO_SCHEDULED, 0) == expected["beside"]
            assert parts.get(LatencyPhase.BETWEEN_STEPS, 0) == expected["between"]
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
    assert seen >= everything | ({LatencyPhase.PACED, LatencyPhase.OUTRANKED} if promises else set())


# The right part ------------------------------------------------------------------------------------------------------


def request(name: str, prompt: int, tokens: int, targets: SloTargets = NO_SLO) -> Request:
    """A prompt like no other."""
    ids = tuple(Random(name).choices(range(16), k=prompt))
    return Request(name, ids, SamplingParams(), tokens, seed=0, scheduling=SchedulingOptions(targets=targets))


class Timed(Run):
    """Passes of a second each, and pauses of a tenth."""

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


def parts(run: Run, name: str) -> dict[LatencyPhase, float]:
    spent = run.breakdowns[name]
    assert sum(spent.phases.values()) == spent.closed - spent.opened
    return spent.phases


def to_the_end(run: Timed) -> None:
    while run.scheduler.has_unfinished:
        run.one_step()


def test_alone_all_is_its_own() -> None:
    run = timed([request("a", 20, 3)])
    to_the_end(run)
    assert parts(run, "a") == {
        LatencyPhase.PREFILL: 3,
        LatencyPhase.DECODE: 2,
        LatencyPhase.BETWEEN_STEPS: Fraction(5, 10),
    }
    assert run.breakdowns["a"].co_scheduled == ()


def test_a_step_is_divided_by_tokens_and_whose_they_were_is_told() -> None:
    run = timed([request("a", 2, 3), request("b", 14, 1)])
    to_the_end(run)  # aabbbbbb, abbbbbbb, ab
    assert parts(run, "a") == {
        LatencyPhase.PREFILL: Fraction(2, 8),
        LatencyPhase.DECODE: Fraction(1, 8) + Fraction(1, 2),
        LatencyPhase.CO_SCHEDULED: Fraction(6, 8) + Fraction(7, 8) + Fraction(1, 2),
        LatencyPhase.BETWEEN_STEPS: Fraction(3, 10),
    }
    assert run.breakdowns["a"].co_scheduled == (("b", 13),)  # a single token is no prompt chunk
    assert run.breakdowns["b"].co_scheduled == (("a", 2),)


def test_of_many_neighbours_the_largest_are_named() -> None:
    run = timed([request("a", 1, 9), *(request(f"p{n}", n, 1) for n in (2, 9, 5, 7, 3))])
    to_the_end(run)
    names = [name for name, _ in run.breakdowns["a"].co_scheduled]
    assert names == ["p9", "p7", "p5"] and len(names) == MAX_CO_SCHEDULED


def test_queued_for_a_seat_for_budget_or_for_blocks() -> None:
    run = timed([request("a", 8, 2), request("b", 2, 1)], max_num_seqs=1)
    to_the_end(run)
    assert parts(run, "b")[LatencyPhase.NO_SLOT] == 2
    run = timed([request("a", 16, 1), request("b", 2, 1)])
    to_the_end(run)
    assert parts(run, "b")[LatencyPhase.NO_BUDGET] == 2
    run = timed([request("a", 16, 2), request("b", 2, 1)], num_blocks=5, budget=20)
    to_the_end(run)
    assert parts(run, "b")[LatencyPhase.NO_BLOCKS] == 2 and LatencyPhase.NO_BUDGET not in parts(run, "b")


def test_preempted_and_computed_again() -> None:
    run = timed([request("a", 7, 14), request("b", 7, 14)], num_blocks=5, budget=16)
    to_the_end(run)
    assert LatencyPhase.PREEMPTED not in parts(run, "a")
    found = parts(run, "b")
    assert (found[LatencyPhase.LEFT_OUT_NO_BLOCKS], found[LatencyPhase.PREEMPTED], found[LatencyPhase.RECOMPUTED]) == (
        4,
        8,
        1,
    )
    assert run.breakdowns["b"].num_preemptions == 1


def test_streams_beyond_the_budget_are_left_out() -> None:
    run = timed([request(name, 1, 4) for name in "abc"], budget=2)
    to_the_end(run)
    assert parts(run, "c")[LatencyPhase.NO_BUDGET] >= 1
    run = timed([request("a", 2, 6), request("b", 2, 3)], budget=4)
    run.one_step()
    run.scheduler._token_budget = 1
    run.one_step()
    to_the_end(run)
    assert parts(run, "b")[LatencyPhase.LEFT_OUT] >= 1


def test_paced_and_behind_a_promise() -> None:
    rule = DeadlinePolicy(LatencyPredictor(COST), token_budget=100)
    run = Run.make(num_blocks=1000, block_size=16, budget=100, policy=rule)
    run.add(request("oldest", 5, 60, SloTargets(1.0, 0.25)))
    run.add(request("stream", 5, 60, SloTargets(1.0, 0.25)))
    for _ in range(3):
        run.step()
    run.add(request("old", 300, 1))
    run.add(request("urgent", 300, 2, SloTargets(0.5, 0.25)))  # no time for one step more
    while run.scheduler.has_unfinished:
        run.step()
    for spent in run.breakdowns.values():
        assert sum(spent.phases.values()) == pytest.approx(spent.closed - spent.opened)
    assert run.breakdowns["old"].phases[LatencyPhase.OUTRANKED] > 0
    assert run.breakdowns["stream"].phases[LatencyPhase.PACED] > 0
    assert run.breakdowns["stream"].phases[LatencyPhase.DECODE] > 0
    assert dict(run.breakdowns["stream"].co_scheduled).keys() == {"old", "oldest", "urgent"}


def test_with_predictions_its_own_share_is_what_it_would_take_alone() -> None:
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


# The ledger alone ----------------------------------------------------------------------------------------------------


def test_who_comes_in_the_middle_of_a_step_joins_when_it_is_over() -> None:
    ledger, first, second = LatencyLedger(), RequestLatency("a"), RequestLatency("b")
    ledger.open(first, sent=0, now=0)
    ledger.begin(StepTransitions([Transition(first, LatencyPhase.DECODE, 1)], [], 1), 1)
    ledger.end(5)
    ledger.open(second, sent=2, now=6)
    assert ledger.close(second, 8).phases == {
        LatencyPhase.TO_ENGINE: 1,
        LatencyPhase.JOINING: 3,
        LatencyPhase.BETWEEN_STEPS: 2,
    }


def test_what_nobody_wanted_any_more_does_not_count() -> None:
    def spent(ended: float) -> dict[LatencyPhase, float]:
        ledger, account = LatencyLedger(), RequestLatency("a")
        ledger.open(account, sent=0, now=0)
        ledger.begin(StepTransitions([Transition(account, LatencyPhase.NO_SLOT)], [], 1), 0)
        ledger.end(4)
        ledger.begin(StepTransitions([Transition(account, LatencyPhase.DECODE, 1)], [], 4), 4)
        ledger.end(8)
        closed = ledger.close(account, 8, wanted_until=ended)
        assert closed.closed == ended and sum(closed.phases.values()) == pytest.approx(ended)
        return closed.phases

    assert spent(8) == {LatencyPhase.NO_SLOT: 4, LatencyPhase.DECODE: 1, LatencyPhase.CO_SCHEDULED: 3}
    assert spent(6) == {LatencyPhase.NO_SLOT: 4, LatencyPhase.DECODE: 0.5, LatencyPhase.CO_SCHEDULED: 1.5}
    assert spent(3) == {LatencyPhase.NO_SLOT: 3}
    assert spent(0) == {LatencyPhase.NO_SLOT: 0}


def test_who_is_ended_from_outside_has_an_account_too() -> None:
    run = timed([request("a", 8, 9)])
    run.one_step()
    assert run.scheduler.finish("a", FinishReason.ABORT, now=run.now + 2)
    breakdown = run.latencies.pop("a")
    assert breakdown is not None and breakdown.phases == {
        LatencyPhase.PREFILL: 1,
        LatencyPhase.BETWEEN_STEPS: Fraction(21, 10),
    }
    assert not run.scheduler.finish("a", FinishReason.ABORT) and run.latencies.pop("a") is None
