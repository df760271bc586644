"""Decoders and whole engines on the Triton kernels, in Triton's interpreter: the same tokens as on the reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from backends import runnable
from ragged_requests import Request, Runner
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder

pytestmark = runnable("triton-float32")

QUICK = {"gemma2"}
"""Families that `make test` runs: with windows and caps."""


def load(folder: Path, backend: Backend, dtype: torch.dtype = torch.float32) -> Decoder:
    weights, spec = ModelFolder(folder).weights(), load_spec(ModelFolder(folder))
    return load_decoder(weights, spec, dtype=dtype, device=torch.device("cpu"), backend=backend)


def make_backend(**options: Any) -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu", **options)


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in tiny_models.VARIANTS]
)
def test_every_family_equals_its_network_on_the_reference(family: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    seen = []
    for backend in (ReferenceBackend(), make_backend()):
        rng = random.Random(family)
        requests = [Request([rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(n)]) for n in (1, 9, 12)]
        Runner(load(tmp_path, backend), block_size=4).run_split(requests, rng)
        seen.append(torch.cat([torch.stack(request.logits) for request in requests]))
    assert (seen[0] - seen[1]).abs().max() <= 1e-4 * seen[0].abs().max()


PROMPTS = ["Erik plays the cello.\n\nWho plays?", "Max bakes."]


def generate(**settings: Any) -> tuple[list[list[int]], splitfuse.Pipeline]:
    pipe = splitfuse.pipeline(dtype="float32", num_blocks=24, block_size=16, **settings)
    answers = pipe(PROMPTS, max_new_tokens=3)
    check_scheduler(pipe.engine.scheduler)
    return [list(answer.token_ids) for answer in answers], pipe


def test_engine_gives_the_tokens_of_the_reference_in_any_batch() -> None:
    wanted, _ = generate(kernels="reference", max_num_batched_tokens=64)
    found, pipe = generate(kernels="triton", max_num_batched_tokens=17)
    assert found == wanted
    assert pipe.engine.model.plan.kernels.startswith("Triton kernels: cpu, interpreted")
    assert [list(pipe(each, max_new_tokens=3)[0].token_ids) for each in PROMPTS[1:]] == wanted[1:]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_an_engine_with_few_bits_answers(settings: dict[str, Any]) -> None:
    found, _ = generate(kernels="triton", max_num_batched_tokens=32, **settings)
    assert all(len(tokens) == 3 for tokens in found)


def test_the_memory_plan_counts_what_the_backend_keeps() -> None:
    settings = {"kernels": "triton", "dtype": "float16", "kv_cache_dtype": "int8", "num_blocks": 8}
    engine = splitfuse.Engine.load(EngineConfig.from_settings(settings | {"quantization": "int4"}))
    plan = engine.model.plan
    assert sum(store.memory.nbytes for store in engine.executor.kv_cache.layers) == plan.num_blocks * plan.block
