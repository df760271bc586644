"""Defines the interface of decoder and kernel backends: the abstract `Backend`, and what it says it can do.

Everything is flat: T tokens of one step, S requests, H query heads, Hk key/value heads, D head size, C hidden size, I
inner size of an MLP, E experts. layers.py describes layers as plain data, weights.py holds their weights. What a KV
store looks like inside is the backend's own affair: it comes out of `Backend.allocate_kv`, and only that backend looks
into it. `reference.py` gives the meaning of every operation in plain PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group, SummingGroup
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    LayerSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    RecurrentSpec,
    RouterSpec,
)
from splitfuse.kernels.loans import Channel
from splitfuse.kernels.lora import Adapter, LoraRows, PackedAdapter
from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.kernels.weights import LayerWeights, NetworkWeights, Weight, WeightRole

Store: TypeAlias = Any
"""Keys and values of one layer, as `Backend.allocate_kv` returns them, or its states, as `allocate_states` does."""
RopeTable: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines [max_position, rotary_dim / 2] in fp32; a row for each position."""


# --- a network in one call --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """Describes a whole network but its head as plain data, for `Backend.compile_network`."""

    layers: tuple[LayerSpec, ...]
    weights: NetworkWeights
    ropes: tuple[RopeTable, ...]
    norm: NormSpec
    embed_scale: float = 1.0
    position_offset: int = 0  # row of `weights.positions` for position 0
    vocabulary: int = 0  # of the whole network, whose embedding a rank has a part of
    group: Group | None = None  # of ranks that compute the network together; layers and weights are those of one


