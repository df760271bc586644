"""From a checkpoint to a decoder: find, check, cast, pack, one weight at a time, straight from the mapped files.

At most one weight exists beside the finished model, and only if it had to be cast. Which tensors there are follows from
the spec; what the checkpoint calls them, from the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from splitfuse.errors import UnsupportedModelError, WeightsError
from splitfuse.kernels.reference import Kernels, LayerWeights, NetworkWeights, Weight
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.families import find_family
from splitfuse.models.sources.safetensors import Checkpoint, listing, release
from splitfuse.models.spec import ModelSpec, MoESpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PACKED = {"qkv", "o", "gate_up", "down", "head", "router", "w13", "w2"}
PLAIN = "plain"  # the role of what is not packed
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")  # computed, not learnt
DUMMY_SCALE = 0.02
DUMMY_SEED = 0

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One weight of the decoder, and the checkpoint's tensors that are stacked by rows to make it."""

    name: str  # a field of LayerWeights, or of NetworkWeights where layer is None
    layer: int | None
    expert: int | None
    pieces: tuple[tuple[str, Shape], ...]

    @property
    def shape(self) -> Shape:
        """Of the whole."""
        shapes = [shape for _, shape in self.pieces]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every weight that the network of `spec` has."""
    names = find_family(spec.architecture).names

    def parameter(
        name: str, shapes: tuple[Shape, ...], layer: int | None = None, expert: int | None = None
    ) -> Parameter:
        pieces = zip((piece.format(layer=layer, expert=expert) for piece in names[name]), shapes, strict=True)
        return Parameter(name, layer, expert, tuple(pieces))

    found = [parameter(name, shapes) for name, shapes in _outer_shapes(spec).items()]
    for layer in range(spec.num_layers):
        found += [parameter(name, shapes, layer) for name, shapes in _layer_shapes(spec, layer).items()]
        if (moe := spec.moe_of(layer)) is not None:
            of_experts = _expert_shapes(moe, spec.hidden_size).items()
            for expert in range(moe.num_experts):
                found += [parameter(name, shapes, layer, expert) for name, shapes in of_experts]
    return found


def weight_bytes(spec: ModelSpec, dtype: torch.dtype, kernels: Kernels) -> int:
    """Bytes of all weights as `kernels` keep those of `dtype`."""
    return sum(
        kernels.weight_bytes(parameter.shape, role=_role(parameter, spec), dtype=dtype)
        for parameter in parameters(spec)
    )


def resolve_dtype(setting: str, spec: ModelSpec) -> torch.dtype:
    """The dtype for a setting of config.DTYPES; "auto" is the checkpoint's own.

    Raises UnsupportedModelError if the checkpoint's is none that we compute in.
    """
    name = spec.dtype if setting == "auto" else setting
    if name not in DTYPES:
        raise UnsupportedModelError(f"the checkpoint is in {name}: set dtype to one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_decoder(
    path: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    load_format: str = "safetensors",
    progress: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Decoder:
    """The decoder of the model in `path`, with a progress bar on stderr if asked; `on_progress` is told the fraction
    that is loaded.

    `load_format` "dummy" reads no weights but makes random ones, the same each time, too small to overflow. Raises
    WeightsError, before anything is loaded, if a weight is missing, surplus, misshapen or not floating point.
    """
    plan = parameters(spec)
    read = _dummy_reader(dtype, device) if load_format == "dummy" else _checkpoint_reader(Checkpoint(path), plan, spec)
    outer: dict[str, Weight] = {}
    layers: list[dict[str, Weight]] = [{} for _ in range(spec.num_layers)]
    for parameter in _with_progress(plan, dtype, progress, on_progress):
        target = outer if parameter.layer is None else layers[parameter.layer]
        role = _role(parameter, spec)
        with read(parameter) as pieces:
            on_device = [piece.to(device) for piece in pieces]
            weight = kernels.pack(on_device, role=role, dtype=dtype)
        if parameter.expert is None:
            target[parameter.name] = weight
        else:
            target.setdefault(parameter.name, []).append(weight)
    if spec.tied_embeddings:
        outer["head"] = outer["embed"]
    return Decoder(spec, NetworkWeights(layers=tuple(LayerWeights(**layer) for layer in layers), **outer), kernels)


def _role(parameter: Parameter, spec: ModelSpec) -> str:
    """What `Kernels.pack` is told of a weight: a tied embedding is the output head."""
    if parameter.name == "embed" and spec.tied_embeddings:
        return "head"
    return parameter.name if parameter.name in PACKED else PLAIN


def _outer_shapes(spec: ModelSpec) -> dict[str, tuple[Shape, ...]]:
    table = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[Shape, ...]] = {"embed": (table,), "norm": ((spec.hidden_size,),)}
    return shapes if spec.tied_embeddings else shapes | {"head": (table,)}


def _expert_shapes(moe: MoESpec, hidden: int) -> dict[str, tuple[Shape, ...]]:
    """Name -> shapes of the pieces, for one expert of a layer."""
    inner = moe.intermediate_size
    return {"w13": ((inner, hidden), (inner, hidden)), "w2": ((hidden, inner),)}


def _layer_shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[Shape, ...]]:
    """Name -> shapes of the pieces, for one layer but its experts."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[Shape, ...]] = {
        "attn_norm": ((hidden,),),
        "qkv": ((q, hidden), (kv, hidden), (kv, hidden)),
        "o": ((hidden, q),),
        "mlp_norm": ((hidden,),),
    }
    if (moe := spec.moe_of(layer)) is not None:
        shapes["router"] = ((moe.num_experts, hidden),)
    else:
        shapes |= {"gate_up": ((inner, hidden), (inner, hidden)), "down": ((hidden, inner),)}
    if spec.qkv_bias:
        shapes["qkv_bias"] = ((q,), (kv,), (kv,))
    if spec.o_bias:
        shapes["o_bias"] = ((hidden,),)
    if spec.mlp_bias:
        shapes |= {"gate_up_bias": ((inner,), (inner,)), "down_bias": ((hidden,),)}
    if spec.head_norms:
        shapes |= {"q_norm": ((spec.head_dim,),), "k_norm": ((spec.head_dim,),)}
    return shapes


