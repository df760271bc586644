"""The table of architectures: each has a row, and what it says is in the spec."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
from typer.testing import CliRunner

from splitfuse.cli.commands import app
from splitfuse.kernels import layers
from splitfuse.models import spec as specs
from splitfuse.models.families import table
from splitfuse.models.families.registry import FAMILIES


def test_every_architecture_has_a_row() -> None:
    assert {row.architecture for row in table.rows()} == set(FAMILIES)


def test_words_are_of_fields_that_specs_have() -> None:
    kinds = {name: kind for name, kind in {**vars(layers), **vars(specs)}.items() if is_dataclass(kind)}
    known = {f"{name}.{field.name}" for name, kind in kinds.items() for field in fields(kind)} | set(kinds)
    assert set(table.WORDS) <= known


@pytest.mark.parametrize(
    ("architecture", "properties"),
    [
        ("LlamaForCausalLM", ()),
        ("SmolLM3ForCausalLM", ("NoPE layers",)),
        ("GlmForCausalLM", ("biases", "partial rope")),
        ("GraniteMoeHybridForCausalLM", ("Mamba-2", "NoPE layers", "experts", "a shared expert")),
        ("Qwen3_5ForConditionalGeneration", ("gated attention", "QK norm", "gated delta nets")),
    ],
)
def test_properties_of_a_family(architecture: str, properties: tuple[str, ...]) -> None:
    assert set(properties) <= set(table.properties(table.default_spec(architecture)))


@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"])
def test_the_default_scale_of_mla_is_no_property(architecture: str) -> None:
    found = table.properties(table.default_spec(architecture))
    assert "MLA" in found
    assert "attention scale" not in found


def test_models_published_quantized_need_a_bf16_copy() -> None:
    limits = {row.architecture: row.limits for row in table.rows()}
    assert limits["Qwen3VLForConditionalGeneration"] == "text only"
    assert limits["LlamaForCausalLM"] == ""


def test_a_property_is_one_of_any_layer() -> None:
    spec = table.default_spec("LlamaForCausalLM")
    layer = replace(spec.layers[3], mixer=replace(spec.layers[3].mixer, window=9))
    assert table.properties(replace(spec, layers=(*spec.layers[:3], layer, *spec.layers[4:]))) == ("sliding window",)


def test_the_command_prints_the_table() -> None:
    ended = CliRunner().invoke(app, ["models"])
    assert ended.exit_code == 0
    assert all(name in ended.output for name in FAMILIES)
    assert "text only" in ended.output
