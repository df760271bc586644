"""A request that goes on at another engine has the tokens and logprobs, bit for bit, that it would have had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import tiny_adapters
import tiny_models
from draft_models import count_drafts, draft_always
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import DraftKind, TokenLogprob
from splitfuse.core.reasoning import Reasoning
from splitfuse.core.request import Request, by_queue_key
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.fair_share import FairShare
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.messages import Add, Finish, ResumePoint, decode_command, encode
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.loading import load_model

SETTINGS: dict[str, Any] = {"num_blocks": 200, "max_num_batched_tokens": 48, "num_threads": 1}
TEXT = "Once upon a time there was a little dog who liked to run in the park with Anna and Tom . One day it"


@dataclass
class Answer:
    """What a request was given."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    phases: Mapping[LatencyPhase, float] = field(default_factory=dict)

    def after(self, num_tokens: int, num_prompt_logprobs: int) -> tuple[object, ...]:
        rest = self.prompt_logprobs[num_prompt_logprobs:]
        return self.token_ids[num_tokens:], self.logprobs[num_tokens:], rest, self.finish_reason


def run(engine: Engine, requests: Sequence[Add]) -> dict[str, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            answer = answers[output.request_id]
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs or ()
            answer.prompt_logprobs += output.prompt_logprobs or ()
            answer.finish_reason = output.finish_reason
            if output.latency_breakdown is not None:
                answer.phases = output.latency_breakdown.phases
        check_scheduler(engine.scheduler)
    return answers


def cut(request: Add, answer: Answer, num_tokens: int, num_prompt_logprobs: int | None = None) -> Add:
    """The request as it goes on after so many tokens."""
    count = len(answer.prompt_logprobs) if num_prompt_logprobs is None else num_prompt_logprobs
    point = ResumePoint(tuple(answer.token_ids[:num_tokens]), (0.0,) * num_tokens, count)
    name = f"{request.request_id} after {num_tokens}"
    # As it crosses to another process.
    add = Add(*(name, request.prompt_token_ids, request.params, request.choice), adapter=request.adapter)
    add = decode_command(encode(replaced(add, seed=request.seed, resume_point=point)))  # type: ignore[assignment]
    assert isinstance(add, Add)
    return add


def replaced(request: Add, **changes: Any) -> Add:
    return msgspec.structs.replace(request, **changes)


def check_cuts(first: Engine, second: Engine, requests: Sequence[Add], *, times: int = 1) -> None:
    """Compare what comes after cuts of all requests, one crowd at another engine, with what one engine gives. The
    second time, the other engine has all in its prefix cache.
    """
    requests = [request.settled for request in requests]
    whole, rng = run(first, requests), Random(3)
    resumed, wanted = [], {}
    for request in requests:
        answer = whole[request.request_id]
        last = len(answer.token_ids) - 1
        for count in {rng.randint(0, min(1, last)), rng.randint(0, last), last}:
            resumed.append(cut(request, answer, count))
            wanted[resumed[-1].request_id] = answer.after(count, len(answer.prompt_logprobs))
    for _ in range(times):
        found = run(second, resumed)
        assert {name: answer.after(0, 0) for name, answer in found.items()} == wanted
        assert second.allocator.num_held == 0


def mixed(pipe: splitfuse.Pipeline, count: int = 16, **more: Any) -> list[Add]:
    rng = Random(7)
    requests = []
    for number in range(count):
        text = " ".join(rng.choice(TEXT.split()) for _ in range(rng.randint(3, 60)))
        keywords: dict[str, Any] = {"max_new_tokens": rng.randint(4, 24), "logprobs": rng.choice((None, 0, 3))}
        if number % 2:
            keywords |= {"temperature": rng.choice((0.7, 1.2)), "seed": number, "n": 2}
            keywords |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        keywords |= rng.choice(({}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}))
        keywords |= rng.choice(({}, {"min_new_tokens": 4}, {"ignore_eos": True}, {"logit_bias": {17: 2.0}}))
        if number % 8 == 3:
            keywords["prompt_logprobs"] = 1
        (request,) = pipe.prepare(text, **{**keywords, **more})
        requests += [
            Add(f"{number}.{choice}", request.token_ids, request.params, choice) for choice in range(request.params.n)
        ]
    return requests


