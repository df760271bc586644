"""Every family against transformers: logits of whole and of split prompts, greedy tokens, shards, low precision, the
C++ kernels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from backends import variants
from ragged_requests import Request, Runner
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from splitfuse.errors import KernelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.library import choose_variant
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import MlpSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder

PROMPT_LENGTHS = (1, 9, 20, 37)
LONGER = (1, 9, 20, 57)
NUM_GENERATED = 12
CPU = torch.device("cpu")
CPP_TOLERANCE = 3e-2  # of the largest logit: activations are rounded to bf16 (2**-9) a dozen times a layer
EVERYWHERE = ("qwen2-tied-upper-windows", "gemma2", "gpt-oss", "qwen3.5", "deepseek-v3")
OTHER_EXPERT = 0.5  # where two experts are nearly as good, the other one may be chosen: of few tokens, and so far off


def load(folder: Path, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> Decoder:
    return load_decoder(
        ModelFolder(folder).weights(),
        load_spec(ModelFolder(folder)),
        dtype=dtype,
        device=CPU,
        backend=backend or ReferenceBackend(),
    )


def prompts(seed: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(length)] for length in lengths]


@torch.no_grad()
def token_by_token(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """What transformers gives when it reads one token at a time, as in generation: [tokens, vocabulary]."""
    cache = DynamicCache()
    rows = [model(input_ids=torch.tensor([[t]]), past_key_values=cache, use_cache=True).logits[0, 0] for t in token_ids]
    return torch.stack(rows)


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """The oracle: transformers on the whole prompt, unless its rope then looks ahead to the prompt's length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic" and "alpha" not in rope:
        return token_by_token(model, token_ids)
    return model(input_ids=torch.tensor([token_ids])).logits[0]


def miss(request: Request, oracle: Tensor) -> Tensor:
    """Of each token, the largest error of a logit as a share of the largest logit of all: [tokens]."""
    ours = torch.stack(request.logits)
    assert ours.shape == oracle.shape
    return (ours - oracle).abs().amax(dim=1) / oracle.abs().max()


def assert_close(request: Request, oracle: Tensor, tolerance: float = 1e-4) -> None:
    assert (miss(request, oracle) <= tolerance).all()


@pytest.fixture(scope="session", params=tiny_models.VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Decoder]:
    """A transformers model, and our decoder of the same files."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_models.save(request.param, folder), load(folder)


@pytest.mark.parametrize("block_size", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_logits_whole_and_split(pair: tuple[PreTrainedModel, Decoder], block_size: int) -> None:
    model, decoder = pair
    oracles = [oracle_logits(model, prompt) for prompt in prompts(block_size, LONGER)]
    whole = [Request(prompt) for prompt in prompts(block_size, LONGER)]
    Runner(decoder, block_size=block_size).step([(request, request.num_pending) for request in whole])
    split = [Request(prompt) for prompt in prompts(block_size, LONGER)]
    Runner(decoder, block_size=block_size).run_split(split, random.Random(block_size))
    for request, oracle in zip(whole + split, oracles * 2, strict=True):
        assert_close(request, oracle)


def test_greedy_tokens(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    requests = [Request(list(prompt)) for prompt in prompts(3, LONGER)]
    runner = Runner(decoder, block_size=4)
    runner.step([(request, request.num_pending) for request in requests])
    runner.generate(requests, NUM_GENERATED)
    for request, prompt in zip(requests, prompts(3, LONGER), strict=True):
        oracle = oracle_logits(model, request.token_ids)
        assert_close(request, oracle)
        assert request.token_ids[len(prompt) :] == oracle.argmax(-1)[len(prompt) - 1 : -1].tolist()


def _families_and_variants() -> Iterator[Any]:
    """Each family on this machine's best variant; on the others those of `EVERYWHERE`, and all in the slow suite."""
    try:
        best = choose_variant()
    except KernelError:  # all are skipped, with the reason
        best = ""
    for variant in variants():
        [name] = variant.values
        for family in tiny_models.VARIANTS:
            slow = [] if name == best or family in EVERYWHERE else [pytest.mark.slow]
            yield pytest.param(name, family, id=f"{name}-{family}", marks=[*variant.marks, *slow])


