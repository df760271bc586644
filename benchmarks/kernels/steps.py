"""Forward steps of a fixed composition, for timing."""

from __future__ import annotations

import torch

from splitfuse.core.plan import Chunk
from splitfuse.kernels.cpu.bindings import Step
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


def scattered_steps(requests: int, rows: int, context: int, num_blocks: int) -> list[Step]:
    """Return steps of `rows` tokens of each request, whose blocks of 32 lie in random places: of single tokens enough
    for all blocks to be read.
    """
    places, per_request = torch.randperm(num_blocks, dtype=torch.int32), context // 32
    many = max(1, num_blocks // (requests * per_request)) if rows == 1 else 1
    return [
        Step.of(
            requests * rows,
            query_start=torch.arange(0, requests * rows + 1, rows, dtype=torch.int32),
            seq_lens=torch.full((requests,), context, dtype=torch.int32),
            block_tables=places.roll(-i * requests * per_request)[: requests * per_request].view(requests, -1),
        )
        for i in range(many)
    ]
