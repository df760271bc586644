"""Experts against a plain loop over tokens, and inside the decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import backends
import pytest
import tiny_models
import torch
from ragged_requests import Request, Runner
from torch import Tensor

from splitfuse.kernels.layers import ExpertsSpec, MlpSpec, RouterSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import LayerWeights
from splitfuse.models.decoder import Decoder, mlp
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder

HIDDEN, INNER = 48, 6


def mixture(num_experts: int, top_k: int, inner: int, renormalize: bool) -> ExpertsSpec:
    return ExpertsSpec(
        router=RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=renormalize),
        expert=MlpSpec(intermediate_size=inner, activation="silu"),
    )


def loop(x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, moe: ExpertsSpec) -> Tensor:
    """The mixture, one token and one expert at a time."""
    out = torch.zeros_like(x)
    for token, row in enumerate(x):
        probabilities = torch.softmax(router @ row, dim=0)
        chosen = sorted(range(moe.router.num_experts), key=lambda e: -float(probabilities[e]))[: moe.router.top_k]
        total = sum(float(probabilities[e]) for e in chosen) if moe.router.renormalize else 1.0
        for expert in chosen:
            gate, up = (w13[expert] @ row)[:INNER], (w13[expert] @ row)[INNER:]
            out[token] += float(probabilities[expert]) / total * (w2[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def make(moe: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(moe.router.num_experts)
    e = moe.router.num_experts
    return torch.randn(e, HIDDEN), torch.randn(e, 2 * INNER, HIDDEN) / 7, torch.randn(e, HIDDEN, INNER) / 7


MIXTURES = [
    mixture(experts, top_k, INNER, renormalize)
    for experts, top_k in [(1, 1), (4, 2), (5, 5), (8, 1)]
    for renormalize in (False, True)
]


@pytest.mark.parametrize("moe", MIXTURES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_mixture(moe: ExpertsSpec, tokens: int) -> None:
    router, w13, w2 = make(moe)
    x = torch.randn(tokens, HIDDEN)
    weights = LayerWeights(router=router, w13=w13, w2=w2)
    ours = mlp(x, moe, weights, ReferenceBackend(), x)
    torch.testing.assert_close(ours, loop(x, router, w13, w2, moe), rtol=1e-4, atol=1e-4)


def test_routing_is_best_first_and_in_fp32() -> None:
    ids, weights = backends.route(
        ReferenceBackend(), torch.tensor([[0.0, 3.0, 1.0, -1.0]], dtype=torch.bfloat16), 2, True
    )
    assert ids.tolist() == [[1, 2]]
    assert weights.dtype == torch.float32
    assert float(weights.sum()) == pytest.approx(1)


def test_decoder_adds_experts_to_the_residual(tmp_path: Path) -> None:
    """One expert that is every layer's MLP makes the dense network again, whatever its router says."""
    tiny_models.save("llama-gqa", tmp_path)
    spec, backend = load_spec(ModelFolder(tmp_path)), ReferenceBackend()
    dense = load_decoder(
        ModelFolder(tmp_path).weights(), spec, dtype=torch.float32, device=torch.device("cpu"), backend=backend
    )
    layers = tuple(
        dataclasses.replace(
            layer,
            mlp=None,
            router=torch.randn(1, spec.hidden_size),
            w13=(layer.mlp.gate_up,),
            w2=(layer.mlp.down,),
        )
        for layer in dense.weights.layers
    )
    moe = mixture(1, 1, 72, renormalize=False)
    sparse_spec = dataclasses.replace(spec, layers=tuple(dataclasses.replace(each, mlp=moe) for each in spec.layers))
    sparse = Decoder(sparse_spec, dataclasses.replace(dense.weights, layers=layers), backend, dtype=torch.float32)
    requests = [Request(list(range(12))) for _ in range(2)]
    for decoder, request in zip((dense, sparse), requests, strict=True):
        Runner(decoder, block_size=4).step([(request, 12)])
    torch.testing.assert_close(torch.stack(requests[0].logits), torch.stack(requests[1].logits))