class Network(Protocol):
    """Computes a network in one call, and writes the keys and values of the batch to the stores of the layers."""

    def __call__(self, stores: Sequence[Store], batch: RaggedBatch, /) -> Tensor:
        """Return what the head is applied to: the normed hidden states [R, C] of the batch."""
        ...

    def choose(
        self,
        stores: Sequence[Store],
        batch: RaggedBatch,
        head: Weight,
        bias: Tensor | None,
        filters: Sequence[Filter],
        numbers: Sequence[float],
        /,
    ) -> tuple[list[int], list[float]]:
        """Return what `Backend.choose` does of these hidden states, in the same call; of ranks that share memory only
        the first one. Not for others.
        """
        ...


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Says what a backend can do, as data: the choice of a backend, memory plans and error messages ask it, before
    anything is loaded.
    """

    name: str  # in messages: "the C++ kernels"
    devices: tuple[str, ...] | None = None  # device types; None: all of PyTorch's
    dtypes: tuple[torch.dtype, ...] | None = None  # of weights and activations; None: all floating-point ones
    quantizations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Quantization -> its group sizes. The quantization that loses least comes first."""
    kv_dtypes: tuple[str, ...] = ()  # values of kv_cache_dtype other than "auto"
    block_multiple: int = 1  # block_size must be a multiple of it
    max_head_dim: int | None = None
    head_rows: int = 64
    """Rows that the output head is applied to at once: logits are [rows, vocabulary], never [tokens of a step,
    vocabulary].
    """
    invariant: bool = False  # a row's bits can be the same whatever the other rows are
    captures: bool = False  # attention and MLPs read nothing back from a GPU: a CUDA graph can have them
    own_threads: bool = False  # num_threads is honoured
    shares_weights: bool = False  # processes can share one copy of the weights
    lends: bool = False  # another process can hold the leading keys and values of a request
    gathers: bool = False  # ranks that share memory compute a network with the bits of one process
    kv_layout: int = 1  # version of what the bytes of a block or a state mean: raise it with every change of that


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Holds the sizes of the largest step that there may be."""

    num_tokens: int
    num_requests: int
    num_positions: int  # of all its requests
    longest: int  # positions of a request
    is_padded: bool  # as RaggedBatch


class Backend(ABC):
    """Computes the operations of a decoder. A backend may subclass `ReferenceBackend` and override what it accelerates.

    Dtypes between the operations are the backend's own: products may be given in fp32 and taken in bf16. Operations of
    T tokens take any T, 0 included.
    """

    capabilities: ClassVar[Capabilities]
    quantization: str | None = None
    """Quantization of the linear weights: a key of `capabilities.quantizations`, or None."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the start: which kernels, on what; if they are not the best, what is lost and why."""

    # Keys and values

    def check_block_size(self, block_size: int) -> None:
        """Raise ConfigError, naming a size that would do, unless the backend takes blocks of `block_size` tokens."""
        multiple = self.capabilities.block_multiple
        if block_size < 1 or block_size % multiple:
            valid = max(multiple, -(-block_size // multiple) * multiple)
            raise ConfigError(
                f"block_size={block_size} is not a positive multiple of {multiple}, which {self.capabilities.name} "
                f"need: use {valid}"
            )

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ConfigError unless the backend takes heads of `head_dim` elements."""
        most = self.capabilities.max_head_dim
        if most is not None and head_dim > most:
            raise ConfigError(
                f"head_dim={head_dim} is too large for {self.capabilities.name}, which take at most {most}"
            )

    @abstractmethod
    def kv_bytes(self, spec: AttentionSpec, *, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block of one layer: exactly what `allocate_kv` takes for it."""

    @abstractmethod
    def allocate_kv(
        self, spec: AttentionSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        """Return the store of one layer. What it holds before it is written is never read.

        Raises RuntimeError if there is no memory for it, ConfigError for sizes that the backend does not take.
        """

    def attention_bytes(self, spec: AttentionSpec, sizes: StepSizes, dtype: torch.dtype) -> int:
        """Return the most bytes that the attention of a step takes besides what it gives, of activations of `dtype`."""
        del spec, sizes, dtype
        return 0

    @abstractmethod
    def fill_kv(self, store: Store, byte: int) -> None:
        """Write `byte` everywhere in a store, for timing: `byte` must make a finite number of every dtype."""

    def have_kv(self, store: Store, first: int, num_blocks: int) -> bool:  # noqa: ARG002
        """Ask for the memory of some blocks that the system would give when they are first written. What they hold
        stays. Returns False where the system does not give it, or there is no need to ask.
        """
        return False

    @abstractmethod
    def read_block(self, store: Store, block: int, out: Tensor) -> None:
        """Copy all that a store has of a block into `out`, uint8 [kv_bytes] on the CPU."""

    @abstractmethod
    def write_block(self, store: Store, block: int, data: Tensor) -> None:
        """Write what `read_block` has copied, of any store of the same spec, block size and dtype, to a block."""

    # Recurrent states

    @abstractmethod
    def state_bytes(self, spec: RecurrentSpec) -> int:
        """Return the bytes of one state of one layer: exactly what `allocate_states` takes for it."""

    @abstractmethod
    def allocate_states(self, spec: RecurrentSpec, *, num_slots: int, device: torch.device) -> Store:
        """Return the states of one layer, in fp32. What a slot holds before it is written is never read.

        Raises RuntimeError if there is no memory for them, ConfigError for sizes that the backend does not take.
        """

    # Weights

    @abstractmethod
    def weight_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
        """Return the bytes of a weight of this shape and role as it is kept."""

    def copy_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype, is_stored: bool = False) -> int:
        """Return the most bytes that a step takes for a copy of a weight which is kept quantized, in another form. With
        `is_stored` a checkpoint has quantized it.
        """
        del shape, role, dtype, is_stored
        return 0

    @abstractmethod
    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Weight:
        """Return a linear weight [N, K] in the form that `linear`, `gated` or `experts` wants, from the pieces of its
        rows in their order, or one [H, N, K] that `linear_heads` wants. Pieces may be maps of files that are given back
        afterwards: what is kept must be a copy. `dtype` is what to compute in, if that is not the pieces' own.

        A packed HEAD is read by `embed` too, if the two are tied. PLAIN stays a tensor of the pieces' shape.
        """

    def accepts(self, stored: QuantizedFormat, role: WeightRole) -> bool:
        """Return whether `pack_quantized` takes weights of a role that a checkpoint stores in this format, and keeps
        their bits. Those that it does not take are dequantized and given to `pack`.
        """
        del stored, role
        return False

    def pack_quantized(
        self, pieces: Sequence[Tensor | QuantizedWeight], *, role: WeightRole, dtype: torch.dtype
    ) -> Weight:
        """Return a linear weight as `pack` does, of pieces of which at least one is quantized, each in a format that
        `accepts` was asked about: they may differ, and some may be dense. `dtype` is what to compute in.
        """
        raise NotImplementedError(f"{self.capabilities.name} keep no weights as a checkpoint has quantized them")

    def quantized_weight_bytes(
        self,
        pieces: Sequence[tuple[QuantizedFormat | None, int]],
        *,
        columns: int,
        role: WeightRole,
        dtype: torch.dtype,
    ) -> int:
        """Return the bytes of what `pack_quantized` makes of pieces, of which the format and the number of rows is
        given in their order; None: the piece is dense.
        """
        raise NotImplementedError(f"{self.capabilities.name} keep no weights as a checkpoint has quantized them")

    def quantized(self, quantization: str) -> Backend:
        """Return a backend like this one whose weights are kept in `quantization`: for plans, not for computing."""
        raise NotImplementedError(f"{self.capabilities.name} do not support quantization={quantization}")

    @abstractmethod
    def pack_adapter(self, adapter: Adapter, weights: NetworkWeights, dtype: torch.dtype) -> PackedAdapter:
        """Return an adapter of a network with these weights, in the form that `linear`, `gated` and `activated` want.
        `dtype` is what to compute in.
        """

    def share_weights(self, sharing: WeightSharing, num_bytes: int) -> None:
        """Let `pack` put weights of `num_bytes` in all into shared memory, or find them there if it is filled. Only
        for a backend whose capabilities say `shares_weights`. Raises RuntimeError if there is no memory.
        """
        raise NotImplementedError(f"{self.capabilities.name} cannot share weights between processes")

    def use_nodes(self, cores_of: Mapping[int, Sequence[int]]) -> str | None:
        """Divide threads, and the weights that are packed from now on, among NUMA nodes, whose cores are given. Only in
        a process that belongs to the backend: its threads are bound. Returns how they are divided; None: not at all.
        """
        del cores_of
        return None

    def finish_loading(self) -> None:  # noqa: B027 - most backends have nothing to do here
        """Finish what `pack` left to do, once all weights are packed."""

    # Operations, once a step

    @abstractmethod
    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        """Return the rows of `table` [vocabulary, C], a tensor or a packed head, for `ids` [T]: [T, C]."""

    @abstractmethod
    def topk(self, scores: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        """Return for each row of `scores` [R, V] the indices of its k largest elements, largest first and equal ones by
        index, and these elements: all of V if k is more. The first one is NaN if the row has one, whatever the others
        and the indices.
        """

    @abstractmethod
    def draw(
        self, scores: Tensor, rows: Sequence[int], filters: Sequence[Filter], numbers: Sequence[Sequence[float]]
    ) -> list[list[int]]:
        """Return tokens drawn from some rows of `scores` [R, V], in fp32 or fp64, each with a filter of its own: one
        for each of its numbers, which are at least 0 and below 1, as many for each row. See drawing.py. Each row has a
        finite largest score, and is drawn from as if it were alone.
        """

    def choose(
        self,
        x: Tensor,
        head: Weight,
        bias: Tensor | None = None,
        filters: Sequence[Filter] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[list[int], list[float]]:
        """Return a token for each row of x [R, C], and the row's largest logit, of `linear(x, head, bias)` in fp32: as
        `choose_from` does, in one operation.
        """
        return self.choose_from(self.linear(x, head, bias).float(), filters, numbers)

    def choose_from(
        self, logits: Tensor, filters: Sequence[Filter] = (), numbers: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Return a token for each row of logits [R, V], and the row's largest logit, which is NaN if the row has one:
        the first token that has it or, if there are filters and the row's has a temperature, one that is drawn by the
        row's number. The token of a row whose largest logit is not finite means nothing.
        """
        best, largest = self.topk(logits, 1)
        tokens, peaks = [token for (token,) in best], [peak for (peak,) in largest]
        drawn = [i for i, each in enumerate(filters) if each.temperature > 0.0 and math.isfinite(peaks[i])]
        if drawn:
            found = self.draw(logits, drawn, [filters[i] for i in drawn], [[numbers[i]] for i in drawn])
            for i, (token,) in zip(drawn, found, strict=True):
                tokens[i] = token
        return tokens, peaks

    # Operations of a layer

    @abstractmethod
    def norm(self, x: Tensor, spec: NormSpec, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the norm of x [T, C] over its last dimension, in fp32 or wider; `weight` and `bias` are [C]."""

    def add_norm(
        self, x: Tensor, branch: Tensor, scale: float, spec: NormSpec, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream x [T, C] with `scale` times what a block gave, and its norm."""
        total = add_branch(x, branch, scale)
        return total, self.norm(total, spec, weight, bias)

    @abstractmethod
    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        """Return `x @ weight.T + bias`: [T, K] -> [T, N], and what `lora` adds to rows that have adapters. Adds no
        residual: the decoder may sum over devices first.
        """

    @abstractmethod
    def linear_heads(self, x: Tensor, weight: Weight) -> Tensor:
        """Return the product of each head's vector with a weight of its own: x [T, H, K], weight [H, N, K] ->
        [T, H, N].
        """

    @abstractmethod
    def activated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        """Return `activation(linear(x, weight, bias, lora))`: [T, K] -> [T, N]."""

    @abstractmethod
    def gated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        """Return `activation(gate) * up`, where `linear(x, weight, bias, lora)` is [gate, up]: x [T, K], weight [2I, K]
        -> [T, I]. `activation` is a key of `reference.ACTIVATIONS` or of `reference.GATED_ACTIVATIONS`.
        """

    @abstractmethod
    def rope_store(
        self,
        qkv: Tensor,
        store: Store,
        spec: AttentionSpec,
        batch: RaggedBatch,
        rope: RopeTable | None,
        weights: LayerWeights,
    ) -> Tensor:
        """Normalize the heads as the spec says, rotate queries and keys, write keys and values to the store.

        qkv [T, (H + 2 Hk) D], of latent attention [T, (H + 1) D] -> queries [T, H, D], scaled by position if the spec
        says so. Rows of `rope`, [max_position, rotary_dim / 2], rotate the first rotary_dim elements of a head, element
        i with element i + rotary_dim / 2 (Su et al., arXiv 2104.09864); the others stay. Of `weights` the norms of
        heads are read. A token of slot -1 is not written.
        """

    @abstractmethod
    def attend(
        self, q: Tensor, store: Store, spec: AttentionSpec, batch: RaggedBatch, sinks: Tensor | None = None
    ) -> Tensor:
        """Return causal attention of each request's newest tokens to all its tokens, over blocked KV: [T, H, D] ->
        [T, H, size of a value].

        Request s owns the rows `query_start[s]` to `query_start[s + 1]` of `q`; they are the last of its `seq_lens[s]`
        positions, whose keys lie in the blocks `block_tables[s]`. The query at position p sees p and what is before
        it; with a window, only p - window + 1 to p; with chunks, only its own chunk. `sinks` [H] are scores of a key
        without a value. What is beyond the request's positions is never read.
        """

    @abstractmethod
    def delta(
        self, x: Tensor, gates: Tensor, states: Store, spec: DeltaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        """Return the gated delta net of each request's newest tokens, and take its state through them: x [T, queries,
        keys, values, z] and gates [T, betas, rates], projections of the layer's input -> [T, Hv Dv].

        Queries, keys and values are convolved over tokens, with SiLU; queries and keys are then made unit vectors, and
        queries divided by the root of Dk. For each token and value head, with the key head that it shares:

            S = S * exp(-decay * softplus(rate + decay_bias))
            S = S + k (v - k S) * sigmoid(beta)
            out = norm(q S) * silu(z)

        The state of request s is read from slot `state_reads[s]`, or is zero if that is -1, and written to slot
        `state_writes[s]`. If that is the slot that request s + 1 reads, the two are parts of one request, and the
        second goes on from there. A token's result depends on its request's tokens alone, not on how they are cut.
        """

    @abstractmethod
    def mamba(
        self, x: Tensor, dt: Tensor, states: Store, spec: MambaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        """Return the Mamba-2 mixer of each request's newest tokens, with states as in `delta`: x [T, c, b, v, z] and dt
        [T, H], projections of the layer's input -> [T, H P].

        c and b of each group, and v of each head, are convolved over tokens, with SiLU. For each token and head:

            dt = softplus(dt + decay_bias), limited to dt_min and dt_max
            S = S * exp(-decay * dt) + b (v dt)
            out = (c S + skip v) * silu(z)

        The output of all heads of a group is normed together.
        """

    @abstractmethod
    def conv(self, x: Tensor, states: Store, spec: ConvSpec, batch: RaggedBatch, weights: LayerWeights) -> Tensor:
        """Return the gated convolution of each request's newest tokens, with states as in `delta`: x [T, b, c, u], a
        projection of the layer's input -> [T, C], which is c * convolution(b * u).
        """

    @abstractmethod
    def route(self, logits: Tensor, spec: RouterSpec, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return for a router's logits [T, E] each token's experts and their weights, both [T, top_k], best first, as
        the spec says, in fp32 or wider.

        Source: Shazeer et al., arXiv 1701.06538; `renormalize` is Mixtral's rule (arXiv 2401.04088).
        """

    @abstractmethod
    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, spec: MlpSpec, layer: LayerWeights) -> Tensor:
        """Return for every token the weighted sum over its k different experts: x [T, C], ids and weights [T, k] ->
        [T, C].

        Expert e is the MLP of `spec` with the weights `layer.w13[e]` (or `w1`) and `layer.w2[e]`, and their biases. The
        sum over a token's experts runs in the order of its ids, whichever other tokens are in the step.
        """

    # The network in one call

    def compile_network(self, plan: NetworkPlan) -> Network | None:
        """Return the network as one call, from token ids to the normed rows [R, C] that the head is applied to, which
        gives what the operations above give one by one. None if the backend does not cover this network.
        """
        del plan
        return None

    # Tensor-parallel groups

    def gather_logits(self, x: Tensor, head: Weight, bias: Tensor | None, vocabulary: int, group: Group) -> Tensor:
        """Return the logits [R, V] in fp32 of rows x [R, C], which all ranks have, by the rows of the head of each.
        Where ranks share memory they lie there, until it is used again: for a backend whose capabilities say `gathers`.
        """
        assert isinstance(group, SummingGroup)
        return group.join_columns(self.linear(x, head, bias).float(), vocabulary)

    # Loans, of networks in one call. Only for a backend whose capabilities say `lends`.

    def channel_bytes(self, network: Network, stores: Sequence[Store], num_tokens: int) -> int:
        """Return the bytes that a loan's channel needs for steps of `num_tokens` tokens of its request."""
        raise NotImplementedError(f"{self.capabilities.name} cannot lend")

    def lend(self, network: Network, stores: Sequence[Store], channel: Channel, blocks: Sequence[int]) -> None:
        """Hold keys and values of a debtor in these blocks, and attend to them for it, until the channel is closed.
        Nothing else may use the blocks meanwhile; steps may run.
        """
        raise NotImplementedError(f"{self.capabilities.name} cannot lend")

    def deposit(self, channel: Channel, index: int, data: Tensor) -> bool:
        """Let a creditor hold a block as block `index` of the loan: what `KVCache.read_block` gives of it. Returns
        False if the loan is lost.
        """
        raise NotImplementedError(f"{self.capabilities.name} cannot lend")


def add_branch(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Return the residual stream with `scale` times what a block gave."""
    return x + (branch if scale == 1.0 else branch.to(x.dtype) * scale)


def exact_topk(scores: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return what `Backend.topk` must give, by PyTorch."""
    k = min(k, scores.shape[1])
    if k == 1:
        peaks = scores.amax(-1, keepdim=True)
        indices = torch.arange(scores.shape[1], device=scores.device)
        best = torch.where(scores == peaks, indices, scores.shape[1] - 1).amin(-1, keepdim=True)
        return best.tolist(), peaks.tolist()
    values = scores.topk(k).values
    candidates = scores >= values[:, -1:]  # topk alone may take any of those equal to the last
    found: list[list[tuple[float, int]]] = [[] for _ in values]
    for (row, index), value in zip(candidates.nonzero().tolist(), scores[candidates].tolist(), strict=True):
        found[row].append((-value, index))
    poisoned = values[:, 0].isnan().tolist()
    largest = [
        [*range(k)] if has_nan else [index for _, index in sorted(row)[:k]]
        for row, has_nan in zip(found, poisoned, strict=True)
    ]
    return largest, values.tolist()
