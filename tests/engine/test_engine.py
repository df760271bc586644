"""The loop over a real model: what is refused, how requests end, and that none waits for or suffers from another."""

import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from guessed_drafts import guess
from scheduler_checks import check_scheduler
from transformers import AutoModelForCausalLM

from splitfuse.bench.baselines import make_baseline
from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import StepPlan, TokenLogprob
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.errors import InvalidRequestError, ModelError, PromptTooLongError
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.executor import StepHandle

VOCAB, LIMIT = tiny_models.VOCAB_SIZE, tiny_models.MAX_POSITION
POISON = 96  # the token whose embedding is made NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", path)
    return path


def load(model: Path, **settings: Any) -> Engine:
    return Engine.load(
        EngineConfig.from_settings({"model": str(model), "dtype": "float32", "block_size": 4, **settings})
    )


class Seen:
    """What came out of an engine for each request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.errors: dict[str, str | None] = {}

    def take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.request_id], self.errors[output.request_id] = output.finish_reason, output.error


def drain(engine: Engine) -> Seen:
    """Step until all have ended; no block may be left behind."""
    seen = Seen()
    while engine.has_unfinished:
        seen.take(engine.step())
        check_scheduler(engine.scheduler)
    assert engine.allocator.num_held == 0
    return seen


def generate(engine: Engine, prompt: list[int], **params: Any) -> list[int]:
    engine.add_request("only", prompt, SamplingParams(**params))
    return drain(engine).tokens["only"]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "parameter", "message"),
    [
        pytest.param([], {}, "prompt", "the prompt is empty", id="empty"),
        pytest.param([1] * LIMIT, {}, "prompt", f"has {LIMIT} tokens: .* at most {LIMIT - 1}", id="too-long"),
        pytest.param(
            [1] * 100,
            {"max_tokens": 29},
            "max_tokens",
            "max_tokens can be at most 28",
            id="max",
        ),
        pytest.param(
            [1, VOCAB], {}, "prompt", f"prompt has the token id {VOCAB}, .* from 0 to {VOCAB - 1}", id="vocab"
        ),
        pytest.param([-1], {}, "prompt", "prompt has the token id -1", id="negative"),
        pytest.param([True], {}, "prompt", "prompt has the token id True", id="bool"),
        pytest.param([1.0], {}, "prompt", "prompt has the token id 1.0", id="float"),
        pytest.param([1], {"logit_bias": {VOCAB: 1}}, "logit_bias", f"logit_bias has the token id {VOCAB}", id="bias"),
        pytest.param(
            [1], {"stop_token_ids": (0, VOCAB)}, "stop_token_ids", f"stop_token_ids has the token id {VOCAB}", id="stop"
        ),
    ],
)
def test_a_refused_request_changes_nothing(
    folder: Path, prompt: list[Any], params: dict[str, Any], parameter: str, message: str
) -> None:
    engine = load(folder)
    with pytest.raises(InvalidRequestError, match=message) as refusal:
        engine.add_request("r", prompt, SamplingParams(**params))
    assert refusal.value.parameter == parameter
    assert isinstance(refusal.value, PromptTooLongError) == ("maximum context length" in str(refusal.value))
    assert not engine.has_unfinished and engine.step() == []


def test_the_longest_prompt_and_largest_max_tokens_run(folder: Path) -> None:
    engine = load(folder)
    assert len(generate(engine, [1] * (LIMIT - 1))) == 1
    assert len(generate(engine, [1] * 100, max_tokens=28)) == 28
    assert len(generate(engine, [1] * 100)) == 28  # left out: as many as there is room for


def test_an_id_is_taken_while_its_request_runs(folder: Path) -> None:
    engine = load(folder)
    engine.add_request("r", [1], SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequestError, match="a request with the id 'r' is still running"):
        engine.add_request("r", [1], SamplingParams(max_tokens=1))
    drain(engine)
    engine.add_request("r", [1], SamplingParams(max_tokens=1))
    drain(engine)


# How requests end ----------------------------------------------------------------------------------------------------


def write_eos(folder: Path, eos: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "generation_config.json").unlink(missing_ok=True)
    return target


def test_eos_tokens_come_from_generation_config_as_a_number_or_a_list(folder: Path, tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    free = generate(load(folder), prompt, max_tokens=20)
    assert len(free) == 20
    eos = next(token for token in free[3:] if token not in free[:3])
    until_eos = free[: free.index(eos) + 1]
    for number, value in enumerate((eos, [eos], [next(t for t in range(VOCAB) if t not in free), eos])):
        model = copy_of(folder, tmp_path / str(number))
        write_eos(model, value)
        engine = load(model)
        engine.add_request("r", prompt, SamplingParams(max_tokens=20))
        seen = drain(engine)
        assert (seen.tokens["r"], seen.reasons["r"]) == (until_eos, FinishReason.STOP)
        assert generate(engine, prompt, max_tokens=20, ignore_eos=True) == free
        assert eos not in generate(engine, prompt, max_tokens=20, min_tokens=20)
        assert generate(engine, prompt, max_tokens=20, min_tokens=len(until_eos) - 1) == until_eos


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, -1, {"a": 1}])
def test_eos_tokens_that_are_none_are_refused(folder: Path, tmp_path: Path, value: object) -> None:
    model = copy_of(folder, tmp_path / "model")
    write_eos(model, value)
    with pytest.raises(ModelError, match=r"eos_token_id in .* must be a token id or a list of them"):
        load(model)


def test_eos_tokens_beyond_the_vocabulary_are_ignored(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = generate(load(folder), [5, 6, 7], max_tokens=20)
    eos = next(token for token in free[3:] if token not in free[:3])
    model = copy_of(folder, tmp_path / "model")
    write_eos(model, [VOCAB, eos, VOCAB + 7, 2**31, 2**63, 10**30])
    engine = load(model)
    assert engine.model.eos_token_ids == (eos,)
    assert f"has EOS tokens outside its vocabulary, which are ignored: {VOCAB}, {VOCAB + 7}" in caplog.text
    engine.add_request("alone", [5, 6, 7], SamplingParams(max_tokens=20))
    engine.add_request("forbids", [5, 6, 7], SamplingParams(max_tokens=20, min_tokens=20))
    engine.add_request("next", [5, 6, 7], SamplingParams(max_tokens=20, presence_penalty=5e-324))
    seen = drain(engine)
    until_eos = free[: free.index(eos) + 1]
    assert seen.tokens["alone"] == seen.tokens["next"] == until_eos
    assert len(seen.tokens["forbids"]) == 20 and eos not in seen.tokens["forbids"]


def test_a_stop_token_ends_a_request_even_if_eos_is_ignored(folder: Path) -> None:
    engine = load(folder)
    free = generate(engine, [5, 6, 7], max_tokens=20)
    stop = free[5]
    stopped = generate(engine, [5, 6, 7], max_tokens=20, stop_token_ids=(stop,), ignore_eos=True)
    assert stopped == free[: free.index(stop) + 1]


def test_an_abort_frees_blocks_at_once_and_only_its_own(folder: Path) -> None:
    engine = load(folder, num_blocks=40, max_num_seqs=2, enable_prefix_caching=False)
    alone = generate(engine, [3, 1, 4], max_tokens=10)
    engine.add_request("kept", [3, 1, 4], SamplingParams(max_tokens=10))
    engine.add_request("running", [9] * 30, SamplingParams(max_tokens=50))
    engine.add_request("waiting", [8] * 30, SamplingParams(max_tokens=50))
    seen = Seen()
    for _ in range(3):
        seen.take(engine.step())
    held = engine.allocator.num_held
    assert engine.abort("waiting") and engine.allocator.num_held == held
    assert engine.abort("running") and engine.allocator.num_held == engine.allocator.blocks_for(3 + 3)
    assert not engine.abort("running") and not engine.abort("unknown")
    seen.take(engine.step())
    rest = drain(engine)
    assert seen.tokens["kept"] + rest.tokens["kept"] == alone
    assert rest.tokens.keys() == {"kept"}


def test_an_observer_sees_every_step(folder: Path) -> None:
    steps: list[StepRecord] = []
    engine = load(folder, max_num_batched_tokens=8)
    engine.events.subscribe(StepRecord, steps.append)
    generated = generate(engine, [1] * 20, max_tokens=3)
    assert [step.plan.num_tokens for step in steps] == [8, 8, 4, 1, 1]
    assert [step.result["only"].token_ids for step in steps] == [(), (), *((token,) for token in generated)]


# Together ------------------------------------------------------------------------------------------------------------


def test_a_prompt_of_1000_tokens_never_delays_a_decode() -> None:
    engine = load(BUNDLED_MODEL, max_num_batched_tokens=64)
    rng = Random(1)
    running = {f"g{number}" for number in range(8)}
    for name in running:
        prompt = [rng.randrange(6, 2000) for _ in range(5)]
        engine.add_request(name, prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    first: set[str] = set()
    while first != running:
        first |= {output.request_id for output in engine.step() if output.token_ids}
    engine.add_request("long", [rng.randrange(6, 2000) for _ in range(1000)], SamplingParams(max_tokens=1))
    steps = 0
    while engine.scheduler.get("long"):
        outputs = engine.step()
        steps += 1
        assert {output.request_id for output in outputs if output.token_ids} >= running
    assert steps == math.ceil(1000 / (64 - len(running)))


def crowd(rng: Random) -> dict[str, tuple[list[int], SamplingParams]]:
    """Requests of all lengths, greedy and at random, with and without penalties and logprobs."""
    requests = {}
    for number in range(16):
        prompt = [rng.randrange(POISON) for _ in range(rng.choice((1, 3, 20, 60)))]
        keywords: dict[str, Any] = {"max_tokens": rng.randint(1, 25), "logit_bias": {POISON: -100}}
        if number % 2:
            keywords |= {"temperature": 1.0, "seed": number, "top_p": rng.choice((0.9, 1.0))}
        keywords |= rng.choice(({}, {"repetition_penalty": 1.2}, {"frequency_penalty": 1.0}, {"min_tokens": 1}))
        requests[f"r{number}"] = (prompt, SamplingParams(**keywords))
    return requests


def add_all(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> None:
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)


@pytest.mark.parametrize("cached", [True, False])
def test_one_plan_in_flight_gives_the_same_tokens(folder: Path, cached: bool) -> None:
    requests = crowd(Random(2))
    engine = load(folder, max_num_batched_tokens=16, enable_prefix_caching=cached)
    add_all(engine, requests)
    wanted = drain(engine)

    engine = load(folder, max_num_batched_tokens=16, num_blocks=40, max_num_seqs=6, enable_prefix_caching=cached)
    add_all(engine, requests)
    scheduler, seen = engine.scheduler, Seen()
    in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
    most_in_flight = 0
    while scheduler.has_unfinished or in_flight:
        while len(in_flight) < 2 and (plan := scheduler.schedule()):
            in_flight.append((plan, engine.executor.submit(plan)))
        most_in_flight = max(most_in_flight, len(in_flight))
        plan, handle = in_flight.popleft()
        seen.take(scheduler.update(plan, engine.executor.collect(handle)))
        check_scheduler(scheduler)
    assert most_in_flight == 2
    assert (seen.tokens, seen.reasons) == (wanted.tokens, wanted.reasons)
    assert engine.allocator.num_held == 0


def test_steps_are_collected_in_the_order_of_submission(folder: Path) -> None:
    engine = load(folder, max_num_batched_tokens=8)
    engine.add_request("only", [1] * 20, SamplingParams(max_tokens=3))
    plans = [plan for _ in range(3) if (plan := engine.scheduler.schedule())]
    first, dropped, last = (engine.executor.submit(plan) for plan in plans)
    assert engine.executor.collect(first)["only"].token_ids == ()
    assert len(engine.executor.collect(last)["only"].token_ids) == 1
    with pytest.raises(AssertionError, match="in the order in which they were submitted"):
        engine.executor.collect(dropped)


# NaN -----------------------------------------------------------------------------------------------------------------


def poison(engine: Engine) -> None:
    engine.executor.decoder.weights.embed[POISON] = math.nan


@pytest.mark.parametrize("where", [0, 25, 49], ids=["first-chunk", "middle", "last-token"])
def test_unusable_logits_fail_one_request_alone(folder: Path, where: int) -> None:
    settings: dict[str, Any] = {"max_num_batched_tokens": 16, "num_blocks": 60}
    requests = crowd(Random(3))
    clean = load(folder, **settings)
    add_all(clean, requests)
    wanted = drain(clean)

    engine = load(folder, **settings)
    poison(engine)
    prompt = [1] * 50
    prompt[where] = POISON
    engine.add_request("poisoned", prompt, SamplingParams(max_tokens=20))
    add_all(engine, requests)
    seen = drain(engine)
    assert seen.reasons.pop("poisoned") is FinishReason.ERROR
    assert seen.errors["poisoned"] == "the model computed unusable logits: NaN among them"
    assert seen.tokens.pop("poisoned") == []
    assert (seen.tokens, seen.reasons) == (wanted.tokens, wanted.reasons)

    add_all(engine, requests)  # more than the cache holds: every block that was NaN is written by now
    assert drain(engine).tokens == wanted.tokens


def test_unusable_logits_of_a_prompt_fail_its_logprobs(folder: Path) -> None:
    engine = load(folder, max_num_batched_tokens=8)
    poison(engine)
    engine.add_request("poisoned", [1, 2, POISON, *range(20)], SamplingParams(max_tokens=2, prompt_logprobs=0))
    engine.add_request("fine", [1, 2], SamplingParams(max_tokens=2, prompt_logprobs=0))
    seen = drain(engine)
    assert "unusable logits" in str(seen.errors["poisoned"]) and len(seen.tokens["fine"]) == 2


def test_a_failure_is_met_with_a_plan_in_flight_too(folder: Path) -> None:
    engine = load(folder)
    poison(engine)
    engine.add_request("poisoned", [POISON], SamplingParams(max_tokens=5))
    engine.add_request("fine", [3], SamplingParams(max_tokens=5, logit_bias={POISON: -100}))
    scheduler, seen = engine.scheduler, Seen()
    plans = [plan for _ in range(2) if (plan := scheduler.schedule())]
    for plan in plans:
        seen.take(scheduler.update(plan, engine.executor.collect(engine.executor.submit(plan))))
        check_scheduler(scheduler)
    rest = drain(engine)
    assert seen.reasons == {"poisoned": FinishReason.ERROR}
    engine.add_request("alone", [3], SamplingParams(max_tokens=5, logit_bias={POISON: -100}))
    assert seen.tokens["fine"] + rest.tokens["fine"] == drain(engine).tokens["alone"]


# Logprobs ------------------------------------------------------------------------------------------------------------


def test_logprobs_of_prompt_and_output_equal_those_of_transformers() -> None:
    rng = Random(4)
    prompt = [rng.randrange(6, 2000) for _ in range(90)]
    engine = load(BUNDLED_MODEL, max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    engine.add_request("r", prompt, params)
    of_prompt: list[TokenLogprob] = []
    of_output: list[TokenLogprob] = []
    while engine.has_unfinished:
        for output in engine.step():
            of_prompt += output.prompt_logprobs or ()
            of_output += output.logprobs or ()
    tokens = prompt + [entry.token_id for entry in of_output]
    assert [entry.token_id for entry in of_prompt] == prompt[1:] and len(of_output) == 6

    oracle = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position, entry in enumerate(of_prompt + of_output):
        assert entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(float(wanted[position, entry.token_id]), abs=1e-3)
        assert len(entry.top) == (2 if position < 89 else 3)
        best = wanted[position].topk(len(entry.top)).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=1e-3)
        assert all(float(wanted[position, token]) == pytest.approx(value, abs=1e-3) for token, value in entry.top)


@pytest.mark.parametrize("policy", ["prefill-first", "orca", "static"])
def test_other_policies_generate_the_same(folder: Path, policy: str) -> None:
    rng = Random(0)
    prompts = [[rng.randrange(1, VOCAB - 10) for _ in range(rng.randint(1, 30))] for _ in range(6)]

    def generate(policy: str) -> dict[str, list[int]]:
        config = EngineConfig.from_settings({"model": str(folder), "dtype": "float32", "block_size": 4})
        config = replace(config, scheduler=SchedulerConfig(max_num_batched_tokens=8))
        engine = Engine.load(config, policy=make_baseline(policy, config.scheduler))
        outputs: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, SamplingParams(max_tokens=6, ignore_eos=True))
            for output in engine.step():
                outputs.setdefault(output.request_id, []).extend(output.token_ids)
        while engine.has_unfinished:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).extend(output.token_ids)
        return outputs

    assert generate(policy) == generate("splitfuse")


def test_drafts_and_those_that_were_right_are_counted(folder: Path) -> None:
    prompts = {"a": list(range(3, 13)), "b": [5] * 9}
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    plain = load(folder)
    for name, prompt in prompts.items():
        plain.add_request(name, prompt, params)
    wanted = drain(plain).tokens
    engine = load(folder, num_speculative_tokens=5)
    loop = EngineLoop(engine, lambda _: None)
    drafting = guess(engine, lambda request: wanted[request.request_id])
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
        check_scheduler(engine.scheduler)
    seen = Seen()
    seen.take(outputs)
    assert seen.tokens == wanted and not any(seen.errors.values())
    stats = loop._stats_now()
    assert stats.num_accepted_tokens == drafting.accepted > 10
    assert stats.num_draft_tokens == sum(output.num_drafted for output in outputs) > drafting.accepted
    assert stats.num_generated_tokens == sum(map(len, wanted.values()))
    assert sum(len(output.token_ids) - 1 for output in outputs if output.num_drafted) == drafting.accepted
