"""A network in one call gives the bits of its operations one by one, and those of any other chunks and threads."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import CPU, emulation_slow, variants
from ragged_requests import Chunk, Request, Runner
from random_networks import OWN, OwnNames, RandomWeights
from specs import make_delta, make_experts, make_mamba, make_spec
from torch import Tensor

from splitfuse.core.plan import ZERO_STATE, StateSlots
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.structs import OPERATORS, OperatorTime
from splitfuse.kernels.drawing import GREEDY, Filter
from splitfuse.kernels.interface import Backend, NetworkPlan
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    ExpertsSpec,
    HeadNormSpec,
    LatentSpec,
    LayerSpec,
    MambaSpec,
    MlpSpec,
    NormPlace,
    NormSpec,
    QueryScaling,
    RouterSpec,
    TokenInputSpec,
)
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families import registry
from splitfuse.models.families.common import Family
from splitfuse.models.spec import ModelSpec, RopeSpec
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.batch import BatchBuilder

FORMATS = [(None, None), ("int8", None), ("int8", 128), ("int4", 64), ("int4", 128)]
SIZES: dict[str, Any] = {
    "architecture": OWN,
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
EXPERTS = dataclasses.replace(
    EXPERTS,
    layers=(
        *EXPERTS.layers[:2],
        dataclasses.replace(
            EXPERTS.layers[2],
            mlp=ExpertsSpec(
                router=RouterSpec(
                    num_experts=24,
                    top_k=3,
                    renormalize=True,
                    sigmoid=True,
                    bias=True,
                    choice_bias=True,
                    num_groups=4,
                    top_groups=2,
                    min_sum=1e-20,
                    scale=1.5,
                ),
                expert=MlpSpec(intermediate_size=50, activation="clamped_swiglu", bias=True),
                shared=MlpSpec(intermediate_size=70, activation="silu", bias=True),
                shared_gate=True,
            ),
        ),
        dataclasses.replace(
            EXPERTS.layers[2],
            mlp=ExpertsSpec(
                router=RouterSpec(
                    num_experts=12, top_k=2, renormalize=False, num_groups=6, top_groups=2, group_best=1, scale=4.0
                ),
                expert=MlpSpec(intermediate_size=33, activation="relu2", gated=False, bias=True),
                shared=MlpSpec(intermediate_size=33, activation="relu2", gated=False),
            ),
        ),
    ),
)


def heads(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": 16} | fields)


def scaled_router(**fields: Any) -> RouterSpec:
    return RouterSpec(num_experts=9, top_k=3, renormalize=False, sigmoid=True, **fields)


def dense(size: int, activation: str, **fields: Any) -> MlpSpec:
    return MlpSpec(intermediate_size=size, activation=activation, **fields)


def network(*layers: LayerSpec, **fields: Any) -> ModelSpec:
    """A network of unequal layers."""
    ropes = (RopeSpec(theta=10000.0, rotary_dim=16), RopeSpec(theta=100.0, rotary_dim=20))
    sizes = {name: SIZES[name] for name in ("architecture", "vocab_size", "hidden_size", "max_position")}
    norm = NormSpec(eps=1e-5)
    return ModelSpec(**{"dtype": "bfloat16", "norm": norm, "ropes": ropes, "layers": layers} | sizes | fields)


SEVEN_TO_ONE: dict[str, Any] = {"num_heads": 7, "num_kv_heads": 1, "head_dim": 35}
EPS = NormSpec(eps=1e-5)
SANDWICH = network(  # norms around blocks, scales, heads that differ
    LayerSpec(
        mixer=heads(window=9, softcap=5.0, scale=0.3),
        mlp=dense(130, "gelu_tanh"),
        norms=NormPlace.AROUND,
        residual_scale=0.7,
    ),
    LayerSpec(
        mixer=heads(**SEVEN_TO_ONE, rope=1, qk_norm=HeadNormSpec(norm=EPS), v_norm=EPS, sinks=True),
        mlp=dense(50, "clamped_swiglu", bias=True),
        norms=NormPlace.AFTER,
        output_scale=True,
    ),
    LayerSpec(
        mixer=heads(rope=None, sinks=True, o_bias=True, window=40), mlp=make_experts(5, 2, 50), residual_scale=0.6
    ),
    LayerSpec(mixer=heads(num_kv_heads=3), mlp=make_experts(5, 2, 50), norms=NormPlace.AROUND),
    embed_scale=9.7,
)
CLASSIC = network(  # layer norms, MLPs without a gate, learned positions, parallel blocks, layers of one block
    LayerSpec(mixer=heads(rope=None, qkv_bias=True), mlp=dense(33, "relu2", gated=False, bias=True)),
    LayerSpec(
        mixer=heads(**SEVEN_TO_ONE, rope=1, o_bias=True),
        mlp=dense(130, "gelu", gated=False),
        parallel=True,
        shared_norm=True,
    ),
    LayerSpec(mixer=heads(rope=None, alibi=0.25, softcap=4.0), mlp=dense(64, "relu", gated=False), parallel=True),
    LayerSpec(mixer=None, mlp=dense(40, "silu", gated=False)),
    LayerSpec(mixer=heads(rope=None, alibi=1.0, window=21), mlp=None),
    norm=NormSpec(eps=1e-5, centered=True, bias=True),
    learned_positions=True,
    position_offset=2,
    embed_scale=0.5,
)
TEMPERED = network(  # gates, chunks, queries scaled by position, norms of heads of every kind
    LayerSpec(
        mixer=heads(
            gate=True,
            chunk=11,
            rope=None,
            query_scaling=QueryScaling(beta=0.3, length=10, offset=1),
            qk_norm=HeadNormSpec(norm=EPS, whole_row=True),
        ),
        mlp=dense(130, "silu"),
    ),
    LayerSpec(
        mixer=heads(
            **SEVEN_TO_ONE,
            gate=True,
            chunk=40,
            window=33,
            qk_norm=HeadNormSpec(norm=NormSpec(eps=1e-5, centered=True, bias=True), own_weights=True),
        ),
        mlp=dense(17, "silu"),
    ),
    LayerSpec(
        mixer=heads(qk_norm=HeadNormSpec(norm=EPS, weight=False, after_rope=True), scale=1.0),
        mlp=make_experts(5, 2, 50),
        parallel=True,
    ),
)


def latent_heads(num_heads: int, **fields: Any) -> AttentionSpec:
    """Return latent attention with the other fields of its own."""
    own = {name: fields.pop(name) for name in ("q_rank", "kv_rank", "nope_dim", "v_dim")}
    latent = LatentSpec(norm=NormSpec(eps=1e-6), rope_dim=16, **own)
    return AttentionSpec(num_heads=num_heads, num_kv_heads=1, head_dim=16 + latent.kv_rank, latent=latent, **fields)


LATENT = network(  # ranks and sizes of heads that are no whole panels, a key of more than one slab
    LayerSpec(
        mixer=latent_heads(6, q_rank=28, kv_rank=20, nope_dim=7, v_dim=14, qkv_bias=True, o_bias=True, scale=0.3),
        mlp=dense(130, "silu"),
    ),
    LayerSpec(
        mixer=latent_heads(40, q_rank=None, kv_rank=515, nope_dim=3, v_dim=33, window=300, softcap=5.0, sinks=True),
        mlp=dense(33, "silu"),
        norms=NormPlace.AROUND,
    ),
)
OWN_INPUT = TokenInputSpec(size=12, activation="gelu_tanh")
BORROWED = network(  # keys and values of another layer, inputs of layers of their own
    LayerSpec(mixer=heads(num_kv_heads=3), mlp=dense(130, "silu"), token_input=OWN_INPUT),
    LayerSpec(mixer=heads(window=9), mlp=dense(50, "silu"), token_input=OWN_INPUT, output_scale=True),
    LayerSpec(
        mixer=heads(window=9, kv_layer=1, qkv_bias=True, qk_norm=HeadNormSpec(norm=EPS)),
        mlp=dense(50, "gelu"),
        norms=NormPlace.AROUND,
        token_input=OWN_INPUT,
    ),
    token_input_rows=71,
)
BRANCHES = network(  # experts next to an MLP with norms of their own, experts whose weights scale what they read
    LayerSpec(
        mixer=heads(),
        mlp=replace(
            make_experts(9, 3, 50), shared=dense(70, "gelu_tanh"), own_norm=EPS, router=scaled_router(expert_scale=True)
        ),
        norms=NormPlace.AROUND,
    ),
    LayerSpec(
        mixer=heads(),
        mlp=replace(make_experts(9, 3, 50), shared=dense(70, "silu"), router=scaled_router(scales_input=True)),
    ),
    LayerSpec(mixer=heads(), mlp=replace(make_experts(9, 3, 50), shared=dense(70, "silu"), own_norm=EPS)),
)


RECURRENT = network(
    LayerSpec(mixer=make_delta(2, 6, 10, 18, 4, eps=1e-5), mlp=dense(130, "silu")),
    LayerSpec(mixer=ConvSpec(num_channels=96, conv_size=3), mlp=make_experts(5, 2, 50)),
    LayerSpec(mixer=heads(gate=True, qk_norm=HeadNormSpec(norm=EPS)), mlp=dense(17, "silu")),
    LayerSpec(mixer=make_delta(1, 1, 33, 70, 2, eps=1e-5), mlp=dense(40, "silu"), parallel=True),
    LayerSpec(
        mixer=ConvSpec(num_channels=50, conv_size=5, bias=True),
        mlp=None,
        norms=NormPlace.AROUND,
        residual_scale=0.7,
    ),
    LayerSpec(mixer=make_mamba(2, 6, 10, 18, eps=1e-5, bias=True, conv_bias=True, dt_min=0.3, dt_max=2.0), mlp=None),
    LayerSpec(mixer=None, mlp=make_experts(5, 2, 50)),
    LayerSpec(mixer=make_mamba(1, 3, 33, 70, 2, eps=1e-5), mlp=dense(40, "silu"), parallel=True, residual_scale=0.7),
)
UNIFORM = {"plain": PLAIN, "everything": EVERYTHING, "odd": ODD, "experts": EXPERTS}
UNEQUAL = {
    "sandwich": SANDWICH,
    "classic": CLASSIC,
    "tempered": TEMPERED,
    "borrowed": BORROWED,
    "branches": BRANCHES,
    "recurrent": RECURRENT,
    "latent": LATENT,
}
SPECS = [pytest.param(spec, id=name) for name, spec in (UNIFORM | UNEQUAL).items()]


def cut_after(spec: ModelSpec, count: int) -> ModelSpec:
    """The network of the first layers of one, with attention in front where none of them attends."""
    layers = spec.layers[:count]
    attends = any(isinstance(layer.mixer, AttentionSpec) for layer in layers)
    return replace(spec, layers=layers if attends else (LayerSpec(mixer=heads(), mlp=None), *layers))


ENDS = [
    pytest.param(cut_after(spec, count), id=f"{name}-{count}")
    for name, spec in (UNIFORM | UNEQUAL).items()
    for count in range(1, len(spec.layers) + 1)
]
"""Networks that end with each kind of layer."""


class OneByOne(CpuBackend):
    """The same kernels, an operation at a time."""

    def compile_network(self, plan: NetworkPlan) -> None:
        del plan


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks have any layers: names of weights are those of no family."""
    monkeypatch.setitem(registry.FAMILIES, OWN, Family("own", lambda _: PLAIN, OwnNames()))


