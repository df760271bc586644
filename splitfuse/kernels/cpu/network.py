"""Computes a whole network but its output head in one call: Python has no part in what happens between its layers."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.cpu.layer_structs import (
    LARGEST,
    MAX_GROUPS,
    MOST_TAPS,
    Heads,
    Latent,
    Layer,
    Mixture,
    Mlp,
    Network,
    Norm,
    Recurrent,
    TokenInput,
    projected_heads,
)
from splitfuse.kernels.cpu.library import Library, check_rules
from splitfuse.kernels.cpu.lora import step_lora
from splitfuse.kernels.cpu.structs import (
    PANEL,
    Choices,
    Loans,
    PackedStep,
    Rank,
    States,
    Store,
    Weight,
    check,
    vector_address,
)
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import SharedGroup
from splitfuse.kernels.interface import NetworkPlan, RopeTable
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec, NormSpec, RecurrentSpec
from splitfuse.kernels.loans import Channel
from splitfuse.kernels.weights import LayerWeights


def uncovered(plan: NetworkPlan) -> str | None:
    """Return the field of a layer that these kernels do not compute, or None."""
    for layer in plan.layers:
        mixer, mlp = layer.mixer, layer.mlp
        norms = mixer.qk_norm if isinstance(mixer, AttentionSpec) else None
        if norms is not None and norms.whole_row and norms.after_rope:
            return "norms of whole rows of queries and keys after they are rotated"
        if isinstance(mixer, RecurrentSpec) and mixer.conv_size > MOST_TAPS:
            return f"convolutions over more than {MOST_TAPS} tokens"
        if isinstance(mlp, ExpertsSpec) and mlp.own_norm is not None and (mlp.shared is None or layer.parallel):
            return "norms of experts of their own in such a layer"
        if isinstance(mlp, ExpertsSpec) and mlp.router.num_groups > MAX_GROUPS:
            return f"more than {MAX_GROUPS} groups of experts"
    return None


class FusedNetwork:
    """Runs embedding, layers and last norm from tables of structs. Gives the same bits as the operations one by one."""

    def __init__(self, library: Library, plan: NetworkPlan) -> None:
        weights = plan.weights
        self._library = library
        self._weights = weights  # they own the memory, and these own vectors and arrays:
        self._heads: list[Heads] = []
        self._mixtures: list[Mixture] = []
        self._first_store: weakref.ref[Store | States] | None = None  # weak: a cache that is given up is not kept
        self._layers = (Layer * len(plan.layers))()
        self._mixers = [spec.mixer for spec in plan.layers]
        mixers = list(enumerate(self._mixers))  # of each kind the first
        self._attention = next((n for n, mixer in mixers if isinstance(mixer, AttentionSpec)), None)
        self._recurrent = next((n for n, mixer in mixers if isinstance(mixer, RecurrentSpec)), None)
        packed = isinstance(weights.embed, Weight)
        num_ids, hidden = (weights.embed.rows, weights.embed.columns) if packed else weights.embed.shape
        self._rank = None if plan.group is None else Rank.of(plan.group)
        gathers = plan.group is not None and not plan.group.shard.sums
        self._num_ranks = plan.group.shard.size if plan.group is not None and gathers else 1
        ids = range(num_ids) if plan.group is None else plan.group.shard.span(plan.vocabulary)
        assert len(ids) == num_ids
        if not packed:
            check(weights.embed, torch.bfloat16)
        for entry, spec, layer in zip(self._layers, plan.layers, weights.layers, strict=True):
            self._set_layer(entry, spec, layer, plan, hidden)
        num_positions = min((heads.max_position for heads in self._heads), default=LARGEST)
        positions = None
        if (table := weights.positions) is not None:
            check(table, torch.bfloat16)
            assert table.shape[1] == hidden
            num_positions = min(num_positions, len(table) - plan.position_offset)
            positions = table[plan.position_offset :].data_ptr()
        self._network = Network(
            ctypes.addressof(self._layers),
            len(self._layers),
            hidden,
            num_ids if plan.group is None else plan.vocabulary,
            None if packed else weights.embed.data_ptr(),
            weights.embed.address if packed else None,
            positions,
            plan.embed_scale,
            Norm.of(plan.norm, weights.norm, weights.norm_bias, hidden),
            group=None if self._rank is None else self._rank.address,
            first_id=ids.start,
            num_ids=num_ids,
            num_positions=num_positions,
        )
        if weights.token_inputs is not None:
            self._set_token_inputs(plan, hidden)

    def _set_token_inputs(self, plan: NetworkPlan, hidden: int) -> None:
        network, weights, projection = self._network, plan.weights, plan.weights.token_projection
        assert weights.token_inputs is not None
        check(weights.token_inputs, torch.bfloat16)
        width = weights.token_inputs.shape[1]
        assert (projection.rows, projection.columns) == (width, hidden)
        assert len(weights.token_inputs) >= network.vocabulary
        network.token_input_size = width // len(plan.layers)
        network.token_inputs, network.token_projection = weights.token_inputs.data_ptr(), projection.address
        network.token_input_norm = Norm.of(plan.norm, weights.token_input_norm, None, network.token_input_size)

    def _set_layer(self, entry: Layer, spec: LayerSpec, layer: LayerWeights, plan: NetworkPlan, hidden: int) -> None:
        if isinstance(spec.mixer, AttentionSpec):
            self._set_attention(entry, spec.mixer, layer, plan.ropes, hidden)
        elif spec.mixer is not None:
            entry.recurrent = Recurrent.of(spec.mixer, layer, hidden)
        if isinstance(spec.mlp, ExpertsSpec):
            self._set_experts(entry, spec.mlp, layer, hidden)
        elif spec.mlp is not None:
            assert layer.mlp is not None
            entry.mlp = Mlp.of(spec.mlp, layer.mlp, hidden, self._num_ranks)
        shared = spec.parallel and spec.shared_norm
        for name in ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm"):
            source = "attn_norm" if shared and name == "mlp_norm" else name
            setattr(entry, name, _norm(plan.norm, layer, source, hidden))
        if spec.token_input is not None:
            entry.token_input = TokenInput.of(spec.token_input, plan.norm, layer, hidden)
        entry.parallel = spec.parallel
        entry.residual_scale = spec.residual_scale
        entry.output_scale = 1.0 if layer.output_scale is None else float(layer.output_scale)

    def _set_attention(
        self, entry: Layer, spec: AttentionSpec, layer: LayerWeights, ropes: Sequence[RopeTable], hidden: int
    ) -> None:
        rope = None if spec.rope is None else ropes[spec.rope]
        heads = Heads.of(spec, rope=rope, weights=layer, sinks=layer.sinks)
        self._heads.append(heads)
        entry.heads = heads
        width = spec.num_heads * spec.head_dim
        ranks = self._num_ranks
        assert layer.qkv.columns == ranks * layer.o.rows == hidden
        if spec.latent is not None:
            entry.latent = Latent.of(spec.latent, spec.num_heads, layer)
            assert layer.o.columns == spec.num_heads * spec.latent.v_dim
        else:
            assert layer.qkv.rows == projected_heads(spec) * spec.head_dim and layer.o.columns == ranks * width
        entry.qkv, entry.o = layer.qkv.address, layer.o.address
        entry.qkv_bias = vector_address(layer.qkv_bias, layer.qkv.rows)
        entry.o_bias = vector_address(layer.o_bias, layer.o.rows)
        if spec.gate:
            gate = layer.attn_gate
            assert (gate.rows, gate.columns) == (width, hidden)
            entry.attn_gate = gate.address

    def _set_experts(self, entry: Layer, spec: ExpertsSpec, layer: LayerWeights, hidden: int) -> None:
        ranks = self._num_ranks
        mixture = Mixture.of(layer, spec.expert, top_k=spec.router.top_k, ranks=ranks)
        mixture.set_block(layer, spec, hidden, ranks)
        assert ranks * layer.w2[0].rows == hidden
        self._mixtures.append(mixture)
        entry.mixture = mixture.address

    def __call__(self, stores: Sequence[Store | States | None], batch: RaggedBatch) -> Tensor:
        """Return the normed hidden states [R, C] of `logit_rows`, in bf16.

        Raises IndexError for a step that cannot be computed.
        """
        out = torch.empty(batch.num_rows, self._network.hidden, dtype=torch.bfloat16)
        self._compute(stores, batch, None, out.data_ptr())
        return out

    def choose(
        self,
        stores: Sequence[Store | States | None],
        batch: RaggedBatch,
        head: Weight,
        bias: Tensor | None,
        filters: Sequence[Filter],
        numbers: Sequence[float],
    ) -> tuple[list[int], list[float]]:
        """Return what `CpuBackend.choose` does of these hidden states, in the same call; of the ranks of a group only
        the first one.
        """
        assert head.columns == self._network.hidden
        choices = Choices.of(head, bias, batch.num_rows, filters, numbers)
        if self._rank is not None:
            assert isinstance(self._rank.group, SharedGroup)
            choices.share(self._rank.group, self._network.vocabulary)
        self._compute(stores, batch, choices.address, None)
        return choices.result

    def _compute(
        self, stores: Sequence[Store | States | None], batch: RaggedBatch, choices: int | None, rows: int | None
    ) -> None:
        if (numbers := batch.address) is None:
            check(batch.packed, torch.int32)
            assert len(batch.packed) == sum(batch.sizes)
            numbers = batch.packed.data_ptr()
        lora = None if batch.adapters is None else step_lora(batch.adapters, batch.num_tokens)
        loans = None
        if batch.loans:
            bounds, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
            starts = [end - last + first for end, first, last in zip(lengths, bounds, bounds[1:], strict=False)]
            loans = Loans.of_step(batch.loans, starts)
        sizes = (batch.num_tokens, batch.num_requests, batch.table_width, batch.num_rows)
        extras = None if lora is None else lora.address, None if loans is None else loans.address
        step = PackedStep(numbers, *sizes, *extras)
        with self._library.lock:  # engines that share a network take turns with its table
            self._use(stores)
            check_rules(self._library.check_packed(step.address, self._network.address))
            batch.on_start()
            self._library.network(step.address, self._network.address, choices, rows)
        for loan, done in zip(batch.loans, () if loans is None else loans.array, strict=True):
            loan.is_lost = bool(done.lost)

    def _use(self, stores: Sequence[Store | States | None]) -> None:
        """Let layers have the stores of a cache, unless they have them from the last step."""
        store, states = (None if layer is None else stores[layer] for layer in (self._attention, self._recurrent))
        assert isinstance(store, Store | None) and isinstance(states, States | None)
        first = store or states
        assert first is not None
        if self._first_store is not None and self._first_store() is first:
            return
        self._set_stores(self._layers, stores)
        network = self._network
        network.num_blocks, network.block_size = (0, 1) if store is None else (store.num_blocks, store.block_size)
        network.num_states = -1 if states is None else states.num_slots
        self._first_store = weakref.ref(first)

    def _set_stores(self, layers: ctypes.Array[Layer], stores: Sequence[Store | States | None]) -> None:
        for entry, mixer, each in zip(layers, self._mixers, stores, strict=True):
            if isinstance(each, States):
                entry.recurrent.states = each
            elif each is not None:
                assert isinstance(mixer, AttentionSpec) and each.fits(mixer)
                entry.store = each

    def lend(self, library: Library, stores: Sequence[Store], channel: Channel, blocks: Sequence[int]) -> None:
        """Attend to the blocks of a loan for its debtor until the channel is closed. `library` is one of its own: its
        workspace is in use as long.
        """
        layers = (Layer * len(self._layers)).from_buffer_copy(self._layers)
        self._set_stores(layers, stores)
        num_blocks = min(store.num_blocks for store in stores)
        assert all(0 <= block < num_blocks for block in blocks)
        table = array("i", blocks)
        address = table.buffer_info()[0]
        library.lend(channel.address, channel.capacity, ctypes.addressof(layers), len(layers), address, len(blocks))

    def channel_bytes(self, stores: Sequence[Store], num_tokens: int) -> int:
        """Return the bytes of the data of a loan's channel: queries of `num_tokens` tokens in one layer with their
        answer, or one block of all layers.
        """
        most = 0
        for mixer in self._mixers:
            assert isinstance(mixer, AttentionSpec)
            values = 2 + -(-mixer.value_dim // PANEL) * PANEL
            most = max(most, num_tokens * mixer.num_heads * (2 * mixer.head_dim + 4 * values))
        own: dict[int, int] = {store.address: store.nbytes // store.num_blocks for store in stores}
        return max(most, sum(own.values())) + 64


def _norm(spec: NormSpec, layer: LayerWeights, name: str, hidden: int) -> Norm:
    """Return this norm of a layer, if it has it."""
    return Norm.of(spec, getattr(layer, name), getattr(layer, f"{name}_bias"), hidden)
