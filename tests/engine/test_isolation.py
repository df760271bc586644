"""An exception ends the request that it belongs to, and no other: in planning, in a step, in sampling, afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from patience import PATIENCE
from scheduler_checks import check_scheduler
from scheduler_harness import FakeExecutor, reference

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.request_kv import RequestKv
from splitfuse.core.plan import Chunk, SamplingState, StepPlan, StepResult
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.slo.request_slo import RequestSlo
from splitfuse.core.slo.targets import SloTargets
from splitfuse.core.step_builder import StepBuilder
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, Finish
from splitfuse.engine.step_runner import MAX_BROKEN_STEPS
from splitfuse.engine.thread import AsyncEngine
from splitfuse.runtime import executor, results
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.runtime.results import Requests
from splitfuse.runtime.sampling.request import RequestSampling

CONFIG = EngineConfig.from_settings({"dtype": "float32", "num_blocks": 60, "block_size": 16, "enable_slo": True})
COST = CostModel(floor=0.001, per_token=1e-5)
BAD = 77
"""Token by which a request is known that something fails on."""
PROMPTS = {f"r{number}": [5 + number, 9, 7 * number + 1] for number in range(7)}
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(CONFIG)


@pytest.fixture
def engine(model: LoadedModel) -> Engine:
    return Engine(CONFIG, model, cost=COST)


@pytest.fixture(scope="module")
def wanted(model: LoadedModel) -> dict[str, tuple[int, ...]]:
    engine = Engine(CONFIG, model, cost=COST)
    add(engine, PROMPTS)
    return {name: tokens for name, (tokens, _) in run(engine).items()}


def add(engine: Engine, prompts: dict[str, list[int]], **scheduling: Any) -> None:
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, PARAMS, scheduling=SchedulingOptions(**scheduling))


def run(engine: Engine) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Tokens and error of each request; every one ends once, and the blocks come back."""
    tokens: dict[str, tuple[int, ...]] = {}
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            assert output.request_id not in last, "an output after the end"
            tokens[output.request_id] = (*tokens.get(output.request_id, ()), *output.token_ids)
            if output.finish_reason is not None:
                last[output.request_id] = output
                assert (output.error is not None) == (output.finish_reason is FinishReason.ERROR)
                assert output.latency_breakdown is not None
        check_scheduler(engine.scheduler)
    assert engine.allocator.num_held == 0
    return {name: (tokens[name], output.error) for name, output in last.items()}


def fail_in_sampling(patch: pytest.MonkeyPatch) -> None:
    plain_rows = executor.plain_rows

    def failing(chunks: Sequence[Chunk], requests: Requests) -> list[RequestSampling] | None:
        states = [requests[chunk.request_id].state for chunk in chunks if chunk.samples]
        if any(BAD in state.prompt_token_ids and len(state.output_token_ids) == 2 for state in states):
            raise IndexError("index out of bounds")
        return plain_rows(chunks, requests)

    patch.setattr(executor, "plain_rows", failing)
    patch.setattr(results, "plain_rows", failing)


def fail_in_the_network(patch: pytest.MonkeyPatch) -> None:
    compute = Executor._compute

    def failing(self: Executor, chunks: Sequence[Chunk]) -> StepResult:
        if any(BAD in chunk.token_ids for chunk in chunks):
            raise RuntimeError("a token id is not below the rows of the table")
        return compute(self, chunks)

    patch.setattr(Executor, "_compute", failing)


