"""Rotary position embeddings: what config.json says of them, and the tables of cosines and sines.

A row of the tables depends on its position alone, never on the length of a batch or of a request, so that a token's
result does not change with its company.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.models.families.config_json import LARGEST_INTEGER, ConfigJson
from splitfuse.models.spec import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, RopeSpec, YarnScaling


def read_rope(config: ConfigJson, *, head_dim: int, theta: float = 10_000.0) -> RopeSpec:
    """The rope of a config, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    `theta` is that of a config that does not say.

    Raises UnsupportedModelError for a type that is not in SCALINGS or a field that is not in KNOWN_FIELDS.
    """
    rope = config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters")
    theta = rope.number("rope_theta", config.number("rope_theta", theta))
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if theta <= 1:
        raise ModelError(f"config.json: rope_theta must be above 1, not {theta}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in SCALINGS:
        raise UnsupportedModelError(f"rope type {kind!r} is not one of those we know: {', '.join(SCALINGS)}")
    if unknown := set(rope) - KNOWN_FIELDS:
        raise UnsupportedModelError(f"rope settings that are not supported: {', '.join(sorted(unknown))}")
    return RopeSpec(theta=theta, rotary_dim=int(head_dim * share), scaling=SCALINGS[kind](rope, config))


def extended_length(rope: RopeSpec, max_position: int) -> int:
    """The longest sequence meant by a config with `max_position_embeddings` = `max_position`.

    Some writers state the length after scaling, some before; Llama 3 always states it after.
    """
    match rope.scaling:
        case LinearScaling(factor=factor):
            scaled = max_position * factor
        case (
            DynamicScaling(factor=factor, original_max_position=original)
            | YarnScaling(factor=factor, original_max_position=original)
        ):
            scaled = original * factor
        case _:
            return max_position
    return int(min(max(max_position, scaled), LARGEST_INTEGER))


def rope_tables(rope: RopeSpec, max_position: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_position, rotary_dim / 2] in fp32, with the attention factor of YaRN multiplied in."""
    positions = torch.arange(max_position, dtype=torch.float32).unsqueeze(1)  # [positions, 1]
    angles = positions * _frequencies(rope, positions)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def _frequencies(rope: RopeSpec, positions: Tensor) -> Tensor:
    """Radians by which the pairs of a head turn from one position to the next: [1 or positions, rotary_dim / 2]."""
    dim = rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32).unsqueeze(0) / dim
    plain = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
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


def _yarn_ramp(rope: RopeSpec, yarn: YarnScaling) -> Tensor:
    """How far each pair is interpolated, 0 to 1: [1, rotary_dim / 2]."""

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


def _read_linear(rope: ConfigJson, _config: ConfigJson) -> RopeScaling:
    return LinearScaling(factor=rope.number("factor"))


def _read_dynamic(rope: ConfigJson, config: ConfigJson) -> RopeScaling:
    return DynamicScaling(factor=rope.number("factor"), original_max_position=config.integer("max_position_embeddings"))


def _read_llama3(rope: ConfigJson, config: ConfigJson) -> RopeScaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=_original_max_position(rope, config),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError("config.json: low_freq_factor of the rope must be below high_freq_factor")
    return scaling


def _read_yarn(rope: ConfigJson, config: ConfigJson) -> RopeScaling:
    original = _original_max_position(rope, config)
    factor = rope.number("factor", config.integer("max_position_embeddings") / original)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = magnitude(1.0)
    if rope.raw("mscale") and rope.raw("mscale_all_dim"):
        attention_factor = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        attention_factor=rope.number("attention_factor", attention_factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        original_max_position=original,
    )


def _original_max_position(rope: ConfigJson, config: ConfigJson) -> int:
    """The length the model was first trained for; a field of the config itself outranks that of its rope section."""
    for section in (config, rope):
        if "original_max_position_embeddings" in section:
            return section.integer("original_max_position_embeddings")
    return config.integer("max_position_embeddings")


SCALINGS: dict[str, Callable[[ConfigJson, ConfigJson], RopeScaling | None]] = {
    "default": lambda _rope, _config: None,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}

KNOWN_FIELDS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "finetuned",  # a remark of some YaRN checkpoints, without meaning for the network
}
