"""A network in one call gives the bits of its operations one by one, and those of any other chunks and threads."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from backends import CPU, variants
from ragged_requests import Chunk, Request, Runner
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuKernels
from splitfuse.kernels.reference import Kernels, LayerWeights, NetworkWeights
from splitfuse.models.decoder import Decoder
from splitfuse.models.ragged_batch import RaggedBatch
from splitfuse.models.spec import ModelSpec, MoESpec, RopeSpec

FORMATS = [(None, None), ("int8", None), ("int8", 128), ("int4", 64), ("int4", 128)]
CASES = [case for f in FORMATS for case in variants(*f, id="-".join(str(x) for x in f))]
PLAIN = ModelSpec(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    vocab_size=70,
    hidden_size=96,
    intermediate_size=130,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position=700,
    norm_eps=1e-5,
    activation="silu",
    rope=RopeSpec(theta=10000.0, rotary_dim=16),
    windows=(None, None),
)
EVERYTHING = dataclasses.replace(
    PLAIN, activation="gelu", windows=(None, 9), attention_softcap=5.0, logit_softcap=20.0, tied_embeddings=True
)
ODD = dataclasses.replace(
    PLAIN,
    activation="gelu_tanh",
    num_layers=1,
    windows=(7,),
    head_dim=35,
    num_kv_heads=3,
    rope=RopeSpec(theta=100.0, rotary_dim=20),
)
EXPERTS = dataclasses.replace(
    PLAIN,
    num_layers=3,
    windows=(None,) * 3,
    moe=MoESpec(num_experts=20, top_k=3, intermediate_size=50, renormalize=True, dense_layers=frozenset({1})),
)
SPECS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param(EVERYTHING, id="everything"),
    pytest.param(ODD, id="odd"),
    pytest.param(EXPERTS, id="experts"),
]


class OneByOne(CpuKernels):
    """The same kernels, an operation at a time."""

    def fuse(self, weights: NetworkWeights, **options: Any) -> None:
        del weights, options


def random_weights(spec: ModelSpec, kernels: Kernels) -> NetworkWeights:
    """The same at every call. Only EVERYTHING has biases and norms of heads."""
    generator = torch.Generator().manual_seed(3)
    extras = spec is EVERYTHING
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def linear(role: str, *rows: int, columns: int) -> Any:
        return kernels.pack([normal(n, columns) / columns**0.5 for n in rows], role=role)

    def mlp(number: int) -> dict[str, Any]:
        if spec.moe is None or number in spec.moe.dense_layers:
            return {
                "gate_up": linear("gate_up", inner, inner, columns=hidden),
                "gate_up_bias": normal(2 * inner) if extras else None,
                "down": linear("down", hidden, columns=inner),
                "down_bias": normal(hidden) if extras else None,
            }
        each, size = range(spec.moe.num_experts), spec.moe.intermediate_size
        return {
            "router": linear("router", len(each), columns=hidden),
            "w13": [linear("w13", size, size, columns=hidden) for _ in each],
            "w2": [linear("w2", hidden, columns=size) for _ in each],
        }

    def layer(number: int) -> LayerWeights:
        return LayerWeights(
            attn_norm=normal(hidden),
            qkv=linear("qkv", q, kv, kv, columns=hidden),
            qkv_bias=normal(q + 2 * kv) if extras else None,
            q_norm=normal(spec.head_dim) if extras else None,
            k_norm=normal(spec.head_dim) if extras else None,
            o=linear("o", hidden, columns=q),
            o_bias=normal(hidden) if extras else None,
            mlp_norm=normal(hidden),
            **mlp(number),
        )

    layers = tuple(layer(number) for number in range(spec.num_layers))
    table = normal(spec.vocab_size, hidden)
    head = kernels.pack([table], role="head")
    return NetworkWeights(embed=head if spec.tied_embeddings else table, layers=layers, norm=normal(hidden), head=head)


def decoder_of(kernels: Kernels, spec: ModelSpec = PLAIN) -> Decoder:
    return Decoder(spec, random_weights(spec, kernels), kernels)


def prompts(lengths: tuple[int, ...] = (1, 3, 23, 70)) -> list[Request]:
    rng = random.Random(0)
    return [Request([rng.randrange(PLAIN.vocab_size) for _ in range(length)]) for length in lengths]


def logits(decoder: Decoder, *, block_size: int = 32, seed: int | None = None) -> list[Tensor]:
    """Logits of every position of the prompts: in one step, or, given a seed, in random chunks; then some more tokens,
    each chosen by them.
    """
    requests, runner = prompts(), Runner(decoder, block_size=block_size, num_blocks=16)
    if seed is None:
        runner.step([(request, request.num_pending) for request in requests])
    else:
        runner.run_split(requests, random.Random(seed))
    runner.generate(requests, 3)
    return [torch.stack(request.logits) for request in requests]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kv_int8", [False, True])
@pytest.mark.parametrize(("variant", "quantization", "group"), CASES)
def test_fused_is_one_by_one(
    variant: str, quantization: str | None, group: int | None, kv_int8: bool, spec: ModelSpec
) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "group_size": group, "kv_int8": kv_int8}
    wanted = logits(decoder_of(OneByOne(variant=variant, num_threads=1, **settings), spec))
    assert all(rows.isfinite().all() and rows.std() > 0.1 for rows in wanted)
    for kernels in (OneByOne, CpuKernels):
        for threads in (1, 2, 3):
            decoder = decoder_of(kernels(variant=variant, num_threads=threads, **settings), spec)
            for block_size, seed in ((32, None), (64, threads), (96, 7 * threads)):
                ours = logits(decoder, block_size=block_size, seed=seed)
                assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("variant", variants())
def test_only_the_rows_that_are_wanted_come_back(variant: str) -> None:
    decoder = decoder_of(CpuKernels(variant=variant, num_threads=2))

    def hidden(num_logits: tuple[int, int]) -> Tensor:
        runner = Runner(decoder, block_size=32, num_blocks=4)
        chunks = [Chunk(0, range(20), (1,), num_logits[0]), Chunk(0, range(3), (3,), num_logits[1])]
        return decoder.forward(RaggedBatch.build(chunks, block_size=32, device=CPU), runner.cache)

    every = hidden((20, 3))
    assert every.shape == (23, PLAIN.hidden_size)
    for first, second in ((0, 0), (1, 0), (0, 1), (7, 2)):
        assert torch.equal(hidden((first, second)), torch.cat((every[20 - first : 20], every[23 - second :])))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", variants())
def test_single_tokens_of_a_long_context(variant: str, spec: ModelSpec) -> None:
    """600 positions at once, and the last ones as single tokens: the threads share the tiles of one request."""
    for threads in (1, 2, 3):
        decoder = decoder_of(CpuKernels(variant=variant, num_threads=threads), spec)
        whole, split = prompts((600,)) + prompts((600,))
        Runner(decoder, block_size=32).step([(whole, 600)])
        runner = Runner(decoder, block_size=64)
        for length in (590, *[1] * 10):
            runner.step([(split, length)])
        assert torch.equal(torch.stack(whole.logits), torch.stack(split.logits))


@pytest.mark.parametrize("variant", variants())
def test_a_step_without_tokens(variant: str) -> None:
    decoder = decoder_of(CpuKernels(variant=variant, num_threads=2))
    runner = Runner(decoder, block_size=32)
    assert decoder.forward(RaggedBatch.build([], block_size=32, device=CPU), runner.cache).shape == (0, 96)


@pytest.mark.parametrize("variant", variants())
def test_two_caches_in_turns(variant: str) -> None:
    """Engines share weights, not caches: each call writes to and reads from the stores that it is given."""
    decoder = decoder_of(CpuKernels(variant=variant, num_threads=2))
    alone = prompts((40, 40))
    for request in alone:
        Runner(decoder, block_size=32).run_split([request], random.Random(1))
    turns, runners = prompts((40, 40)), [Runner(decoder, block_size=32) for _ in range(2)]
    while turns[0].num_pending:
        for request, runner in zip(turns, runners, strict=True):
            runner.step([(request, min(7, request.num_pending))])
    for ours, wanted in zip(turns, alone, strict=True):
        assert torch.equal(torch.stack(ours.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("variant", variants())
def test_two_engines_in_two_threads(variant: str) -> None:
    """They share the kernels' workspace, in which there is room for one call."""
    decoder = decoder_of(CpuKernels(variant=variant, num_threads=1))

    def compute(number: int) -> Tensor:
        request = prompts((200,))[0]
        request.token_ids = request.token_ids[number:]
        Runner(decoder, block_size=32).run_split([request], random.Random(number))
        return torch.stack(request.logits)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(compute, range(8)))
    for number, ours in enumerate(together):
        assert torch.equal(ours, compute(number))


@pytest.mark.parametrize("variant", variants())
def test_a_cache_that_is_gone_is_not_held(variant: str) -> None:
    decoder = decoder_of(CpuKernels(variant=variant, num_threads=1))
    runner = Runner(decoder, block_size=32)
    runner.step([(request, request.num_pending) for request in prompts()])
    memory = weakref.ref(runner.cache.layers[0].memory)
    del runner
    gc.collect()
    assert memory() is None
