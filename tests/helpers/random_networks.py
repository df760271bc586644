"""Networks of any layers, which no family has, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from backends import CPU
from torch import Tensor

from splitfuse.models.sources.dummy import SCALE, DummyWeights
from splitfuse.models.sources.source import Piece

OWN = "OwnForCausalLM"
"""Architecture of such networks; tests register it."""


class OwnNames(dict[str, tuple[str, ...]]):
    """Names of weights: each is stored as one tensor, under our name of it."""

    def __missing__(self, name: str) -> tuple[str, ...]:
        return (f"{name} of {{layer}} {{expert}}",)


class RandomWeights(DummyWeights):
    """The same at every call: rows of products of about the size of what they multiply, of norms and biases of 1."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16, CPU)

    @contextmanager
    def read(self, piece: Piece) -> Iterator[Tensor]:
        with super().read(piece) as tensor:
            is_table = piece.name.startswith(("embed", "positions", "conv")) or len(piece.shape) == 1
            scaled = tensor / SCALE / (1 if is_table else piece.shape[1] ** 0.5)
            yield scaled.abs() if piece.name.startswith("decay of") else scaled