def decoder_of(backend: Backend, spec: ModelSpec = PLAIN, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return load_decoder(RandomWeights(), spec, dtype=dtype, device=CPU, backend=backend)


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


def is_paired(format_index: int, spec_index: int, kv_int8: bool) -> bool:
    """Whether a case is one of the half in which each two of format, cache and network meet: the rest is slow."""
    return kv_int8 == ((format_index % 2 == 1) != (spec_index >= 2))


EVERY_FORMAT = [
    pytest.param(
        *case.values,
        kv_int8,
        spec,
        id=f"{case.id}-{kv_int8}-{name}",
        marks=[*case.marks, *([] if is_paired(f, s, kv_int8) else [pytest.mark.slow])],
    )
    for f, weights in enumerate(FORMATS)
    for case in variants(*weights, id="-".join(map(str, weights)))
    for kv_int8 in (False, True)
    for s, (name, spec) in enumerate(UNIFORM.items())
]
SOME_FORMATS = [
    pytest.param(*case.values, kv_int8, spec, id=f"{case.id}-{kv_int8}-{name}", marks=case.marks)
    for weights, int8 in (((None, None), False), (("int8", 128), True), (("int4", 64), False))
    for case in variants(*weights, id="-".join(map(str, weights)))
    for name, spec in UNEQUAL.items()
    for kv_int8 in [int8 and spec is not LATENT]  # which is kept in bf16 alone
]


TILED = ("None-None-False-plain", "int8-None-True-everything", "int4-64-False-experts", "None-None-False-latent")


@pytest.mark.parametrize(
    ("variant", "quantization", "group", "kv_int8", "spec"), emulation_slow(EVERY_FORMAT + SOME_FORMATS, *TILED)
)
def test_fused_equals_one_by_one(
    variant: str, quantization: str | None, group: int | None, kv_int8: bool, spec: ModelSpec
) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "group_size": group, "kv_int8": kv_int8}
    wanted = logits(decoder_of(OneByOne(variant=variant, num_threads=1, **settings), spec))
    assert all(rows.isfinite().all() and rows.std() > 0.1 for rows in wanted)
    for threads in (1, 2, 3):
        cuts = ((32, None), (64, threads), (96, 7 * threads))
        for backend, some in ((OneByOne, cuts[threads - 1 : threads]), (CpuBackend, cuts)):  # test_bits.py has the rest
            decoder = decoder_of(backend(variant=variant, num_threads=threads, **settings), spec)
            for block_size, seed in some:
                ours = logits(decoder, block_size=block_size, seed=seed)
                assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_near_the_reference_in_fp32(variant: str, spec: ModelSpec) -> None:
    """The same weights: what differs is that activations, keys and values are rounded to bf16."""
    ours = logits(decoder_of(CpuBackend(variant=variant, num_threads=2), spec))
    wanted = logits(decoder_of(ReferenceBackend(), spec, torch.float32))
    likeness = torch.cat(
        [torch.cosine_similarity(a[:-3], b[:-3].float(), dim=-1) for a, b in zip(ours, wanted, strict=True)]
    )  # of the prompts: a token generated after them may differ, as the two round
    off, routed = int((likeness < 0.998).sum()), any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers)
    assert off <= (len(likeness) // 8 if routed else 0)  # where two experts are nearly as good, either may be chosen
    assert likeness.median() > 0.9995


def test_cpp_kernels_know_every_field_of_a_layer() -> None:
    """`CpuBackend` and `FusedNetwork` honour a new field, or `uncovered` names it: then add it here."""
    known = {
        LayerSpec: "mixer mlp norms parallel shared_norm residual_scale token_input output_scale",
        AttentionSpec: "num_heads num_kv_heads head_dim latent rope window chunk qkv_bias o_bias qk_norm v_norm "
        "value_is_key kv_layer gate sinks alibi scale query_scaling softcap",
        DeltaSpec: "num_key_heads num_value_heads key_dim value_dim conv_size norm",
        ConvSpec: "num_channels conv_size bias",
        MambaSpec: "num_heads num_groups state_dim head_dim conv_size norm bias conv_bias dt_min dt_max",
        MlpSpec: "intermediate_size activation gated bias",
        ExpertsSpec: "router expert shared shared_gate own_norm",
        RouterSpec: "num_experts top_k renormalize sigmoid bias choice_bias num_groups top_groups "
        "group_best min_sum scale scales_input expert_scale",
        NormSpec: "eps centered bias",
        HeadNormSpec: "norm whole_row own_weights weight after_rope",
    }
    for spec, names in known.items():
        assert [field.name for field in dataclasses.fields(spec)] == names.split()


@pytest.mark.parametrize("fields", [{"head_dim": 18}, {"num_kv_heads": 1}], ids=str)
def test_a_store_of_other_heads_is_not_read(fields: dict[str, Any]) -> None:
    decoder = decoder_of(CpuBackend())
    runner = Runner(decoder, block_size=32, num_blocks=4)
    other = make_spec(**SIZES | fields, num_layers=2)
    runner.cache.layers[1] = Runner(decoder_of(CpuBackend(), other), block_size=32, num_blocks=4).cache.layers[1]
    with pytest.raises(AssertionError):
        decoder.forward(BatchBuilder(32, CPU).build([Chunk(0, range(20), (1,), 1)]), runner.cache)


@pytest.mark.parametrize("threads", [1, 2])
def test_account_of_a_step(threads: int) -> None:
    """Each operator takes some of the step, and what is no operator nothing."""
    backend = CpuBackend(num_threads=threads)
    decoder = decoder_of(backend)
    runner = Runner(decoder, block_size=32, num_blocks=4)
    batch = BatchBuilder(32, CPU).build([Chunk(0, range(20), (1,), 1)])
    wanted = decoder.forward_and_choose(batch, runner.cache)
    times = (OperatorTime * len(OPERATORS) * threads)()
    backend.library.account_in(ctypes.addressof(times))
    start = time.perf_counter_ns()
    assert decoder.forward_and_choose(batch, runner.cache) == wanted
    longest = time.perf_counter_ns() - start
    backend.library.account_in(None)
    decoder.forward_and_choose(batch, runner.cache)
    for thread in times:
        sums = {
            name: each.split + each.after_split + each.claimed + each.after_claimed
            for name, each in zip(OPERATORS, thread, strict=True)
        }
        assert sums.pop("others") == 0
        assert all(taken > 0 for taken in sums.values())
        assert sum(sums.values()) < longest


@pytest.mark.parametrize("variant", variants())
def test_only_wanted_rows_come_back(variant: str) -> None:
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=2))

    def hidden(num_logits: tuple[int, int]) -> Tensor:
        runner = Runner(decoder, block_size=32, num_blocks=4)
        chunks = [Chunk(0, range(20), (1,), num_logits[0]), Chunk(0, range(3), (3,), num_logits[1])]
        return decoder.forward(BatchBuilder(32, CPU).build(chunks), runner.cache)

    every = hidden((20, 3))
    assert every.shape == (23, PLAIN.hidden_size)
    for first, second in ((0, 0), (1, 0), (0, 1), (7, 2)):
        assert torch.equal(hidden((first, second)), torch.cat((every[20 - first : 20], every[23 - second :])))


