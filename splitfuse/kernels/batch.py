"""The tokens of one step as flat tensors: all that a decoder and its kernels know of the requests they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """Holds T tokens of S chunks, of which R need logits. Row i of every per-token tensor is the same token.

    `packed` is int32 and holds all tensors one behind the other, in the order of the properties here: a step is one
    transfer to its device, and one address for kernels that take it whole.
    """

    packed: Tensor
    num_tokens: int
    num_requests: int
    table_width: int  # most blocks of a chunk
    num_rows: int

    @property
    def ids(self) -> Tensor:
        """Return the token ids: [T]."""
        return self.packed[: self.num_tokens]

    @property
    def positions(self) -> Tensor:
        """Return the position of each token in its request: [T]."""
        return self.packed[self.num_tokens : 2 * self.num_tokens]

    @property
    def slot_mapping(self) -> Tensor:
        """Return the slots that keys and values go to, block * block_size + offset or -1 for none: [T]."""
        return self.packed[2 * self.num_tokens : 3 * self.num_tokens]

    @property
    def query_start(self) -> Tensor:
        """Return the first row of each chunk, whose rows end where the next begin: [S + 1]."""
        return self._after_tokens(0, self.num_requests + 1)

    @property
    def seq_lens(self) -> Tensor:
        """Return how many positions of each request exist after this step: [S]."""
        return self._after_tokens(self.num_requests + 1, self.num_requests)

    @property
    def block_tables(self) -> Tensor:
        """Return the block tables, filled up with 0, which is never read: [S, most blocks of a chunk]."""
        size = self.num_requests * self.table_width
        return self._after_tokens(2 * self.num_requests + 1, size).view(self.num_requests, self.table_width)

    @property
    def logit_rows(self) -> Tensor:
        """Return the rows that need logits: [R]."""
        return self.packed[len(self.packed) - self.num_rows :]

    def _after_tokens(self, begin: int, size: int) -> Tensor:
        begin += 3 * self.num_tokens
        return self.packed[begin : begin + size]
