"""Makes random weights in place of a checkpoint, for measuring a network without its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from splitfuse.models.sources.source import Piece, WeightSource

SCALE = 0.02
SEED = 0


class DummyWeights(WeightSource):
    """Makes every tensor that is asked for, the same at each start: ones if its name ends in norm.weight, else random
    numbers too small to overflow.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(SEED)

    def __contains__(self, name: str) -> bool:
        return False

    def names(self) -> Collection[str]:
        return ()

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        """Accept everything."""

    @contextmanager
    def read(self, piece: Piece) -> Iterator[Tensor]:
        tensor = torch.empty(piece.shape, dtype=self._dtype, device=self._device)
        if piece.name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=SCALE, generator=self._generator)
        yield tensor
