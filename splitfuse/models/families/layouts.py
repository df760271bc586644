"""Says how a checkpoint stores a weight where it is not one tensor with our rows in our order.

A name table (`WeightNames`) gives for each of our weights the tensors that are stacked by rows to make it: a plain name
for a tensor that is taken as it is, a `Stored` for one of which only some rows are ours, or in another order. A
function of the place gives them where layers differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Says which layer and which of its experts a weight belongs to; None: it belongs to none. `rotary_dim` is how many
    elements of a head the layer's rope rotates.
    """

    layer: LayerSpec | None = None
    number: int | None = None
    expert: int | None = None
    rotary_dim: int = 0

    @property
    def attention(self) -> AttentionSpec:
        """Return the attention of the layer."""
        assert self.layer is not None and isinstance(self.layer.mixer, AttentionSpec)
        return self.layer.mixer

    @property
    def num_experts(self) -> int:
        """Return the number of experts of the layer."""
        assert self.layer is not None and isinstance(self.layer.mlp, ExpertsSpec)
        return self.layer.mlp.router.num_experts


@dataclass(frozen=True)
class Stored:
    """Names a stored tensor, and says how to take a weight's rows from it.

    `take` returns our rows as a view of the stored tensor where it can; `shape` returns the shape of the stored tensor
    for that of our rows.
    """

    name: str
    take: Callable[[Tensor, Place], Tensor] = lambda tensor, _: tensor
    shape: Callable[[Shape, Place], Shape] = lambda shape, _: shape


Layout: TypeAlias = tuple[str | Stored, ...]
"""Stored tensors that are stacked by rows to make a weight."""


def plus_one(name: str) -> Stored:
    """Return a norm's weight that is stored as its distance from one."""
    return Stored(name, lambda tensor, _: tensor.float() + 1)


def transposed(name: str) -> Stored:
    """Return a weight that is stored as [columns, rows]."""
    return Stored(name, lambda tensor, _: tensor.T, lambda shape, _: shape[::-1])


def conv1d(name: str) -> Stored:
    """Return the weight of a convolution of each channel alone, which is stored as [channels, 1, taps]."""
    return Stored(name, lambda tensor, _: tensor[:, 0].T, lambda shape, _: (shape[1], 1, shape[0]))


def every_other(stored: Stored, first: int) -> Stored:
    """Return every second row of a weight, from row `first` on."""
    return Stored(
        stored.name,
        lambda tensor, place: stored.take(tensor, place)[first::2],
        lambda shape, place: stored.shape((2 * shape[0], *shape[1:]), place),
    )


def of_expert(stored: Stored) -> Stored:
    """Return an expert's weight, of a tensor that holds those of all experts of a layer: [experts, ...]."""
    return Stored(
        stored.name,
        lambda tensor, place: stored.take(tensor[place.expert], place),
        lambda shape, place: (place.num_experts, *stored.shape(shape, place)),
    )


def of_heads(name: str, order: Callable[[AttentionSpec], Tensor]) -> Stored:
    """Return rows of heads that are stored in another order: row i of ours is row `order(spec)[i]` of the tensor."""
    return Stored(name, lambda tensor, place: tensor[order(place.attention)])


def of_kv_heads(name: str) -> Stored:
    """Return queries, keys and values that are stored by key/value heads: the queries of one, its key, its value."""

    def order(spec: AttentionSpec) -> Tensor:
        num_rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        heads = torch.arange(num_rows).view(spec.num_kv_heads, -1, spec.head_dim)
        return torch.cat((heads[:, :-2].flatten(), heads[:, -2].flatten(), heads[:, -1].flatten()))

    return of_heads(name, order)


def of_each_head(name: str) -> Stored:
    """Return a weight of heads of which each has a tensor of its own, with `{head}` in its name."""
    return Stored(name, lambda tensor, _: tensor.unsqueeze(0), lambda shape, _: shape[1:])


def interleaved_rope(name: str) -> Stored:
    """Return queries or keys whose rope turns neighbouring elements of a head, element 2i with 2i + 1: in our order it
    turns element i with i + rotary_dim / 2, which gives the same scores.
    """

    def take(tensor: Tensor, place: Place) -> Tensor:
        heads = tensor.view(-1, place.attention.head_dim, *tensor.shape[1:])
        return heads[:, _halves_apart(place)].view_as(tensor)

    return Stored(name, take)


def interleaved_norm(name: str) -> Stored:
    """Return the weight of the norm of such queries or keys."""
    return Stored(
        name, lambda tensor, place: tensor.view(-1, place.attention.head_dim)[:, _halves_apart(place)].view_as(tensor)
    )


def _halves_apart(place: Place) -> Tensor:
    turned, kept = torch.arange(place.attention.head_dim).tensor_split([place.rotary_dim])
    return torch.cat((turned[0::2], turned[1::2], kept))
