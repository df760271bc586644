"""Reads rotary position embeddings as config.json describes them: every field is honoured or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.models.families.config_json import LARGEST_INTEGER, ConfigJson
from splitfuse.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

MAX_POSITION = 2**24
"""Length of the longest sequence: beyond it fp32 does not tell positions apart."""


MROPE = ("mrope_section", "mrope_interleaved")
"""Rope fields that assign pairs of a head to time, height and width (multimodal rope)."""


def read_rope(
    config: ConfigJson,
    *,
    head_dim: int,
    theta: float = 10_000.0,
    share: float = 1.0,
    section: ConfigJson | None = None,
    honours: Collection[str] = (),
) -> RopeSpec:
    """Return the rope of a config, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before),
    or from the `section` given alone. `theta` and the `share` of a head that is rotated are defaults of the family,
    `honours` the fields that it has besides KNOWN_FIELDS.

    Raises UnsupportedModelError for a type that is not in SCALINGS or a field that is not in KNOWN_FIELDS.
    """
    rope = section
    if rope is None:
        rope = rope_section(config)
        theta = config.number("rope_theta", theta)
    theta = rope.number("rope_theta", theta)
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", share))
    if theta <= 1:
        raise ModelError(f"config.json: rope_theta must be above 1, not {theta}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if "alpha" in honours and kind == "dynamic" and "alpha" in rope:
        kind, theta = "default", theta * rope.number("alpha") ** (head_dim / max(head_dim - 2, 1))
    if kind == "proportional":
        share = 1.0  # it says itself which pairs it rotates
    rotary_dim = int(min(head_dim * share, LARGEST_INTEGER))
    if "mrope_section" in honours:
        kind = "default" if kind == "mrope" else kind
        _check_mrope(rope, rotary_dim // 2)
    if kind not in SCALINGS:
        raise UnsupportedModelError(f"rope type {kind!r} is not one of those we know: {', '.join(SCALINGS)}")
    if unknown := set(rope) - KNOWN_FIELDS - set(honours):
        raise UnsupportedModelError(f"rope settings that are not supported: {', '.join(sorted(unknown)):.200}")
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, scaling=SCALINGS[kind](rope, config, rotary_dim))


def rope_section(config: ConfigJson) -> ConfigJson:
    """Return the section of a config that describes its one rope: `rope_scaling` unless it is null or {}, which say
    nothing, else `rope_parameters`.
    """
    return config.section("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")


def read_layer_ropes(
    config: ConfigJson, *, head_dim: int, theta: float, local_theta: float
) -> tuple[RopeSpec, RopeSpec]:
    """Return the rope of layers without and of those with a window, whose bases are `theta` and `local_theta` if the
    config does not say: `rope_parameters` by kind of layer (transformers 5), or `rope_theta` and `rope_scaling` for the
    first and `rope_local_base_freq` for the second (before).
    """
    sections = config.section("rope_parameters")
    if unknown := set(sections) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"rope_parameters must be those of full_attention and of sliding_attention here; it has {sorted(unknown)}"
        )
    full = config.section("rope_scaling").with_defaults(sections.section("full_attention"))
    local = sections.section("sliding_attention")
    theta, local_theta = config.number("rope_theta", theta), config.number("rope_local_base_freq", local_theta)
    return (
        read_rope(config, head_dim=head_dim, theta=theta, section=full),
        read_rope(config, head_dim=head_dim, theta=local_theta, section=local),
    )


def _check_mrope(rope: ConfigJson, num_pairs: int) -> None:
    """Refuse sections of a head's rotated pairs that do not add up to all of them."""
    sections = rope.integers("mrope_section", [num_pairs])
    if sum(sections) != num_pairs:
        raise ModelError(
            f"config.json: mrope_section {brief(sections)} must add up to the {num_pairs} pairs that are rotated"
        )


def extended_length(rope: RopeSpec, max_position: int) -> int:
    """Return the longest sequence meant by a config with `max_position_embeddings` = `max_position`.

    Some checkpoints state the length after scaling, some before; Llama 3 always states it after.
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
            scaled = max_position
    return int(min(max(max_position, scaled), MAX_POSITION))


def _read_linear(rope: ConfigJson, _config: ConfigJson, _dim: int) -> RopeScaling:
    return LinearScaling(factor=rope.number("factor"))


def _read_proportional(rope: ConfigJson, _config: ConfigJson, _dim: int) -> RopeScaling:
    share = rope.number("partial_rotary_factor", 1.0, most=1.0)
    return ProportionalScaling(share=share, factor=rope.number("factor", 1.0))


def _read_dynamic(rope: ConfigJson, config: ConfigJson, _dim: int) -> RopeScaling:
    return DynamicScaling(factor=rope.number("factor"), original_max_position=config.integer("max_position_embeddings"))


def _read_llama3(rope: ConfigJson, config: ConfigJson, _dim: int) -> RopeScaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=_original_max_position(rope, config),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError("config.json: low_freq_factor of the rope must be below high_freq_factor")
    return scaling


def _read_yarn(rope: ConfigJson, config: ConfigJson, dim: int) -> RopeScaling:
    if "short_factor" in rope:  # the first name of Phi-3's
        return _read_longrope(rope, config, dim)
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
        beta_fast=rope.number("beta_fast", 32.0, most=1e9),
        beta_slow=rope.number("beta_slow", 1.0, most=1e9),
        truncate=rope.flag("truncate", True),
        original_max_position=original,
    )


def _read_longrope(rope: ConfigJson, config: ConfigJson, dim: int) -> RopeScaling:
    original = _original_max_position(rope, config)
    factor = rope.number("factor", config.integer("max_position_embeddings") / original)
    # An original length of 1, whose logarithm is 0, comes with an attention factor.
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    return LongRopeScaling(
        short_factors=tuple(rope.numbers("short_factor", dim // 2)),
        long_factors=tuple(rope.numbers("long_factor", dim // 2)),
        attention_factor=rope.number("attention_factor", attention_factor),
        original_max_position=original,
    )


def _original_max_position(rope: ConfigJson, config: ConfigJson) -> int:
    """Return the length the model was first trained for; a field of the config itself outranks its rope section's."""
    for section in (config, rope):
        if "original_max_position_embeddings" in section:
            return section.integer("original_max_position_embeddings")
    return config.integer("max_position_embeddings")


SCALINGS: dict[str, Callable[[ConfigJson, ConfigJson, int], RopeScaling | None]] = {
    "default": lambda _rope, _config, _dim: None,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "proportional": _read_proportional,
    "longrope": _read_longrope,
    "su": _read_longrope,  # its name before
}

KNOWN_FIELDS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor"),
    "finetuned",  # a remark of some YaRN checkpoints, without meaning for the network
}