def two_engines(**settings: Any) -> tuple[splitfuse.Pipeline, Engine]:
    pipe = splitfuse.pipeline(**{**SETTINGS, **settings})
    return pipe, Engine(pipe.engine.config, pipe.engine.model)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int8"}], ids=["bf16", "int8-cache"])
def test_the_rest_is_equal(settings: dict[str, Any]) -> None:
    pipe, other = two_engines(**settings)
    check_cuts(pipe.engine, other, mixed(pipe), times=2)


def test_the_rest_is_equal_with_drafts() -> None:
    pipe, _ = two_engines()
    config = EngineConfig.from_settings({**SETTINGS, "num_speculative_tokens": 5})
    check_cuts(*(Engine(config, pipe.engine.model) for _ in range(2)), mixed(pipe))


def test_the_rest_is_equal_with_a_draft_model() -> None:
    pipe, _ = two_engines()
    with_drafts = {**SETTINGS, "num_speculative_tokens": 4, "draft_model": str(BUNDLED_MODEL)}
    model = splitfuse.pipeline(**with_drafts).engine.model
    engines = [Engine(EngineConfig.from_settings(with_drafts), model) for _ in range(2)]
    for engine in engines:
        draft_always(engine)
    counts = count_drafts(engines[1])
    check_cuts(*engines, mixed(pipe))
    assert counts[DraftKind.MODEL][1] > 10


