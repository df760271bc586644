"""A forward step that is broken off, by Ctrl-C or by an error, costs no block and hangs no request."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.latency.ledger import LatencyLedger
from splitfuse.core.request_output import FinishReason
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Finish
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.models import decoder
from splitfuse.runtime.loading import LoadedModel, load_model

CONFIG = EngineConfig.from_settings({"dtype": "float32", "num_blocks": 12, "block_size": 16})
PROMPTS = ["Erik plays the cello.", "Anna lives in Oakford. Max is a baker."]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(CONFIG)


def break_once(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, error: BaseException, after: int) -> None:
    """Let the step after `after` good ones end in `error`, in the middle of the network."""
    forward, calls = decoder.mlp, [0]

    def broken(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == after * len(model.spec.layers) + 2:
            raise error
        return forward(*arguments)

    monkeypatch.setattr(decoder, "mlp", broken)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_step_gives_every_block_back(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, error: BaseException, after: int
) -> None:
    pipe = splitfuse.Pipeline(Engine(CONFIG, model), splitfuse.pipeline().tokenizer)
    wanted = [r.token_ids for r in pipe(PROMPTS, max_new_tokens=8, ignore_eos=True)]
    break_once(monkeypatch, model, error, after)
    for _ in range(3):
        with pytest.raises(type(error)):
            pipe(PROMPTS, max_new_tokens=8, ignore_eos=True)
        assert pipe.engine.allocator.num_held == 0 and not pipe.engine.has_unfinished
        check_scheduler(pipe.engine.scheduler)
        monkeypatch.undo()
        assert [r.token_ids for r in pipe(PROMPTS, max_new_tokens=8, ignore_eos=True)] == wanted
        break_once(monkeypatch, model, error, after)


def test_a_listener_that_fails_is_logged_and_fails_no_step(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: StepRecord) -> None:
        raise ValueError("a bug in the listener")

    steps: list[StepRecord] = []
    engine = Engine(CONFIG, model)
    engine.events.subscribe(StepRecord, broken)
    engine.events.subscribe(StepRecord, steps.append)
    engine.add_request("a", [5, 6, 7], splitfuse.SamplingParams(max_tokens=3, ignore_eos=True))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1] and len(steps) == 3
    assert outputs[-1].finish_reason is FinishReason.LENGTH and outputs[-1].latency_breakdown is not None
    assert engine.allocator.num_held == 0 and not engine.has_unfinished
    assert "a bug in the listener" in caplog.text and len(caplog.records) == 3


def test_an_abort_counts_though_latency_accounting_failed(monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug in the ledger")

    monkeypatch.setattr(LatencyLedger, "_settle", broken)
    engine = Engine(CONFIG, model)
    engine.add_request("a", [5, 6, 7], splitfuse.SamplingParams(max_tokens=3))
    output = engine.finish(Finish("a", FinishReason.STOP))
    assert output is not None and output.finish_reason is FinishReason.STOP and output.latency_breakdown is None
    engine.add_request("b", [5, 6, 7], splitfuse.SamplingParams(max_tokens=3))
    assert engine.abort("b") and not engine.abort("b") and not engine.has_unfinished


def test_a_broken_put_leaves_the_sequence_as_it_was(monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> None:
    engine = RaggedEngine(CONFIG, model)
    wanted = engine.put([1], [list(range(10, 50))])
    engine.flush(1)
    engine.put([1], [list(range(10, 30))])
    free = engine.num_free_blocks
    break_once(monkeypatch, model, KeyboardInterrupt(), 0)
    with pytest.raises(KeyboardInterrupt):
        engine.put([1, 2], [list(range(30, 50)), [9] * 20])
    assert engine.num_free_blocks == free
    engine.check()
    assert torch.allclose(engine.put([1], [list(range(30, 50))]), wanted, atol=1e-4)


def make_engine(model: LoadedModel) -> Callable[[list[int]], list[int]]:
    engine = Engine(CONFIG, model)

    def generate(prompt: list[int]) -> list[int]:
        engine.add_request("a", prompt, splitfuse.SamplingParams(max_tokens=6, ignore_eos=True))
        tokens: list[int] = []
        while engine.has_unfinished:
            tokens += [token for output in engine.step() for token in output.token_ids]
        return tokens

    return generate


def test_engines_that_share_a_model_share_no_cache(model: LoadedModel) -> None:
    one, other, ragged = make_engine(model), make_engine(model), RaggedEngine(CONFIG, model)
    prompt = list(range(300, 340))
    before = ragged.put([1], [prompt])
    wanted = one(prompt)
    other(list(range(400, 480)))
    assert one([*prompt, *wanted])[:1] == make_engine(model)([*prompt, *wanted])[:1]
    assert torch.allclose(ragged.put([1], [[7]]), RaggedEngine(CONFIG, model).put([1], [[*prompt, 7]]), atol=1e-4)
    assert before.shape == (1, model.spec.vocab_size)


def test_streaming_an_ended_generation_ends_at_once(model: LoadedModel) -> None:
    pipe = splitfuse.Pipeline(Engine(CONFIG, model), splitfuse.pipeline().tokenizer)
    (request,) = pipe.prepare([PROMPTS[0]], max_new_tokens=3, ignore_eos=True)
    generations = pipe.generator.add(request)
    assert list(pipe.generator.stream(generations))
    assert list(pipe.generator.stream(generations)) == []
    assert generations[0].finish_reason is FinishReason.LENGTH


def test_min_tokens_beyond_the_model_length_are_refused(model: LoadedModel) -> None:
    with pytest.raises(splitfuse.InvalidRequestError, match="min_tokens 500: with its 3 tokens"):
        Engine(CONFIG, model).add_request("a", [1, 2, 3], splitfuse.SamplingParams(min_tokens=500))
