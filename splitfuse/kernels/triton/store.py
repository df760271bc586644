"""Keeps keys and values as int8 or FP8, each head of a token with a scale of its own in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}
"""Dtypes of scaled stores by the names of kv_cache_dtype, and the largest number of each."""


class ScaledStore:
    """Holds `values` [2, num_blocks, block_size, Hk, D] in 8 bits and `scales` [2, num_blocks, block_size, Hk], two
    views of one `memory`.
    """

    def __init__(
        self, name: str, *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        dtype, self.levels = FORMATS[name]
        self.is_integer = not dtype.is_floating_point
        self.num_kv_heads = num_kv_heads
        num_heads = 2 * num_blocks * block_size * num_kv_heads
        self.memory = torch.empty(num_heads * (head_dim + 4), dtype=torch.uint8, device=device)
        values, scales = self.memory.split_with_sizes((num_heads * head_dim, num_heads * 4))
        self.values = values.view(dtype).view(2, num_blocks, block_size, num_kv_heads, head_dim)
        self.scales = scales.view(torch.float32).view(2, num_blocks, block_size, num_kv_heads)

    def parts(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the values and scales of a block, as bytes."""
        return self.values.view(torch.uint8)[:, block], self.scales[:, block]
