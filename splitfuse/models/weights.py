"""Loads a decoder from a checkpoint: find, check, cast and pack one weight at a time, from the mapped files.

At most one weight exists twice, and only if it had to be cast.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.group import WHOLE, Group, Shard
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import (
    AttentionSpec,
)
from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight, are_whole_groups
from splitfuse.kernels.weights import LayerWeights, MlpWeights, NetworkWeights, Weight, WeightRole
from splitfuse.models.decoder import Decoder
from splitfuse.models.encoder.spec import EncoderSpec
from splitfuse.models.families.layouts import Place
from splitfuse.models.families.registry import find_family
from splitfuse.models.families.wrappers import kind_aside, text_names
from splitfuse.models.parameters import Parameter, Part, parameters, stored_parts
from splitfuse.models.sharding import RankDecoder, rank_spec
from splitfuse.models.sources.source import Piece, WeightSource
from splitfuse.models.spec import ModelSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPARED_NUMBERS = 2**22
"""Number of elements of two tensors that are compared at a time."""

_logger = logging.getLogger(__name__)
KeptFormats: TypeAlias = tuple[QuantizedFormat | None, ...]
"""Formats that a backend keeps the parts of a weight in as they are stored; None: dense, or dequantized."""


def weight_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    backend: Backend,
    weights: WeightSource | None = None,
    *,
    shard: Shard = WHOLE,
) -> int:
    """Return the bytes of a rank's weights as `backend` keeps those of `dtype`, and what is quantized in `weights`."""
    if weights is None:
        parts = [each.of_rank(shard) for each in parameters(spec)]
        return sum(backend.weight_bytes(each.shape, role=each.role, dtype=dtype) for each in parts)
    plan = kept_parameters(weights, spec, backend, shard)
    return sum(parameter_bytes(parameter, formats, dtype, backend) for parameter, formats in plan)


def copy_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    backend: Backend,
    weights: WeightSource | None = None,
    *,
    shard: Shard = WHOLE,
) -> int:
    """Return the bytes of the largest copy of a rank's weight that `backend` makes in a step, of those that are
    quantized in `weights` too.
    """
    is_stored = weights is not None and any(weights.quantization(name) is not None for name in weights.names())
    if backend.quantization is None and not is_stored:  # a mixture has tens of thousands of weights to ask about
        return 0
    if weights is None or not is_stored:
        parts = [each.of_rank(shard) for each in parameters(spec)]
        return max(backend.copy_bytes(each.shape, role=each.role, dtype=dtype) for each in parts)
    return max(
        backend.copy_bytes(each.shape, role=each.role, dtype=dtype, is_stored=any(formats))
        for each, formats in kept_parameters(weights, spec, backend, shard)
    )


def parameter_bytes(parameter: Parameter, formats: KeptFormats, dtype: torch.dtype, backend: Backend) -> int:
    """Return the bytes of a weight as `backend` keeps it, of parts in these formats."""
    if not any(formats):
        return backend.weight_bytes(parameter.shape, role=parameter.role, dtype=dtype)
    pieces = [(each, part.shape[0]) for each, part in zip(formats, parameter.parts, strict=True)]
    return backend.quantized_weight_bytes(pieces, columns=parameter.shape[1], role=parameter.role, dtype=dtype)


def kept_parameters(
    weights: WeightSource, spec: ModelSpec, backend: Backend, shard: Shard = WHOLE
) -> list[tuple[Parameter, KeptFormats]]:
    """Return `stored_parameters` of a rank, each with the formats that its parts are kept in.

    The parts of a weight read the same x, and the experts of a layer are packed alike: where a checkpoint stores only
    some of them quantized, or with their columns in different orders, or experts in different formats, all are dense.
    """
    of_rank = [each.of_rank(shard) for each in stored_parameters(weights, spec)]
    plan = [(each, _kept_formats(weights, each, backend)) for each in of_rank]
    of_experts: dict[tuple[int | None, str], set[KeptFormats]] = {}
    for parameter, formats in plan:
        of_experts.setdefault((parameter.layer, parameter.name), set()).add(formats)
    return [
        (parameter, formats if len(of_experts[parameter.layer, parameter.name]) == 1 else (None,) * len(formats))
        for parameter, formats in plan
    ]


def _kept_formats(weights: WeightSource, parameter: Parameter, backend: Backend) -> KeptFormats:
    formats = tuple(_kept_format(weights, part, parameter.role, backend) for part in parameter.parts)
    if len({type(each) for each in formats}) == 1 and (
        None in formats or weights.in_one_order([part.piece.name for part in parameter.parts])
    ):
        return formats
    return (None,) * len(formats)


