"""Offers the C++ kernels as a backend: activations in bf16, the residual stream and logits in fp32.

Batch-invariant, bit for bit: a row's result depends on that row and its request alone, not on the other rows, the
chunk, the block size or the number of threads (csrc/multiply.h and csrc/attention.h say why). Bits differ between
variants.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from splitfuse.errors import ConfigError, UnsupportedModelError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.cpu.layer_structs import (
    ACTIVATIONS,
    Delta,
    Heads,
    Mamba,
    Mixture,
    Norm,
    Router,
    ShortConv,
    projected_heads,
)
from splitfuse.kernels.cpu.library import Library, choose_variant, is_emulated
from splitfuse.kernels.cpu.lora import PackedLora, place_of, step_lora
from splitfuse.kernels.cpu.memory import OwnWeights, SharedWeights, allocate, have
from splitfuse.kernels.cpu.network import FusedNetwork, uncovered
from splitfuse.kernels.cpu.nodes import NodeMemory, plan_nodes
from splitfuse.kernels.cpu.quantization import GROUP_SIZES, INT4_BIAS, QVALUES, choose_format
from splitfuse.kernels.cpu.stored import (
    common_format,
    converted,
    fp8_weight,
    kind_of,
    stacked,
    stored_fp8,
    stored_groups,
)
from splitfuse.kernels.cpu.structs import (
    Choices,
    Loan,
    Lora,
    Rank,
    States,
    Step,
    Store,
    Stored,
    Weight,
    check,
    int32,
    vector_address,
)
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group, SharedGroup
from splitfuse.kernels.interface import Backend, Capabilities, Network, NetworkPlan, RopeTable
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    RecurrentSpec,
    RouterSpec,
)
from splitfuse.kernels.loans import Channel
from splitfuse.kernels.lora import Adapter, LoraRows
from splitfuse.kernels.quantized import (
    Fp8Format,
    Fp8Quantized,
    GroupFormat,
    GroupQuantized,
    QuantizedFormat,
    QuantizedWeight,
    read_alike,
)
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.kernels.weights import LayerWeights, NetworkWeights, WeightRole

NAMES = {"avx512_amx": "AMX", "avx512_bf16": "AVX-512 (VNNI, bf16)", "avx512": "AVX-512 (VNNI)", "avx2": "AVX2"}
"""Names of the variants in the memory plan."""
_logger = logging.getLogger(__name__)

PIECE = 32  # tokens that the KV layout keeps together
MAX_HEAD_DIM = 1024
"""Largest head size. Both numbers are in csrc/kv_store.h too."""


class CpuBackend(Backend):
    """Computes in C++ on any x86-64 CPU with AVX2 or better.

    `quantization` is None (bf16), "int8" or "int4", `group_size` the columns that share a scale (None: int8 a whole
    row, int4 the default of quantization.py), `kv_int8` whether keys and values are kept in 8 bits. Raises KernelError
    without a compiled library or such a CPU, ConfigError for settings that contradict each other.

        >>> CpuBackend(variant="avx2", num_threads=2, quantization="int8").describe()
        'C++ kernels: AVX2, 2 threads; weights int8, KV cache bf16'
    """

    capabilities = Capabilities(
        name="the C++ kernels",
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        quantizations=GROUP_SIZES,
        kv_dtypes=("int8",),
        block_multiple=PIECE,
        max_head_dim=MAX_HEAD_DIM,
        invariant=True,
        own_threads=True,
        shares_weights=True,
        lends=True,
        gathers=True,
    )

    def __init__(
        self,
        *,
        variant: str | None = None,
        num_threads: int | None = None,
        quantization: str | None = None,
        group_size: int | None = None,
        kv_int8: bool = False,
    ) -> None:
        self.variant = choose_variant(variant)
        self.num_threads = num_threads or torch.get_num_threads()
        self.quantization = quantization
        self.group_size = group_size
        self.kv_int8 = kv_int8
        self._weights: OwnWeights | SharedWeights = OwnWeights()  # where `pack` puts them
        self._node_memory: NodeMemory | None = None
        choose_format(WeightRole.QKV, quantization, group_size)  # raises, if there is none
        self.library = Library(self.variant, self.num_threads)

    def describe(self) -> str:
        weights = self.quantization or "bf16"
        if (group := choose_format(WeightRole.QKV, self.quantization, self.group_size).group) is not None:
            weights += f" in groups of {group}"
        cache = "int8" if self.kv_int8 else "bf16"
        name = NAMES[self.variant] + (", emulated" if is_emulated(self.variant) else "")
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return f"C++ kernels: {name}, {threads}; weights {weights}, KV cache {cache}"

    # Keys and values

    def kv_bytes(self, spec: AttentionSpec, *, block_size: int, dtype: torch.dtype) -> int:
        del dtype  # what is kept is decided by kv_int8
        return self._store_bytes(self._store(spec, 1, block_size))

    def allocate_kv(
        self, spec: AttentionSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        del dtype, device
        store = self._store(spec, num_blocks, block_size)
        store.memory = allocate(self._store_bytes(store))
        store.data = store.memory.data_ptr()
        return store

    def fill_kv(self, store: Store, byte: int) -> None:
        store.memory.fill_(byte)

    def have_kv(self, store: Store, first: int, num_blocks: int) -> bool:
        return have(store.memory.view(store.num_blocks, -1)[first : first + num_blocks])

    def read_block(self, store: Store, block: int, out: Tensor) -> None:
        out.copy_(store.block(block))

    def write_block(self, store: Store, block: int, data: Tensor) -> None:
        store.block(block).copy_(data)

    def _store(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> Store:
        self.check_block_size(block_size)
        self.check_head_dim(spec.head_dim)
        if spec.latent is not None and self.kv_int8:
            raise ConfigError(
                "kv_cache_dtype=int8 is not supported with latent attention, whose cache is small already: use auto"
            )
        return Store(None, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, self.kv_int8, spec.value_from)

    def _store_bytes(self, store: Store) -> int:
        return int(self.library.store_bytes(store.address))

    # Recurrent states

    def state_bytes(self, spec: RecurrentSpec) -> int:
        return 4 * self._state_floats(spec)

    def allocate_states(self, spec: RecurrentSpec, *, num_slots: int, device: torch.device) -> States:
        del device
        states = States(None, num_slots, self._state_floats(spec))
        states.memory = allocate(num_slots * self.state_bytes(spec))
        states.data = states.memory.data_ptr()
        return states

    def _state_floats(self, spec: RecurrentSpec) -> int:
        if isinstance(spec, DeltaSpec):
            delta = Delta.of(spec, LayerWeights())
            return int(self.library.delta_floats(delta.address))
        if isinstance(spec, MambaSpec):
            mamba = Mamba.of(spec, LayerWeights())
            return int(self.library.mamba_floats(mamba.address))
        conv = ShortConv.of(spec, LayerWeights())
        return int(self.library.conv_floats(conv.address))

    # Weights

    def weight_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
        if not role.linear:
            return math.prod(shape) * (torch.float32 if role is WeightRole.NORM else dtype).itemsize
        *heads, rows, columns = shape
        return math.prod(heads) * self._weight_bytes(self._weight(rows, columns, role))

    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Tensor | Weight:
        if not role.linear:
            return self._keep(pieces, torch.float32 if role is WeightRole.NORM else dtype or pieces[0].dtype)
        heads = [[head] for piece in pieces for head in piece] if role.by_head else [pieces]
        columns = heads[0][0].shape[1]
        assert all(piece.shape[1] == columns for piece in heads[0])
        weight = self._weight(sum(len(piece) for piece in heads[0]), columns, role)
        head_bytes = self._weight_bytes(weight)
        weight.memory, weight.num_heads = self._weights.take(len(heads) * head_bytes), len(heads)
        if self._node_memory is not None and not role.by_head:
            self._node_memory.keep(weight.memory, weight.num_panels)
        weight.data = weight.memory.data_ptr()
        if self._weights.filled:
            return weight
        for number, head in enumerate(heads):
            of_head = Weight.from_buffer_copy(weight)
            of_head.data = weight.data + number * head_bytes
            self._fill(of_head, head)
        return weight

    def _fill(self, weight: Weight, pieces: Sequence[Tensor]) -> None:
        first, rows_at_once = 0, max(1, 2**23 // weight.columns)
        for piece in pieces:
            for begin in range(0, len(piece), rows_at_once):  # what is converted exists twice
                source = piece[begin : begin + rows_at_once].to(torch.bfloat16).contiguous()
                self.library.pack(weight.address, source.data_ptr(), first, len(source))
                first += len(source)

    def accepts(self, stored: QuantizedFormat, role: WeightRole) -> bool:
        if role is WeightRole.GATES:  # one format for all: states depend on them exponentially
            return False
        if isinstance(stored, GroupFormat):
            kept = (role.linear and not role.by_head) or role is WeightRole.EMBED
            return kept and kind_of(stored) is not None
        dense = role.by_head or role is WeightRole.HEAD  # FP8
        return self.quantization is None and role.linear and not dense

    def pack_quantized(
        self, pieces: Sequence[Tensor | QuantizedWeight], *, role: WeightRole, dtype: torch.dtype
    ) -> Tensor | Weight:
        groups = [piece for piece in pieces if isinstance(piece, GroupQuantized)]
        values = [piece for piece in pieces if isinstance(piece, Fp8Quantized)]
        if len(values) == len(pieces):
            weight = fp8_weight(sum(len(each.values) for each in values), values[0].shape[1], gated=role.gated)
            return self._pack_stored(weight, map(stored_fp8, values))
        if len(groups) == len(pieces) and read_alike(groups):
            return self._pack_groups(groups, gated=role.gated)
        dense = [piece if isinstance(piece, Tensor) else piece.dequantize(dtype) for piece in pieces]
        return self.pack(dense, role=role, dtype=dtype)  # in several formats: as none of them

    def quantized_weight_bytes(
        self,
        pieces: Sequence[tuple[QuantizedFormat | None, int]],
        *,
        columns: int,
        role: WeightRole,
        dtype: torch.dtype,
    ) -> int:
        num_rows = sum(rows for _, rows in pieces)
        formats = [stored for stored, _ in pieces if isinstance(stored, GroupFormat)]
        if all(isinstance(stored, Fp8Format) for stored, _ in pieces):
            return self._weight_bytes(fp8_weight(num_rows, columns, gated=role.gated))
        if len(formats) < len(pieces):
            return self.weight_bytes((num_rows, columns), role=role, dtype=dtype)
        kinds = [kind_of(stored) for stored in formats]
        if role.gated and len(set(kinds)) > 1:
            kinds = [kind_of(common_format(formats))] * len(pieces)
        total = 0
        for kind, run in groupby(zip(kinds, pieces, strict=True), lambda each: each[0]):
            assert kind is not None
            rows = sum(rows for _, (_, rows) in run)
            total += self._weight_bytes(kind.weight(rows, columns, gated=role.gated))
        return total

    def _pack_groups(self, pieces: Sequence[GroupQuantized], *, gated: bool) -> Weight:
        """Return a weight of pieces in groups: of parts, where their kinds differ."""
        if gated and len({kind_of(piece.format) for piece in pieces}) > 1:  # which are neighbours in a panel
            common = common_format([piece.format for piece in pieces])
            pieces = [converted(piece, common) for piece in pieces]
        order = None if pieces[0].order is None else int32(pieces[0].order)
        weights = []
        for kind, run in groupby(pieces, lambda piece: kind_of(piece.format)):
            assert kind is not None
            alike = list(run)
            weight = kind.weight(sum(len(piece.levels) for piece in alike), alike[0].shape[1], gated=gated)
            if order is not None:
                weight.order, weight.kept = order.data_ptr(), (order,)
            weights.append(self._pack_stored(weight, map(stored_groups, alike)))
        return stacked(weights)

    def _pack_stored(self, weight: Weight, rows: Iterable[Stored]) -> Weight:
        """Return the weight with memory, in which rows are packed as a checkpoint holds them."""
        weight.memory = self._weights.take(self._weight_bytes(weight))
        if self._node_memory is not None:
            self._node_memory.keep(weight.memory, weight.num_panels)
        weight.data = weight.memory.data_ptr()
        first = 0
        for each in () if self._weights.filled else rows:
            self.library.pack_stored(weight.address, each.address, first, each.num_rows)
            first += each.num_rows
        return weight

    def _keep(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return a copy of what is not packed."""
        shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
        kept = self._weights.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        if not self._weights.filled:
            torch.cat([piece.to(dtype) for piece in pieces], out=kept)
        return kept

    def _weight(self, rows: int, columns: int, role: WeightRole) -> Weight:
        chosen = choose_format(role, self.quantization, self.group_size)
        return Weight(chosen.number, role.gated, rows, columns, chosen.group or 0, None, QVALUES, INT4_BIAS)

    def _weight_bytes(self, weight: Weight) -> int:
        return int(self.library.weight_bytes(weight.address))

    def pack_adapter(self, adapter: Adapter, weights: NetworkWeights, dtype: torch.dtype) -> PackedLora:
        del dtype
        return PackedLora(adapter, weights)

    def quantized(self, quantization: str) -> CpuBackend:
        return CpuBackend(variant=self.variant, num_threads=1, quantization=quantization, group_size=self.group_size)

    def share_weights(self, sharing: WeightSharing, num_bytes: int) -> None:
        self._weights = SharedWeights(sharing, num_bytes)

    def use_nodes(self, cores_of: Mapping[int, Sequence[int]]) -> str | None:
        if (plan := plan_nodes(cores_of, self.num_threads)) is None:
            return None
        self.library.set_nodes(plan)
        self._node_memory = NodeMemory(plan)
        return str(plan)

    def finish_loading(self) -> None:
        self._weights.finish()
        if self._node_memory is not None and (remark := self._node_memory.remark) is not None:
            _logger.warning("%s", remark)

    # Once a step

    def embed(self, ids: Tensor, table: Tensor | Weight) -> Tensor:
        ids = int32(ids)
        if isinstance(table, Weight):
            rows, columns, plain, packed = table.rows, table.columns, None, table.address
        else:
            check(table, torch.bfloat16)
            (rows, columns), plain, packed = table.shape, table.data_ptr(), None
        if self.library.check_ids(ids.data_ptr(), len(ids), rows):
            raise IndexError(f"a token id is not below {rows}, the rows of the embedding table")
        out = torch.empty(len(ids), columns)
        self.library.embed(ids.data_ptr(), len(ids), plain, packed, columns, out.data_ptr())
        return out

    def topk(self, scores: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        check(scores, torch.float32)
        rows, columns = scores.shape
        k = min(k, columns)
        size = rows * k
        # Small tensors would cost more than the choice, and types of ctypes' arrays, one for each size, are cycles.
        ids, values = array("i", bytes(4 * size)), array("f", bytes(4 * size))
        self.library.topk(scores.data_ptr(), rows, columns, k, ids.buffer_info()[0], values.buffer_info()[0])
        starts = range(0, size, k)
        return [ids[start : start + k].tolist() for start in starts], [
            values[start : start + k].tolist() for start in starts
        ]

    def draw(
        self, scores: Tensor, rows: Sequence[int], filters: Sequence[Filter], numbers: Sequence[Sequence[float]]
    ) -> list[list[int]]:
        check(scores, torch.float64 if scores.dtype == torch.float64 else torch.float32)
        (num_scores, columns), count, size = scores.shape, len(rows), sum(map(len, numbers))
        each = size // max(count, 1)
        assert len(filters) == len(numbers) == count and all(0 <= row < num_scores for row in rows)
        assert all(len(some) == each for some in numbers)
        places, ids = array("i", rows), array("i", bytes(4 * size))
        kept, wanted = array("d", chain(*filters)), array("d", chain(*numbers))
        in_doubles = scores.dtype == torch.float64
        places_at, ids_at, kept_at, wanted_at = (buffer.buffer_info()[0] for buffer in (places, ids, kept, wanted))
        self.library.draw(scores.data_ptr(), in_doubles, columns, places_at, count, kept_at, wanted_at, each, ids_at)
        return [ids[start : start + each].tolist() for start in range(0, size, each)]

    def choose(
        self,
        x: Tensor,
        head: Weight,
        bias: Tensor | None = None,
        filters: Sequence[Filter] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[list[int], list[float]]:
        check(x, torch.bfloat16)
        assert x.shape[1] == head.columns
        choices = Choices.of(head, bias, len(x), filters, numbers)
        self.library.choose(choices.address, x.data_ptr(), len(x))
        return choices.result

    # Layers, one operation at a time

    def norm(self, x: Tensor, spec: NormSpec, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        check(x, torch.float32)
        out = torch.empty_like(x, dtype=torch.bfloat16)
        rows, columns = x.shape
        norm = Norm.of(spec, weight, bias, columns)
        self.library.norm(x.data_ptr(), rows, columns, norm.address, out.data_ptr())
        return out

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        check(x, torch.bfloat16)
        assert x.shape[1] == weight.columns and not weight.gated
        out = torch.empty(len(x), weight.rows)
        bias_address, (adapters, place) = vector_address(bias, weight.rows), _lora(lora, len(x))
        self.library.linear(
            *(weight.address, x.data_ptr(), len(x), bias_address, None),
            *(None if adapters is None else adapters.address, place, out.data_ptr()),
        )
        return out

    def linear_heads(self, x: Tensor, weight: Weight) -> Tensor:
        check(x, torch.bfloat16)
        assert x.shape[1:] == (weight.num_heads, weight.columns)
        out = torch.empty(len(x), weight.num_heads, weight.rows, dtype=torch.bfloat16)
        self.library.linear_heads(weight.address, weight.num_heads, x.data_ptr(), len(x), out.data_ptr())
        return out

    def activated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        assert not weight.gated
        return self._activated(x, weight, bias, activation, weight.rows, lora)

    def gated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        assert weight.gated
        return self._activated(x, weight, bias, activation, weight.rows // 2, lora)

    def _activated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, columns: int, lora: LoraRows | None
    ) -> Tensor:
        check(x, torch.bfloat16)
        assert x.shape[1] == weight.columns
        out = torch.empty(len(x), columns, dtype=torch.bfloat16)
        bias_address, (adapters, place) = vector_address(bias, weight.rows), _lora(lora, len(x))
        self.library.activated(
            *(weight.address, x.data_ptr(), len(x), bias_address, ACTIVATIONS[activation]),
            *(None if adapters is None else adapters.address, place, out.data_ptr()),
        )
        return out

    def rope_store(
        self,
        qkv: Tensor,
        store: Store,
        spec: AttentionSpec,
        batch: RaggedBatch,
        rope: RopeTable | None,
        weights: LayerWeights,
    ) -> Tensor:
        check(qkv, torch.float32)
        tokens, head_dim = len(qkv), spec.head_dim
        assert qkv.shape[1] == projected_heads(spec) * head_dim
        assert store.fits(spec)
        heads = Heads.of(spec, rope=rope, weights=weights)
        arrays = Step.of(tokens, positions=batch.positions, slot_mapping=batch.slot_mapping)
        arrays.check(self.library, store, max_position=heads.max_position)
        q = torch.empty(tokens, spec.num_heads, head_dim, dtype=torch.bfloat16)
        self.library.rope_store(arrays.address, heads.address, store.address, qkv.data_ptr(), q.data_ptr())
        return q

    def attend(
        self, q: Tensor, store: Store, spec: AttentionSpec, batch: RaggedBatch, sinks: Tensor | None = None
    ) -> Tensor:
        check(q, torch.bfloat16)
        assert q.shape[1:] == (spec.num_heads, spec.head_dim)
        assert store.fits(spec)
        arrays = Step.of(
            len(q), query_start=batch.query_start, seq_lens=batch.seq_lens, block_tables=batch.block_tables
        )
        arrays.check(self.library, store, max_position=0)
        heads, out = Heads.of(spec, sinks=sinks), q.new_empty(*q.shape[:2], spec.value_dim)
        self.library.attend(arrays.address, heads.address, store.address, q.data_ptr(), out.data_ptr())
        return out

    def delta(
        self, x: Tensor, gates: Tensor, states: States, spec: DeltaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        check(x, torch.float32)
        check(gates, torch.float32)
        values = spec.num_value_heads * spec.value_dim
        assert x.shape == (len(gates), spec.num_channels + values) and gates.shape[1] == 2 * spec.num_value_heads
        arrays, delta = self._recurrent_step(len(x), states, spec, batch), Delta.of(spec, weights)
        out = torch.empty(len(x), values, dtype=torch.bfloat16)
        self.library.delta(
            arrays.address, delta.address, states.address, x.data_ptr(), gates.data_ptr(), out.data_ptr()
        )
        return out

    def mamba(
        self, x: Tensor, dt: Tensor, states: States, spec: MambaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        check(x, torch.float32)
        check(dt, torch.float32)
        values = spec.num_heads * spec.head_dim
        assert x.shape == (len(dt), spec.num_channels + values) and dt.shape[1] == spec.num_heads
        arrays, mamba = self._recurrent_step(len(x), states, spec, batch), Mamba.of(spec, weights)
        out = torch.empty(len(x), values, dtype=torch.bfloat16)
        self.library.mamba(arrays.address, mamba.address, states.address, x.data_ptr(), dt.data_ptr(), out.data_ptr())
        return out

    def conv(self, x: Tensor, states: States, spec: ConvSpec, batch: RaggedBatch, weights: LayerWeights) -> Tensor:
        check(x, torch.float32)
        assert x.shape[1] == 3 * spec.num_channels
        arrays, conv = self._recurrent_step(len(x), states, spec, batch), ShortConv.of(spec, weights)
        out = torch.empty(len(x), spec.num_channels, dtype=torch.bfloat16)
        self.library.conv(arrays.address, conv.address, states.address, x.data_ptr(), out.data_ptr())
        return out

    def _recurrent_step(self, num_tokens: int, states: States, spec: RecurrentSpec, batch: RaggedBatch) -> Step:
        """Return the arrays of a step as a recurrent layer needs them, checked."""
        assert states.slot_floats == self._state_floats(spec)
        arrays = Step.of(
            num_tokens,
            query_start=batch.query_start,
            state_reads=batch.state_reads,
            state_writes=batch.state_writes,
        )
        arrays.check(self.library, None, states=states)
        return arrays

    def route(self, logits: Tensor, spec: RouterSpec, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check(logits, torch.float32)
        assert logits.shape[1] == spec.num_experts
        router, overwritten = Router.of(spec, choice_bias), logits.clone()
        ids, weights = (torch.empty(len(logits), spec.top_k, dtype=dtype) for dtype in (torch.int32, torch.float32))
        self.library.route(router.address, overwritten.data_ptr(), len(logits), ids.data_ptr(), weights.data_ptr())
        return ids, weights

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, spec: MlpSpec, layer: LayerWeights) -> Tensor:
        check(x, torch.bfloat16)
        ids, weights = int32(ids), weights.float().contiguous()
        top_k = ids.shape[1]
        mixture = Mixture.of(layer, spec, top_k=top_k)
        assert ids.shape == weights.shape == (len(x), top_k) and x.shape[1] == layer.w2[0].rows
        assert all(len(set(each)) == top_k for each in ids.tolist())
        if self.library.check_ids(ids.data_ptr(), ids.numel(), len(layer.w2)):
            raise IndexError(f"an expert id is not below {len(layer.w2)}, the number of experts")
        out = torch.empty(x.shape)
        self.library.experts(mixture.address, x.data_ptr(), len(x), ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        return out

    # All of them in one call

    def compile_network(self, plan: NetworkPlan) -> Network | None:
        if (reason := uncovered(plan)) is not None:
            raise UnsupportedModelError(f"the C++ kernels do not compute {reason}: set kernels=reference")
        return FusedNetwork(self.library, plan)

    # Groups

    def gather_logits(self, x: Tensor, head: Weight, bias: Tensor | None, vocabulary: int, group: Group) -> Tensor:
        if not isinstance(group, SharedGroup):
            return super().gather_logits(x, head, bias, vocabulary, group)
        check(x, torch.bfloat16)
        ids, rank, size = group.shard.span(vocabulary), Rank.of(group), 4 * len(x) * vocabulary
        assert (head.rows, head.columns) == (len(ids), x.shape[1]) and size <= group.logit_bytes
        own = group.logits_address + 4 * ids.start
        self.library.head(
            *(rank.address, head.address, vector_address(bias, head.rows), x.data_ptr(), len(x), own, vocabulary)
        )
        return group.logits(len(x), vocabulary)

    # Loans

    def channel_bytes(self, network: Network, stores: Sequence[Store], num_tokens: int) -> int:
        assert isinstance(network, FusedNetwork)
        return network.channel_bytes(stores, num_tokens)

    def lend(self, network: Network, stores: Sequence[Store], channel: Channel, blocks: Sequence[int]) -> None:
        assert isinstance(network, FusedNetwork)
        network.lend(Library(self.variant, self.num_threads), stores, channel, blocks)

    def deposit(self, channel: Channel, index: int, data: Tensor) -> bool:
        check(data, torch.uint8)
        loan = Loan.of(channel)
        return not self.library.deposit(loan.address, index, data.data_ptr(), data.nbytes)


def _lora(lora: LoraRows | None, num_tokens: int) -> tuple[Lora | None, int]:
    """Return the adapters of a step, and the place of the weight that they change."""
    if lora is None:
        return None, 0
    assert all(-1 <= number < len(lora.step.adapters) for number in lora.step.of_row.tolist())
    return step_lora(lora.step, num_tokens), place_of(lora.layer, lora.target)
