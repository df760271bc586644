"""Replays steps as CUDA graphs: the launches of a whole step in one, without Python between its kernels.

A graph is of one shape, and steps are padded to few: by tokens of slot -1 that belong to no request, and by requests
without tokens. Dynamic SplitFuse makes the same shapes recur. Not measured, nor run on a GPU, yet.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache

_logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
"""Memory of graphs at which no more are captured: the last one may take more."""
NOWHERE = -1
"""Slot of keys and values, or of a state, that are not read or written."""
STEPS_PER_OCTAVE = 4
"""Number of sizes between a power of two and the next: at most a fifth of a step is padding."""


class Bucket(NamedTuple):
    """Sizes of a padded step: tokens, requests, blocks of a table, and rows that need logits."""

    tokens: int
    requests: int
    table_width: int
    rows: int

    @classmethod
    def of(cls, batch: RaggedBatch) -> Bucket:
        """Return the bucket that a batch belongs to. A step of single tokens stays one: kernels may look at that."""
        requests = round_up(batch.num_requests)
        is_single = batch.num_tokens == batch.num_requests
        tokens = requests if is_single else max(round_up(batch.num_tokens), requests + 1)
        return cls(tokens, requests, round_up(batch.table_width), round_up(batch.num_rows))


def round_up(size: int) -> int:
    """Return the least size of a bucket that is not below `size`.

    >>> [round_up(size) for size in (0, 3, 9, 33, 2048)]
    [0, 3, 10, 40, 2048]
    """
    unit = max(1, (1 << size.bit_length()) // (2 * STEPS_PER_OCTAVE))
    return -(-size // unit) * unit


def pad(batch: RaggedBatch, bucket: Bucket) -> RaggedBatch:
    """Return a batch of a bucket's sizes on the host, with the numbers of `batch`, and others that change nothing."""
    size = bucket.requests * (bucket.table_width + 4) + 1 + 3 * bucket.tokens + bucket.rows
    padded = RaggedBatch(torch.zeros(size, dtype=torch.int32), *bucket, is_padded=True)
    tables, given = (each.host_parts[0].reshape(each.num_requests, each.table_width) for each in (padded, batch))
    tables[: batch.num_requests, : batch.table_width] = given
    fillers = (0, 0, NOWHERE, batch.num_tokens, 0, NOWHERE, NOWHERE, 0)
    for part, numbers, filler in zip(padded.host_parts[1:], batch.host_parts[1:], fillers, strict=True):
        part[: len(numbers)] = numbers
        part[len(numbers) :] = filler
    return padded


@dataclass
class _Captured:
    """Holds a graph, and the tensors that it reads and writes at each replay."""

    graph: Any
    batch: RaggedBatch
    hidden: Tensor


class StepGraphs:
    """Computes steps of a decoder, those of a shape that came before by a graph."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self._decoder, self._kv_cache = decoder, kv_cache
        self._captured: dict[Bucket, _Captured] = {}
        self._pool: Any = None
        self._stream: Any = None  # of all captures: cuBLAS keeps memory for each stream that it is used on
        self._bytes_left = MAX_BYTES

    @staticmethod
    def obstacle(decoder: Decoder) -> str | None:
        """Return why steps of this decoder cannot be captured, or None."""
        backend = decoder.backend
        if decoder.device.type != "cuda" or not backend.capabilities.captures:
            return f"{backend.capabilities.name} on {decoder.device.type} cannot be captured"
        return None

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Return what `Decoder.forward` does."""
        if batch.adapters is not None or not batch.num_tokens:
            return self._decoder.forward(batch, self._kv_cache)
        bucket = Bucket.of(batch)
        captured = self._captured.get(bucket)
        if captured is not None:
            captured.batch.write(pad(batch, bucket))
        elif (captured := self._new(batch, bucket)) is None:
            return self._decoder.forward(batch, self._kv_cache)
        captured.graph.replay()
        return captured.hidden[: batch.num_rows].clone()

    def _new(self, batch: RaggedBatch, bucket: Bucket) -> _Captured | None:
        """Return a new graph for steps of a bucket, with the numbers of `batch`; None if there are to be no more. One
        that fails, for lack of memory say, is the last: steps run without.
        """
        if self._bytes_left <= 0:
            return None
        try:
            captured = self._captured[bucket] = self._capture(pad(batch, bucket))
        except RuntimeError as error:
            self._bytes_left = 0
            _logger.warning("a CUDA graph was not captured: steps of other shapes run without (%s)", error)
            return None
        return captured

    def _prepare(self, batch: RaggedBatch) -> None:
        """Compute a step that a graph will compute again: compiles what was not compiled, and derives what the kernels
        read. Recurrent states stay as they are, as the next time must go on from them; keys and values do not matter.
        """
        writes = batch.state_writes.clone()
        batch.state_writes.fill_(NOWHERE)
        self._decoder.forward(batch, self._kv_cache)
        batch.state_writes.copy_(writes)

    def _capture(self, padded: RaggedBatch) -> _Captured:
        """Return the graph of a step of this shape."""
        free_before = torch.cuda.mem_get_info(self._decoder.device)[0]
        batch = padded.on_device(self._decoder.device)
        current = torch.cuda.current_stream()
        if self._stream is None:
            make_stream: Any = torch.cuda.Stream  # which has no types
            self._stream = make_stream(self._decoder.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._prepare(batch)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU.
        options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.stream(current), torch.cuda.graph(graph, **options):  # back to it if a capture fails, too
            hidden = self._decoder.forward(batch, self._kv_cache)
        self._pool = self._pool or graph.pool()
        self._bytes_left -= max(0, free_before - torch.cuda.mem_get_info(self._decoder.device)[0])
        if self._bytes_left <= 0:
            _logger.warning("CUDA graphs have taken %d MiB: steps of other shapes run without", MAX_BYTES >> 20)
        return _Captured(graph, batch, hidden)
