"""Wrong on purpose: each field of the spec of each variant, changed alone, is no longer the network of transformers.

So the parity tests look at all that a spec says: a change asks for other weights, or changes a logit by more than they
allow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ragged_requests import Request, Runner

from splitfuse.errors import ModelError
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, HeadNormSpec, LayerSpec, NormSpec, QueryScaling
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import find_family, load_spec
from splitfuse.models.rope import rope_table
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import load_decoder, stored_parameters

PROMPT = [(7 * n * n + 3 * n) % tiny_models.VOCAB_SIZE for n in range(30)]
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit, as in the parity tests
QUICK = ("smollm3-windows", "glm4", "granite")
"""Variants whose fields are changed in every run."""

NOT_OF_THE_NETWORK = {"architecture", "dtype", "max_position", "further_layers"}
IN_PLACE_OF_NONE: dict[str, Any] = {
    "window": 5,
    "chunk": 5,
    "softcap": 0.05,
    "logit_softcap": 0.05,
    "scale": 1.0,
    "alibi": 1.0,
    "dt_max": 0.1,
    "rope": 0,
    "v_norm": NormSpec(eps=1e-6),
    "qk_norm": HeadNormSpec(norm=NormSpec(eps=1e-6), weight=False),
    "query_scaling": QueryScaling(beta=0.5, length=2),
}
"""Values in place of None; other fields that are None would be a part of a network of their own."""


def mutations(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield copies of a spec with one field of it changed, and the names of that field."""
    for field in fields(value):
        inner, name = getattr(value, field.name), f"{path}{field.name}"
        if field.name in NOT_OF_THE_NETWORK:
            continue
        for found, changed in _changes(field.name, inner, name):
            try:
                yield found, replace(value, **{field.name: changed})
            except (ModelError, AssertionError, IndexError):
                continue  # a spec that contradicts itself is none


def _changes(field: str, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if field == "layers":
        yield from _changed_layers(value)
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for number, each in enumerate(value):
            for found, changed in mutations(each, f"{name}.{number}."):
                yield found, (*value[:number], changed, *value[number + 1 :])
    elif field == "scaling":
        if value is not None:  # test_rope.py compares the tables of all kinds with those of transformers
            yield name, None
    elif is_dataclass(value) and not isinstance(value, Enum):
        yield from mutations(value, f"{name}.")
    elif isinstance(value, bool):
        yield name, not value
    elif isinstance(value, Enum):
        for other in type(value):
            if other is not value:
                yield f"{name}={other.value}", other
    elif field == "rope" and value is not None:
        yield name, None
    elif isinstance(value, int):
        yield name, value - 2 if field == "rotary_dim" else value + 1
    elif isinstance(value, float):
        yield name, {"eps": 0.1, "theta": 100 * value, "min_sum": 100.0}.get(field, 1.5 * value or 100.0)
    elif isinstance(value, str):
        yield name, "relu" if value != "relu" else "gelu"
    elif value is None and field in IN_PLACE_OF_NONE:
        yield name, IN_PLACE_OF_NONE[field]


def _changed_layers(layers: tuple[LayerSpec, ...]) -> Iterator[tuple[str, tuple[LayerSpec, ...]]]:
    """Change a layer of each kind."""
    for layer in dict.fromkeys(layers):
        number = layers.index(layer)
        for found, changed in mutations(layer, f"layer {number}."):
            yield found, (*layers[:number], changed, *layers[number + 1 :])


def has_no_effect(spec: ModelSpec, name: str) -> bool:
    """Return whether the field means nothing here: there is nothing that it could change."""
    field, number = name.rpartition(".")[2], int(name.split(".")[1]) if name.startswith("ropes") else 0
    if field == "theta":  # a single pair turns by a radian a position, whatever the base
        tables = [rope_table(rope, 4, CPU) for rope in (spec.ropes[number], replace(spec.ropes[number], theta=1e9))]
        return torch.equal(tables[0][1], tables[1][1])
    if not name.startswith("layer "):
        return (field == "position_offset" and not spec.learned_positions) or (
            field == "token_input_rows" and not spec.token_input_size
        )
    layer = spec.layers[int(name.split(".")[0].split()[1])]
    if field == "bias" and re.search(r"(mixer|latent)\.norm\.|v_norm|own_norm|qk_norm\.norm", name):
        return True  # these norms have none, or ask for its weights and are seen
    if isinstance(layer.mlp, ExpertsSpec) and field in ("group_best", "min_sum"):
        router = layer.mlp.router
        if field == "min_sum":
            return not router.renormalize
        return router.num_groups == 1 or router.group_best >= router.num_experts // router.num_groups
    if isinstance(mixer := layer.mixer, AttentionSpec):
        if mixer.kv_layer is not None and field in ("num_kv_heads", "v_norm", "value_is_key"):
            return True  # it has no keys and values of its own
        if field == "value_is_key":  # the names say which rows they are
            return mixer.latent is not None or not callable(find_family(spec.architecture).names["qkv"])
        if field == "after_rope":  # a rotation keeps the norm of a head
            return mixer.rope is None or (mixer.qk_norm is not None and not mixer.qk_norm.weight)
    if field == "parallel" and None in (layer.mixer, layer.mlp):
        return True  # there is one block
    return field == "shared_norm" and not layer.parallel


def logits(folder: Path, spec: ModelSpec) -> torch.Tensor:
    weights = ModelFolder(folder).weights()
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=CPU, backend=ReferenceBackend())
    request = Request(list(PROMPT))
    Runner(decoder, block_size=8).step([(request, len(PROMPT))])
    return torch.stack(request.logits)


def survivors(folder: Path) -> list[str]:
    """Return the fields that may say something else without being noticed."""
    source = ModelFolder(folder)
    weights, spec = source.weights(), load_spec(source)
    wanted, right = stored_parameters(weights, spec), logits(folder, spec)
    pieces = [each.pieces for each in wanted]
    found = []
    for name, changed in mutations(spec):
        if has_no_effect(spec, name):
            continue
        try:
            if [each.pieces for each in stored_parameters(weights, changed)] != pieces:
                continue
            wrong = logits(folder, changed)
        except (ModelError, RuntimeError, ValueError, TypeError, LookupError, AssertionError):
            continue  # what does not fit is noticed
        if (wrong - right).abs().max() <= TOLERANCE * right.abs().max():
            found.append(name)
    return found


@pytest.mark.parametrize("variant", QUICK)
def test_each_field_of_some_variants_matters(variant: str, tmp_path: Path) -> None:
    tiny_models.save(variant, tmp_path)
    assert survivors(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in tiny_models.VARIANTS if name not in QUICK])
def test_each_field_of_every_variant_matters(variant: str, tmp_path: Path) -> None:
    tiny_models.save(variant, tmp_path)
    assert survivors(tmp_path) == []
