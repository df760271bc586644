"""Allocates the cache: for each layer a store of blocked keys and values, or one of recurrent states. It decides the
sizes, the backend the layout inside a block or a state.

Knows block numbers only as indices: which request owns a block is the allocator's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from typing import NamedTuple

import torch
from torch import Tensor

from splitfuse.errors import MemoryPlanError
from splitfuse.kernels.interface import Backend, Store
from splitfuse.kernels.layers import AttentionSpec, Mixer, RecurrentSpec
from splitfuse.models.spec import ModelSpec


def block_bytes(spec: ModelSpec, *, block_size: int, dtype: torch.dtype, backend: Backend) -> int:
    """Return the bytes of one block over all layers."""
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]
    mixers = [mixer for mixer in mixers if mixer.kv_layer is None]
    return sum(backend.kv_bytes(mixer, block_size=block_size, dtype=dtype) for mixer in mixers)


def state_bytes(spec: ModelSpec, backend: Backend) -> int:
    """Return the bytes of one recurrent state over all layers; 0 in a network without."""
    return sum(backend.state_bytes(layer.mixer) for layer in spec.layers if isinstance(layer.mixer, RecurrentSpec))


PIECE_BYTES = 2**21
"""Bytes of a piece of a store, about: those of a huge page."""


class Piece(NamedTuple):
    """Names some blocks of one of the stores."""

    first: int
    place: int
    """Index of the store among those with blocks of their own."""
    num_blocks: int


class KVCache:
    """Holds `num_blocks` blocks of `block_size` positions, and `num_states` slots of recurrent states: `layers[i]` is
    the store that layer i reads, which may be that of a layer before it; None if it reads none.

    A block can be copied out of all layers, and into another cache of the same model, dtype, block size and backend.

    Raises ConfigError for a block size that the backend does not take, MemoryPlanError if the memory is not there.
    """

    layers: list[Store]

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        num_states: int = 0,
    ) -> None:
        backend.check_block_size(block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_states = num_states
        self.block_bytes = 0
        """Bytes that `read_block` gives."""
        self._backend = backend
        self._parts: list[tuple[Store, slice]] = []  # where a layer's bytes lie among those of a block

        def allocate(mixer: Mixer | None) -> Store | None:
            if mixer is None:
                return None
            if isinstance(mixer, AttentionSpec):
                if mixer.kv_layer is not None:
                    return self.layers[mixer.kv_layer]
                store = backend.allocate_kv(
                    mixer, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
                )
                begin = self.block_bytes
                self.block_bytes += backend.kv_bytes(mixer, block_size=block_size, dtype=dtype)
                self._parts.append((store, slice(begin, self.block_bytes)))
                return store
            return backend.allocate_states(mixer, num_slots=num_states, device=device)

        self.layers = []
        try:
            for layer in spec.layers:
                self.layers.append(allocate(layer.mixer))
        except RuntimeError as error:  # what torch raises on every device when memory runs out
            size = num_blocks * block_bytes(spec, block_size=block_size, dtype=dtype, backend=backend)
            wanted, settings = f"a KV cache of {num_blocks} blocks ({size / 2**30:.1f} GiB)", "num_blocks"
            if size := num_states * state_bytes(spec, backend):
                wanted += f" and {num_states} recurrent states ({size / 2**30:.1f} GiB)"
                settings += " or max_num_seqs"
            raise MemoryPlanError(f"no memory for {wanted}: choose a smaller {settings}") from error

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of all stores by their first blocks."""

        def of_store(place: int, num_bytes: int) -> Iterator[Piece]:
            most = max(PIECE_BYTES // num_bytes, 1)
            for first in range(0, self.num_blocks, most):
                yield Piece(first, place, min(most, self.num_blocks - first))

        return merge(*(of_store(place, part.stop - part.start) for place, (_, part) in enumerate(self._parts)))

    def have(self, piece: Piece) -> bool:
        """Ask for the memory of a piece, whose content stays. Returns False if the system does not give it."""
        store, _ = self._parts[piece.place]
        return self._backend.have_kv(store, piece.first, piece.num_blocks)

    def read_block(self, block: int, out: Tensor) -> None:
        """Copy the keys and values of a block, of all layers, into `out`, uint8 [block_bytes] on the CPU."""
        for store, part in self._parts:
            self._backend.read_block(store, block, out[part])

    def write_block(self, block: int, data: Tensor) -> None:
        """Write what `read_block` has copied to a block."""
        for store, part in self._parts:
            self._backend.write_block(store, block, data[part])
