"""What an engine traces: records that say all of its steps, and cost nothing while nothing is traced."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_models

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepScheduled
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import StepPlan
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine import trace
from splitfuse.engine import tracer as tracer_module
from splitfuse.engine.client import EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Add, Report, SetTracing, StepReport, Stop, Traced, decode_report, encode
from splitfuse.engine.thread import AsyncEngine
from splitfuse.engine.trace import (
    PLAIN,
    BlockMap,
    FinishTrace,
    PhaseTrace,
    PreemptTrace,
    RequestTrace,
    StepTrace,
    TraceLevel,
    TraceRecord,
)
from splitfuse.engine.tracer import EngineTracer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", path)
    return path


def load(folder: Path, **settings: Any) -> Engine:
    return Engine.load(EngineConfig.from_settings({"model": str(folder), "block_size": 4, **settings}))


def run(engine: Engine, tracer: EngineTracer) -> Iterator[TraceRecord]:
    """The records of all steps to the end, each as it comes out of a message."""
    while engine.has_unfinished:
        engine.step()
        report = decode_report(encode(Traced(tracer.take())))
        assert isinstance(report, Traced)
        yield from report.records


@pytest.mark.parametrize("preempted", [False, True])
def test_records_say_all_of_every_plan(folder: Path, *, preempted: bool) -> None:
    engine = load(folder, num_blocks=12 if preempted else 64, max_num_batched_tokens=16)
    plans: list[StepPlan] = []
    engine.events.subscribe(StepScheduled, lambda event: plans.append(event.plan))
    tracer = EngineTracer(engine)
    tracer.level = TraceLevel.PLANS
    prompts = {f"r{n}": tuple(range(3 + n, 3 + n + 9)) for n in range(4)}
    for name, prompt in prompts.items():
        logprobs = None if name == "r0" else 1
        engine.add_request(name, prompt, SamplingParams(max_tokens=10, temperature=1.0, logprobs=logprobs))
    records = list(tracer.take()) + list(run(engine, tracer))

    requests = {record.number: record for record in records if isinstance(record, RequestTrace)}
    assert [request.request_id for request in requests.values()] == list(prompts)
    assert all(request.detail and request.detail.seed >= 0 for request in requests.values())
    assert any(isinstance(record, PreemptTrace) for record in records) is preempted
    tokens = {number: list(prompts[request.request_id]) for number, request in requests.items()}
    tables: dict[int, tuple[int, ...]] = {}
    steps = [record for record in records if isinstance(record, StepTrace)]
    assert [step.step for step in steps] == [plan.step for plan in plans]
    for step, plan in zip(steps, plans, strict=True):
        assert step.start_time <= step.end_time and step.token_budget == 16
        for chunk, planned in zip(step.chunks, plan.chunks, strict=True):
            detail = chunk.detail or PLAIN
            assert requests[chunk.number].request_id == planned.request_id
            assert tuple(tokens[chunk.number][chunk.start :][: chunk.num_tokens]) == planned.token_ids
            table = tables.get(chunk.number, ())
            if detail.blocks:
                table = table[: detail.first_block] + detail.blocks
            assert table == planned.block_table
            tables[chunk.number] = table
            tokens[chunk.number] += chunk.token_ids
            has_logprobs = requests[chunk.number].request_id != "r0"
            assert [each.token_id for each in detail.logprobs] == (list(chunk.token_ids) if has_logprobs else [])
    finished = [record for record in records if isinstance(record, FinishTrace)]
    assert {(record.number, record.reason, record.num_output_tokens) for record in finished} == {
        (number, FinishReason.LENGTH, 10) for number in requests
    }
    assert all(len(tokens[number]) == 19 for number in requests)


def test_phases_are_those_that_requests_enter(folder: Path) -> None:
    engine = load(folder, num_blocks=64, max_num_batched_tokens=8, max_num_seqs=1)
    tracer = EngineTracer(engine)
    tracer.level = TraceLevel.STEPS
    for name in "ab":
        engine.add_request(name, range(3, 13), SamplingParams(max_tokens=3))
    records = list(tracer.take()) + list(run(engine, tracer))
    phases: dict[int, list[LatencyPhase]] = {0: [], 1: []}
    for record in records:
        if isinstance(record, PhaseTrace):
            for number, phase in record.phases:
                phases[number].append(phase)
    assert phases[0] == [LatencyPhase.PREFILL, LatencyPhase.DECODE]
    assert phases[1] == [LatencyPhase.NO_SLOT, LatencyPhase.PREFILL, LatencyPhase.DECODE]
    assert all(record.detail is None for record in records if isinstance(record, RequestTrace))
    maps = [record for record in records if isinstance(record, BlockMap)]
    assert maps[0].stride == 1 and len(maps[0].states) == 64 and 2 in maps[0].states
    assert not {2, 3} & set(maps[-1].states), "the last one, of an idle engine, shows what is held still"


def test_unfinished_requests_are_told_when_tracing_begins(folder: Path) -> None:
    engine = load(folder, num_blocks=64)
    tracer = EngineTracer(engine)
    engine.add_request("a", range(3, 13), SamplingParams(max_tokens=4, seed=1))
    engine.step()
    engine.step()
    assert not tracer.has_records
    tracer.level = TraceLevel.PLANS
    request, phase = tracer.take()
    assert isinstance(request, RequestTrace) and request.detail is not None
    assert len(request.detail.output_token_ids) == 2
    assert isinstance(phase, PhaseTrace) and phase.phases == ((request.number, LatencyPhase.DECODE),)
    tracer.level = TraceLevel.OFF
    while engine.has_unfinished:
        engine.step()
    assert not tracer.has_records


def test_client_passes_records_and_states(folder: Path) -> None:
    states: list[EngineState] = []
    records: list[TraceRecord] = []

    async def generate() -> None:
        client = AsyncEngine(load(folder, num_blocks=64))
        client.on_state = lambda: states.append(client.state)
        client.on_trace = records.extend
        client.set_tracing(TraceLevel.STEPS)  # before it is ready: set as soon as it is
        await client.start()
        async with client.open(Add("a", (3, 4, 5), SamplingParams(max_tokens=3))) as stream:
            outputs = [output async for output in stream]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        await client.close()
        assert client.death == "it was closed"

    asyncio.run(generate())
    assert states == [EngineState.READY, EngineState.DEAD]
    kinds = [type(record) for record in records if isinstance(record, RequestTrace | StepTrace)]
    assert kinds == [RequestTrace, StepTrace, StepTrace, StepTrace]
    assert msgspec.json.encode(records)  # also for a browser


def test_change_of_level_keeps_records(folder: Path) -> None:
    engine = load(folder, num_blocks=64)
    tracer = EngineTracer(engine)
    tracer.level = TraceLevel.PLANS
    engine.add_request("a", range(3, 13), SamplingParams(max_tokens=4))
    engine.step()
    engine.abort("a")
    tracer.level = TraceLevel.STEPS  # lower: what is open is known
    kinds = [type(record) for record in tracer.take() if not isinstance(record, PhaseTrace | BlockMap)]
    assert kinds == [RequestTrace, StepTrace, FinishTrace]


def test_records_are_sent_together_and_before_answers_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer_module, "TAKE_SECONDS", 3600.0)
    reports: list[Report] = []

    def take(report: Report) -> None:
        reports.append(report)
        if isinstance(report, StepReport) and any(output.finish_reason for output in report.outputs):
            loop.commands.put(Stop())

    loop = EngineLoop(load(folder, num_blocks=64), take)
    loop.commands.put(SetTracing(TraceLevel.STEPS))
    loop.commands.put(Add("a", (3, 4, 5), SamplingParams(max_tokens=9)))
    loop.run()
    steps = [report for report in reports if isinstance(report, StepReport)]
    assert len(steps) == 9 and not any(report.traced for report in steps[1:-1])
    kinds = [type(record) for report in steps for record in report.traced]
    assert kinds.count(StepTrace) == 9 and kinds.count(FinishTrace) == 1
    assert FinishTrace in map(type, steps[-1].traced), "known with the end of the answer"


def test_step_that_an_engine_dies_of_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(folder, num_blocks=64)
    reports: list[Report] = []
    loop = EngineLoop(engine, reports.append)
    loop.commands.put(SetTracing(TraceLevel.STEPS))
    loop.commands.put(Add("a", (3, 4, 5), SamplingParams(max_tokens=4)))

    def fail(_: StepPlan) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.executor, "submit", fail)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    records = [record for report in reports if isinstance(report, Traced) for record in report.records]
    assert {RequestTrace, StepTrace, FinishTrace} <= {type(record) for record in records}


def test_records_with_long_prompts_are_reported_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "PART_TOKENS", 10)
    engine = load(folder, num_blocks=64)
    tracer = EngineTracer(engine)
    tracer.level = TraceLevel.PLANS
    for name in "abc":
        engine.add_request(name, range(3, 9), SamplingParams(max_tokens=4))
    records = tracer.take()
    assert [len(part) for part in trace.in_parts(records)] == [2, 1]
    assert tuple(record for part in trace.in_parts(records) for record in part) == records
