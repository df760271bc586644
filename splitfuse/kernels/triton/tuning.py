"""Keeps the sizes of tiles by compute capability: what `python -m benchmarks.gpu --stage tune` looks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionTiles:
    """Holds sizes of attention for heads of up to `head_dim` elements: rows of a tile in steps of single tokens and in
    those with chunks, keys of a tile, warps of a program, and stages of its pipeline of loads.
    """

    head_dim: int
    single_rows: int
    chunk_rows: int
    keys: int
    warps: int = 4
    stages: int = 2


_100_KIB = (
    AttentionTiles(head_dim=64, single_rows=16, chunk_rows=64, keys=64),
    AttentionTiles(head_dim=128, single_rows=16, chunk_rows=64, keys=32),
    AttentionTiles(head_dim=256, single_rows=16, chunk_rows=32, keys=32, warps=8, stages=1),
    AttentionTiles(head_dim=1024, single_rows=16, chunk_rows=16, keys=16, warps=8, stages=1),
)
"""Sizes of consumer GPUs, whose programs have 99 KiB of shared memory."""
_160_KIB = (
    AttentionTiles(head_dim=64, single_rows=16, chunk_rows=64, keys=64, stages=3),
    AttentionTiles(head_dim=128, single_rows=16, chunk_rows=64, keys=64),
    AttentionTiles(head_dim=256, single_rows=16, chunk_rows=64, keys=32, warps=8),
    AttentionTiles(head_dim=1024, single_rows=32, chunk_rows=32, keys=16, warps=8, stages=1),
)
"""Sizes of those of data centres, which have 163 KiB or more."""
TABLE: dict[tuple[int, int], tuple[AttentionTiles, ...]] = {
    (7, 5): (  # what fits into 64 KiB of shared memory, in fp32 too
        AttentionTiles(head_dim=64, single_rows=16, chunk_rows=32, keys=32),
        AttentionTiles(head_dim=128, single_rows=16, chunk_rows=16, keys=32),
        AttentionTiles(head_dim=1024, single_rows=16, chunk_rows=16, keys=16, stages=1),
    ),
    (8, 0): _160_KIB,
    (8, 6): _100_KIB,
    (9, 0): _160_KIB,
    (12, 0): _100_KIB,
}
"""Sizes by the least compute capability that they are for, oldest first. Estimates: none has been measured yet."""
INTERPRETED = AttentionTiles(head_dim=1024, single_rows=16, chunk_rows=32, keys=64)
"""Sizes in the interpreter, which takes as long for a small tile as for a large one."""


def attention_tiles(head_dim: int, capability: tuple[int, int] | None, *, itemsize: int) -> AttentionTiles:
    """Return the sizes for heads of this many elements of `itemsize` bytes, on a GPU of this compute capability; None:
    in the interpreter.

    >>> attention_tiles(80, (9, 0), itemsize=2).head_dim
    128
    """
    if capability is None:
        return INTERPRETED
    newest = min(TABLE) if itemsize > 2 else max(each for each in TABLE if each <= capability)
    return next(each for each in TABLE[newest] if head_dim <= each.head_dim)