def _kept_format(weights: WeightSource, part: Part, role: WeightRole, backend: Backend) -> QuantizedFormat | None:
    """Return the format that a backend could keep rows of a weight in: None if they are dense, or no rows of a stored
    matrix, or not whole groups of their columns, or if the backend does not take the format.
    """
    (name, shape), columns = part.piece, part.columns
    stored = weights.quantization(name) if name in weights else None
    if stored is None or not backend.accepts(stored, role) or part.row_numbers() is None:
        return None
    if columns is not None and not (are_whole_groups(stored, columns, shape[1]) and weights.is_in_order(name)):
        return None
    return stored


def resolve_dtype(setting: str, spec: ModelSpec | EncoderSpec) -> torch.dtype:
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
    embed, head = _tied_pair(weights, spec)
    both = spec.tied_embeddings and embed.name in weights and head.name in weights
    aside = [name for names in left_aside(weights, spec).values() for name in names]
    weights.check([*plan, head] if both else plan, architecture=spec.architecture, aside=aside)
    if not both or _are_equal(weights, embed, head):
        return spec
    _logger.warning(
        "config.json says that %s is the output head too (tie_word_embeddings), but the checkpoint holds a different "
        "%s, which is used; set tie_word_embeddings to false",
        embed.name,
        head.name,
    )
    return replace(spec, tied_embeddings=False)


def left_aside(weights: WeightSource, spec: ModelSpec) -> dict[str, list[str]]:
    """Return the tensors that do not belong to the network of `spec` and need not, by kind: vision, audio, ..."""
    family = find_family(spec.architecture)
    further = range(len(spec.layers), len(spec.layers) + spec.further_layers)
    mixers = [layer.mixer for layer in spec.layers]
    reusing = {n for n, mixer in enumerate(mixers) if isinstance(mixer, AttentionSpec) and mixer.kv_layer is not None}
    found: dict[str, list[str]] = {}
    for name in weights.names():
        kind = kind_aside(name, wrapper=bool(family.text_types), further=further, reusing=reusing)
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return found


def describe_aside(weights: WeightSource, spec: ModelSpec) -> list[str]:
    """Return a line on what of the checkpoint is left aside, if anything is."""
    counts = [f"{len(names)} tensors of {kind}" for kind, names in left_aside(weights, spec).items()]
    text = "text alone is computed, images are refused" if find_family(spec.architecture).text_types else ""
    aside = f"left aside: {', '.join(counts)}" if counts else ""
    return ["; ".join(filter(None, (text, aside)))] if text or aside else []


def stored_parameters(weights: WeightSource, spec: ModelSpec) -> list[Parameter]:
    """Return `parameters` under the names of the checkpoint: a language model in a larger one has names of its own, and
    a tied pair may be stored as the head alone.
    """
    rename = _renaming(weights, spec)
    choices = [
        [replace(each, parts=tuple(replace(part, piece=rename(part.piece)) for part in each.parts)) for each in found]
        for found in (parameters(spec, names) for names in (None, *find_family(spec.architecture).alternatives))
    ]
    found = max(choices, key=lambda each: sum(piece.name in weights for p in each for piece in p.pieces))
    embed, head = _tied_pair(weights, spec)
    if spec.tied_embeddings and embed.name not in weights and head.name in weights:
        return [
            replace(each, parts=(replace(each.parts[0], piece=head),)) if each.pieces == (embed,) else each
            for each in found
        ]
    return found


def _tied_pair(weights: WeightSource, spec: ModelSpec) -> tuple[Piece, Piece]:
    """Return the embedding and the output head, of which a tied network has one."""
    names, table = find_family(spec.architecture).names, (spec.vocab_size, spec.hidden_size)
    embed, head = (stored_parts(names, name, Place())[0].name for name in ("embed", "head"))
    rename = _renaming(weights, spec)
    return rename(Piece(embed, table)), rename(Piece(head, table))


def _renaming(weights: WeightSource, spec: ModelSpec) -> Callable[[Piece], Piece]:
    """Return how the checkpoint calls the pieces of the network: those of one without a head may lack the prefix."""
    family = find_family(spec.architecture)
    if family.text_types:
        name = text_names(weights.names())
        return lambda piece: piece._replace(name=name(piece.name))
    embed = stored_parts(family.names, "embed", Place())[0].name
    prefix, _, bare = embed.partition(".")
    if embed in weights or bare not in weights:
        return lambda piece: piece
    return lambda piece: piece._replace(name=piece.name.removeprefix(f"{prefix}."))


