"""Computes a whole network but its output head in one call: Python has no part in what happens between its layers."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.cpu.bindings import (
    ACTIVATIONS,
    Heads,
    Layer,
    Library,
    Mixture,
    Network,
    Step,
    Store,
    Weight,
    check,
    vector_address,
)
from splitfuse.kernels.interface import ExpertsSpec, LayerSpec, LayerWeights, NetworkPlan


def compile_network(library: Library, plan: NetworkPlan) -> FusedNetwork | None:
    """Return the network as one call; None if its layers differ in what csrc/layers.h takes to be the same for all."""
    heads = {replace(each.attention, window=None, qkv_bias=False, o_bias=False, qk_norm=False) for each in plan.layers}
    return FusedNetwork(library, plan) if len(heads) == 1 else None


class FusedNetwork:
    """Runs embedding, layers and last norm from tables of structs. Gives the same bits as the operations one by one."""

    def __init__(self, library: Library, plan: NetworkPlan) -> None:
        weights, attention = plan.weights, plan.layers[0].attention
        self._library = library
        self._weights = weights  # they own the memory
        self._heads = Heads.of(attention, plan.ropes[attention.rope], plan.norm_eps)
        self._first_store: weakref.ref[Store] | None = None  # weak: a cache that its engine gave up is not kept
        self._mixtures: list[Mixture] = []
        self._layers = (Layer * len(plan.layers))()
        packed = isinstance(weights.embed, Weight)
        vocabulary, hidden = (weights.embed.rows, weights.embed.columns) if packed else weights.embed.shape
        if not packed:
            check(weights.embed, torch.bfloat16)
        for entry, spec, layer in zip(self._layers, plan.layers, weights.layers, strict=True):
            self._set_layer(entry, spec, layer, hidden)
        self._network = Network(
            ctypes.addressof(self._layers),
            len(self._layers),
            hidden,
            vocabulary,
            None if packed else weights.embed.data_ptr(),
            weights.embed.address if packed else None,
            vector_address(weights.norm, hidden),
            plan.norm_eps,
        )

    def _set_layer(self, entry: Layer, spec: LayerSpec, layer: LayerWeights, hidden: int) -> None:
        attention, mlp = spec.attention, spec.mlp
        heads_width = attention.num_heads * attention.head_dim
        entry.attn_norm = vector_address(layer.attn_norm, hidden)
        entry.q_norm = vector_address(layer.q_norm, attention.head_dim)
        entry.k_norm = vector_address(layer.k_norm, attention.head_dim)
        _set_linear(entry, layer, "qkv", columns=hidden)
        _set_linear(entry, layer, "o", columns=heads_width)
        assert layer.o.rows == hidden
        entry.window = attention.window or 0
        entry.mlp_norm = vector_address(layer.mlp_norm, hidden)
        entry.activation = ACTIVATIONS[mlp.activation]
        if not isinstance(mlp, ExpertsSpec):
            _set_linear(entry, layer, "gate_up", columns=hidden)
            _set_linear(entry, layer, "down", columns=mlp.intermediate_size)
            assert layer.down.rows == hidden and layer.gate_up.rows == 2 * mlp.intermediate_size
            return
        mixture = Mixture.of(
            layer.w13,
            layer.w2,
            top_k=mlp.top_k,
            activation=mlp.activation,
            router=layer.router,
            renormalize=mlp.renormalize,
        )
        assert layer.w2[0].rows == layer.router.columns == hidden
        self._mixtures.append(mixture)
        entry.mixture = mixture.address

    def __call__(self, stores: Sequence[Store], batch: RaggedBatch) -> Tensor:
        """Return the normed hidden states [R, C] of `logit_rows`, in bf16.

        Raises IndexError for a step that cannot be computed.
        """
        check(batch.packed, torch.int32)
        *addresses, end = accumulate((4 * size for size in batch.sizes), initial=batch.packed.data_ptr())
        assert end == batch.packed.data_ptr() + batch.packed.nbytes
        arrays = Step(batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows, *addresses)
        vocabulary = self._network.vocabulary
        arrays.check(self._library, stores[0], max_position=self._heads.max_position, vocabulary=vocabulary)
        rows = torch.empty(batch.num_rows, self._network.hidden, dtype=torch.bfloat16)
        with self._library.lock:  # engines that share a network take turns with its table
            if self._first_store is None or self._first_store() is not stores[0]:
                for entry, store in zip(self._layers, stores, strict=True):
                    entry.store = store
                self._first_store = weakref.ref(stores[0])
            self._library.network(arrays.address, self._heads.address, self._network.address, rows.data_ptr())
        return rows


def _set_linear(entry: Layer, layer: LayerWeights, name: str, *, columns: int) -> None:
    """Give the entry this weight of the layer, and its bias if it has one."""
    weight: Weight = getattr(layer, name)
    assert weight.columns == columns
    setattr(entry, name, weight.address)
    setattr(entry, f"{name}_bias", vector_address(getattr(layer, f"{name}_bias"), weight.rows))
