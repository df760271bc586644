"""Cuts the attention of a step into tiles of equal shape, on the host: what each program of the kernel computes.

A tile is ROWS rows of one request, of the rows that each key/value head has in it: for each token its query heads,
`token * group + head`. A tile reads keys in tiles of their own, which begin at multiples of `Tiling.keys`. Its keys may
be divided among several programs, at multiples of `Tiling.split`: each gives a partial result, and a second kernel
merges these in the order of the keys. Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from splitfuse.kernels.batch import Numbers, RaggedBatch
from splitfuse.kernels.interface import StepSizes
from splitfuse.kernels.triton.tuning import AttentionTiles

TILE_FIELDS = 8
"""Number of int32 of a tile: request, first row of the request in the step, number of rows that the request has of a
head, first of them in this tile, position of the request's first token in the step, first key, end of the keys, and
place of the partial result or -1 if there is none.
"""
BEGIN, END, PLACE = 5, 6, 7
"""Fields of a tile that dividing its keys changes."""
MERGE_FIELDS = 5
"""Number of int32 of a merge: first row of the request in the step, number of rows that the request has of a head,
first of them, place of the first partial result, number of them.
"""
SHORTEST_SPLIT = 256
"""Least number of keys that a program reads if keys are divided: for fewer, merging takes longer than it saves."""
PROGRAMS_PER_PROCESSOR = 4
"""Number of programs per multiprocessor of the GPU that dividing keys aims at."""


@dataclass(frozen=True)
class Tiling:
    """Holds the sizes of tiles: rows, keys, and keys of a program, a multiple of `keys` (None: all that it sees)."""

    rows: int
    keys: int
    split: int | None = None


@dataclass(frozen=True)
class WorkList:
    """Holds the programs of two launches: tiles [n, TILE_FIELDS] and merges [m, MERGE_FIELDS], int32. There are no
    more partial results than tiles.
    """

    tiles: Numbers
    merges: Numbers


def make_work_list(
    query_start: Sequence[int] | Numbers,
    seq_lens: Sequence[int] | Numbers,
    *,
    group: int,
    tiling: Tiling,
    window: int | None = None,
    chunk: int | None = None,
) -> WorkList:
    """Return the tiles of the requests whose rows begin at `query_start` [S + 1] and which have `seq_lens` [S]
    positions, longest first; `group` query heads share a key/value head.

    >>> make_work_list([0, 1], [100], group=4, tiling=Tiling(rows=16, keys=32)).tiles.tolist()
    [[0, 0, 4, 0, 99, 0, 100, -1]]
    """
    starts, ends = np.asarray(query_start, np.int64), np.asarray(seq_lens, np.int64)
    counts = np.diff(starts)
    request, index = expand(-(-counts * group // tiling.rows))
    num_rows, first_position = (counts * group)[request], (ends - counts)[request]
    first = index * tiling.rows
    last = np.minimum(first + tiling.rows, num_rows) - 1
    begin = first_seen(first_position + first // group, window, chunk) // tiling.keys * tiling.keys
    end = first_position + last // group + 1
    tiles = _rows(request, starts[request], num_rows, first, first_position, begin, end, -1)
    merges = np.empty((0, MERGE_FIELDS), np.int32)
    if tiling.split is not None:
        tiles, merges = _divided(tiles, tiling.split)
    return WorkList(tiles[np.argsort(tiles[:, BEGIN] - tiles[:, END], kind="stable")], merges)


def _divided(tiles: Numbers, split: int) -> tuple[Numbers, Numbers]:
    """Return tiles whose keys end at the next multiple of `split`, in place of some that have more, and the merges of
    their partial results.
    """
    begin, end = tiles[:, BEGIN], tiles[:, END]
    num_splits = (end - 1) // split - begin // split + 1
    is_merged = num_splits > 1
    first_place = np.cumsum(np.where(is_merged, num_splits, 0)) - num_splits
    tile, part = expand(num_splits)
    divided = tiles[tile]
    bound = begin[tile] // split + part
    divided[:, BEGIN] = np.maximum(begin[tile], bound * split)
    divided[:, END] = np.minimum(end[tile], (bound + 1) * split)
    divided[:, PLACE] = np.where(is_merged[tile], first_place[tile] + part, -1)
    return divided, _rows(*tiles[:, 1:4].T, first_place, num_splits)[is_merged]


def _rows(first: Numbers, *others: Numbers | int) -> Numbers:
    """Return int32 [n, fields], from a column for each field or one number for all of it."""
    rows = np.empty((len(first), 1 + len(others)), np.int32)
    for column, field in enumerate((first, *others)):
        rows[:, column] = field
    return rows


def first_seen(position: Numbers, window: int | None, chunk: int | None) -> Numbers:
    """Return the first position that a query at each position sees."""
    first = np.zeros_like(position) if window is None else np.maximum(position - window + 1, 0)
    return first if chunk is None else np.maximum(first, position // chunk * chunk)


def choose_split(
    query_start: Sequence[int] | Numbers,
    seq_lens: Sequence[int] | Numbers,
    *,
    group: int,
    num_kv_heads: int,
    tiling: Tiling,
    processors: int,
) -> int | None:
    """Return how many keys a program reads at most so that every multiprocessor of the GPU has work; None: all, as
    there are tiles enough.
    """
    counts = np.diff(np.asarray(query_start, np.int64))
    num_tiles = -(-counts * group // tiling.rows)
    wanted = PROGRAMS_PER_PROCESSOR * processors
    if 2 * int(num_tiles.sum()) * num_kv_heads >= wanted:
        return None
    keys = int((num_tiles * np.asarray(seq_lens, np.int64)).sum()) * num_kv_heads
    return -(-max(SHORTEST_SPLIT, keys // wanted) // tiling.keys) * tiling.keys


def filled_up(rows: Numbers, count: int) -> Numbers:
    """Return rows of a list, and behind them others of zeros, which compute nothing: as many as there can be in steps
    of these sizes.
    """
    assert len(rows) <= count, f"{len(rows)} programs, of {count} that there can be"
    filled = np.zeros((count, rows.shape[1]), rows.dtype)
    filled[: len(rows)] = rows
    return filled


def expand(counts: Numbers) -> tuple[Numbers, Numbers]:
    """Return for each of the things of which owner i has `counts[i]` its owner, and its number there."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class AttentionWork:
    """Makes the work list of a kind of attention, once a step for all layers that have it.

    With `split`, keys are always divided at its multiples and all tiles have the same rows, so that a row's bits do not
    depend on its company; otherwise as the GPU, which has so many `processors`, is best used.
    """

    sizes: AttentionTiles
    group: int
    num_kv_heads: int
    window: int | None
    chunk: int | None
    processors: int
    block_size: int
    split: int | None = None

    def rows(self, batch: RaggedBatch) -> int:
        """Return the number of rows of a tile in a step: at least all heads of a token, if a tile can have them."""
        if self.split is not None or batch.num_tokens > batch.num_requests:
            return self.sizes.chunk_rows
        return max(self.sizes.single_rows, min(self.sizes.chunk_rows, 1 << (self.group - 1).bit_length()))

    def __call__(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Return tiles and merges of a step, int32 on the host."""
        starts, lengths = batch.host_query_start, batch.host_seq_lens
        tiling = Tiling(self.rows(batch), self.sizes.keys, self.split)
        if self.split is None:
            shape = {"group": self.group, "num_kv_heads": self.num_kv_heads}
            split = choose_split(starts, lengths, **shape, tiling=tiling, processors=self.processors)
            tiling = replace(tiling, split=split)
        work = make_work_list(starts, lengths, group=self.group, tiling=tiling, window=self.window, chunk=self.chunk)
        lists = work.tiles, work.merges
        if batch.is_padded:
            longest = batch.table_width * self.block_size
            counts = self._most(tiling.rows, batch.num_tokens, batch.num_requests, longest)
            lists = filled_up(work.tiles, counts[0]), filled_up(work.merges, counts[1])
        return torch.from_numpy(lists[0]), torch.from_numpy(lists[1])

    def most_partials(self, step: StepSizes) -> int:
        """Return the most partial results of a step: of a padded one as many as there can be in its list."""
        rows = self.sizes.chunk_rows
        if step.is_padded:
            tiles, merges = self._most(rows, step.num_tokens, step.num_requests, step.longest)
            return tiles if merges else 0
        if self.split is None:  # fewer than half of the programs aimed at are divided, to at most twice their number
            programs = 2 * PROGRAMS_PER_PROCESSOR * self.processors
            return -(-programs // self.num_kv_heads) if step.longest > SHORTEST_SPLIT else 0
        if step.longest <= self.split:
            return 0
        whole = -(-step.num_tokens * self.group // rows) * -(-step.longest // self.split)  # tiles of one request
        return whole + step.num_requests + step.num_positions // self.split  # and the last tile of each

    def _most(self, rows: int, num_tokens: int, num_requests: int, longest: int) -> tuple[int, int]:
        """Return the most programs and merges that a padded batch of these sizes can have."""
        merges = -(-num_tokens * self.group // rows) + num_requests
        if self.split is None:  # of divided keys all programs but one for each tile have a full split
            return 2 * merges + -(-PROGRAMS_PER_PROCESSOR * self.processors // self.num_kv_heads), merges
        return merges * (1 + -(-longest // self.split)), merges