@pytest.mark.parametrize(
    "form",
    [{"json": {"type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 4}}, {"regex": "([a-d]{2} ){3,6}!"}],
)
def test_a_form_goes_on_where_it_was(form: dict[str, Any]) -> None:
    pipe, other = two_engines()
    check_cuts(pipe.engine, other, mixed(pipe, 4, structured_outputs=form, ignore_eos=False, max_new_tokens=24))


def test_a_thought_goes_on_with_what_is_left_of_its_budget() -> None:
    pipe, other = two_engines()
    start, end = 1, 2  # special tokens of the bundled model
    requests = [
        replaced(
            request,
            params=replace(
                request.params,
                reasoning=Reasoning(
                    start_token_ids=(start,),
                    end_token_ids=(end,),
                    is_open=number % 3 == 0,
                    reopens=number % 2 == 0,
                    max_tokens=number % 7,
                    close_token_ids=(300, 301, end) if number % 4 == 0 else (),
                    answer_token_ids=(301,) if number % 5 == 0 else (),
                ),
                logit_bias={start: 6.0},
            ),
        )
        for number, request in enumerate(mixed(pipe))
    ]
    check_cuts(pipe.engine, other, requests)


def test_the_rest_is_equal_with_a_recurrent_state(tmp_path: Path) -> None:
    tiny_models.save("qwen3.5", tmp_path)
    settings = {"model": str(tmp_path), "dtype": "float32", "num_blocks": 200, "block_size": 4}
    config = EngineConfig.from_settings({**settings, "kernels": "reference", "max_num_batched_tokens": 24})
    model, rng = load_model(config), Random(5)
    requests = [
        Add(
            str(number),
            tuple(rng.randrange(70) for _ in range(rng.randint(1, 50))),
            SamplingParams(max_tokens=rng.randint(2, 30), ignore_eos=True, temperature=number % 2, seed=number),
        )
        for number in range(8)
    ]
    check_cuts(Engine(config, model), Engine(config, model), requests, times=2)


def test_the_rest_is_equal_with_an_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(Path(BUNDLED_MODEL) / "model.safetensors")
    folder = tiny_adapters.save_adapter(tmp_path, tiny_adapters.module_shapes(weights, tiny_adapters.EVERYTHING))
    pipe, other = two_engines()
    digest = pipe.engine.adapters.load("a", str(folder))
    assert other.adapters.load("a", str(folder)) == digest
    check_cuts(pipe.engine, other, [replaced(request, adapter=digest) for request in mixed(pipe, 8)])


def test_prompt_logprobs_are_not_repeated() -> None:
    pipe, other = two_engines(max_num_batched_tokens=16)
    (request,) = [Add("a", tuple(range(10, 70)), SamplingParams(max_tokens=3, prompt_logprobs=1), seed=1)]
    answer = run(pipe.engine, [request])["a"]
    assert len(answer.prompt_logprobs) == 59
    for count in (0, 16, 58, 59):
        (found,) = run(other, [cut(request, answer, 0, count)]).values()
        assert found.after(0, 0) == answer.after(0, count)


def test_tokens_given_are_computed_in_chunks_and_not_counted_again() -> None:
    pipe, other = two_engines()
    request = Add("a", tuple(range(10, 70)), SamplingParams(max_tokens=100, ignore_eos=True), seed=1)
    answer = run(pipe.engine, [request])["a"]
    steps: list[int] = []
    other.events.subscribe(StepRecord, lambda step: steps.append(step.plan.num_tokens))
    (found,) = run(other, [cut(request, answer, 80)]).values()
    assert steps == [48, 48, 44, *[1] * 19]
    assert found.phases[LatencyPhase.RECOMPUTED] > 0 and LatencyPhase.PREFILL not in found.phases


def test_a_prompt_counts_once_where_its_first_token_is() -> None:
    pipe, other = two_engines(max_num_batched_tokens=16)
    loops = [EngineLoop(engine, lambda _: None) for engine in (pipe.engine, other)]
    request = Add("a", tuple(range(10, 70)), SamplingParams(max_tokens=3, ignore_eos=True), seed=1)
    pipe.engine.add(request)
    for _ in range(2):
        pipe.engine.step()
    pipe.engine.finish(Finish("a", FinishReason.MOVED))
    while pipe.engine.has_unfinished:
        pipe.engine.step()
    run(other, [request])
    assert [loop._stats.num_prompt_tokens for loop in loops] == [0, 60]
    run(other, [request])
    assert loops[1]._stats.num_prompt_tokens == 120 and loops[1]._stats.num_cached_tokens == 32
    answer = run(pipe.engine, [request])["a"]  # the first 32 of its tokens are cached
    assert loops[0]._stats.num_prompt_tokens == 60 and loops[0]._stats.num_cached_tokens == 32
    run(other, [cut(request, answer, 1)])
    assert loops[1]._stats.num_prompt_tokens == 120
    assert not any(loop._prompts for loop in loops)


def test_an_slo_goes_on_from_the_times_that_the_client_has() -> None:
    targets, times = SloTargets(ttft=1.0, itl=0.2, tpot=0.1), (10.9, 10.95, 11.2)

    def request(name: str) -> Request:
        scheduling = SchedulingOptions(targets=targets, arrival_time=10.0)
        return Request(name, (1, 2, 3), SamplingParams(), max_tokens=9, seed=0, scheduling=scheduling)

    whole, resumed = request("whole"), request("resumed")
    for time in times:
        whole.slo.observe_token(time)
    resumed.resume((4, 5, 6), times, num_prompt_logprobs=0)
    assert resumed.slo.deadline == whole.slo.deadline > 11.2
    for each in whole, resumed:
        each.slo.observe_token(15.0)  # a pause that the client has seen
    assert resumed.slo.violation == whole.slo.violation is not None


def test_a_request_that_goes_on_comes_first_and_is_not_charged_again() -> None:
    share = FairShare()

    def request(name: str, owner: str) -> Request:
        options = SchedulingOptions(owner=owner)
        return Request(name, (1,) * 50, SamplingParams(), max_tokens=9, seed=0, scheduling=options)

    first, resumed = request("first", "x"), request("resumed", "x")
    resumed.resume((4, 5), (0.0, 0.0), num_prompt_logprobs=0)
    keys = [share.key(each, running=(), waiting=()) for each in (first, resumed)]
    assert keys == [0.0, 50.0] and by_queue_key(resumed) < by_queue_key(first)
    assert share.key(request("next", "x"), running=(), waiting=()) == 50.0
    share.refund(resumed)
    assert share.key(request("last", "x"), running=(), waiting=()) == 100.0
