"""A draft model of an engine: what is refused, what it takes, what is told of it, and that nothing depends on it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_models import count_drafts, draft_always, first_layers

from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import Chunk, DraftKind
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation.model_drafts import MAX_FAILURES, Guess, Guesses, most_tokens
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.draft_model import DraftRunner
from splitfuse.runtime.loading import LoadedModel
from splitfuse.runtime.step_memory import step_bytes

PROMPTS = [(7, 8, 9, 10 + number, 300 + number) for number in range(4)]


def load(draft_model: str | None = str(BUNDLED_MODEL), **settings: Any) -> Engine:
    more = {} if draft_model is None else {"draft_model": draft_model, "num_speculative_tokens": 3}
    return Engine.load(EngineConfig.from_settings({"dtype": "float32", "num_blocks": 40, **more, **settings}))


def run(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS, *, max_tokens: int = 16) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        temperature = 0.8 * (number % 2)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature, seed=number)
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[int]]:
    return run(load(None))


def test_drafts_are_counted_by_kind(wanted: dict[str, list[int]]) -> None:
    engine = load()
    loop, counts = EngineLoop(engine, lambda _: None), count_drafts(engine)
    draft_always(engine)
    assert run(engine) == wanted
    stats = loop._stats_now()
    drafted, accepted = counts[DraftKind.MODEL]
    assert (stats.num_model_drafts, stats.num_model_accepted) == (drafted, accepted) and drafted > 10
    assert stats.num_draft_tokens == sum(each for each, _ in counts.values()) and stats.num_form_drafts == 0
    assert stats.draft_model_seconds > 0.0
    assert accepted == drafted, "it is the model itself, for sampled tokens too"


def test_a_model_that_returns_nonsense_costs_only_speed(wanted: dict[str, list[int]]) -> None:
    engine = load()
    draft_always(engine)
    drafting = engine.scheduler.drafting
    assert drafting is not None and drafting.model is not None
    answers = [Guess(-5, 1.0), Guess(2**40, float("nan")), None, Guess(11, 1.0)]

    class Nonsense:
        def guess(self, chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]) -> Guesses:
            assert len(chunks) == len(drafts)
            return Guesses([answers[number % 4] for number in range(len(chunks))], 0.1)

    drafting.model._model = Nonsense()
    counts = count_drafts(engine)
    assert run(engine) == wanted
    assert counts[DraftKind.MODEL][0] > counts[DraftKind.MODEL][1] == 0 and drafting.model.is_on


@pytest.mark.parametrize("when", [0, 3])
def test_a_model_that_dies_costs_only_speed(
    wanted: dict[str, list[int]], when: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, num_calls, guess = load(), 0, DraftRunner.guess
    draft_always(engine)

    def dying(self: DraftRunner, *arguments: Any) -> Guesses:
        nonlocal num_calls
        num_calls += 1
        if num_calls > when:
            raise MemoryError("no memory")
        return guess(self, *arguments)

    monkeypatch.setattr(DraftRunner, "guess", dying)
    assert run(engine) == wanted
    assert num_calls == when + MAX_FAILURES and "not used any more" in caplog.text


def test_weights_that_are_no_numbers_are_no_guesses(wanted: dict[str, list[int]]) -> None:
    engine = load()
    draft_always(engine)
    assert engine.model.draft is not None  # type: ignore[union-attr]
    engine.model.draft.weights.norm.fill_(float("nan"))  # type: ignore[union-attr]
    counts = count_drafts(engine)
    assert run(engine) == wanted and counts[DraftKind.MODEL][1] <= counts[DraftKind.MODEL][0]


def test_drafts_keep_within_the_positions_of_the_draft_model(tmp_path: Path, wanted: dict[str, list[int]]) -> None:
    folder = first_layers(BUNDLED_MODEL, tmp_path, 4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    engine = load(folder)
    draft_always(engine)
    counts = count_drafts(engine)
    assert run(engine) == wanted and counts[DraftKind.MODEL][0] > 0


def test_a_draft_model_with_fewer_tokens_guesses_what_it_has(tmp_path: Path, wanted: dict[str, list[int]]) -> None:
    """Models of a family differ in how far their vocabulary is filled up."""
    from safetensors.torch import load_file, save_file

    folder = first_layers(BUNDLED_MODEL, tmp_path, 4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 3040}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:3040].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {text: number for text, number in vocab.items() if number < 3040}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    lacking = (7, 8, 3050)
    wanted = {**wanted, "4": run(load(None), [lacking])["0"]}
    for first, second in ((None, folder), (folder, str(BUNDLED_MODEL))):
        engine = load(second, model=first) if first else load(second)
        draft_always(engine)
        counts = count_drafts(engine)
        tokens = run(engine, PROMPTS if first else [*PROMPTS, lacking])
        assert first is not None or tokens == wanted
        assert counts[DraftKind.MODEL][1] > 10
        assert engine.scheduler.drafting.model.num_failures == 0  # type: ignore[union-attr]


# --- what is refused, and planned -------------------------------------------------------------------------------------


def test_a_draft_model_needs_tokens_to_draft() -> None:
    with pytest.raises(ConfigError, match=r"draft_model x drafts nothing .* is 0: set it to 4"):
        EngineConfig.from_settings({"draft_model": "x"})


def test_a_draft_model_is_refused_with_ranks() -> None:
    settings = {"draft_model": "x", "num_speculative_tokens": 4, "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match="draft_model x cannot be used with tensor_parallel_size=2"):
        EngineConfig.from_settings(settings)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = first_layers(BUNDLED_MODEL, tmp_path, 1)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    texts = sorted(vocab, key=vocab.__getitem__)
    tokenizer["model"]["vocab"] = {text: number for number, text in enumerate(texts[:1000] + texts[1000:][::-1])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"has another vocabulary: 1354 of the 2354 token ids .* smaller model"):
        load(folder)
    for path in (tmp_path / "tokenizer.json",):
        path.unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "vocab_size": 100})
    )
    with pytest.raises(ConfigError, match=r"has a vocabulary of 100 tokens, and .* one of 3072"):
        load(folder)


@pytest.mark.parametrize("which", ["model", "draft_model"])
def test_a_recurrent_state_is_refused(which: str, folder_of: Callable[[str], str]) -> None:
    settings: dict[str, Any] = {which: folder_of("lfm2"), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=r"recurrent state, which cannot be"):
        Engine.load(EngineConfig.from_settings({"draft_model": str(BUNDLED_MODEL), "dtype": "float32"} | settings))


def test_a_draft_model_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(num_blocks=None, kv_cache_memory_gib=0.01).model
    assert isinstance(model, LoadedModel) and model.draft is not None
    plan = model.plan
    assert plan.draft is not None and plan.need == plan.weights + plan.activations + plan.kv_cache + plan.draft_model
    assert plan.draft_model == plan.draft.weights + plan.draft.activations + plan.num_blocks * plan.draft.block
    sizes = model.draft.spec, torch.float32, most_tokens(plan.max_num_seqs), model.draft.backend
    assert plan.draft.activations == step_bytes(*sizes)
    assert "draft model" in str(plan) and "storyteller: weights 0.0" in str(plan)
    little = plan.weights + plan.activations + 4 * plan.block + plan.draft.weights // 2
    monkeypatch.setattr("splitfuse.runtime.memory_planner.available_memory", lambda _: little)
    budget = plan.max_num_batched_tokens
    with pytest.raises(MemoryPlanError, match=r"does not fit into memory[\s\S]*leaving out draft_model.* would fit"):
        load(max_num_batched_tokens=budget)
    load(None, num_blocks=4, max_model_len=100, max_num_batched_tokens=budget)


def test_settings_without_a_scheduler_of_ours_are_refused() -> None:
    config = EngineConfig.from_settings({"draft_model": str(BUNDLED_MODEL), "num_speculative_tokens": 2})
    with pytest.raises(ConfigError, match="draft_model needs a scheduler, which RaggedEngine has not"):
        RaggedEngine.load(config)
