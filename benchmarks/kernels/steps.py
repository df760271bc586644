"""Forward steps of a fixed composition, for timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.models import SHAPES
from splitfuse.core.plan import Chunk
from splitfuse.core.slo.cost_model import num_pairs
from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu.structs import Step
from splitfuse.kernels.layers import AttentionSpec, MlpSpec
from splitfuse.models.spec import ModelSpec
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel

CONTEXT = 512  # of the requests that generate


def check_shape(name: str, spec: ModelSpec) -> None:
    """Raise ConfigError if a model is not of this shape, whose work would be compared with another's limits."""
    sizes = dense_sizes(spec)
    for field, size in sizes.items():
        if (wanted := getattr(SHAPES[name], field)) != size:
            same = (other for other, shape in SHAPES.items() if all(getattr(shape, f) == n for f, n in sizes.items()))
            hint = next((f"use --shape {other}" for other in same), "write one with python -m benchmarks.models")
            raise ConfigError(f"--shape {name} has {field} {wanted}, but the model has {size}: {hint}")


def dense_sizes(spec: ModelSpec) -> dict[str, int]:
    """Return the sizes that decide how much a step reads and computes, by their names in ModelShape."""
    mixer, mlp = spec.layers[0].mixer, spec.layers[0].mlp
    if not isinstance(mixer, AttentionSpec) or not isinstance(mlp, MlpSpec):
        raise ConfigError("step wants a model of attention and dense MLPs: write one with python -m benchmarks.models")
    return {
        "hidden_size": spec.hidden_size,
        "num_layers": len(spec.layers),
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "intermediate_size": mlp.intermediate_size,
    }


def step_bytes(model: LoadedModel, chunks: Sequence[Chunk]) -> float:
    """Return the bytes that a step must read: all weights but an embedding that is no head, and the keys and values of
    earlier steps. The end of the network is counted even if no row needs logits.
    """
    plan, spec = model.plan, model.spec
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size * 2
    return plan.weights - embedding + sum(chunk.start for chunk in chunks) * plan.block / plan.block_size


def step_operations(spec: ModelSpec, chunks: Sequence[Chunk]) -> float:
    """Return the multiplications and additions that a step needs. Of a row without logits that is its key and value in
    the last layer, and nothing more of that.
    """
    sizes = dense_sizes(spec)
    hidden, before = sizes["hidden_size"], sizes["num_layers"] - 1
    kv, q = (sizes["head_dim"] * sizes[heads] for heads in ("num_kv_heads", "num_heads"))
    stored, rest = 2 * kv * hidden, (2 * q + 3 * sizes["intermediate_size"]) * hidden
    rows, wanted = sum(len(chunk.token_ids) for chunk in chunks), sum(chunk.num_logits for chunk in chunks)
    products = rows * (before * (stored + rest) + stored) + wanted * (rest + hidden * spec.vocab_size)
    pairs = sum(before * num_pairs(chunk.start, len(chunk.token_ids)) + wanted_pairs(chunk) for chunk in chunks)
    return 2.0 * products + 4.0 * pairs * q


def wanted_pairs(chunk: Chunk) -> int:
    """Return how many pairs of a query and a key the rows of a chunk that need logits have."""
    return num_pairs(chunk.start + len(chunk.token_ids) - chunk.num_logits, chunk.num_logits)


def make_chunks(rows: int, generating: bool, beside: int = 0) -> list[Chunk]:
    """Return the chunks of a step of so many rows: of requests that generate, or of a prompt and `beside` that do."""
    blocks = CONTEXT // 32 + 1
    decodes = rows if generating else beside
    chunks = [Chunk(str(i), CONTEXT, (i,), tuple(range(i * blocks, (i + 1) * blocks)), 1, True) for i in range(decodes)]
    if (count := rows - decodes) > 0:
        first = decodes * blocks
        table = tuple(range(first, first + count // 32 + 1))
        chunks.append(Chunk("prompt", 0, tuple(range(count)), table, 1, True))
    return chunks


def forward(executor: Executor, chunks: list[Chunk]) -> torch.Tensor:
    with torch.inference_mode():
        return executor.decoder.logits(executor.hidden(chunks))


def scattered_steps(rows: int, contexts: Sequence[int], num_blocks: int) -> list[Step]:
    """Return steps of `rows` tokens of requests with these contexts, whose blocks of 32 lie in random places: of single
    tokens enough for nearly all blocks to be read.
    """
    counts = [-(-context // 32) for context in contexts]
    many = max(1, num_blocks // sum(counts)) if rows == 1 else 1
    places = torch.randperm(num_blocks, dtype=torch.int32)
    steps = []
    for i in range(many):
        tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
        for table, own in zip(tables, places.roll(-i * sum(counts))[: sum(counts)].split(counts), strict=True):
            table[: len(own)] = own
        steps.append(
            Step.of(
                len(contexts) * rows,
                query_start=torch.arange(0, len(contexts) * rows + 1, rows, dtype=torch.int32),
                seq_lens=torch.tensor(contexts, dtype=torch.int32),
                block_tables=tables,
            )
        )
    return steps
