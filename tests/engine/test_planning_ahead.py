"""Steps that are planned while the one before runs: the same outputs, requests that come in time, clean failures."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from scheduler_checks import check_scheduler
from torch import Tensor

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepScheduled
from splitfuse.core.plan import Chunk, SamplingState, StepPlan, StepResult
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation.token_cost import TokenCost
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Add, Finish, Stop
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.models.kv_cache import KVCache
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import load_model

STOPPED = "r3"
"""Request that its caller ends after two tokens, of which it wants one."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", folder)
    settings = {"model": str(folder), "dtype": "float32", "num_blocks": 24, "block_size": 4, "max_num_seqs": 6}
    config = EngineConfig.from_settings({**settings, "max_num_batched_tokens": 16})
    model = load_model(config)

    def make(*, plans_ahead: bool = True, **others: int) -> Engine:
        engine = Engine(EngineConfig.from_settings({**settings, "max_num_batched_tokens": 16, **others}), model)
        engine.executor.keeps_plans = plans_ahead
        return engine

    return make


def params_of(rng: Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 20),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(100),
        top_p=rng.choice((0.9, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        frequency_penalty=rng.choice((0.0, 1.0)),
        min_tokens=rng.choice((0, 1)),
        stop_token_ids=tuple(range(5, 15)),
        logprobs=rng.choice((None, 2)),
        prompt_logprobs=rng.choice((None, None, 1)),
    )


@dataclass
class Answer:
    """All that came out for a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None


def answers_of(engine: Engine) -> dict[str, Answer]:
    """What 14 requests give; some stop early, and most are preempted."""
    rng = Random(5)
    for number in range(14):
        prompt = [rng.randrange(15, 60) for _ in range(rng.choice((1, 3, 20, 50)))]
        engine.add_request(f"r{number}", prompt, params_of(rng))
    answers: dict[str, Answer] = {}
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            answer = answers.setdefault(output.request_id, Answer())
            assert answer.reason is None, "an output after the end"
            answer.tokens += output.token_ids
            answer.logprobs += [each.token_id for each in output.logprobs or ()]
            answer.prompt_logprobs += [each.token_id for each in output.prompt_logprobs or ()]
            answer.reason, answer.error = output.finish_reason, output.error
            if output.request_id == STOPPED and answer.reason is None and len(answer.tokens) >= 2:
                del answer.tokens[2:], answer.logprobs[2:]  # several come at once with drafts
                assert engine.finish(Finish(STOPPED, FinishReason.STOP, 1)) is not None
                answer.reason = FinishReason.STOP
        check_scheduler(engine.scheduler)
    assert engine.allocator.num_held == 0
    return answers


@pytest.mark.parametrize("kind", ["cpu", "other"])
def test_when_others_get_python(kind: str, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU before kernels run, which leave Python alone; on another device once all of a step is launched."""
    executor, seen = make().executor, list[bool]()
    forward = executor.decoder.forward

    def noted(batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        assert executor._running is not None
        seen.append(executor._running.begun.is_set())
        return forward(batch, kv_cache)

    monkeypatch.setattr(executor.decoder, "forward", noted)
    monkeypatch.setattr(type(executor.decoder), "device", SimpleNamespace(type=kind))
    request = SamplingState("r", (5, 6), SamplingParams(max_tokens=2), (), seed=0, choice=0)
    handle = executor.submit(StepPlan(1, 16, (Chunk("r", 0, (5, 6), (0,), 1, True),), (request,)))
    executor.collect(handle)
    assert seen == [kind == "cpu"] and handle.progress is not None and handle.progress.begun.is_set()


def test_outputs_are_those_without(make: Callable[..., Engine]) -> None:
    wanted = answers_of(make(plans_ahead=False))
    engine = make()
    in_flight: list[int] = []
    engine.events.subscribe(StepScheduled, lambda _: in_flight.append(len(engine.ids_in_flight())))
    assert answers_of(engine) == wanted
    assert sum(map(bool, in_flight)) > len(in_flight) / 2, "most steps are planned while one runs"
    assert engine.scheduler.queue.num_preemptions > 0


def test_outputs_with_drafts_are_those_without(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are planned ahead while no draft is likely, and drafts come only where nothing is in flight."""
    monkeypatch.setattr(TokenCost, "observe", lambda *_: None)  # what a draft is worth is not to depend on the clock
    repeated = SamplingParams(max_tokens=40, logit_bias={40: 100.0}, ignore_eos=True)
    plain, engine = make(plans_ahead=False), make(num_speculative_tokens=3)
    for each in (plain, engine):
        each.add_request("repeated", [20] * 6, repeated)
    wanted = answers_of(plain)
    steps: list[tuple[int, int]] = []

    def note(step: StepScheduled) -> None:
        steps.append((len(engine.ids_in_flight()), sum(chunk.num_drafts for chunk in step.plan.chunks)))

    engine.events.subscribe(StepScheduled, note)
    assert answers_of(engine) == wanted
    assert any(in_flight for in_flight, _ in steps) and any(drafts for _, drafts in steps)
    assert not any(in_flight and drafts for in_flight, drafts in steps)


def test_a_request_that_comes_during_a_step_is_in_the_next_one(make: Callable[..., Engine]) -> None:
    engine = make()
    plans: list[StepPlan] = []
    engine.events.subscribe(StepScheduled, lambda step: plans.append(step.plan))
    engine.add_request("a", [20] * 3, SamplingParams(max_tokens=8, ignore_eos=True))

    def add() -> bool:
        engine.add_request("b", [21] * 3, SamplingParams(max_tokens=2))
        return True

    engine.step(before_planning=add)
    assert [[chunk.request_id for chunk in plan.chunks] for plan in plans] == [["a"], ["a", "b"]]
    assert engine.ids_in_flight() == ["a", "b"]


def test_an_abort_gives_blocks_back_with_the_step_in_flight(make: Callable[..., Engine]) -> None:
    engine = make()
    for name in "ab":
        engine.add_request(name, [20] * 6, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    assert engine.abort("b") and not engine.abort("b")
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["a"]
    assert engine.allocator.num_held - len(held_by(engine, "a")) == 0
    assert engine.abort("a") and engine.has_unfinished
    assert engine.step() == [] and not engine.has_unfinished
    assert engine.allocator.num_held == 0


def held_by(engine: Engine, name: str) -> list[int]:
    request = engine.scheduler.get(name)
    assert request is not None
    return request.kv.blocks


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[Sequence[Chunk]]:
    """Let the forward step of that number raise. Returns a list that gets the chunks of each step."""
    compute = Executor._compute
    steps: list[Sequence[Chunk]] = []

    def failing(self: Executor, chunks: Sequence[Chunk]) -> StepResult:
        steps.append(chunks)
        if len(steps) == number:
            raise error
        return compute(self, chunks)

    monkeypatch.setattr(Executor, "_compute", failing)
    return steps


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_is_broken_off_ends_all_in_flight(
    make: Callable[..., Engine], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    fail_at(monkeypatch, 3, error("broken off"))
    for name in "ab":
        engine.add_request(name, [20] * 6, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.step()
    with pytest.raises(error, match="broken off"):
        engine.step()
    assert not engine.has_unfinished and engine.allocator.num_held == 0
    check_scheduler(engine.scheduler)
    assert len(tokens_of(engine, "c")) == 2


def tokens_of(engine: Engine, name: str) -> list[int]:
    engine.add_request(name, [20] * 6, SamplingParams(max_tokens=2, ignore_eos=True))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    return [token for output in outputs for token in output.token_ids]


def test_a_thread_that_cannot_be_started_hangs_no_step(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens_of(make(), "a")
    engine = make()
    computed: list[str] = []
    compute = Executor._compute

    def counting(self: Executor, chunks: Sequence[Chunk]) -> StepResult:
        computed.extend(chunk.request_id for chunk in chunks)
        return compute(self, chunks)

    def failing(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Executor, "_compute", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", failing)
        with pytest.raises(RuntimeError, match="start new thread"):
            tokens_of(engine, "a")
    assert not engine.has_unfinished and engine.allocator.num_held == 0
    assert tokens_of(engine, "b") == wanted
    assert computed == ["b", "b"], "what could not be submitted is not run by a later thread"


@pytest.mark.parametrize("step", [1, 2])
def test_ctrl_c_in_submit_hangs_no_step(
    make: Callable[..., Engine], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens_of(make(), "a")
    engine = make()
    submit, calls = ThreadPoolExecutor.submit, 0

    def interrupted(self: ThreadPoolExecutor, *arguments: Any) -> Future[Any]:
        nonlocal calls
        calls += 1
        future = submit(self, *arguments)  # it is queued, and may run
        if calls == step:
            raise KeyboardInterrupt
        return future

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(engine, "a")
    assert not engine.has_unfinished and engine.allocator.num_held == 0
    assert tokens_of(engine, "b") == wanted


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("later", ["c", "a"])
def test_requests_retire_though_their_plan_is_not_executed(
    make: Callable[..., Engine], isolate: bool, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    executor = engine.executor
    assert isinstance(executor, Executor)
    steps = fail_at(monkeypatch, 2, RuntimeError("a fault"))
    engine.add_request("a", [20] * 6, SamplingParams(max_tokens=1))
    engine.add_request("b", [20] * 6, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step(isolate=isolate)  # the plan after the next one retires "a", and ends with "b"
    if isolate:
        while engine.has_unfinished:
            engine.step(isolate=True)
    else:
        with pytest.raises(RuntimeError, match="a fault"):
            engine.step()
    assert len(steps) == 2 and not engine.has_unfinished
    assert len(tokens_of(engine, later)) == 2
    assert list(executor.requests) == [later]


def test_a_stop_that_comes_during_a_step_ends_planning(make: Callable[..., Engine]) -> None:
    engine = make()
    loop = EngineLoop(engine, lambda _: None)
    engine.events.subscribe(StepScheduled, lambda _: loop.commands.put(Stop()))
    loop.commands.put(Add("a", (20, 20), SamplingParams(max_tokens=8, ignore_eos=True)))
    loop.run()
    assert engine.ids_in_flight() == []
