"""What the decoder does beyond parity: rows that are asked for, caps, and what it hands to the backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ragged_requests import Chunk, Request, Runner
from torch import Tensor

from splitfuse.kernels.interface import Store
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.batch import BatchBuilder


class RecordingBackend(ReferenceBackend):
    """The reference, remembering how each layer asked for attention."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int | None, float | None]] = []
        self.rows: list[int] = []

    def attend(self, q: Tensor, store: Store, spec: AttentionSpec, *others: Any) -> Tensor:
        self.asked.append((spec.score_scale, spec.window, spec.softcap))
        self.rows.append(len(q))
        return super().attend(q, store, spec, *others)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    tiny_models.save("qwen2-tied-upper-windows", tmp_path)
    spec = load_spec(ModelFolder(tmp_path))
    return load_decoder(
        ModelFolder(tmp_path).weights(),
        spec,
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=RecordingBackend(),
    )


def logits(decoder: Decoder, token_ids: list[int]) -> Tensor:
    request = Request(token_ids)
    Runner(decoder, block_size=4).step([(request, len(token_ids))])
    return torch.stack(request.logits)


def test_only_the_rows_asked_for_are_returned(decoder: Decoder) -> None:
    assert isinstance(decoder.backend, RecordingBackend)
    every_row = logits(decoder, list(range(9)))
    runner = Runner(decoder, block_size=4)
    chunks = [
        Chunk(start=0, token_ids=range(9), block_table=(3, 1, 2), num_logits=2),
        Chunk(start=0, token_ids=range(4), block_table=(0,), num_logits=0),
        Chunk(start=0, token_ids=range(1), block_table=(5,), num_logits=1),
    ]
    hidden = decoder.forward(BatchBuilder(4, decoder.device).build(chunks), runner.cache)
    assert hidden.shape == (3, decoder.spec.hidden_size)
    torch.testing.assert_close(decoder.logits(hidden), every_row[[7, 8, 0]])
    assert decoder.backend.rows == [9, 9, 9, 14, 14, 3]  # in the last layer those of the rows asked for


def test_logit_softcap(decoder: Decoder) -> None:
    capped = Decoder(
        dataclasses.replace(decoder.spec, logit_softcap=0.5), decoder.weights, decoder.backend, dtype=decoder.dtype
    )
    raw = logits(decoder, [5, 6, 7])
    assert raw.abs().max() > 0.5
    torch.testing.assert_close(logits(capped, [5, 6, 7]), 0.5 * torch.tanh(raw / 0.5))


def test_each_layer_attends_by_its_spec(decoder: Decoder) -> None:
    backend = decoder.backend
    assert isinstance(backend, RecordingBackend)
    capped = [
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, softcap=2.0))
        for layer in decoder.spec.layers[:2]
    ]
    spec = dataclasses.replace(decoder.spec, layers=(*capped, decoder.spec.layers[2]))
    logits(Decoder(spec, decoder.weights, backend, dtype=decoder.dtype), [1, 2])
    assert backend.asked == [(8**-0.5, None, 2.0), (8**-0.5, 5, 2.0), (8**-0.5, 5, None)]


def test_logits_are_fp32_in_every_precision(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        half = load_decoder(
            ModelFolder(tmp_path).weights(),
            load_spec(ModelFolder(tmp_path)),
            dtype=dtype,
            device=torch.device("cpu"),
            backend=ReferenceBackend(),
        )
        assert logits(half, [1, 2, 3]).dtype == torch.float32
