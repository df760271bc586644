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
from specs import make_experts, make_spec
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import (
    AttentionSpec,
    Backend,
    ConvSpec,
    DeltaSpec,
    ExpertsSpec,
    HeadNormSpec,
    LayerSpec,
    LayerWeights,
    MlpSpec,
    MlpWeights,
    NetworkPlan,
    NetworkWeights,
    NormSpec,
    Role,
    RouterSpec,
)
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.spec import ModelSpec, RopeSpec
from splitfuse.runtime.batch import build_batch

FORMATS = [(None, None), ("int8", None), ("int8", 128), ("int4", 64), ("int4", 128)]
CASES = [case for f in FORMATS for case in variants(*f, id="-".join(str(x) for x in f))]
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 700,
}
PLAIN = make_spec(**SIZES, num_layers=2)
EVERYTHING = make_spec(
    **SIZES,
    num_layers=2,
    activation="gelu",
    mlp_bias=True,
    windows=(None, 9),
    attention={"qkv_bias": True, "o_bias": True, "qk_norm": HeadNormSpec(norm=NormSpec(eps=1e-5)), "softcap": 5.0},
    logit_softcap=20.0,
    tied_embeddings=True,
)
ODD = make_spec(
    **SIZES | {"head_dim": 35, "num_kv_heads": 3},
    num_layers=1,
    activation="gelu_tanh",
    windows=(7,),
    rope=RopeSpec(theta=100.0, rotary_dim=20),
)
EXPERTS = make_spec(
    **SIZES,
    num_layers=3,
    experts=make_experts(20, 3, 50),
    dense_layers={1},
)
SPECS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param(EVERYTHING, id="everything"),
    pytest.param(ODD, id="odd"),
    pytest.param(EXPERTS, id="experts"),
]


class OneByOne(CpuBackend):
    """The same kernels, an operation at a time."""

    def compile_network(self, plan: NetworkPlan) -> None:
        del plan


def random_weights(spec: ModelSpec, backend: Backend) -> NetworkWeights:
    """The same at every call."""
    generator = torch.Generator().manual_seed(3)
    hidden = spec.hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def norm(*shape: int) -> Tensor:
        return backend.pack([normal(*shape)], role=Role.NORM)

    def linear(role: Role, *rows: int, columns: int) -> Any:
        return backend.pack([normal(n, columns) / columns**0.5 for n in rows], role=role)

    def mlp(spec: MlpSpec | ExpertsSpec) -> dict[str, Any]:
        inner = (spec if isinstance(spec, MlpSpec) else spec.expert).intermediate_size
        if isinstance(spec, MlpSpec):
            return {
                "mlp": MlpWeights(
                    gate_up=linear(Role.GATE_UP, inner, inner, columns=hidden),
                    up_bias=normal(2 * inner) if spec.bias else None,
                    down=linear(Role.DOWN, hidden, columns=inner),
                    down_bias=normal(hidden) if spec.bias else None,
                )
            }
        each = range(spec.router.num_experts)
        return {
            "router": linear(Role.ROUTER, len(each), columns=hidden),
            "w13": [linear(Role.W13, inner, inner, columns=hidden) for _ in each],
            "w2": [linear(Role.W2, hidden, columns=inner) for _ in each],
        }

    def layer(spec: LayerSpec) -> LayerWeights:
        a = spec.mixer
        assert a is not None and spec.mlp is not None
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        return LayerWeights(
            attn_norm=norm(hidden),
            qkv=linear(Role.QKV, q, kv, kv, columns=hidden),
            qkv_bias=normal(q + 2 * kv) if a.qkv_bias else None,
            q_norm=norm(a.head_dim) if a.qk_norm else None,
            k_norm=norm(a.head_dim) if a.qk_norm else None,
            o=linear(Role.O, hidden, columns=q),
            o_bias=normal(hidden) if a.o_bias else None,
            mlp_norm=norm(hidden),
            **mlp(spec.mlp),
        )

    layers = tuple(layer(each) for each in spec.layers)
    table = normal(spec.vocab_size, hidden)
    head = backend.pack([table], role=Role.HEAD)
    return NetworkWeights(embed=head if spec.tied_embeddings else table, layers=layers, norm=norm(hidden), head=head)


