"""Computes the tables of cosines and sines of rotary position embeddings.

A row of a table depends on its position alone, never on the length of a batch or of a request, so that a token's result
does not change with the other tokens of a step. Only LongRoPE looks at the length of the table too: its two sets of
frequencies do not mix, so a network computes all its requests with one of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splitfuse.kernels.interface import RopeTable
from splitfuse.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeSpec,
    YarnScaling,
)

ROWS = 65536
"""Number of positions that are computed at a time, so that nothing but the tables is large."""


def rope_table(rope: RopeSpec, max_position: int, device: torch.device) -> RopeTable:
    """Return cosines and sines [max_position, rotary_dim / 2] in fp32, times the attention factor of YaRN or LongRoPE.

    >>> cos, sin = rope_table(RopeSpec(theta=10000.0, rotary_dim=64), 4096, torch.device("cpu"))
    >>> cos.shape
    torch.Size([4096, 32])
    """
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0
    cos, sin = (torch.empty(max_position, rope.rotary_dim // 2, device=device) for _ in range(2))
    for start in range(0, max_position, ROWS):
        positions = torch.arange(start, min(start + ROWS, max_position), dtype=torch.float32).unsqueeze(1)
        angles = positions * _frequencies(rope, positions, max_position)
        cos[start : start + ROWS] = angles.cos() * factor
        sin[start : start + ROWS] = angles.sin() * factor
    return cos, sin


def _frequencies(rope: RopeSpec, positions: Tensor, max_position: int) -> Tensor:
    """Return the radians by which pairs rotate from one position to the next: [1 or positions, rotary_dim / 2]."""
    dim = rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32).unsqueeze(0) / dim
    plain = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case ProportionalScaling(share=share, factor=factor):
            pairs = torch.arange(dim // 2)
            return (plain / factor).where(pairs < int(share * dim // 2), 0.0)
        case DynamicScaling(factor=factor, original_max_position=original):
            # The token at p is the last of p + 1: the frequencies that generating token by token gives it.
            lengths = (positions + 1).clamp(min=original)
            stretch = (factor * lengths / original - (factor - 1)) ** (dim / max(dim - 2, 1))
            return 1.0 / (rope.theta * stretch) ** exponents
        case Llama3Scaling() as llama:
            turns = llama.original_max_position * plain / (2 * math.pi)
            kept = (turns - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)
            return torch.lerp(plain / llama.factor, plain, kept.clamp(0, 1))
        case YarnScaling() as yarn:
            return torch.lerp(plain, plain / yarn.factor, _yarn_ramp(rope, yarn))
        case LongRopeScaling() as long:
            is_long = has_long_factors(rope, max_position)
            return plain / torch.tensor(long.long_factors if is_long else long.short_factors)


def has_long_factors(rope: RopeSpec, max_position: int) -> bool:
    """Return whether a table of this length has the frequencies of LongRoPE for long texts."""
    return isinstance(rope.scaling, LongRopeScaling) and max_position > rope.scaling.original_max_position


def _yarn_ramp(rope: RopeSpec, yarn: YarnScaling) -> Tensor:
    """Return how far each pair is interpolated, 0 to 1: [1, rotary_dim / 2]."""

    def pair_that_turns(times: float) -> float:
        log_theta = math.log(rope.theta)
        return rope.rotary_dim * math.log(yarn.original_max_position / (times * 2 * math.pi)) / (2 * log_theta)

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float32).unsqueeze(0)
    return ((pairs - low) / (high - low)).clamp(0, 1)