def fail_in_order(patch: pytest.MonkeyPatch) -> None:
    order = DeadlinePolicy.order

    def failing(self: DeadlinePolicy, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> Any:
        if any(request.slo.targets.ttft == BAD for request in (*running, *waiting)):
            raise ZeroDivisionError("float division by zero")
        return order(self, running, waiting, now=now)

    patch.setattr(DeadlinePolicy, "order", failing)


def fail_in_the_plan(patch: pytest.MonkeyPatch) -> None:
    state = Request.sampling_state

    def failing(self: Request) -> SamplingState:
        if BAD in self.prompt_token_ids:
            raise AttributeError("no such parameter")
        return state(self)

    patch.setattr(Request, "sampling_state", failing)


def fail_afterwards(patch: pytest.MonkeyPatch) -> None:
    observe = RequestSlo.observe_token

    def failing(self: RequestSlo, now: float) -> None:
        if self.targets.ttft == BAD:
            raise OverflowError("too large")
        observe(self, now)

    patch.setattr(RequestSlo, "observe_token", failing)


FAULTS = [fail_in_sampling, fail_in_the_network, fail_in_order, fail_in_the_plan, fail_afterwards]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_exception_ends_the_request_it_belongs_to(
    engine: Engine,
    wanted: dict[str, tuple[int, ...]],
    fault: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    first, *others = PROMPTS
    add(engine, {first: PROMPTS[first]})
    add(engine, {"bad": [4, BAD]}, targets=SloTargets(ttft=BAD))
    add(engine, {name: PROMPTS[name] for name in others})
    add(engine, {"bad too": [4, BAD, 4]}, targets=SloTargets(ttft=BAD))
    outcomes = run(engine)
    for name in ("bad", "bad too"):
        tokens, error = outcomes.pop(name)
        assert error is not None and "Error(" in error and len(tokens) < 6
    assert outcomes == {name: (tokens, None) for name, tokens in wanted.items()}
    monkeypatch.undo()
    add(engine, {"bad": [4, BAD]}, targets=SloTargets(ttft=BAD))
    assert run(engine)["bad"][1] is None


def test_one_of_two_that_cannot_be_planned_together_ends(
    engine: Engine, wanted: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = engine.scheduler.policy
    order = policy.order

    def failing(running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> Any:
        if {"r2", "r5"} <= {request.request_id for request in (*running, *waiting)}:
            raise ValueError("math domain error")
        return order(running, waiting, now=now)

    monkeypatch.setattr(policy, "order", failing)
    add(engine, PROMPTS)
    outcomes = run(engine)
    assert [name for name, (_, error) in outcomes.items() if error] == ["r2"]
    assert all(tokens == wanted[name] for name, (tokens, error) in outcomes.items() if not error)


def test_a_fault_of_no_request_ends_all_with_a_reason(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> int:
        raise ArithmeticError("of no request")

    monkeypatch.setattr(StepBuilder, "reserve", failing)
    add(engine, PROMPTS)
    outcomes = run(engine)
    assert len(outcomes) == len(PROMPTS) and all("of no request" in str(error) for _, error in outcomes.values())
    monkeypatch.undo()
    add(engine, PROMPTS)
    assert all(error is None for _, error in run(engine).values())


def test_an_engine_whose_steps_stay_broken_raises(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> StepResult:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Executor, "_compute", failing)
    for _ in range(MAX_BROKEN_STEPS - 1):
        add(engine, PROMPTS)
        assert all("the device is gone" in str(error) for _, error in run(engine).values())
    add(engine, PROMPTS)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step(isolate=True)
    assert not engine.has_unfinished and engine.allocator.num_held == 0
    monkeypatch.undo()
    add(engine, PROMPTS)
    assert all(error is None for _, error in run(engine).values())


def test_a_request_that_cannot_be_added_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    key = engine.scheduler.requests.fair_share.key

    def failing(request: Request, **others: Any) -> float:
        if BAD in request.prompt_token_ids:
            raise ZeroDivisionError("float division by zero")
        return key(request, **others)

    monkeypatch.setattr(engine.scheduler.requests.fair_share, "key", failing)

    async def outcome(client: AsyncEngine, name: str, prompt: tuple[int, ...]) -> RequestOutput:
        async with client.open(Add(name, prompt, PARAMS)) as stream:
            return [output async for output in stream][-1]

    async def test() -> None:
        client = AsyncEngine(engine)
        await client.start()
        good, bad, after = await asyncio.gather(
            *(outcome(client, name, prompt) for name, prompt in (("a", (5, 6)), ("b", (BAD,)), ("c", (5, 6))))
        )
        assert good.error is None and after.error is None
        assert bad.error is not None and "it could not be added: ZeroDivisionError" in bad.error
        await client.close()

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


@pytest.mark.parametrize("kept", [None, 1])
def test_a_fault_in_ending_a_request_harms_no_other(
    engine: Engine, wanted: dict[str, tuple[int, ...]], kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Request) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(engine.scheduler.requests.fair_share, "refund", failing)
    add(engine, PROMPTS)
    engine.step(isolate=True)
    output = engine.finish(Finish("r3", FinishReason.ABORT, num_tokens=kept))
    assert output is not None and output.finish_reason is FinishReason.ABORT and output.latency_breakdown is not None
    check_scheduler(engine.scheduler)
    outcomes = run(engine)  # each of which ends with a fault too
    assert {name for name in wanted if name not in outcomes} == {"r3"}
    assert all(error is None for _, error in outcomes.values())


def test_a_fault_in_giving_blocks_back_loses_these_blocks_only(
    engine: Engine,
    wanted: dict[str, tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    release, lost = engine.allocator.release, list[int]()

    def failing(blocks: Sequence[int]) -> None:
        if not lost:
            lost.extend(blocks)
            raise ArithmeticError("a fault")
        release(blocks)

    monkeypatch.setattr(engine.allocator, "release", failing)
    add(engine, PROMPTS)
    outcomes = {}
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            tokens, _ = outcomes.get(output.request_id, ((), None))
            outcomes[output.request_id] = (*tokens, *output.token_ids), output.error
    assert {name: tokens for name, (tokens, error) in outcomes.items() if error is None} == wanted
    assert engine.allocator.num_held == len(lost) > 0
    engine.allocator.check([lost])
    assert caplog.messages == [f"some of the {len(lost)} KV blocks of a request are lost until a restart"]


@pytest.mark.parametrize("failing", ["submit", "hidden"])
def test_an_id_is_used_again_in_a_step_that_is_tried_in_halves(
    engine: Engine, wanted: dict[str, tuple[int, ...]], failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = {"grammars": [{"lark_grammar": "start: /[a-c]{2}/"}]}
    form = StructuredOutputs("grammar", "two letters", compiled=json.dumps(grammar))
    engine.add_request("r0", PROMPTS["r0"], replace(PARAMS, structured_outputs=form))
    run(engine)
    method, failures = getattr(Executor, failing), [RuntimeError("out of memory for two")]

    def failing_once(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return method(*arguments)

    monkeypatch.setattr(Executor, failing, failing_once)
    add(engine, {name: PROMPTS[name] for name in ("r0", "r1")})
    assert run(engine) == {name: (wanted[name], None) for name in ("r0", "r1")}


class FaultyExecutor(FakeExecutor):
    """Computes as FakeExecutor does, but some steps fail, before anything is computed or after all of it."""

    def __init__(self, block_size: int, rng: Random) -> None:
        super().__init__(block_size)
        self.rng = rng
        self.adapters: dict[str, object] = {}

    def submit(self, plan: StepPlan) -> int:
        share = 0.2 if len(plan.chunks) > 1 else 0.02
        if self.rng.random() < share:
            raise RuntimeError("before the step")
        chosen = dict(self.last_chosen)
        handle = super().submit(replace(plan, retired_requests=()))
        if self.rng.random() < share:
            self.submitted.pop()
            self.last_chosen = chosen
            raise RuntimeError("after the step")
        return handle


def sometimes_raising(method: Callable[..., Any], rng: Random) -> Callable[..., Any]:
    def raising(*arguments: Any, **others: Any) -> Any:
        if rng.random() < 0.01:
            raise ArithmeticError(method.__name__)
        return method(*arguments, **others)

    return raising


FAULTY: list[tuple[type[Any], str]] = [
    (StepBuilder, "available_slots"),
    (StepBuilder, "_chunk"),
    (Request, "sampling_state"),
    (FairShare, "refund"),
    (RequestKv, "grow"),
    (RequestKv, "reuse_prefix"),
    (RequestKv, "publish"),
    (RequestSlo, "observe_token"),
]


@pytest.mark.parametrize("seed", range(12))
def test_random_faults_leave_the_scheduler_sound(
    model: LoadedModel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = Random(seed)
    plan = replace(model.plan, num_blocks=rng.choice((8, 12, 30)), block_size=4)
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 16, "block_size": 4, "enable_slo": True}
    engine = Engine(EngineConfig.from_settings(settings), replace(model, plan=plan), cost=COST)
    engine.executor = engine._steps._executor = FaultyExecutor(4, rng)  # type: ignore[assignment]
    engine.executor.keeps_plans = seed % 2 == 1
    for owner, name in FAULTY:
        monkeypatch.setattr(owner, name, sometimes_raising(getattr(owner, name), rng))
    requests: dict[str, Request] = {}
    for number in range(60):
        prompt = tuple(rng.randrange(16) for _ in range(rng.randint(1, 20)))
        params = SamplingParams(max_tokens=rng.randint(1, 10), ignore_eos=True)
        targets = SloTargets(
            *(rng.choice((None, 1e-6, 10.0)), rng.choice((None, 1e-6, 1.0))), tpot=rng.choice((None, 1e-6, 1.0))
        )
        made = Request(f"r{number}", prompt, params, max_tokens=params.max_tokens or 0, seed=0)
        requests[made.request_id] = made
        engine.add_request(made.request_id, prompt, params, scheduling=SchedulingOptions(targets=targets))
    outcomes = run(engine)
    assert outcomes.keys() == requests.keys()
    complete = {name: list(tokens) for name, (tokens, error) in outcomes.items() if error is None}
    assert complete == {name: reference(requests[name])[0] for name in complete}
    assert 10 < len(complete) < 60