def decoder_of(backend: Backend, spec: ModelSpec = PLAIN) -> Decoder:
    return Decoder(spec, random_weights(spec, backend), backend, dtype=torch.bfloat16)


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
def test_fused_equals_one_by_one(
    variant: str, quantization: str | None, group: int | None, kv_int8: bool, spec: ModelSpec
) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "group_size": group, "kv_int8": kv_int8}
    wanted = logits(decoder_of(OneByOne(variant=variant, num_threads=1, **settings), spec))
    assert all(rows.isfinite().all() and rows.std() > 0.1 for rows in wanted)
    for backend in (OneByOne, CpuBackend):
        for threads in (1, 2, 3):
            decoder = decoder_of(backend(variant=variant, num_threads=threads, **settings), spec)
            for block_size, seed in ((32, None), (64, threads), (96, 7 * threads)):
                ours = logits(decoder, block_size=block_size, seed=seed)
                assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(
    "attention",
    [{"softcap": 5.0}, {"num_kv_heads": 3}, {"head_dim": 32}, {"rope": 1}],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("variant", variants())
def test_layers_with_unequal_heads_run_one_by_one(variant: str, attention: dict[str, Any]) -> None:
    """The fused network takes heads and their rotation to be alike in all layers; others are computed nevertheless."""
    first, second = PLAIN.layers
    layers = (first, dataclasses.replace(second, mixer=dataclasses.replace(second.mixer, **attention)))
    spec = dataclasses.replace(PLAIN, layers=layers, ropes=(*PLAIN.ropes, RopeSpec(theta=100.0, rotary_dim=8)))
    cpu, reference = CpuBackend(variant=variant, num_threads=2), ReferenceBackend()
    decoder = decoder_of(cpu, spec)
    assert (
        cpu.compile_network(NetworkPlan(layers=layers, weights=decoder.weights, ropes=decoder.ropes, norm=spec.norm))
        is None
    )
    for ours, wanted in zip(logits(decoder), logits(decoder_of(reference, spec)), strict=True):
        likeness = torch.cosine_similarity(ours, wanted.float(), dim=-1)
        assert likeness[:-3].min() > 0.995  # of the prompt: a token generated after it may differ, as the two round


def test_cpp_kernels_know_every_field_of_a_layer() -> None:
    """`CpuBackend` and `FusedNetwork` honour a new field, or `compile_network` gives None for it: then add it here."""
    known = {
        LayerSpec: "mixer mlp norms parallel shared_norm residual_scale token_input output_scale",
        AttentionSpec: "num_heads num_kv_heads head_dim latent rope window chunk qkv_bias o_bias qk_norm v_norm "
        "value_is_key kv_layer gate sinks alibi scale query_scaling softcap",
        DeltaSpec: "num_key_heads num_value_heads key_dim value_dim conv_size norm",
        ConvSpec: "num_channels conv_size bias",
        MlpSpec: "intermediate_size activation gated bias",
        ExpertsSpec: "router expert shared shared_gate own_norm",
        RouterSpec: "num_experts top_k renormalize sigmoid bias choice_bias num_groups top_groups "
        "group_best min_sum scale scales_input expert_scale",
        NormSpec: "eps centered bias",
        HeadNormSpec: "norm whole_row own_weights weight after_rope",
    }
    for spec, names in known.items():
        assert [field.name for field in dataclasses.fields(spec)] == names.split()


@pytest.mark.parametrize("variant", variants())
def test_only_wanted_rows_come_back(variant: str) -> None:
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=2))

    def hidden(num_logits: tuple[int, int]) -> Tensor:
        runner = Runner(decoder, block_size=32, num_blocks=4)
        chunks = [Chunk(0, range(20), (1,), num_logits[0]), Chunk(0, range(3), (3,), num_logits[1])]
        return decoder.forward(build_batch(chunks, block_size=32, device=CPU), runner.cache)

    every = hidden((20, 3))
    assert every.shape == (23, PLAIN.hidden_size)
    for first, second in ((0, 0), (1, 0), (0, 1), (7, 2)):
        assert torch.equal(hidden((first, second)), torch.cat((every[20 - first : 20], every[23 - second :])))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", variants())
def test_single_tokens_of_a_long_context(variant: str, spec: ModelSpec) -> None:
    """600 positions at once, and the last ones as single tokens: the threads share the tiles of one request."""
    for threads in (1, 2, 3):
        decoder = decoder_of(CpuBackend(variant=variant, num_threads=threads), spec)
        whole, split = prompts((600,)) + prompts((600,))
        Runner(decoder, block_size=32).step([(whole, 600)])
        runner = Runner(decoder, block_size=64)
        for length in (590, *[1] * 10):
            runner.step([(split, length)])
        assert torch.equal(torch.stack(whole.logits), torch.stack(split.logits))


@pytest.mark.parametrize("variant", variants())
def test_a_step_without_tokens(variant: str) -> None:
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=2))
    runner = Runner(decoder, block_size=32)
    assert decoder.forward(build_batch([], block_size=32, device=CPU), runner.cache).shape == (0, 96)


@pytest.mark.parametrize("variant", variants())
def test_two_caches_in_turns(variant: str) -> None:
    """Engines share weights, not caches: each call writes to and reads from the stores that it is given."""
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=2))
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
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=1))

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
def test_a_deleted_cache_is_freed(variant: str) -> None:
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=1))
    runner = Runner(decoder, block_size=32)
    runner.step([(request, request.num_pending) for request in prompts()])
    memory = weakref.ref(runner.cache.layers[0].memory)
    del runner
    gc.collect()
    assert memory() is None
