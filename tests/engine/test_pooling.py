"""Requests that generate nothing: embeddings and log-probabilities of given tokens, against transformers, alone and in
company, with the same floats whatever the chunks, the neighbours, the prefix cache and preemptions.
"""

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from backends import why_not
from forced_preemption import force_preemptions
from scheduler_checks import check_scheduler

from splitfuse.config.engine import EngineConfig
from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, EngineStats, StepReport, decode_command, decode_report, encode
from splitfuse.errors import InvalidRequestError
from splitfuse.kernels.cpu.library import VARIANTS

VOCAB = tiny_models.VOCAB_SIZE


def load(model: Path | None, **settings: Any) -> Engine:
    named = {} if model is None else {"model": str(model), "dtype": "float32"}
    return Engine.load(EngineConfig.from_settings({"block_size": 32, **named, **settings}))


def pooled(engine: Engine, requests: dict[str, tuple[list[int], PoolingParams | None]]) -> dict[str, RequestOutput]:
    """Run requests together; those without PoolingParams generate. Returns the last output of each."""
    for name, (prompt, pooling) in requests.items():
        params = SamplingParams(max_tokens=9) if pooling is None else NOTHING_GENERATED
        engine.add_request(name, prompt, params, pooling=pooling)
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for output in engine.step():
            last[output.request_id] = output
        check_scheduler(engine.scheduler)
    assert engine.allocator.num_held == 0
    return last


def one(engine: Engine, prompt: list[int], pooling: PoolingParams) -> tuple[float, ...]:
    output = pooled(engine, {"only": (prompt, pooling)})["only"]
    assert output.finish_reason is FinishReason.STOP and output.token_ids == ()
    return output.values


@pytest.mark.parametrize("budget", [7, 64])
def test_hidden_states_and_logprobs_are_those_of_transformers(tmp_path: Path, budget: int) -> None:
    oracle = tiny_models.save("llama-gqa", tmp_path)
    prompt = [Random(1).randrange(VOCAB) for _ in range(40)]
    with torch.no_grad():
        ids = torch.tensor([prompt])
        hidden = oracle.model(ids).last_hidden_state[0, -1]
        logprobs = oracle(ids).logits[0, -1].log_softmax(-1)
    engine = load(tmp_path, block_size=4, max_num_batched_tokens=budget)
    for _ in range(2):  # the second time with most of it in the prefix cache
        assert one(engine, prompt, PoolingParams()) == pytest.approx(hidden.tolist(), rel=1e-4, abs=1e-5)
        scores = one(engine, prompt, PoolingParams((5, 3, 5)))
        assert scores == pytest.approx(logprobs[[5, 3, 5]].tolist(), rel=1e-4, abs=1e-5)


def crowd() -> dict[str, tuple[list[int], PoolingParams | None]]:
    rng, vocab = Random(4), 512
    shared = [rng.randrange(vocab) for _ in range(70)]
    requests: dict[str, tuple[list[int], PoolingParams | None]] = {}
    for number in range(12):
        prompt = shared * (number % 2) + [rng.randrange(vocab) for _ in range(rng.choice((1, 5, 60, 130)))]
        requests[str(number)] = prompt, (None, PoolingParams(), PoolingParams((38, 39, 7)))[number % 3]
    return requests


@pytest.mark.skipif(all(map(why_not, VARIANTS)), reason="the C++ kernels cannot be used here")
def test_the_same_bits_alone_and_in_any_company() -> None:
    requests = crowd()
    wanted = {}
    for name, request in requests.items():
        if request[1] is not None:
            wanted[name] = pooled(load(None), {name: request})[name].values
    for settings in ({}, {"max_num_batched_tokens": 17}, {"max_num_batched_tokens": 64, "num_blocks": 64}):
        engine = load(None, **settings)
        if "num_blocks" in settings:
            force_preemptions(engine)
        for _ in range(2):
            last = pooled(engine, requests)
            assert {name: last[name].values for name in wanted} == wanted
        assert bool(engine.scheduler.queue.num_preemptions) == ("num_blocks" in settings)


def test_logprobs_of_given_tokens_are_those_of_a_completion() -> None:
    engine, prompt = load(None), [5, 9, 33, 250, 8]
    engine.add_request("completion", prompt, SamplingParams(max_tokens=1, logprobs=20))
    (output,) = engine.step()
    assert output.logprobs is not None
    top = dict(output.logprobs[0].top)
    assert one(engine, prompt, PoolingParams(tuple(top))) == tuple(top.values())


def test_unusable_numbers_fail_one_request_alone(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    engine = load(tmp_path, max_num_batched_tokens=16)
    engine.executor.decoder.weights.embed[96] = math.nan
    kinds = {"hidden": PoolingParams(), "scores": PoolingParams((1, 2))}
    bad, good = [1, 2, 96, *range(30)], [1, 2, *range(30)]
    last = pooled(
        engine, {f"{kind} {prompt is bad}": (prompt, kinds[kind]) for kind in kinds for prompt in (bad, good)}
    )
    for kind in kinds:
        assert last[f"{kind} True"].error == "the model computed unusable numbers: nan among them"
        assert last[f"{kind} False"].finish_reason is FinishReason.STOP


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    with pytest.raises(InvalidRequestError, match=f"pooling has the token id {VOCAB}"):
        load(tmp_path).add_request("r", [1], NOTHING_GENERATED, pooling=PoolingParams((0, VOCAB)))


def test_messages_carry_what_is_asked_and_what_is_given() -> None:
    add = Add("r", (1, 2), NOTHING_GENERATED, pooling=PoolingParams((3,)))
    assert decode_command(encode(add)) == add
    report = StepReport((RequestOutput("r", values=(0.5, -1.25)),), EngineStats())
    assert decode_report(encode(report)) == report
