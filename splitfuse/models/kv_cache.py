"""Allocates the blocked KV cache: one store per layer. It decides the size, the backend the layout inside a block.

Knows block numbers only as indices: which request owns a block is the allocator's business.
"""

from __future__ import annotations

import torch

from splitfuse.errors import MemoryPlanError
from splitfuse.kernels.interface import Backend, Store
from splitfuse.models.spec import ModelSpec


def block_bytes(spec: ModelSpec, *, block_size: int, dtype: torch.dtype, backend: Backend) -> int:
    """Return the bytes of one block over all layers."""
    mixers = (layer.mixer for layer in spec.layers if layer.mixer is not None)
    return sum(backend.kv_bytes(mixer, block_size=block_size, dtype=dtype) for mixer in mixers)


class KVCache:
    """Holds `num_blocks` blocks of `block_size` positions: `layers[i]` is the store of layer i, None if it has none.

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
    ) -> None:
        backend.check_block_size(block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        try:
            self.layers = [
                layer.mixer
                and backend.allocate_kv(
                    layer.mixer, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
                )
                for layer in spec.layers
            ]
        except RuntimeError as error:  # what torch raises on every device when memory runs out
            size = num_blocks * block_bytes(spec, block_size=block_size, dtype=dtype, backend=backend)
            raise MemoryPlanError(
                f"no memory for a KV cache of {num_blocks} blocks ({size / 2**30:.1f} GiB): choose a smaller num_blocks"
            ) from error