def _are_equal(weights: WeightSource, first: Piece, second: Piece) -> bool:
    """Return whether two tensors of one shape hold the same numbers; one that is quantized differs."""
    if weights.quantization(first.name) or weights.quantization(second.name):
        return False
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
    group: Group | None = None,
) -> Decoder:
    """Load a network that `check_weights` has returned, with a progress bar on stderr if asked; `on_progress` is called
    with the fraction that is loaded. With a group, load the part of this rank.
    """
    plan = kept_parameters(weights, spec, backend, WHOLE if group is None else group.shard)
    outer: dict[str, Weight] = {}
    layers: list[dict[str, Weight]] = [{} for _ in spec.layers]
    for parameter, formats in _with_progress(plan, dtype, progress, on_progress):
        target = outer if parameter.layer is None else layers[parameter.layer]
        with ExitStack() as stack:
            reader = _Reader(weights, dtype, stack)
            parts = [
                reader.read(part, quantized=stored is not None)
                for part, stored in zip(parameter.parts, formats, strict=True)
            ]
            tensors = [part.to(device) for part in parts if isinstance(part, Tensor)]
            if len(tensors) == len(parts):
                weight = backend.pack(tensors, role=parameter.role, dtype=dtype)
            else:
                weight = backend.pack_quantized(parts, role=parameter.role, dtype=dtype)
        if parameter.expert is None:
            target[parameter.name] = weight
        else:
            target.setdefault(parameter.name, []).append(weight)
    if spec.tied_embeddings:
        outer["head"] = outer["embed"]
    network = NetworkWeights(layers=tuple(map(_layer_weights, layers)), **outer)
    if group is None:
        return Decoder(spec, network, backend, dtype=dtype)
    return RankDecoder(rank_spec(spec, group.shard.size), network, backend, dtype=dtype, group=group)


class _Reader:
    """Reads the parts of a weight for as long as the contexts of `stack` last, each stored tensor once."""

    def __init__(self, weights: WeightSource, dtype: torch.dtype, stack: ExitStack) -> None:
        self._weights, self._dtype, self._stack = weights, dtype, stack
        self._tensors: dict[Piece, Tensor] = {}
        self._stored: dict[Piece, QuantizedWeight] = {}

    def read(self, part: Part, *, quantized: bool) -> Tensor | QuantizedWeight:
        """Return rows of a weight, `quantized` as they are stored."""
        piece, weights = part.piece, self._weights
        if weights.quantization(piece.name) is None:
            if piece not in self._tensors:
                self._tensors[piece] = self._stack.enter_context(weights.read(piece))
            return part.take(self._tensors[piece])
        if piece not in self._stored:
            self._stored[piece] = self._stack.enter_context(weights.read_quantized(piece))
        stored = self._stored[piece]
        if quantized and (rows := part.row_numbers()) is not None:
            stored = stored.rows(rows)
            return stored if part.columns is None else stored.only_columns(part.columns)
        if piece not in self._tensors:
            self._tensors[piece] = stored.dequantize(self._dtype)
        return part.take(self._tensors[piece])


def _layer_weights(weights: dict[str, Weight]) -> LayerWeights:
    """Return the weights of a layer by their names; those of an MLP are named after it, as in "mlp.down"."""
    plain = {name: weight for name, weight in weights.items() if "." not in name}
    for part in {name.partition(".")[0] for name in weights if "." in name}:
        plain[part] = MlpWeights(
            **{name.partition(".")[2]: weight for name, weight in weights.items() if name.startswith(f"{part}.")}
        )
    return LayerWeights(**plain)


def _with_progress(
    plan: list[tuple[Parameter, KeptFormats]], dtype: torch.dtype, shown: bool, on_progress: Callable[[float], None]
) -> Iterator[tuple[Parameter, KeptFormats]]:
    """Yield the plan, counting on the bar what has been loaded."""
    sizes = [math.prod(parameter.shape) * dtype.itemsize for parameter, _ in plan]
    loaded = 0
    with tqdm(total=sum(sizes), desc="Loading weights", unit="B", unit_scale=True, disable=not shown) as bar:
        for each, size in zip(plan, sizes, strict=True):
            yield each
            loaded += size
            bar.update(size)
            on_progress(loaded / sum(sizes))
