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
from splitfuse.kernels.interface import (
    AttentionSpec,
    ExpertsSpec,
    HeadNormSpec,
    LayerSpec,
    LayerWeights,
    NetworkPlan,
    RouterSpec,
)


def compile_network(library: Library, plan: NetworkPlan) -> FusedNetwork | None:
    """Return the network as one call; None if its layers differ in what csrc/layers.h takes to be the same for all."""
    mixers = [layer.mixer for layer in plan.layers if isinstance(layer.mixer, AttentionSpec)]
    if len(mixers) < len(plan.layers):
        return None
    heads = {replace(each, window=None, qkv_bias=False, o_bias=False, qk_norm=None) for each in mixers}
    return FusedNetwork(library, plan) if len(heads) == 1 else None


MOST_TAPS = 16  # in csrc/delta.h too

COVERED = (
    *("num_heads", "num_kv_heads", "head_dim", "rope", "window", "qkv_bias", "o_bias", "qk_norm", "scale", "softcap"),
    "value_is_key",  # keys' rows are kept twice
)
"""Fields of AttentionSpec that the kernels compute."""


def uncovered(plan: NetworkPlan) -> str | None:
    """Return the field of a layer that these kernels do not compute, or None."""
    if plan.norm.centered or plan.norm.bias:
        return "layer norms"
    if plan.embed_scale != 1.0 or plan.weights.positions is not None:
        return "its embedding"
    for layer in plan.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if mixer is None or mlp is None:
            return "layers of one block"
        if layer != LayerSpec(mixer=mixer, mlp=mlp):
            return "another form of layers than that of Llama"
        if isinstance(mixer, AttentionSpec):
            if mixer != AttentionSpec(**{name: getattr(mixer, name) for name in COVERED}) or mixer.rope is None:
                return "its attention"
            if (norms := mixer.qk_norm) is not None and norms != HeadNormSpec(norm=plan.norm):
                return "its norms of heads"
        elif mixer.conv_size > MOST_TAPS:
            return f"convolutions over more than {MOST_TAPS} tokens"
        inner = mlp.expert if isinstance(mlp, ExpertsSpec) else mlp
        if not inner.gated or inner.activation not in ACTIVATIONS:
            return "its MLP"
        if isinstance(mlp, ExpertsSpec) and (
            inner.bias
            or mlp != ExpertsSpec(router=mlp.router, expert=inner)
            or mlp.router
            != RouterSpec(
                num_experts=mlp.router.num_experts, top_k=mlp.router.top_k, renormalize=mlp.router.renormalize
            )
        ):
            return "its mixture of experts"
    return None


class FusedNetwork:
    """Runs embedding, layers and last norm from tables of structs. Gives the same bits as the operations one by one."""

    def __init__(self, library: Library, plan: NetworkPlan) -> None:
        weights, attention = plan.weights, plan.layers[0].mixer
        assert isinstance(attention, AttentionSpec) and attention.rope is not None
        self._library = library
        self._weights = weights  # they own the memory
        self._heads = Heads.of(attention, plan.ropes[attention.rope], plan.norm.eps)
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
            vector_address(weights.norm, hidden, torch.float32),
            plan.norm.eps,
        )

    def _set_layer(self, entry: Layer, spec: LayerSpec, layer: LayerWeights, hidden: int) -> None:
        attention, mlp = spec.mixer, spec.mlp
        assert isinstance(attention, AttentionSpec) and mlp is not None
        heads_width = attention.num_heads * attention.head_dim
        entry.attn_norm = vector_address(layer.attn_norm, hidden, torch.float32)
        entry.q_norm = vector_address(layer.q_norm, attention.head_dim, torch.float32)
        entry.k_norm = vector_address(layer.k_norm, attention.head_dim, torch.float32)
        _set_linear(entry, layer, "qkv", columns=hidden)
        _set_linear(entry, layer, "o", columns=heads_width)
        assert layer.o.rows == hidden
        entry.window = attention.window or 0
        entry.mlp_norm = vector_address(layer.mlp_norm, hidden, torch.float32)
        if not isinstance(mlp, ExpertsSpec):
            entry.activation = ACTIVATIONS[mlp.activation]
            weights = layer.mlp
            assert weights is not None
            assert weights.gate_up.rows == 2 * weights.down.columns and weights.down.columns == mlp.intermediate_size
            assert weights.gate_up.columns == weights.down.rows == hidden
            entry.gate_up, entry.down = weights.gate_up.address, weights.down.address
            entry.gate_up_bias = vector_address(weights.up_bias, weights.gate_up.rows)
            entry.down_bias = vector_address(weights.down_bias, weights.down.rows)
            return
        mixture = Mixture.of(
            layer, top_k=mlp.router.top_k, activation=mlp.expert.activation, renormalize=mlp.router.renormalize
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
