"""Networks that ranks of a tensor-parallel group divide, and what computes them in threads, a rank each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ragged_requests import Request, Runner
from random_networks import OWN, OwnNames
from specs import make_experts
from torch import Tensor

from splitfuse.kernels.group import Group, Shard
from splitfuse.kernels.layers import (
    AttentionSpec,
    ExpertsSpec,
    HeadNormSpec,
    LayerSpec,
    MlpSpec,
    NormPlace,
    NormSpec,
    RouterSpec,
)
from splitfuse.models.decoder import Decoder
from splitfuse.models.families import registry
from splitfuse.models.families.common import Family
from splitfuse.models.spec import ModelSpec, RopeSpec
from splitfuse.runtime.parallel.distributed import DistributedGroup

EPS = NormSpec(eps=1e-5)


def heads(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 12, "num_kv_heads": 6, "head_dim": 16} | fields)


def dense(size: int, activation: str = "silu", **fields: Any) -> MlpSpec:
    return MlpSpec(intermediate_size=size, activation=activation, **fields)


def network(*layers: LayerSpec, **fields: Any) -> ModelSpec:
    ropes = (RopeSpec(theta=10000.0, rotary_dim=16),)
    sizes = {"architecture": OWN, "dtype": "bfloat16", "vocab_size": 71, "hidden_size": 96, "max_position": 700}
    return ModelSpec(**sizes | {"norm": EPS, "ropes": ropes, "layers": layers} | fields)


NETWORKS = {
    "plain": network(LayerSpec(mixer=heads(), mlp=dense(132)), LayerSpec(mixer=heads(window=9), mlp=dense(66))),
    "biases": network(
        LayerSpec(
            mixer=heads(qkv_bias=True, o_bias=True, sinks=True, softcap=5.0, qk_norm=HeadNormSpec(norm=EPS)),
            mlp=dense(132, "gelu", bias=True),
        ),
        LayerSpec(mixer=heads(), mlp=dense(66, "clamped_swiglu", bias=True)),
        tied_embeddings=True,
        logit_softcap=20.0,
        embed_scale=9.7,
    ),
    "sandwich": network(
        LayerSpec(mixer=heads(), mlp=dense(132), norms=NormPlace.AROUND, residual_scale=0.7),
        LayerSpec(mixer=heads(head_dim=18, rope=None), mlp=dense(66), norms=NormPlace.AFTER),
        LayerSpec(mixer=heads(), mlp=make_experts(5, 2, 48), norms=NormPlace.AROUND),
        LayerSpec(mixer=heads(), mlp=make_experts(5, 2, 48), residual_scale=0.6),
    ),
    "classic": network(
        LayerSpec(mixer=heads(rope=None, qkv_bias=True), mlp=dense(36, "relu2", gated=False, bias=True)),
        LayerSpec(mixer=heads(o_bias=True), mlp=dense(132, "gelu", gated=False), parallel=True, shared_norm=True),
        LayerSpec(mixer=heads(), mlp=dense(66, "relu", gated=False), parallel=True),
        LayerSpec(mixer=None, mlp=dense(42, gated=False)),
        LayerSpec(mixer=heads(window=21), mlp=None),
        norm=NormSpec(eps=1e-5, centered=True, bias=True),
        learned_positions=True,
        position_offset=2,
    ),
    "experts": network(
        LayerSpec(mixer=heads(), mlp=make_experts(20, 3, 48)),
        LayerSpec(
            mixer=heads(),
            mlp=ExpertsSpec(
                router=RouterSpec(num_experts=24, top_k=3, renormalize=True, sigmoid=True, bias=True, scale=1.5),
                expert=dense(48, "clamped_swiglu", bias=True),
                shared=dense(72, bias=True),
                shared_gate=True,
            ),
        ),
        LayerSpec(
            mixer=heads(),
            mlp=replace(
                make_experts(9, 3, 48),
                shared=dense(72),
                router=RouterSpec(num_experts=9, top_k=3, renormalize=False, sigmoid=True, scales_input=True),
            ),
        ),
        LayerSpec(
            mixer=heads(),
            mlp=ExpertsSpec(
                router=RouterSpec(num_experts=12, top_k=2, renormalize=False),
                expert=dense(36, "relu2", gated=False, bias=True),
                shared=dense(36, "relu2", gated=False),
            ),
            parallel=True,
        ),
    ),
}


@contextmanager
def own_names() -> Iterator[None]:
    """Let networks have any layers: names of weights are those of no family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, OWN, Family("own", lambda _: NETWORKS["plain"], OwnNames()))
        yield


def make_summing_groups(size: int, patience: float = 60.0, *, in_order: bool = True) -> list[Group]:
    """Return groups that add up by gloo, made in threads, since they wait for each other."""
    store, options = dist.HashStore(), {"patience": patience, "in_order": in_order}

    def make(rank: int) -> Group:
        return DistributedGroup(store, Shard(rank, size, sums=True), address="127.0.0.1", **options)  # type: ignore[arg-type]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(make, range(size)))


def together(decoders: list[Decoder], compute: Callable[[Decoder], list[Tensor]]) -> list[list[Tensor]]:
    """Return what each rank computes, in threads."""
    with ThreadPoolExecutor(len(decoders)) as pool:
        return list(pool.map(compute, decoders))


def logits(
    decoder: Decoder,
    vocab_size: int,
    seed: int = 3,
    *,
    lengths: Sequence[int] = (1, 3, 23, 70),
    block_size: int = 32,
    num_chosen: int = 3,
) -> list[Tensor]:
    """Return the logits of every position of some prompts, computed in chunks, and of some tokens chosen by them."""
    rng = random.Random(0)
    requests = [Request([rng.randrange(vocab_size) for _ in range(length)]) for length in lengths]
    runner = Runner(decoder, block_size=block_size, num_blocks=16)
    runner.run_split(requests, random.Random(seed))
    runner.generate(requests, num_chosen)
    return [torch.stack(request.logits) for request in requests]
