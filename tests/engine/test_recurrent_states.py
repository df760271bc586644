"""A real hybrid, with gated delta nets and attention: what it answers never depends on which states were reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from scheduler_checks import check_scheduler

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import Chunk
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.errors import RequestTooLargeError
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model

SETTINGS = {"dtype": "float32", "num_blocks": 90, "block_size": 4, "max_num_batched_tokens": 24}
PARAMS = SamplingParams(max_tokens=7, ignore_eos=True)
BAD = 77
"""Token by which a request is known that a step fails on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    tiny_models.save("qwen3.5", path)
    return path


def config(folder: Path, **changes: object) -> EngineConfig:
    return EngineConfig.from_settings({"model": str(folder), **SETTINGS, **changes})


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(config(folder))


@pytest.fixture
def engine(folder: Path, model: LoadedModel) -> Engine:
    return Engine(config(folder), model)


def answers(engine: Engine, prompts: dict[str, list[int]], params: SamplingParams = PARAMS) -> dict[str, list[int]]:
    """The tokens of each request, an empty list for one that failed; all slots and blocks come back."""
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            tokens[output.request_id] = [] if output.error else [*tokens[output.request_id], *output.token_ids]
        check_scheduler(engine.scheduler)
    assert engine.allocator.states is not None
    assert engine.allocator.num_held == engine.allocator.states.num_held == 0
    return tokens


def alone(folder: Path, model: LoadedModel, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    """The answer without a prefix cache and without company, the prompt in one step."""
    fresh = Engine(config(folder, enable_prefix_caching=False, max_num_batched_tokens=256), model)
    return answers(fresh, {"alone": prompt}, params)["alone"]


def random_prompt(rng: Random, length: int) -> list[int]:
    return [rng.randrange(BAD) for _ in range(length)]


def test_six_turns_compute_new_tokens_and_one_interval_at_most(
    engine: Engine, folder: Path, model: LoadedModel
) -> None:
    steps: list[int] = []
    engine.events.subscribe(StepRecord, lambda step: steps.append(step.plan.num_tokens))
    rng = Random(1)
    history = random_prompt(rng, 41)
    for turn in range(6):
        message = random_prompt(rng, 5 + turn)
        before, prompt = sum(steps), history + message
        answer = answers(engine, {f"turn {turn}": prompt})[f"turn {turn}"]
        assert answer == alone(folder, model, prompt)
        if turn:
            assert sum(steps) - before <= len(message) + len(answer) + model.plan.block_size
        history = prompt + answer


def test_a_crowd_with_shared_prefixes_and_preemptions_answers_as_each_alone(folder: Path, model: LoadedModel) -> None:
    crowded = Engine(config(folder, max_num_seqs=5), model)
    rng = Random(2)
    shared = random_prompt(rng, 30)
    prompts = {f"{n}": shared[: rng.randint(0, 30)] + random_prompt(rng, rng.randint(1, 50)) for n in range(12)}
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    tokens = answers(crowded, prompts, params)
    assert crowded.scheduler.queue.num_preemptions
    assert tokens == {name: alone(folder, model, prompt, params) for name, prompt in prompts.items()}


def fail(patch: pytest.MonkeyPatch, *, times: int | None = None) -> None:
    """Let steps with the bad token fail once their states are written; after some `times`, no more."""
    failures: list[Sequence[Chunk]] = []

    def after(compute: Callable[[Executor, Sequence[Chunk]], Any]) -> Callable[[Executor, Sequence[Chunk]], Any]:
        def failing(self: Executor, chunks: Sequence[Chunk]) -> Any:
            result = compute(self, chunks)
            if any(BAD in chunk.token_ids and chunk.start for chunk in chunks) and len(failures) != times:
                failures.append(chunks)
                raise RuntimeError("out of memory")
            return result

        return failing

    patch.setattr(Executor, "_compute", after(Executor._compute))
    patch.setattr(Executor, "hidden", after(Executor.hidden))  # of a RaggedEngine


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_failed_step_changes_no_other_answer(
    engine: Engine, folder: Path, model: LoadedModel, times: int | None
) -> None:
    rng = Random(3)
    prompts = {f"{n}": random_prompt(rng, 9 + n) for n in range(4)}
    prompts["bad"] = [*random_prompt(rng, 40), BAD, 1, 2]
    wanted = {name: alone(folder, model, prompt) for name, prompt in prompts.items()}
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, times=times)
        tokens = answers(engine, prompts)
    assert tokens == (wanted if times else wanted | {"bad": []})


# --- RaggedEngine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ragged(folder: Path, model: LoadedModel) -> RaggedEngine:
    return RaggedEngine(config(folder), model)


def test_sequences_of_a_ragged_engine_keep_their_states(ragged: RaggedEngine) -> None:
    prompts = {uid: random_prompt(Random(uid), 20) for uid in range(3)}
    whole = {uid: ragged.put([uid], [prompt]) for uid, prompt in prompts.items()}
    for uid in prompts:
        ragged.flush(uid)
    for part in (slice(0, 7), slice(7, 8), slice(8, 13)):
        ragged.put(list(prompts), [prompt[part] for prompt in prompts.values()])
        ragged.check()
    ends = ragged.put(list(prompts), [prompt[13:] for prompt in prompts.values()])
    for uid, logits in zip(prompts, ends, strict=True):
        assert (logits - whole[uid][0]).abs().max() <= 1e-4 * logits.abs().max()


def test_a_put_that_fails_leaves_the_state_before_it(ragged: RaggedEngine) -> None:
    ragged.put([1], [[1, 2, 3]])
    wanted = ragged.put([1], [[4, 5]])
    ragged.flush(1)
    ragged.put([1], [[1, 2, 3]])
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises(RuntimeError, match="out of memory"):
            ragged.put([1, 2], [[BAD, 5], [6]])
    ragged.check()
    assert torch.equal(ragged.put([1], [[4, 5]]), wanted)


def test_a_put_without_a_free_slot_is_refused(folder: Path) -> None:
    ragged = RaggedEngine.load(config(folder, max_num_seqs=1))
    for uid in range(3):
        ragged.put([uid], [[1, 2]])
    assert ragged.can_schedule([0], [1]) and not ragged.can_schedule([0, 1], [1, 1])
    with pytest.raises(RequestTooLargeError, match="2 slots for recurrent states are needed, 1 are free: flush a seq"):
        ragged.put([0, 3], [[1], [1]])
    ragged.flush(2)
    ragged.put([0, 3], [[1], [1]])
    ragged.check()


def test_nothing_is_drafted_and_its_server_says_so(
    folder: Path, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(config(folder, num_speculative_tokens=7), model)
    assert engine.scheduler.drafting is None and "recurrent state" in caplog.text
    assert EngineLoop(engine, lambda _: None).info.num_speculative_tokens == 0
    prompt = [1, 2, 3] * 8
    assert answers(engine, {"a": prompt})["a"] == alone(folder, model, prompt)
