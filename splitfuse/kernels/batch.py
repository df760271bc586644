"""Holds the tokens of one step as flat tensors: all that a decoder and its kernels know of requests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """Holds T tokens of S chunks, of which R need logits. Row i of every per-token tensor is the same token.

    `packed` is int32 and holds all tensors one behind the other, in the order of `sizes`: a step is one
    transfer to its device, and one address for kernels that take it whole.
    """

    packed: Tensor
    num_tokens: int
    num_requests: int
    table_width: int  # most blocks of a chunk
    num_rows: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the lengths of the arrays in `packed`, in their order: ids, positions, slot_mapping, query_start,
        seq_lens, block_tables, logit_rows.
        """
        tokens, requests = self.num_tokens, self.num_requests
        return tokens, tokens, tokens, requests + 1, requests, requests * self.table_width, self.num_rows

    @property
    def ids(self) -> Tensor:
        """Return the token ids: [T]."""
        return self._array(0)

    @property
    def positions(self) -> Tensor:
        """Return the position of each token in its request: [T]."""
        return self._array(1)

    @property
    def slot_mapping(self) -> Tensor:
        """Return the slots that keys and values go to, block * block_size + offset or -1 for none: [T]."""
        return self._array(2)

    @property
    def query_start(self) -> Tensor:
        """Return the first row of each chunk, whose rows end where the next begin: [S + 1]."""
        return self._array(3)

    @property
    def seq_lens(self) -> Tensor:
        """Return how many positions of each request exist after this step: [S]."""
        return self._array(4)

    @property
    def block_tables(self) -> Tensor:
        """Return the block tables, filled up with 0, which is never read: [S, most blocks of a chunk]."""
        return self._array(5).view(self.num_requests, self.table_width)

    @property
    def logit_rows(self) -> Tensor:
        """Return the rows that need logits: [R]."""
        return self._array(6)

    def _array(self, index: int) -> Tensor:
        return self.packed.split_with_sizes(self.sizes)[index]
