"""Results of steps that kernels choose all tokens of, against those of the sampler, which they replace."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from splitfuse.core.plan import Chunk, ChunkResult, SamplingState
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.reasoning import Reasoning
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.weights import NetworkWeights
from splitfuse.models.decoder import Decoder
from splitfuse.runtime import results
from splitfuse.runtime.sampling.request import RequestSampling
from splitfuse.runtime.sampling.sampler import sample

VOCABULARY, HIDDEN = 61, 8
PLAIN = SamplingParams(max_tokens=9, min_tokens=2, temperature=0.7, top_p=0.9)


def decoder_of(backend: Backend, *, scale: float = 1.0, cap: float | None = None) -> Decoder:
    """A head and nothing else."""
    torch.manual_seed(1)
    decoder = Decoder.__new__(Decoder)
    decoder.backend = backend
    decoder.spec = cast("object", SimpleNamespace(logit_scale=scale, logit_softcap=cap))  # type: ignore[assignment]
    head = torch.randn(VOCABULARY, HIDDEN).round()  # many logits are equal
    decoder.weights = NetworkWeights(embed=head, layers=(), norm=torch.ones(HIDDEN), head=head)
    return decoder


def request(name: str, params: SamplingParams, *, output: int = 0) -> RequestSampling:
    sampling = RequestSampling(SamplingState(name, (1, 2, 3), params, (0,), seed=len(name), choice=int(name[1:])))
    sampling.take([5] * output)
    return sampling


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0)])
@pytest.mark.parametrize("count", [1, 5, 150])
def test_tokens_are_those_of_the_sampler(count: int, scale: float, cap: float | None) -> None:
    rng, decoder = Random(count), decoder_of(ReferenceBackend(), scale=scale, cap=cap)
    for temperatures in ((0.0,), (0.0, 0.0, 0.7, 1.3)):
        requests, chunks = {}, []
        for number in range(count):
            params = SamplingParams(
                temperature=rng.choice(temperatures),
                top_k=rng.choice((0, 3)),
                top_p=rng.choice((1.0, 0.8)),
                min_p=rng.choice((0.0, 0.1)),
                min_tokens=rng.choice((0, 1)),
                max_tokens=9,
            )
            requests[f"r{number}"] = request(f"r{number}", params, output=rng.randint(1, 3))
            if number % 7 == 3:  # a part of a prompt
                chunks.append(Chunk(f"r{number}", 0, (1, 2), (0,), num_logits=0, samples=False))
            else:
                chunks.append(Chunk(f"r{number}", 3, (5,), (0,), num_logits=1, samples=True))
        rows = [requests[chunk.request_id].state for chunk in chunks if chunk.samples]
        hidden = torch.randn(len(rows), HIDDEN).round()
        if count > 1:
            hidden[1] = torch.nan
        wanted = iter(sample(decoder.logits(hidden), rows))
        found = results.results_of(chunks, hidden, requests, decoder)
        assert found == {c.request_id: next(wanted) if c.samples else ChunkResult() for c in chunks}
        assert list(found) == [chunk.request_id for chunk in chunks]


@pytest.mark.parametrize(
    ("params", "output", "is_plain"),
    [
        (SamplingParams(), 0, True),
        (PLAIN, 1, False),
        (PLAIN, 2, True),
        (replace(PLAIN, seed=7, top_k=3, min_p=0.1, stop=("a",), stop_token_ids=(3,)), 2, True),
        (replace(PLAIN, prompt_logprobs=3), 2, True),  # only its prompt has more rows
        (replace(PLAIN, logprobs=0), 2, False),
        (replace(PLAIN, logit_bias={3: 1.0}), 2, False),
        (replace(PLAIN, repetition_penalty=1.1), 2, False),
        (replace(PLAIN, presence_penalty=0.1), 2, False),
        (replace(PLAIN, frequency_penalty=-0.1), 2, False),
        (SamplingParams(reasoning=Reasoning(end_token_ids=(6,), is_open=True)), 0, False),
    ],
    ids=str,
)
def test_which_requests_are_plain(params: SamplingParams, output: int, is_plain: bool) -> None:
    state = SamplingState("r0", (1,), params, (0,), 0, 0, [5] * output, thought=params.thought())
    assert RequestSampling(state).is_plain is is_plain
    assert not RequestSampling(replace(state, pooling=PoolingParams())).is_plain


def test_a_request_that_is_not_plain_is_sampled_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(ReferenceBackend())
    requests = {"r0": request("r0", SamplingParams(logprobs=1)), "r1": request("r1", SamplingParams(temperature=1.0))}
    chunks = [Chunk(name, 3, (5,), (0,), num_logits=1, samples=True) for name in requests]
    hidden = torch.randn(2, HIDDEN)
    together = results.results_of(chunks, hidden, requests, decoder)
    monkeypatch.setattr(results, "sample", None)  # not needed for what follows
    assert results.results_of(chunks[1:], hidden[1:], requests, decoder) == {"r1": together["r1"]}
    assert len(together["r0"].logprobs) == 1
