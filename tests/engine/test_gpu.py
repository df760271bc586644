"""On a GPU, by the reference and by the Triton kernels: every family, captured steps, the sampler, the engine, a
process of its own, a calibration, and NCCL.

Skipped where there is none. A GPU's sums depend on the shapes of a batch, so nothing here is compared in bits.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import tiny_models
import torch
from patience import PATIENCE
from ragged_requests import Request, Runner
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import SamplingState
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.calibrate import run_calibration
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.errors import ConfigError, MemoryPlanError, RankLostError
from splitfuse.kernels.group import Shard
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.calibration import identify
from splitfuse.runtime.parallel.distributed import DistributedGroup, make_store
from splitfuse.runtime.sampling.sampler import prompt_logprobs, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")

TOLERANCE = 1e-4  # of the largest logit, in fp32


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32, *, kernels: str = "reference") -> Decoder:
    backend: Backend = ReferenceBackend()
    if kernels == "triton":
        from splitfuse.kernels.triton.backend import TritonBackend

        backend = TritonBackend(device=device)
    return load_decoder(
        ModelFolder(folder).weights(),
        load_spec(ModelFolder(folder)),
        dtype=dtype,
        device=torch.device(device),
        backend=backend,
    )


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("family", tiny_models.VARIANTS)
def test_every_family_equals_its_network_on_the_cpu(family: str, kernels: str, tmp_path: Path) -> None:
    tiny_models.save(family, tmp_path)
    seen = []
    for device, chosen in (("cpu", "reference"), ("cuda", kernels)):
        rng = random.Random(family)
        requests = [Request([rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(n)]) for n in (1, 9, 20, 37)]
        Runner(load(tmp_path, device, kernels=chosen), block_size=4).run_split(requests, rng)
        seen.append(torch.cat([torch.stack(request.logits).cpu() for request in requests]))
    assert (seen[0] - seen[1]).abs().max() <= TOLERANCE * seen[0].abs().max()


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(tmp_path: Path, dtype: torch.dtype, kernels: str) -> None:
    tiny_models.save("qwen3", tmp_path)
    seen = []
    for device, kind, chosen in (("cpu", torch.float32, "reference"), ("cuda", dtype, kernels)):
        request = Request([i * 7 % tiny_models.VOCAB_SIZE for i in range(37)])
        Runner(load(tmp_path, device, kind, kernels=chosen), block_size=16).run_split([request], random.Random(0))
        seen.append(torch.stack(request.logits).cpu())
    assert (seen[0] - seen[1]).abs().max() <= 8 * torch.finfo(dtype).eps * seen[0].abs().max()


def test_the_sampler_chooses_as_on_the_cpu() -> None:
    """Coarse logits, so that equal ones are common; a choice may differ where a sum's last digit decides it."""
    rng = random.Random(0)
    logits = (torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)) * 12).round() / 4
    rows = []
    for number in range(len(logits)):
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.5, 1.0, 3.0)),
            top_k=rng.choice((0, 0, 1, 20)),
            top_p=rng.choice((1.0, 0.9, 0.3)),
            min_p=rng.choice((0.0, 0.1)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            presence_penalty=rng.choice((0.0, 1.0)),
            logit_bias=rng.choice(({}, {5: 20.0})),
            min_tokens=rng.choice((0, 9)),
            logprobs=rng.choice((None, 0, 5)),
        )
        rows.append(SamplingState("r", (1, 2, 3), params, (7,), number, 0, [4, 4, 5]))
    here, there = sample(logits, rows), sample(logits.cuda(), rows)
    assert sum(a.token_ids != b.token_ids for a, b in zip(here, there, strict=True)) <= 1
    for a, b in zip(here, there, strict=True):
        if a.logprobs and b.logprobs and a.token_ids == b.token_ids:
            assert [token for token, _ in a.logprobs[0].top] == [token for token, _ in b.logprobs[0].top]
            assert a.logprobs[0].logprob == pytest.approx(b.logprobs[0].logprob, abs=1e-9)
    logits[3, 5] = float("nan")
    assert "NaN" in str(sample(logits[:8].cuda(), rows[:8])[3].error)
    found = prompt_logprobs(logits[10:20].cuda(), list(range(10)), 3)
    assert [each.token_id for each in found] == list(range(10))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_bundled_model_answers_as_alone_and_on_the_cpu(cuda_graphs: bool) -> None:
    prompts = [f"Mary went to the {place}.\n\nWhere is Mary?" for place in ("kitchen", "garden", "office", "park")] * 8
    wanted = splitfuse.pipeline(dtype="float32", kernels="reference", device="cpu")(prompts[:4], max_new_tokens=12)
    settings = {"num_blocks": 200, "block_size": 8, "max_num_batched_tokens": 64, "cuda_graphs": cuda_graphs}
    pipe = splitfuse.pipeline(dtype="float32", device="cuda", **settings)
    answers = pipe(prompts, max_new_tokens=12)
    assert [answer.generated_text for answer in answers] == [each.generated_text for each in wanted] * 8
    check_scheduler(pipe.engine.scheduler)
    assert pipe.engine.executor.decoder.device.type == "cuda"


