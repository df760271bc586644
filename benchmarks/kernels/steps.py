"""Forward steps of a fixed composition, for timing."""

from __future__ import annotations

import torch

from splitfuse.core.plan import Chunk
from splitfuse.runtime.executor import Executor

CONTEXT = 512  # of the requests that generate


def make_chunks(rows: int, generating: bool) -> list[Chunk]:
    if not generating:
        return [Chunk("prompt", 0, tuple(range(rows)), tuple(range(rows // 32 + 1)), 1, True)]
    blocks = CONTEXT // 32 + 1
    return [Chunk(str(i), CONTEXT, (i,), tuple(range(i * blocks, (i + 1) * blocks)), 1, True) for i in range(rows)]


def forward(executor: Executor, chunks: list[Chunk]) -> torch.Tensor:
    with torch.inference_mode():
        return executor.decoder.logits(executor.hidden(chunks))
