"""Loads a decoder from a checkpoint: find, check, cast and pack one weight at a time, from the mapped files.

At most one weight exists twice, and only if it had to be cast. Which tensors there are follows from the spec; what the
checkpoint calls them, from the family.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from tqdm import tqdm

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.interface import Backend, LayerSpec, LayerWeights, MlpSpec, NetworkWeights, Role, Weight
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import find_family
from splitfuse.models.sources.source import Piece, Shape, WeightSource
from splitfuse.models.spec import ModelSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPARED_NUMBERS = 2**22
"""Number of elements of two tensors that are compared at a time."""

_logger = logging.getLogger(__name__)

Shapes: TypeAlias = dict[str, tuple[Shape, ...]]
"""Name of a weight -> shapes of the pieces that are stacked by rows to make it."""


@dataclass(frozen=True)
class Parameter:
    """Names one weight of the decoder, and the checkpoint's tensors that are stacked by rows to make it."""

    name: str  # a field of LayerWeights, or of NetworkWeights where layer is None
    role: Role
    layer: int | None
    expert: int | None
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> Shape:
        """Return the shape of the whole."""
        shapes = [piece.shape for piece in self.pieces]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Return every weight that the network of `spec` has."""
    names = find_family(spec.architecture).names

    def named(shapes: Shapes, layer: int | None = None, expert: int | None = None) -> Iterator[Parameter]:
        for name, pieces in shapes.items():
            full = (tensor.format(layer=layer, expert=expert) for tensor in names[name])
            named_pieces = tuple(Piece(*each) for each in zip(full, pieces, strict=True))
            yield Parameter(name, _role(name, spec), layer, expert, named_pieces)

    found = list(named(_outer_shapes(spec)))
    for number, layer in enumerate(spec.layers):
        found += named(_layer_shapes(layer, spec.hidden_size), number)
        if not isinstance(layer.mlp, MlpSpec):
            inner = (layer.mlp.intermediate_size, spec.hidden_size)
            of_expert: Shapes = {"w13": (inner, inner), "w2": (inner[::-1],)}
            for expert in range(layer.mlp.num_experts):
                found += named(of_expert, number, expert)
    return found


def _role(name: str, spec: ModelSpec) -> Role:
    """Return the role of a weight: a tied embedding is the output head; what no Role is named after stays plain."""
    if name == "embed" and spec.tied_embeddings:
        return Role.HEAD
    return Role(name) if name in {role.value for role in Role} else Role.PLAIN


def _outer_shapes(spec: ModelSpec) -> Shapes:
    table = (spec.vocab_size, spec.hidden_size)
    shapes: Shapes = {"embed": (table,), "norm": ((spec.hidden_size,),)}
    return shapes if spec.tied_embeddings else shapes | {"head": (table,)}


def _layer_shapes(layer: LayerSpec, hidden: int) -> Shapes:
    """Return the weights of a layer but those of its experts."""
    attention, mlp = layer.attention, layer.mlp
    q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes: Shapes = {
        "attn_norm": ((hidden,),),
        "qkv": ((q, hidden), (kv, hidden), (kv, hidden)),
        "o": ((hidden, q),),
        "mlp_norm": ((hidden,),),
    }
    if isinstance(mlp, MlpSpec):
        inner = mlp.intermediate_size
        shapes |= {"gate_up": ((inner, hidden), (inner, hidden)), "down": ((hidden, inner),)}
    else:
        shapes["router"] = ((mlp.num_experts, hidden),)
    if attention.qkv_bias:
        shapes["qkv_bias"] = ((q,), (kv,), (kv,))
    if attention.o_bias:
        shapes["o_bias"] = ((hidden,),)
    if isinstance(mlp, MlpSpec) and mlp.bias:
        shapes |= {"gate_up_bias": ((inner,), (inner,)), "down_bias": ((hidden,),)}
    if attention.qk_norm:
        shapes |= {"q_norm": ((attention.head_dim,),), "k_norm": ((attention.head_dim,),)}
    return shapes


def weight_bytes(spec: ModelSpec, dtype: torch.dtype, backend: Backend) -> int:
    """Return the bytes of all weights as `backend` keeps those of `dtype`."""
    return sum(
        backend.weight_bytes(parameter.shape, role=parameter.role, dtype=dtype) for parameter in parameters(spec)
    )


def resolve_dtype(setting: str, spec: ModelSpec) -> torch.dtype:
    """Return the dtype for a setting of config.DTYPES; "auto" is the checkpoint's own.

    Raises UnsupportedModelError if the checkpoint's is not one that we compute in.
    """
    name = spec.dtype if setting == "auto" else setting
    if name not in DTYPES:
        raise UnsupportedModelError(f"the checkpoint is in {name}: set dtype to one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_weights(weights: WeightSource, spec: ModelSpec) -> ModelSpec:
    """Compare a checkpoint with the network of `spec` before anything is loaded, and return the network that it holds:
    one that says that its head is its embedding, but stores a head that differs, has that head.

    Raises WeightsError if a weight is missing, surplus, misshapen or not floating point.
    """
    plan = [piece for parameter in stored_parameters(weights, spec) for piece in parameter.pieces]
    embed, head = _tied_pair(spec)
    both = spec.tied_embeddings and embed.name in weights and head.name in weights
    weights.check([*plan, head] if both else plan, architecture=spec.architecture)
    if not both or _are_equal(weights, embed, head):
        return spec
    _logger.warning(
        "config.json says that %s is the output head too (tie_word_embeddings), but the checkpoint holds a different "
        "%s, which is used; set tie_word_embeddings to false",
        embed.name,
        head.name,
    )
    return replace(spec, tied_embeddings=False)


def stored_parameters(weights: WeightSource, spec: ModelSpec) -> list[Parameter]:
    """Return `parameters` under the names of the checkpoint: a tied pair may be stored as the head alone."""
    found = parameters(spec)
    embed, head = _tied_pair(spec)
    if spec.tied_embeddings and embed.name not in weights and head.name in weights:
        return [replace(each, pieces=(head,)) if each.pieces == (embed,) else each for each in found]
    return found


def _tied_pair(spec: ModelSpec) -> tuple[Piece, Piece]:
    """Return the embedding and the output head, of which a tied network has one."""
    names, table = find_family(spec.architecture).names, (spec.vocab_size, spec.hidden_size)
    return Piece(names["embed"][0], table), Piece(names["head"][0], table)


def _are_equal(weights: WeightSource, first: Piece, second: Piece) -> bool:
    """Return whether two tensors of one shape hold the same numbers."""
    rows = max(1, COMPARED_NUMBERS // first.shape[1])
    with weights.read(first) as one, weights.read(second) as other:
        pairs = zip(torch.split(one, rows), torch.split(other, rows), strict=True)
        return all(torch.equal(a, b.to(a.dtype)) for a, b in pairs)


def load_decoder(
    weights: WeightSource,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    progress: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Decoder:
    """Load a network that `check_weights` has returned, with a progress bar on stderr if asked; `on_progress` is called
    with the fraction that is loaded.
    """
    plan = stored_parameters(weights, spec)
    outer: dict[str, Weight] = {}
    layers: list[dict[str, Weight]] = [{} for _ in spec.layers]
    for parameter in _with_progress(plan, dtype, progress, on_progress):
        target = outer if parameter.layer is None else layers[parameter.layer]
        with ExitStack() as stack:
            pieces = [stack.enter_context(weights.read(piece)).to(device) for piece in parameter.pieces]
            weight = backend.pack(pieces, role=parameter.role, dtype=dtype)
        if parameter.expert is None:
            target[parameter.name] = weight
        else:
            target.setdefault(parameter.name, []).append(weight)
    if spec.tied_embeddings:
        outer["head"] = outer["embed"]
    return Decoder(spec, NetworkWeights(layers=tuple(LayerWeights(**layer) for layer in layers), **outer), backend)


def _with_progress(
    plan: list[Parameter], dtype: torch.dtype, shown: bool, on_progress: Callable[[float], None]
) -> Iterator[Parameter]:
    """Yield the plan, counting on the bar what has been loaded."""
    sizes = [math.prod(parameter.shape) * dtype.itemsize for parameter in plan]
    loaded = 0
    with tqdm(total=sum(sizes), desc="Loading weights", unit="B", unit_scale=True, disable=not shown) as bar:
        for parameter, size in zip(plan, sizes, strict=True):
            yield parameter
            loaded += size
            bar.update(size)
            on_progress(loaded / sum(sizes))