Reader: TypeAlias = Callable[[Parameter], AbstractContextManager[list[Tensor]]]
"""What gives a parameter's pieces, for as long as they are being packed."""


def _checkpoint_reader(checkpoint: Checkpoint, plan: list[Parameter], spec: ModelSpec) -> Reader:
    """Pieces mapped from files, once everything is known to be there."""
    wanted = dict(piece for parameter in plan for piece in parameter.pieces)
    if missing := wanted.keys() - checkpoint.names():
        raise WeightsError(f"weights missing from the checkpoint ({len(missing)}): {listing(missing)}")
    unread = set(find_family(spec.architecture).names["head"]) if spec.tied_embeddings else set()
    surplus = {name for name in checkpoint.names() - wanted.keys() - unread if not name.endswith(HARMLESS_SUFFIXES)}
    if surplus:
        raise WeightsError(
            f"weights that {spec.architecture} with this config.json does not use ({len(surplus)}): {listing(surplus)}"
        )
    for name, shape in wanted.items():
        checkpoint.check(name, shape)

    @contextmanager
    def read(parameter: Parameter) -> Iterator[list[Tensor]]:
        pieces = [checkpoint.read(name) for name, _ in parameter.pieces]
        yield pieces
        for piece in pieces:
            release(piece)

    return read


def _dummy_reader(dtype: torch.dtype, device: torch.device) -> Reader:
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)

    @contextmanager
    def read(parameter: Parameter) -> Iterator[list[Tensor]]:
        pieces = [torch.empty(shape, dtype=dtype, device=device) for _, shape in parameter.pieces]
        for piece in pieces:
            if parameter.name.endswith("norm"):
                piece.fill_(1.0)
            else:
                piece.normal_(std=DUMMY_SCALE, generator=generator)
        yield pieces

    return read


def _with_progress(
    plan: list[Parameter], dtype: torch.dtype, shown: bool, on_progress: Callable[[float], None]
) -> Iterator[Parameter]:
    """The plan, counting on the bar what has been loaded."""
    sizes = [math.prod(parameter.shape) * dtype.itemsize for parameter in plan]
    loaded = 0
    with tqdm(total=sum(sizes), desc="Loading weights", unit="B", unit_scale=True, disable=not shown) as bar:
        for parameter, size in zip(plan, sizes, strict=True):
            yield parameter
            loaded += size
            bar.update(size)
            on_progress(loaded / sum(sizes))