@pytest.mark.parametrize(("variant", "family"), list(_families_and_variants()))
def test_cpp_kernels(variant: str, family: str, tmp_path: Path) -> None:
    """In bf16, near to transformers in fp32 with the same bf16 weights; and the same bits whole and split."""
    model = tiny_models.make(family).bfloat16().float()  # rounded norms, which stay in fp32 with ours
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if getattr(module, "rotary_emb", None) is not None:  # its table is no weight, and is fp32 with ours
            module.rotary_emb = type(module.rotary_emb)(module.config)
    decoder = load(tmp_path, torch.bfloat16, CpuBackend(variant=variant, num_threads=2))
    whole = [Request(prompt) for prompt in prompts(0)]
    Runner(decoder, block_size=32).step([(request, request.num_pending) for request in whole])
    misses = torch.cat([miss(request, oracle_logits(model, request.token_ids)) for request in whole])
    off = misses[misses > CPP_TOLERANCE]
    if len(off):  # some networks magnify what is rounded
        in_bf16 = [Request(prompt) for prompt in prompts(0)]
        runner = Runner(load(tmp_path, torch.bfloat16), block_size=32)
        runner.step([(request, request.num_pending) for request in in_bf16])
        rounded = max(float(miss(request, oracle_logits(model, request.token_ids)).max()) for request in in_bf16)
        off = off[off > 2 * rounded]
    few, far = (
        (0, 0.0)
        if all(isinstance(layer.mlp, MlpSpec) for layer in decoder.spec.layers)
        else (len(misses) // 5, OTHER_EXPERT)
    )
    assert len(off) <= few and (off <= far).all()
    for block_size in (32, 64) if family in EVERYWHERE else (64,):  # the whole ones have blocks of 32
        split = [Request(prompt) for prompt in prompts(0)]
        Runner(decoder, block_size=block_size).run_split(split, random.Random(block_size))
        for ours, wanted in zip(split, whole, strict=True):
            assert torch.equal(torch.stack(ours.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", variants())
def test_cpp_kernels_quantized(variant: str, quantization: str, tmp_path: Path) -> None:
    """Random weights are the hardest to quantize, and three layers add up: near means the same network, no more."""
    model = tiny_models.save("qwen3", tmp_path)
    decoder = load(tmp_path, torch.bfloat16, CpuBackend(variant=variant, num_threads=2, quantization=quantization))
    request = Request(prompts(0)[3])
    Runner(decoder, block_size=32).run_split([request], random.Random(0))
    ours, oracle = torch.stack(request.logits), oracle_logits(model, request.token_ids)
    likeness = torch.cosine_similarity(ours, oracle, dim=-1)
    assert likeness.mean() >= {"int8": 0.998, "int4": 0.9}[quantization]


def test_sharded_checkpoint_is_the_same_network(tmp_path: Path) -> None:
    model = tiny_models.save("qwen2", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    request = Request(prompts(0)[2])
    Runner(load(tmp_path), block_size=4).step([(request, request.num_pending)])
    assert_close(request, oracle_logits(model, request.token_ids))


@pytest.mark.parametrize(("variant", "most"), [("qwen3", 8), ("gemma4-vision-per-layer-embeddings", 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(tmp_path: Path, dtype: torch.dtype, variant: str, most: int) -> None:
    model = tiny_models.save(variant, tmp_path)
    decoder = load(tmp_path, dtype)
    assert decoder.dtype == dtype
    request = Request(prompts(0)[3])
    Runner(decoder, block_size=4).run_split([request], random.Random(0))
    oracle = oracle_logits(model, request.token_ids)
    tolerance = most * torch.finfo(dtype).eps
    assert (torch.stack(request.logits) - oracle).abs().max() <= tolerance * oracle.abs().max()


def test_a_batch_without_tokens(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    decoder = load(tmp_path)
    runner = Runner(decoder, block_size=4)
    runner.step([])
    assert runner.decoder.logits(torch.empty(0, decoder.spec.hidden_size)).shape == (0, tiny_models.VOCAB_SIZE)
