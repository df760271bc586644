"""A spec that differs in one field is another network: parity with transformers, or loading, would show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ragged_requests import Request, Runner
from torch import Tensor

from splitfuse.errors import ModelError
from splitfuse.kernels.interface import HeadNormSpec, NormPlace, NormSpec, QueryScaling, RopeTable
from splitfuse.kernels.reference import ACTIVATIONS, ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import load_decoder, parameters

PROMPT = [(7 * position * position + 11) % tiny_models.VOCAB_SIZE for position in range(37)]
TOLERANCE = 1e-4
"""Part of the largest logit by which logits may differ in the parity tests, whose longest prompt is as long."""

OTHERWISE: dict[str, Any] = {
    "window": 5,
    "chunk": 4,
    "scale": 0.31,
    "alibi": 0.7,
    "softcap": 1.5,
    "logit_softcap": 0.5,
    "query_scaling": QueryScaling(beta=0.5, length=4),
    "qk_norm": HeadNormSpec(norm=NormSpec(eps=1e-6), weight=False),
    "v_norm": NormSpec(eps=1e-6),
}
"""Values of fields that are None."""
APART = {"architecture", "dtype", "max_position", "layers", "ropes"}
"""Fields of ModelSpec that are no part of what is computed, or mutated apart."""


def variations(name: str, value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield other values of a field with the name of what differs, and where it is a spec those of its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            for inner, other in variations(field.name, getattr(value, field.name)):
                yield f"{name}.{inner}", lambda field=field, other=other: replace(value, **{field.name: other()})
    elif isinstance(value, bool):
        yield name, lambda: not value
    elif isinstance(value, int):
        yield name, lambda: {"rotary_dim": value - 2, "original_max_position": 2 * value}.get(name, value + 1)
    elif isinstance(value, float):
        yield name, lambda: value * 3 if value > 1e-3 else 0.05
    elif isinstance(value, NormPlace):
        yield from ((name, lambda other=other: other) for other in NormPlace if other is not value)
    elif isinstance(value, str):
        yield name, lambda: next(other for other in ACTIVATIONS if other != value)
    elif value is None and name in OTHERWISE:
        yield name, lambda: OTHERWISE[name]
    if value is not None and name in (*OTHERWISE, "rope", "scaling"):
        yield name, lambda: None


def mutants(spec: ModelSpec) -> Iterator[tuple[str, Callable[[], ModelSpec]]]:
    """Yield networks that differ from `spec` in one field, in all layers that are alike."""
    for field in fields(spec):
        for name, other in variations(field.name, getattr(spec, field.name)) if field.name not in APART else ():
            yield name, lambda field=field, other=other: replace(spec, **{field.name: other()})
    for number, rope in enumerate(spec.ropes):
        for name, other in variations(f"ropes[{number}]", rope):
            yield (
                name,
                lambda number=number, other=other: replace(
                    spec, ropes=(*spec.ropes[:number], other(), *spec.ropes[number + 1 :])
                ),
            )
    for layer in dict.fromkeys(spec.layers):
        for name, other in variations("layer", layer):
            yield (
                name,
                lambda layer=layer, other=other: replace(
                    spec, layers=tuple(other() if each == layer else each for each in spec.layers)
                ),
            )


def logits(decoder: Decoder) -> Tensor:
    request = Request(list(PROMPT))
    Runner(decoder, block_size=4, num_blocks=10).step([(request, len(PROMPT))])
    return torch.stack(request.logits)


def is_seen(mutant: Callable[[], ModelSpec], decoder: Decoder, right: Tensor) -> bool:
    """Whether a network cannot be, has other weights than that of the decoder, or with the same gives other logits.
    A rope that turns few pairs, or over few positions, has fields that cannot matter: test_rope.py compares its tables.
    """
    try:
        spec = mutant()
        if [each.parts for each in parameters(spec)] != [each.parts for each in parameters(decoder.spec)]:
            return True
    except (ModelError, AssertionError, LookupError, ValueError):
        return True
    other = Decoder(spec, decoder.weights, decoder.backend, dtype=decoder.dtype)
    if spec.ropes != decoder.spec.ropes and all(map(same_table, other.ropes, decoder.ropes)):
        return True
    return not (logits(other) - right).abs().max() <= TOLERANCE * right.abs().max()


def same_table(first: RopeTable, second: RopeTable) -> bool:
    rows = len(PROMPT)
    return all(torch.allclose(a[:rows], b[:rows], rtol=0, atol=1e-3) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_a_field_that_differs_is_seen(variant: str, tmp_path: Path) -> None:
    tiny_models.save(variant, tmp_path)
    source = ModelFolder(tmp_path)
    decoder = load_decoder(
        source.weights(), load_spec(source), dtype=torch.float32, device=torch.device("cpu"), backend=ReferenceBackend()
    )
    right = logits(decoder)
    unseen = {name for name, mutant in mutants(decoder.spec) if not is_seen(mutant, decoder, right)}
    assert unseen <= (set() if decoder.spec.learned_positions else {"position_offset"})
