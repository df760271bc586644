"""Lists the weights of a network: what its spec says there is, and where a checkpoint of its family has each part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from splitfuse.kernels.group import Shard
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    Mixer,
    MlpSpec,
    NormSpec,
)
from splitfuse.kernels.weights import WeightRole
from splitfuse.models.families.common import WeightNames
from splitfuse.models.families.layouts import Place, Stored
from splitfuse.models.families.registry import find_family
from splitfuse.models.sharding import ADDED_ONCE, DIVIDED, SUMMED
from splitfuse.models.sources.source import Piece, Shape
from splitfuse.models.spec import ModelSpec

Shapes: TypeAlias = dict[str, tuple[Shape, ...]]
"""Name of a weight -> shapes of the pieces that are stacked by rows to make it."""


@dataclass(frozen=True)
class Parameter:
    """Names one weight of the decoder, and the checkpoint's tensors that are stacked by rows to make it."""

    name: str  # a field of LayerWeights, "mlp.up" of its MlpWeights, or of NetworkWeights where layer is None
    role: WeightRole
    layer: int | None
    expert: int | None
    parts: tuple[Part, ...]
    sections: tuple[int, ...]  # rows that ranks divide each for itself: of queries, keys and values, say

    def of_rank(self, shard: Shard) -> Parameter:
        """Return what a rank has of the weight: its part of each section of rows, or of the columns, or all of it."""
        if shard.size == 1 or self.name not in DIVIDED:
            return self
        if shard.sums and self.name in SUMMED:
            columns = shard.span(self.shape[1])
            return replace(self, parts=tuple(part.only_columns(columns) for part in self.parts))
        if shard.sums and self.name in ADDED_ONCE:
            return replace(self, parts=tuple(replace(part, is_zero=shard.rank > 0) for part in self.parts))
        ends = list(accumulate(self.sections, initial=0))
        spans = [(first, shard.span(size)) for first, size in zip(ends, self.sections, strict=False)]
        wanted = [range(first + span.start, first + span.stop) for first, span in spans]
        parts: list[Part] = []
        first = 0
        for part in self.parts:
            last = first + part.shape[0]
            common = [range(max(rows.start, first), min(rows.stop, last)) for rows in wanted]
            parts += [part.only(range(rows.start - first, rows.stop - first)) for rows in common if rows]
            first = last
        return replace(self, parts=tuple(parts), sections=tuple(len(rows) for rows in wanted))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the tensors as they are stored."""
        return tuple(part.piece for part in self.parts)

    @property
    def shape(self) -> Shape:
        """Return the shape of the whole."""
        shapes = [part.shape for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class Part:
    """Holds rows of a weight: the tensor that they are in, how they are taken from it, and their shape."""

    piece: Piece
    stored: Stored
    place: Place
    shape: Shape
    chosen: range | None = None  # of the rows that are taken
    columns: range | None = None  # of each row
    is_zero: bool = False  # zeros in place of what is stored

    def only(self, rows: range) -> Part:
        """Return some of the rows."""
        return replace(self, chosen=rows, shape=(len(rows), *self.shape[1:]))

    def only_columns(self, columns: range) -> Part:
        """Return some of the columns."""
        return replace(self, columns=columns, shape=(self.shape[0], len(columns)))

    def take(self, tensor: Tensor) -> Tensor:
        """Return the rows, of the stored tensor."""
        taken = self.stored.take(tensor, self.place)
        if self.chosen is not None:
            taken = taken[self.chosen.start : self.chosen.stop]
        if self.columns is not None:
            taken = taken[:, self.columns.start : self.columns.stop]
        return torch.zeros_like(taken) if self.is_zero else taken

    def row_numbers(self) -> Tensor | None:
        """Return which rows of the stored tensor these are, or are columns of, in order; None if they are none."""
        if len(self.piece.shape) != 2:
            return None
        numbers = replace(self, columns=None).take(torch.arange(self.piece.shape[0]).unsqueeze(1))
        return numbers[:, 0] if numbers.shape == (self.shape[0], 1) else None


def parameters(spec: ModelSpec, alternative: WeightNames | None = None) -> list[Parameter]:
    """Return every weight that the network of `spec` has, by the names of its family or an alternative of it."""
    names = find_family(spec.architecture).names
    names = {**names, **alternative} if alternative else names

    def named(shapes: Shapes, place: Place) -> Iterator[Parameter]:
        for name, pieces in shapes.items():
            layout, sections = stored_parts(names, name, place), tuple(piece[0] for piece in pieces)
            if "{head}" in layout[0].name:
                layout *= len(pieces)
            if len(layout) == 1 < len(pieces):  # all pieces lie in one tensor, in our order
                pieces = ((sum(piece[0] for piece in pieces), *pieces[0][1:]),)
            parts = tuple(_part(*each, place, head) for head, each in enumerate(zip(layout, pieces, strict=True)))
            yield Parameter(name, _role(name, spec), place.number, place.expert, parts, sections)

    found = list(named(_outer_shapes(spec), Place()))
    for number, layer in enumerate(spec.layers):
        mixer = layer.mixer
        rope = mixer.rope if isinstance(mixer, AttentionSpec) else None
        rotary_dim = 0 if rope is None else spec.ropes[rope].rotary_dim
        place = Place(layer, number, rotary_dim=rotary_dim)
        found += named(_layer_shapes(layer, spec.norm, spec.hidden_size), place)
        if isinstance(layer.mlp, ExpertsSpec):
            of_expert = _mlp_shapes(layer.mlp.expert, spec.hidden_size, gate_up="w13", up="w1", down="w2")
            for expert in range(layer.mlp.router.num_experts):
                found += named(of_expert, Place(layer, number, expert))
    return found


def stored_parts(names: WeightNames, name: str, place: Place) -> list[Stored]:
    """Return the tensors that a weight of `place` is made of."""
    layout = names[name]
    parts = layout(place) if callable(layout) else layout
    return [Stored(each) if isinstance(each, str) else each for each in parts]


def _part(stored: Stored, shape: Shape, place: Place, head: int) -> Part:
    name = stored.name.format(layer=place.number, expert=place.expert, head=head)
    return Part(Piece(name, stored.shape(shape, place)), stored, place, shape)


def _role(name: str, spec: ModelSpec) -> WeightRole:
    """Return the role of a weight: a tied embedding is the output head; one without a role stays plain."""
    if name == "embed" and spec.tied_embeddings:
        return WeightRole.HEAD
    last = name.rpartition(".")[2]
    others = ("output_scale", "choice_bias", "expert_scale", "skip")
    if last.removesuffix("_bias").endswith(("norm", "conv", "decay")) or last in others:
        return WeightRole.NORM
    return WeightRole(last) if last in {role.value for role in WeightRole} else WeightRole.PLAIN


def _outer_shapes(spec: ModelSpec) -> Shapes:
    table = (spec.vocab_size, spec.hidden_size)
    shapes: Shapes = {"embed": (table,), **_norm_shapes("norm", spec.norm, spec.hidden_size)}
    if spec.learned_positions:
        shapes["positions"] = ((spec.max_position + spec.position_offset, spec.hidden_size),)
    if spec.token_input_rows:
        size = spec.token_input_size
        width = size * len(spec.layers)
        shapes |= {"token_inputs": ((spec.token_input_rows, width),), "token_projection": ((width, spec.hidden_size),)}
        shapes["token_input_norm"] = ((size,),)
    if spec.head_bias:
        shapes["head_bias"] = ((spec.vocab_size,),)
    return shapes if spec.tied_embeddings else shapes | {"head": (table,)}


def _norm_shapes(name: str, norm: NormSpec, *shape: int) -> Shapes:
    return {name: (shape,), f"{name}_bias": (shape,)} if norm.bias else {name: (shape,)}


def _layer_shapes(layer: LayerSpec, norm: NormSpec, hidden: int) -> Shapes:
    """Return the weights of a layer but those of its experts."""
    shapes: Shapes = {}
    if layer.mixer is not None:
        shapes |= _mixer_shapes(layer.mixer, hidden)
        shapes |= _norm_shapes("attn_norm", norm, hidden) if layer.norms.before else {}
        shapes |= _norm_shapes("post_attn_norm", norm, hidden) if layer.norms.after else {}
    if layer.mlp is not None:
        own_norm = layer.norms.before and not (layer.parallel and layer.shared_norm)
        shapes |= _norm_shapes("mlp_norm", norm, hidden) if own_norm else {}
        shapes |= _norm_shapes("post_mlp_norm", norm, hidden) if layer.norms.after else {}
    if isinstance(layer.mlp, MlpSpec):
        shapes |= _mlp_shapes(layer.mlp, hidden, gate_up="mlp.gate_up", up="mlp.up", down="mlp.down")
    elif layer.mlp is not None:
        router = layer.mlp.router
        shapes["router"] = ((router.num_experts, hidden),)
        shapes |= {"router_bias": ((router.num_experts,),)} if router.bias else {}
        shapes |= {"choice_bias": ((router.num_experts,),)} if router.choice_bias else {}
        shapes |= {"expert_scale": ((router.num_experts,),)} if router.expert_scale else {}
        if layer.mlp.own_norm is not None:
            shapes |= dict.fromkeys(("router_norm", "expert_norm", "post_expert_norm"), ((hidden,),))
            shapes |= {"post_shared_norm": ((hidden,),)} if layer.mlp.shared else {}
        if (shared := layer.mlp.shared) is not None:
            shapes |= _mlp_shapes(shared, hidden, gate_up="shared.gate_up", up="shared.up", down="shared.down")
        shapes |= {"shared_gate": ((1, hidden),)} if layer.mlp.shared_gate else {}
    if layer.token_input is not None:
        size = layer.token_input.size
        shapes |= {"token_gate": ((size, hidden),), "token_out": ((hidden, size),), "token_norm": ((hidden,),)}
    return shapes | ({"output_scale": ((1,),)} if layer.output_scale else {})


def _mixer_shapes(spec: Mixer, hidden: int) -> Shapes:
    if isinstance(spec, AttentionSpec):
        return _attention_shapes(spec, hidden)
    channels = spec.num_channels
    shapes: Shapes = {"conv": ((spec.conv_size, channels),)}
    if isinstance(spec, ConvSpec):
        shapes |= {"in_proj": ((3 * channels, hidden),), "out_proj": ((hidden, channels),)}
        biases: Shapes = {
            "in_proj_bias": ((3 * channels,),),
            "conv_bias": ((channels,),),
            "out_proj_bias": ((hidden,),),
        }
        return shapes | (biases if spec.bias else {})
    if isinstance(spec, DeltaSpec):
        heads, values = spec.num_value_heads, spec.num_value_heads * spec.value_dim
        shapes |= {"gates": ((heads, hidden), (heads, hidden)), "out_norm": ((spec.value_dim,),)}
    else:
        heads, values = spec.num_heads, spec.num_heads * spec.head_dim
        shapes |= {"gates": ((heads, hidden),), "out_norm": ((values,),), "skip": ((heads,),)}
        shapes |= {"conv_bias": ((channels,),)} if spec.conv_bias else {}
        if spec.bias:
            shapes |= {
                "in_proj_bias": ((channels,), (values,)),
                "gates_bias": ((heads,),),
                "out_proj_bias": ((hidden,),),
            }
    shapes |= {"in_proj": ((channels, hidden), (values, hidden)), "out_proj": ((hidden, values),)}
    return shapes | {"decay": ((heads,),), "decay_bias": ((heads,),)}


def _attention_shapes(spec: AttentionSpec, hidden: int) -> Shapes:
    q, kv, dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.head_dim
    own_kv = spec.kv_layer is None
    rows: tuple[int, ...] = (q, kv, kv) if own_kv else (q,)
    shapes: Shapes = {"qkv": tuple((count, hidden) for count in rows), "o": ((hidden, q),)}
    if (latent := spec.latent) is not None:
        rows = (latent.q_width(spec.num_heads), latent.kv_rank + latent.rope_dim)
        shapes = _latent_shapes(latent, spec.num_heads, hidden) | {"qkv": tuple((count, hidden) for count in rows)}
    if spec.qkv_bias:
        shapes["qkv_bias"] = tuple((count,) for count in rows)
    if spec.o_bias:
        shapes["o_bias"] = ((hidden,),)
    if spec.gate:
        shapes["attn_gate"] = ((q, hidden),)
    if spec.sinks:
        shapes["sinks"] = ((spec.num_heads,),)
    if (norms := spec.qk_norm) is not None and norms.weight:
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads))[: 1 + own_kv]:
            pieces = ((1, dim),) * heads if norms.own_weights else ((heads * dim if norms.whole_row else dim,),)
            shapes |= {name: pieces, f"{name}_bias": pieces} if norms.norm.bias else {name: pieces}
    return shapes


def _latent_shapes(spec: LatentSpec, heads: int, hidden: int) -> Shapes:
    """Return the weights of latent attention but those that read the hidden states."""
    shapes: Shapes = {
        "kv_a_norm": ((spec.kv_rank,),),
        "k_b": ((heads, spec.kv_rank, spec.nope_dim),),
        "v_b": ((heads, spec.v_dim, spec.kv_rank),),
        "o": ((hidden, heads * spec.v_dim),),
    }
    if (rank := spec.q_rank) is None:
        return shapes
    return shapes | {"q_a_norm": ((rank,),), "q_b": ((heads * (spec.rope_dim + spec.nope_dim), rank),)}


def _mlp_shapes(spec: MlpSpec, hidden: int, *, gate_up: str, up: str, down: str) -> Shapes:
    """Return the weights of an MLP or an expert: `gate_up`, or `up` if it is not gated, and `down`, by these names."""
    inner = spec.intermediate_size
    halves = 2 if spec.gated else 1
    shapes: Shapes = {gate_up if spec.gated else up: ((inner, hidden),) * halves, down: ((hidden, inner),)}
    return shapes | ({f"{up}_bias": ((inner,),) * halves, f"{down}_bias": ((hidden,),)} if spec.bias else {})
