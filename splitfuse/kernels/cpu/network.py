"""A whole network but its output head in one call, so that Python has no part in what happens between its layers."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from splitfuse.kernels.cpu import bindings
from splitfuse.kernels.cpu.arguments import KVStore, Mixture, PackedWeight, address, check, check_step
from splitfuse.kernels.cpu.bindings import Library
from splitfuse.kernels.reference import LayerWeights, NetworkWeights


class FusedNetwork:
    """Embedding, layers and last norm as tables of structs. Gives the same bits as its operations one by one."""

    def __init__(
        self,
        kernels: Library,
        weights: NetworkWeights,
        *,
        windows: Sequence[int | None],
        activation: int,
        heads: bindings.Heads,
        top_k: int,
        renormalize: bool,
    ) -> None:
        self._library = kernels
        self._weights = weights  # they own the memory
        self._heads = heads
        self._first_store: weakref.ref[KVStore] | None = None  # weak: a cache that its engine gave up is not kept
        self._mixtures: list[Mixture] = []
        self._layers = (bindings.Layer * len(weights.layers))()
        head_dim = weights.layers[0].o.columns // heads.num_heads
        for entry, layer, window in zip(self._layers, weights.layers, windows, strict=True):
            hidden = layer.qkv.columns
            entry.attn_norm = address(layer.attn_norm, hidden)
            entry.mlp_norm = address(layer.mlp_norm, hidden)
            entry.q_norm = address(layer.q_norm, head_dim)
            entry.k_norm = address(layer.k_norm, head_dim)
            _set_linear(entry, layer, "qkv", "o")
            assert layer.o.rows == hidden and layer.o.columns == head_dim * heads.num_heads
            if layer.router is None:
                _set_linear(entry, layer, "gate_up", "down")
                assert layer.down.rows == layer.gate_up.columns == hidden
                assert layer.gate_up.rows == 2 * layer.down.columns
            else:
                mixture = Mixture(
                    layer.w13,
                    layer.w2,
                    top_k=top_k,
                    activation=activation,
                    router=layer.router,
                    renormalize=renormalize,
                )
                assert mixture.hidden == layer.router.columns == hidden
                self._mixtures.append(mixture)
                entry.mixture = mixture.address
            entry.window = window or 0
            entry.activation = activation
        packed = isinstance(weights.embed, PackedWeight)
        vocabulary, hidden = (weights.embed.rows, weights.embed.columns) if packed else weights.embed.shape
        if not packed:
            check(weights.embed, torch.bfloat16)
        self._network = bindings.Network(
            ctypes.addressof(self._layers),
            len(self._layers),
            hidden,
            vocabulary,
            None if packed else weights.embed.data_ptr(),
            weights.embed.address if packed else None,
            address(weights.norm, hidden),
            heads.eps,
        )

    def __call__(
        self,
        stores: Sequence[KVStore],
        packed: Tensor,
        *,
        num_tokens: int,
        num_requests: int,
        table_width: int,
        num_rows: int,
    ) -> Tensor:
        """The normed hidden states [R, C] of `logit_rows`, in bf16. Raises IndexError for a step that cannot be."""
        check(packed, torch.int32)
        sizes = (num_tokens, num_tokens, num_tokens, num_requests + 1, num_requests, num_requests * table_width)
        addresses = list(accumulate((4 * size for size in sizes), initial=packed.data_ptr()))
        assert addresses[-1] + 4 * num_rows == packed.data_ptr() + packed.nbytes
        step = bindings.Step(num_tokens, num_requests, table_width, num_rows, *addresses)
        check_step(
            self._library,
            step,
            stores[0].struct,
            max_position=self._heads.max_position,
            vocabulary=self._network.vocabulary,
        )
        rows = torch.empty(num_rows, self._network.hidden, dtype=torch.bfloat16)
        with self._library.lock:  # engines that share a network take turns with its table
            if self._first_store is None or self._first_store() is not stores[0]:
                for entry, store in zip(self._layers, stores, strict=True):
                    entry.store = store.struct
                self._first_store = weakref.ref(stores[0])
            self._library.network(
                ctypes.addressof(step),
                ctypes.addressof(self._heads),
                ctypes.addressof(self._network),
                rows.data_ptr(),
            )
        return rows


def _set_linear(entry: bindings.Layer, layer: LayerWeights, *names: str) -> None:
    """These weights of the layer, and their biases where it has some."""
    for name in names:
        weight: PackedWeight = getattr(layer, name)
        setattr(entry, name, weight.address)
        setattr(entry, f"{name}_bias", address(getattr(layer, f"{name}_bias"), weight.rows))