def test_the_memory_plan_counts_the_memory_of_the_gpu() -> None:
    engine = Engine.load(EngineConfig.from_settings({"device": "cuda", "dtype": "bfloat16"}))
    cache = sum(store.numel() * store.element_size() for store in engine.executor.kv_cache.layers)
    assert cache == engine.model.plan.num_blocks * engine.model.plan.block
    with pytest.raises(MemoryPlanError, match="does not fit into memory"):
        Engine.load(EngineConfig.from_settings({"device": "cuda", "num_blocks": 10**9}))


def test_settings_that_need_the_cpu_are_refused_on_a_gpu() -> None:
    for settings, reason in (
        ({"num_threads": 2}, "num_threads=2 needs the C\\+\\+ kernels"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Engine.load(EngineConfig.from_settings({"device": "cuda"} | settings))


def test_an_engine_in_a_process_of_its_own() -> None:
    async def test() -> None:
        client = SupervisedEngine(
            SubprocessLauncher(EngineConfig.from_settings({"device": "cuda", "num_blocks": 64, "dtype": "float32"}))
        )
        await client.start()
        try:
            tokens: list[int] = []
            params = SamplingParams(max_tokens=9, ignore_eos=True)
            async with client.open(Add("r", tuple(range(10, 60)), params)) as stream:
                async for output in stream:
                    tokens += output.token_ids
            assert len(tokens) == 9
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_a_calibration_is_kept_by_the_name_of_the_gpu() -> None:
    config = EngineConfig.from_settings({"device": "cuda", "dtype": "float32", "num_blocks": 512})
    assert identify(config)["gpu"] == torch.cuda.get_device_name()
    calibration, checked = run_calibration(config, seconds=5, progress=False)
    assert calibration.cost.floor > 0
    assert checked


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="PyTorch without NCCL")
@pytest.mark.parametrize("in_order", [False, True])
def test_a_group_of_one_is_connected_and_ended_by_nccl(in_order: bool) -> None:
    """Whatever NCCL is asked for is there: with one rank each sum is what the rank gives."""
    device = torch.device("cuda", 0)
    group = DistributedGroup(
        make_store("127.0.0.1"), Shard(0, 1, sums=True), address="127.0.0.1", device=device, in_order=in_order
    )
    with torch.inference_mode():
        given = torch.randn(7, 6, device=device, dtype=torch.float16)
        numbers = given.clone()
        group.add_up(numbers)
        group.broadcast(numbers)
        assert torch.equal(numbers, given) and torch.equal(group.join_columns(numbers, 6), given)
    group.end()
    with pytest.raises(RankLostError):
        group.add_up(numbers)
