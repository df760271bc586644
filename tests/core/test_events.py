"""Events: each listener gets those of its type, in order, and none can break a step or another listener."""

import logging

import pytest
from scheduler_harness import Run

from splitfuse.core.events import (
    EngineEvents,
    RequestAdded,
    RequestFinished,
    RequestPreempted,
    RequestStarted,
    StepRecord,
    StepScheduled,
)
from splitfuse.core.plan import StepPlan, StepResult
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor


def request(name: str, prompt: int, tokens: int) -> Request:
    ids = tuple((len(name) * 7 + i * i) % 16 for i in range(prompt))
    return Request(name, ids, SamplingParams(), tokens, seed=0)


def record(step: int) -> StepRecord:
    return StepRecord(StepPlan(step, 8, ()), StepResult(), 1.0, 1.5, 0.0, 1, 2)


def test_listeners_are_called_in_order_until_they_unsubscribe() -> None:
    events, heard = EngineEvents(), list[tuple[str, int]]()
    first = events.subscribe(StepRecord, lambda event: heard.append(("first", event.plan.step)))
    events.subscribe(StepRecord, lambda event: heard.append(("second", event.plan.step)))
    events.emit(record(1))
    first()
    events.emit(record(2))
    assert heard == [("first", 1), ("second", 1), ("second", 2)]


def test_a_failing_listener_is_logged_and_reaches_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: StepRecord) -> None:
        raise ValueError("a bug in the listener")

    run, records = Run.make(num_blocks=100, block_size=4, budget=8), list[StepRecord]()
    run.scheduler.events.subscribe(StepRecord, broken)
    run.scheduler.events.subscribe(StepRecord, records.append)
    run.add(request("a", 20, 3))
    with caplog.at_level(logging.ERROR):
        run.drain()
    assert len(run.outcomes["a"].tokens) == 3 and len(records) == len(run.plans) == 5
    assert len(caplog.records) == 5 and "a bug in the listener" in caplog.text


def test_the_lifecycle_of_requests_is_told() -> None:
    run, told = Run.make(num_blocks=6, block_size=2, budget=16, prefix=False), list[tuple[str, str]]()
    for kind in (RequestAdded, RequestStarted, RequestPreempted, RequestFinished):
        run.scheduler.events.subscribe(
            kind, lambda event: told.append((type(event).__name__, event.request.request_id))
        )
    run.add(request("old", 3, 8))
    run.add(request("newer", 3, 8))
    run.drain()
    assert told[:2] == [("RequestAdded", "old"), ("RequestAdded", "newer")]
    assert told[2:4] == [("RequestStarted", "old"), ("RequestStarted", "newer")]
    assert ("RequestPreempted", "newer") in told[4:] and ("RequestPreempted", "old") not in told
    assert [name for kind, name in told if kind == "RequestFinished"] == ["old", "newer"]
    assert told.count(("RequestStarted", "newer")) == 1  # though it ran again after its preemption


def test_an_aborted_request_tells_when_it_was_given_up() -> None:
    run, finished = Run.make(num_blocks=100, block_size=4, budget=8), list[RequestFinished]()
    run.scheduler.events.subscribe(RequestFinished, finished.append)
    run.add(request("a", 20, 3))
    run.scheduler.finish("a", FinishReason.ABORT, now=5.0, wanted_until=3.0)
    assert [(event.time, event.wanted_until) for event in finished] == [(5.0, 3.0)]
    assert finished[0].request.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("depth", [1, 2])
def test_step_records_carry_plans_sizes_and_times(depth: int) -> None:
    cost = CostModel(floor=0.01, per_token=0.001)
    policy = DeadlinePolicy(LatencyPredictor(cost), token_budget=8)
    run = Run.make(num_blocks=100, block_size=4, budget=8, max_num_seqs=1, depth=depth, policy=policy)
    records, scheduled = list[StepRecord](), list[StepScheduled]()
    run.scheduler.events.subscribe(StepRecord, records.append)
    run.scheduler.events.subscribe(StepScheduled, scheduled.append)
    run.add(request("a", 20, 3))
    run.add(request("b", 4, 1))
    run.drain()
    assert [event.plan for event in records] == [event.plan for event in scheduled] == run.plans
    assert all(event.predicted_seconds > 0.0 and event.measured_seconds > 0.0 for event in records)
    assert [event.end_time for event in records] == run.ended
    ends = [0.0, *run.ended]
    assert all(
        max(planned, end) == event.start_time for planned, end, event in zip(run.began, ends, records, strict=False)
    )
    assert (records[0].num_running, records[0].num_waiting) == (1, 1)
