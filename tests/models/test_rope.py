"""Rope tables and settings against transformers' own formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.rope_config import extended_length, read_rope
from splitfuse.models.rope import rope_table
from splitfuse.models.spec import RopeSpec

CPU = torch.device("cpu")
HEAD_DIM = 16
MAX_POSITION = 64

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(rope: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"max_position_embeddings": MAX_POSITION, "rope_parameters": {"rope_theta": 10000.0, **rope}, **fields}


def rope_of(rope: dict[str, Any], **fields: Any) -> RopeSpec:
    return read_rope(ConfigJson(config_of(rope, **fields)), head_dim=HEAD_DIM)


def oracle(rope: dict[str, Any], **fields: Any) -> LlamaRotaryEmbedding:
    sizes = {"hidden_size": 2 * HEAD_DIM, "num_attention_heads": 2, "head_dim": HEAD_DIM}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, **config_of(rope, **fields)))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.5, "partial_rotary_factor": 0.5},
        LLAMA3,
        {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8},
        {**LLAMA3, "partial_rotary_factor": 0.75},
        YARN,
        {**YARN, "original_max_position_embeddings": 4096, "rope_theta": 1e6},
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
        {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},  # an empty range
        {**YARN, "attention_factor": 0.8},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
        {**YARN, "mscale": 0.7},
        {**YARN, "factor": None},
        {**YARN, "factor": 0.5},
        {**YARN, "partial_rotary_factor": 0.5},
    ],
)
def test_tables_match_transformers(rope: dict[str, Any]) -> None:
    spec = rope_of(rope)
    cos, sin = rope_table(spec, MAX_POSITION, CPU)
    theirs = oracle(rope)(torch.empty(0), torch.arange(MAX_POSITION)[None])
    for ours, oracle_table in zip((cos, sin), theirs, strict=True):
        half = oracle_table.shape[-1] // 2
        torch.testing.assert_close(ours, oracle_table[0, :, :half], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"partial_rotary_factor": 0.5}])
def test_dynamic_rows_equal_those_of_generation(fields: dict[str, Any]) -> None:
    """Row p of the table is the row transformers uses when p is the newest position, whatever came before."""
    rope = {"rope_type": "dynamic", "factor": 2.0, **fields}
    cos, sin = rope_table(rope_of(rope), 2 * MAX_POSITION, CPU)
    embedding = oracle(rope)
    for position in range(2 * MAX_POSITION):
        their_cos, their_sin = embedding(torch.empty(0), torch.tensor([[position]]))
        half = their_cos.shape[-1] // 2
        torch.testing.assert_close(cos[position], their_cos[0, 0, :half], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sin[position], their_sin[0, 0, :half], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_position", [1, 16, 17, 64])
@pytest.mark.parametrize(
    "fields", [{}, {"rope_type": "su"}, {"rope_type": "yarn"}, {"factor": 8.0}, {"attention_factor": 1.3}], ids=str
)
def test_longrope_is_that_of_the_longest_request(fields: dict[str, Any], max_position: int) -> None:
    """Every row of the table is that of transformers for a text of the table's length."""
    rope = {**LONGROPE, **fields}
    ours = rope_table(rope_of(rope, original_max_position_embeddings=16), max_position, CPU)
    embedding = oracle({**rope, "rope_type": "longrope"}, original_max_position_embeddings=16)
    for table, theirs in zip(ours, embedding(torch.empty(0), torch.arange(max_position)[None]), strict=True):
        torch.testing.assert_close(table, theirs[0, :, : HEAD_DIM // 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_rows_do_not_depend_on_the_length_of_the_table(kind: str) -> None:
    rope = rope_of({**LLAMA3, "rope_type": kind})
    for long, short in zip(rope_table(rope, 200, CPU), rope_table(rope, 70, CPU), strict=True):
        torch.testing.assert_close(long[:70], short, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("scaling", "same"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"type": "yarn", **YARN}, YARN),
        ({"rope_type": "default", "type": "linear"}, {"rope_type": "default"}),
        (None, {"rope_type": "default"}),
    ],
)
def test_fields_before_transformers_5(scaling: dict[str, Any] | None, same: dict[str, Any]) -> None:
    old = {"max_position_embeddings": MAX_POSITION, "rope_theta": 777.0, "rope_scaling": scaling}
    assert read_rope(ConfigJson(old), head_dim=HEAD_DIM) == rope_of({**same, "rope_theta": 777.0})


def test_defaults() -> None:
    rope = read_rope(ConfigJson({}), head_dim=HEAD_DIM)
    assert rope == RopeSpec(theta=10000.0, rotary_dim=HEAD_DIM)


def test_original_length_of_the_config_outranks_the_ropes() -> None:
    assert rope_of(YARN, original_max_position_embeddings=8) == rope_of({**YARN, "original_max_position_embeddings": 8})
    assert rope_of({**YARN, "original_max_position_embeddings": None}) == rope_of(
        {**YARN, "original_max_position_embeddings": MAX_POSITION}
    )


def test_extended_length() -> None:
    for rope, length in [
        ({"rope_type": "default"}, 64),
        (LLAMA3, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 1.5}, 96),
        ({**YARN, "factor": 4.0}, 64),
        ({**YARN, "original_max_position_embeddings": 64}, 256),
        ({**YARN, "factor": 0.5}, 64),
    ]:
        assert extended_length(rope_of(rope), MAX_POSITION) == length


@pytest.mark.parametrize("kind", ["axial", "mrope", ""])
def test_unknown_type_lists_the_known(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="default, linear, dynamic, llama3, yarn"):
        rope_of({"rope_type": kind})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_unknown_setting_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not supported: (alpha|full_attention, sliding_attention)$"):
        rope_of(rope)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "no rope_parameters.factor"),
        ({"rope_type": "linear", "factor": 0}, "factor must be a positive finite number, not 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "not nan"),
        ({"rope_type": "linear", "factor": float("inf")}, "not inf"),
        ({"rope_type": "linear", "factor": "2"}, "not '2'"),
        ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta must be above 1"),
        ({**LONGROPE, "short_factor": None}, "no rope_parameters.short_factor"),
        ({**LONGROPE, "short_factor": [1.0] * 7}, "short_factor must be a list of 8 positive finite numbers, not"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "long_factor must be a list of 8 positive finite numbers, not"),
        ({**LONGROPE, "long_factor": "4"}, "long_factor must be a list of 8 positive finite numbers, not '4'"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({**YARN, "truncate": 1}, "truncate must be true or false"),
        ({**YARN, "original_max_position_embeddings": 1.5}, "whole number"),
        ({"rope_type": 7}, "rope_type must be a string"),
    ],
)
def test_invalid_values_are_named(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope_of(rope)


def test_rope_must_be_an_object() -> None:
    with pytest.raises(ModelError, match="rope_parameters must be an object"):
        read_rope(ConfigJson({"rope_parameters": [1]}), head_dim=HEAD_DIM)
