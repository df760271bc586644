"""Holds the tokens of one step as flat tensors: all that a decoder and its kernels know of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfuse.kernels.loans import RequestLoan
from splitfuse.kernels.lora import StepAdapters

Numbers: TypeAlias = npt.NDArray[np.signedinteger[Any]]
"""Type of whole numbers on the host."""
Derivation: TypeAlias = Callable[["RaggedBatch"], Sequence[Tensor]]
"""Function of a batch that returns tensors on the host, made of its numbers there. Equal ones give equal tensors."""


def copied(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers on the host, or a copy on another device. The host does not wait for what the device has to do
    before: CUDA reads memory that is not pinned before this returns.
    """
    return numbers.to(device, non_blocking=True)


def _flat(made: Sequence[Tensor]) -> Tensor:
    """Return the numbers of tensors one behind the other."""
    return torch.cat([each.flatten() for each in made])


class RaggedBatch:
    """Holds T tokens of S chunks, of which R need logits. Row i of every per-token tensor is the same token.

    `packed` is int32 and holds all tensors one behind the other, in the order of `sizes`: a step is one transfer to its
    device, and one address for kernels that take it whole. It and the tensors are views, made when they are asked for.
    Block tables come first, where they can stay from step to step.
    """

    def __init__(
        self,
        numbers: Tensor,
        num_tokens: int,
        num_requests: int,
        table_width: int,
        num_rows: int,
        adapters: StepAdapters | None = None,
        on_host: Tensor | None = None,
        is_padded: bool = False,
        address: int | None = None,
    ) -> None:
        """`numbers` begin with `packed`, and `address` is theirs, if they are known to be on the host. `table_width` is
        the length of a row of block tables: that of the longest one at least. `on_host` are the numbers of `packed`, if
        that is on another device. With `is_padded` the last tokens are no request's, the last requests may have no
        tokens, and derivations must give tensors whose shapes depend on the sizes alone.
        """
        self.on_start: Callable[[], None] = lambda: None
        """Called by networks of one call just before it: other threads can have Python until it returns."""
        self.adapters = adapters
        """Adapters of rows; None: no row has one."""
        self.loans: Sequence[RequestLoan] = ()
        """Loans of requests: for networks that a backend computes in one call, if it `lends`."""
        self.address = address
        self.is_padded = is_padded
        self._numbers, self._on_host = numbers, on_host
        self._derived: dict[Derivation, tuple[Tensor, tuple[Tensor, ...]]] = {}  # flat, and as they are
        self.num_tokens = num_tokens
        self.num_requests = num_requests
        self.table_width = table_width
        self.num_rows = num_rows
        per_token, per_request = (num_tokens,) * 3, (num_requests + 1, *(num_requests,) * 3)
        self.sizes = (num_requests * table_width, *per_token, *per_request, num_rows)

    @cached_property
    def packed(self) -> Tensor:
        """Return all numbers, flat."""
        return self._numbers[: sum(self.sizes)]

    @cached_property
    def host_numbers(self) -> Numbers:
        """Return all numbers on the host, flat."""
        return (self.packed if self._on_host is None else self._on_host).numpy()

    @cached_property
    def host_parts(self) -> tuple[Numbers, ...]:
        """Return views of `host_numbers`, one for each tensor of `packed`, flat, in its order."""
        ends = (*accumulate(self.sizes),)
        return tuple(self.host_numbers[end - size : end] for size, end in zip(self.sizes, ends, strict=True))

    @property
    def host_query_start(self) -> Numbers:
        """Return `query_start` on the host: [S + 1]."""
        return self.host_parts[4]

    @property
    def host_seq_lens(self) -> Numbers:
        """Return `seq_lens` on the host: [S]."""
        return self.host_parts[5]

    @property
    def host_state_reads(self) -> Numbers:
        """Return `state_reads` on the host: [S]."""
        return self.host_parts[6]

    @property
    def host_state_writes(self) -> Numbers:
        """Return `state_writes` on the host: [S]."""
        return self.host_parts[7]

    def on_device(self, device: torch.device) -> RaggedBatch:
        """Return a batch on the host, or a copy of it on another device."""
        if device == self.packed.device:
            return self
        sizes = (self.num_tokens, self.num_requests, self.table_width, self.num_rows)
        return RaggedBatch(copied(self.packed, device), *sizes, on_host=self.packed, is_padded=self.is_padded)

    def write(self, other: RaggedBatch) -> None:
        """Write the numbers of another batch of the same sizes, which is on the host, into the tensors of this one, and
        what its derivations give.
        """
        self.packed.copy_(other.packed, non_blocking=True)
        for derivation, (kept, _) in self._derived.items():
            kept.copy_(_flat(derivation(other)), non_blocking=True)

    def derived(self, derivation: Derivation) -> tuple[Tensor, ...]:
        """Return the tensors of a derivation on the batch's device: made and copied once a step, not once a layer."""
        if derivation not in self._derived:
            made = derivation(self)
            kept = copied(_flat(made), self.packed.device)
            parts = kept.split_with_sizes([each.numel() for each in made])
            views = (part.view(each.shape) for part, each in zip(parts, made, strict=True))
            self._derived[derivation] = kept, tuple(views)
        return self._derived[derivation][1]

    @cached_property
    def logit_batch(self) -> RaggedBatch:
        """Return a batch of the rows that need logits alone, in their order: for what follows the last keys, values and
        states that a network stores, where nothing reads the other rows. These tokens are stored already: their slots
        are -1. It is this batch if all rows need logits, or some that are not the last ones of their chunks, and if it
        is padded: a captured graph has one shape, whichever rows of it need logits.
        """
        tables, ids, positions, _, starts, *per_request, rows = self.host_parts
        if self.is_padded or len(rows) == self.num_tokens:
            return self
        counts = np.bincount(np.searchsorted(starts, rows, side="right") - 1, minlength=self.num_requests)
        is_left, each = counts > 0, np.arange(len(rows), dtype=np.int32)
        if not np.array_equal(rows, np.repeat(starts[1:] - np.cumsum(counts), counts) + each):
            return self
        tables = tables.reshape(self.num_requests, self.table_width)[is_left]
        of_tokens = ids[rows], positions[rows], np.full_like(rows, -1)
        of_requests = np.cumsum([0, *counts[is_left]]), *(part[is_left] for part in per_request)
        parts = tables, *of_tokens, *of_requests, each
        numbers = torch.from_numpy(np.concatenate(parts, axis=None, dtype=np.int32))
        adapters, device = self.adapters, self.packed.device
        if adapters is not None:
            adapters = StepAdapters(adapters.adapters, adapters.of_row.index_select(0, self.logit_rows))
        sizes = len(rows), len(tables), self.table_width, len(rows)
        return RaggedBatch(copied(numbers, device), *sizes, adapters, None if device.type == "cpu" else numbers)

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.packed.split_with_sizes(self.sizes)

    @property
    def block_tables(self) -> Tensor:
        """Return the block tables, filled up with what is never read: [S, `table_width`]."""
        return self._parts[0].view(self.num_requests, self.table_width)

    @property
    def ids(self) -> Tensor:
        """Return the token ids: [T]."""
        return self._parts[1]

    @property
    def positions(self) -> Tensor:
        """Return the position of each token in its request: [T]."""
        return self._parts[2]

    @property
    def slot_mapping(self) -> Tensor:
        """Return the slots that keys and values go to, block * block_size + offset or -1 for none: [T]."""
        return self._parts[3]

    @property
    def query_start(self) -> Tensor:
        """Return the first row of each chunk, whose rows end where the next begin: [S + 1]."""
        return self._parts[4]

    @property
    def seq_lens(self) -> Tensor:
        """Return the number of positions of each request that exist after this step: [S]."""
        return self._parts[5]

    @property
    def state_reads(self) -> Tensor:
        """Return the slots that recurrent states are read from, or -1 for a state of zeros: [S]."""
        return self._parts[6]

    @property
    def state_writes(self) -> Tensor:
        """Return the slots that they are written to, or -1 in a network without: [S]. A chunk may read what the one
        just before it in the batch writes, if both are parts of the same request; otherwise no chunk reads what another
        writes.
        """
        return self._parts[7]

    @property
    def logit_rows(self) -> Tensor:
        """Return the rows that need logits: [R]."""
        return self._parts[8]
