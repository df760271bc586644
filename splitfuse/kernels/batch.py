"""Holds the tokens of one step as flat tensors: all that a decoder and its kernels know of requests."""

from __future__ import annotations

from torch import Tensor

from splitfuse.kernels.lora import StepAdapters


class RaggedBatch:
    """Holds T tokens of S chunks, of which R need logits. Row i of every per-token tensor is the same token.

    `packed` is int32 and holds all tensors one behind the other, in the order of `sizes`: a step is one transfer to its
    device, and one address for kernels that take it whole. The tensors are views of it.
    """

    def __init__(
        self,
        packed: Tensor,
        num_tokens: int,
        num_requests: int,
        table_width: int,
        num_rows: int,
        adapters: StepAdapters | None = None,
    ) -> None:
        """`table_width` is the most blocks of a chunk."""
        self.adapters = adapters
        """Adapters of rows; None: no row has one."""
        self.packed = packed
        self.num_tokens = num_tokens
        self.num_requests = num_requests
        self.table_width = table_width
        self.num_rows = num_rows
        per_token, per_request = (num_tokens,) * 3, (num_requests + 1, *(num_requests,) * 3, num_requests * table_width)
        self.sizes = (*per_token, *per_request, num_rows)
        parts = packed.split_with_sizes(self.sizes)
        ids, positions, slot_mapping, query_start, seq_lens, state_reads, state_writes, tables, logit_rows = parts
        self.ids = ids
        """Token ids: [T]."""
        self.positions = positions
        """Position of each token in its request: [T]."""
        self.slot_mapping = slot_mapping
        """Slots that keys and values go to, block * block_size + offset or -1 for none: [T]."""
        self.query_start = query_start
        """First row of each chunk, whose rows end where the next begin: [S + 1]."""
        self.seq_lens = seq_lens
        """Number of positions of each request that exist after this step: [S]."""
        self.state_reads = state_reads
        """Slots that recurrent states are read from, or -1 for a state of zeros: [S]."""
        self.state_writes = state_writes
        """Slots that they are written to, or -1 in a network without: [S]. A chunk may read what the one just before it
        in the batch writes, if both are parts of the same request; otherwise no chunk reads what another writes.
        """
        self.block_tables = tables.view(num_requests, table_width)
        """Block tables, filled up with 0, which is never read: [S, most blocks of a chunk]."""
        self.logit_rows = logit_rows
        """Rows that need logits: [R]."""
