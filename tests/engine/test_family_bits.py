"""With the C++ kernels a model of each kind gives each request the same bits, whatever is reused, preempted or in its
batch: hybrids of attention with delta nets or Mamba-2, mixtures of experts, shared experts, sinks, windows, latent
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
from backends import emulation_slow, variants
from forced_preemption import force_preemptions
from guessed_drafts import guess
from scheduler_checks import check_scheduler

from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.runtime.loading import LoadedModel, load_model

Outcome = list[RequestOutput]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def folder(model: str) -> Path:
        path = tmp_path_factory.mktemp(model)
        network = tiny_models.make(model)
        network.config.max_position_embeddings = 640
        network.save_pretrained(path)
        return path

    return folder


@functools.cache
def loaded(folder: Path, variant: str, threads: int, quantization: str | None) -> LoadedModel:
    return load_model(config(folder, variant, threads, quantization))


def config(folder: Path, variant: str, threads: int, quantization: str | None, **changes: Any) -> EngineConfig:
    settings = {"dtype": "bfloat16", "num_blocks": 128, "max_num_batched_tokens": 512, "max_num_seqs": 4}
    own = {"kernels": variant, "num_threads": threads, "quantization": quantization}
    return EngineConfig.from_settings({"model": str(folder), **settings, **own, **changes})


def requests() -> list[Add]:
    """Prompts of which most begin with a shared one; two of them are two choices of one request."""
    rng = Random(5)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(length))

    shared, added = tokens(140), []
    for number, (common, own) in enumerate(((0, 3), (70, 40), (140, 1), (140, 60), (64, 33), (0, 150), (140, 9))):
        sampling = {"temperature": 1.0, "seed": number} if number % 2 else {}
        params = SamplingParams(max_tokens=rng.randint(4, 20), ignore_eos=True, logprobs=2, **sampling)
        prompt = shared[:common] + tokens(own)
        added += [Add(f"{number}-{choice}", prompt, params, choice=choice) for choice in range(1 + number % 3 // 2)]
    return added


def outcomes(engine: Engine, together: int) -> dict[str, list[Any]]:
    """Tokens and logprobs of each request, of which so many come at a time."""
    found: dict[str, list[Any]] = {}
    waiting = requests()
    while waiting or engine.has_unfinished:
        if not engine.has_unfinished:
            for _ in range(min(together, len(waiting))):
                engine.add(waiting.pop(0))
        for output in engine.step():
            assert output.error is None
            entries = zip(output.token_ids, map(str, output.logprobs or ()), strict=True)
            found.setdefault(output.request_id, []).extend(part for entry in entries for part in entry)
        check_scheduler(engine.scheduler)
    return found


@functools.cache
def alone(folder: Path, variant: str, quantization: str | None) -> dict[str, list[Any]]:
    settings = config(folder, variant, 1, quantization, enable_prefix_caching=False)
    found = outcomes(Engine(settings, loaded(folder, variant, 1, quantization)), 1)
    assert all(len(each) == 2 * sum(isinstance(part, int) for part in each) for each in found.values())
    return found


SETTINGS: list[tuple[Any, ...]] = [  # budget, threads, quantization, other settings
    (64, 2, "int8", {"block_size": 64}),
    (1, 2, None, {}),
    (7, 1, None, {"num_blocks": 24}),
    (512, 2, None, {"max_num_seqs": 8}),
]
MODELS = {  # of what kind it is
    "qwen3.5": "hybrid",
    "nemotron-h": "hybrid of single blocks, experts",
    "qwen3-moe": "experts",
    "glm-moe-groups": "shared experts",
    "gpt-oss": "sinks, experts with biases",
    "gemma3": "windows",
    "deepseek-v3": "latent attention",
}
CASES = [
    pytest.param(model, *case.values, *settings, id=f"{model}-{case.id}-budget-{settings[0]}", marks=case.marks)
    for case in emulation_slow(variants())
    for model in MODELS
    for settings in (SETTINGS if case.id == "avx512" else SETTINGS[:1])
]


@pytest.mark.parametrize(("model", "variant", "budget", "threads", "quantization", "changes"), CASES)
def test_equal_bits_alone_and_in_a_crowd(
    folders: Callable[[str], Path],
    model: str,
    variant: str,
    budget: int,
    threads: int,
    quantization: str | None,
    changes: dict[str, Any],
) -> None:
    folder = folders(model)
    settings = config(folder, variant, threads, quantization, max_num_batched_tokens=budget, **changes)
    engine = Engine(settings, loaded(folder, variant, threads, quantization))
    if budget > 1:
        force_preemptions(engine)
    for together in (8, 3):  # and again, when much is cached
        assert outcomes(engine, together) == alone(folder, variant, quantization)
    assert engine.scheduler.queue.num_preemptions or budget == 1


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("model", [model for model, kind in MODELS.items() if "hybrid" not in kind])
def test_drafts_change_no_bit(folders: Callable[[str], Path], model: str, variant: str) -> None:
    folder = folders(model)
    wanted = alone(folder, variant, None)
    engine = Engine(config(folder, variant, 2, None), loaded(folder, variant, 2, None))
    known = {name: [part for part in parts if isinstance(part, int)] for name, parts in wanted.items()}
    drafting = guess(engine, lambda request: known[request.request_id])
    assert outcomes(engine, 8) == wanted
    assert drafting.accepted > 20