@pytest.mark.parametrize("spec", ENDS)
@pytest.mark.parametrize("variant", emulation_slow(variants(), "plain"))
def test_rows_without_logits_change_nothing_that_is_kept(variant: str, spec: ModelSpec) -> None:
    """Whichever rows need logits: the same bits of their hidden states, and of all keys, values and states."""
    states = [StateSlots(ZERO_STATE, 0), StateSlots(ZERO_STATE, 1)]
    before = [Chunk(0, range(20), (1,), 20, states[0]), Chunk(0, range(40, 43), (2, 5), 3, states[1])]

    def compute(decoder: Decoder, wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The hidden states that are wanted of a decode, a chunk whose state is kept on the way, and a new prompt."""
        runner = Runner(decoder, block_size=32, num_blocks=8)
        chunks = [
            Chunk(20, (7,), (1,), wanted[0], StateSlots(0, 0)),
            Chunk(3, range(3, 43), (2, 5), wanted[1], StateSlots(1, 1, ((20, 3),))),
            Chunk(0, range(9), (3,), wanted[2], StateSlots(ZERO_STATE, 2)),
        ]
        decoder.forward(runner.batches.build(before), runner.cache)
        hidden = decoder.forward(runner.batches.build(chunks), runner.cache)
        return hidden, *(store.memory.view(torch.uint8) for store in runner.cache.layers if store is not None)

    every, *kept = compute(decoder_of(CpuBackend(variant=variant, num_threads=2), spec), (1, 40, 9))
    assert every.shape == (50, 96) and every.isfinite().all()
    for backend, threads in ((CpuBackend, 1), (CpuBackend, 3), (OneByOne, 2)):
        decoder = decoder_of(backend(variant=variant, num_threads=threads), spec)
        for wanted in ((1, 0, 0), (1, 1, 0), (1, 30, 2), (0, 40, 9), (0, 0, 1), (0, 0, 0)):
            ours, *stores = compute(decoder, wanted)
            ends = zip((1, 41, 50), wanted, strict=True)
            assert torch.equal(ours, torch.cat([every[end - count : end] for end, count in ends]))
            assert all(map(torch.equal, stores, kept))


@pytest.mark.parametrize("variant", variants())
def test_rows_without_logits_are_not_computed_to_the_end(variant: str) -> None:
    """Behind the keys and values of the last layer nothing is, if no row needs logits."""
    backend = CpuBackend(variant=variant, num_threads=1)
    decoder = decoder_of(backend, replace(PLAIN, layers=PLAIN.layers[:1]))
    runner = Runner(decoder, block_size=32, num_blocks=4)
    times = (OperatorTime * len(OPERATORS))()
    backend.library.account_in(ctypes.addressof(times))
    begun = {"embedding", "qkv", "rotate and store", "head"}
    for count, taken in ((0, begun), (1, begun | {"attention", "o", "gate and up", "down"})):
        ctypes.memset(times, 0, ctypes.sizeof(times))
        decoder.forward(runner.batches.build([Chunk(0, range(20), (1,), count)]), runner.cache)
        each = zip(OPERATORS, times, strict=True)
        assert {name for name, time in each if time.split + time.claimed > 0} == taken
    backend.library.account_in(None)


@pytest.mark.parametrize("variant", variants())
def test_rows_that_are_not_the_last_of_a_chunk(variant: str) -> None:
    """No scheduler asks for them: then all rows are computed to the end."""
    decoder = decoder_of(CpuBackend(variant=variant, num_threads=2))
    chunks = [Chunk(0, range(20), (1,), 3), Chunk(0, range(3), (3,), 1)]
    runner = Runner(decoder, block_size=32, num_blocks=4)
    every = decoder.forward(
        runner.batches.build([replace(c, num_logits=len(c.token_ids)) for c in chunks]), runner.cache
    )
    for rows in ([18, 3, 19, 22], [2, 20, 21, 22], [17, 18, 19, 21], [20, 21, 22, 19], [0, 0, 0, 0]):
        batch = runner.batches.build(chunks)
        batch.logit_rows.copy_(torch.tensor(rows))
        assert torch.equal(decoder.forward(batch, runner.cache), every[rows])
        assert batch.logit_batch is batch


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", emulation_slow(variants()))
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
    assert decoder.forward(BatchBuilder(32, CPU).build([]), runner.cache).shape == (0, 96)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_network_and_choice_in_one_call(variant: str, spec: ModelSpec) -> None:
    """The tokens and the largest logits of two calls, to the last bit; also if no row is wanted."""
    spec = dataclasses.replace(spec, logit_scale=1.0, logit_softcap=None)
    chunks = [
        Chunk(0, range(20), (1,), 1, StateSlots(ZERO_STATE, 0)),
        Chunk(0, range(3), (3,), 0, StateSlots(ZERO_STATE, 1)),
        Chunk(0, (7,), (2,), 1, StateSlots(ZERO_STATE, 2)),
        Chunk(0, (9, 8), (5,), 2, StateSlots(ZERO_STATE, 3)),
    ]
    filters = [Filter(0.7), GREEDY, Filter(1.5, top_k=4), Filter(1.0, top_p=0.8)]
    for quantization in (None, "int8"):
        decoder = decoder_of(CpuBackend(variant=variant, num_threads=2, quantization=quantization), spec)
        runner = Runner(decoder, block_size=32, num_blocks=8)
        for some, draws in ((chunks, ([], [])), (chunks, (filters, [0.1, 0.0, 0.5, 0.9])), (chunks[1:2], ([], []))):
            hidden = decoder.forward(runner.batches.build(some), runner.cache)
            wanted = decoder.choose(hidden, *draws)
            assert decoder.chooses_at_once and len(wanted[0]) == sum(chunk.num_logits for chunk in some)
            assert decoder.forward_and_choose(runner.batches.build(some), runner.cache, *draws) == wanted


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
