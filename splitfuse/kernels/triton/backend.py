"""Offers the Triton kernels as a backend. What they do not compute, the reference does with PyTorch: dense products by
cuBLAS, choosing experts, and drawing tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from splitfuse.errors import ConfigError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import RopeTable, StepSizes, Store
from splitfuse.kernels.layers import AttentionSpec, ConvSpec, DeltaSpec, MambaSpec, MlpSpec, NormSpec, RecurrentSpec
from splitfuse.kernels.lora import LoraRows
from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight
from splitfuse.kernels.reference import ReferenceBackend, add_lora, alibi_slopes, place_heads, query_scales
from splitfuse.kernels.triton.attention import attention_kernel, merge_kernel
from splitfuse.kernels.triton.capabilities import CAPABILITIES, is_interpreted
from splitfuse.kernels.triton.chunks import CHUNK, between_kernel, state_chunks, within_kernel
from splitfuse.kernels.triton.products import (
    dense_kernel,
    dequantize_kernel,
    grouped_kernel,
    grouped_quantized_kernel,
    quantized_kernel,
    tiles_kernel,
)
from splitfuse.kernels.triton.quantized import Quantized, choose_format, stored_format
from splitfuse.kernels.triton.recurrent import (
    convolve_kernel,
    gated_norm_kernel,
    matrix_kernel,
    tail_kernel,
    token_origins,
)
from splitfuse.kernels.triton.rows import (
    ACTIVATIONS,
    NO_NORM,
    NORM_FIRST,
    NORM_LAST,
    best_kernel,
    gated_kernel,
    norm_kernel,
    place_kernel,
)
from splitfuse.kernels.triton.store import ScaledStore
from splitfuse.kernels.triton.tuning import attention_tiles
from splitfuse.kernels.triton.work_list import AttentionWork
from splitfuse.kernels.weights import LayerWeights, Weight, WeightRole

ELEMENTS = 1024
"""Number of columns of a program that goes along rows."""
FIXED_SPLIT = 8192
"""Number of keys of a program, if bits must not depend on the other rows: partial results are few in usual contexts."""
SMALL_STEP = 64
"""Number of rows up to which weights in 8 or 4 bits are multiplied as they are; beyond, cuBLAS multiplies a copy in the
dtype of activations."""
PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_DEPTH = 16, 64, 64
"""Sizes of a tile of our own products."""
QUANTIZED_COLUMNS = 32
"""Number of columns of a tile whose weight has 8 or 4 bits."""
DEQUANTIZED_ROWS, DEQUANTIZED_BYTES = 32, 128
"""Numbers of rows of a weight, and of bytes of each, that a program dequantizes."""
LARGE_ROWS = 64
"""Number of rows of a tile where experts have half as many or more each: every tile reads its weight again."""
TILES_AT_ONCE = 16
"""Number of tiles that a program makes of rows and their owners."""
NEVER_COPIED = (WeightRole.HEAD, WeightRole.EMBED, WeightRole.W13, WeightRole.W1, WeightRole.W2)
"""Roles of weights in 8 or 4 bits that are used as they are in steps of any size: heads have few rows at a time,
embeddings are looked up, and experts have a kernel.
"""
SEARCHED_COLUMNS = 8192
"""Number of columns that a program looks for the largest number in at a time: it has a row alone."""
PLACED_ELEMENTS = 2048
"""Number of elements of a tile of `place_kernel`: a head of so many tokens."""
CONVOLVED_COLUMNS = 128
"""Number of channels that a program convolves."""
MATRIX_ELEMENTS = 2048
"""Number of elements of a recurrent state that a program takes through its tokens, one after the other."""
CHUNK_COLUMNS = 16
"""Most columns of a recurrent state that a program takes through chunks of tokens."""
KEYS_AT_ONCE = 32
"""Number of elements of the vectors of a chunk that a program multiplies at a time."""
OLDEST_WITH_TF32 = (8, 0)
"""Least compute capability whose tensor cores multiply fp32, in three products of 19 bits."""


class TritonBackend(ReferenceBackend):
    """Computes on an NVIDIA GPU; in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, for tests.

    `kv_dtype` is "auto" (the dtype of activations), "int8" or "fp8", `quantization` None, "int8" or "int4", and
    `group_size` the number of columns that share a scale. If it is `invariant`, a row's bits are the same whatever the
    other rows of a step are: all products are then its own, and tiles and splits have fixed sizes, which is slower.
    Raises ConfigError for a group size that the quantization does not have.

    >>> TritonBackend().describe()  # doctest: +SKIP
    'Triton kernels: NVIDIA H200 (compute capability 9.0); weights and KV cache as activations'
    """

    capabilities = CAPABILITIES

    def __init__(
        self,
        *,
        device: str = "cuda",
        kv_dtype: str = "auto",
        quantization: str | None = None,
        group_size: int | None = None,
        invariant: bool = False,
    ) -> None:
        super().__init__()
        choose_format(WeightRole.QKV, quantization, group_size)  # raises, if there is none
        self.kv_dtype, self.quantization, self.group_size = kv_dtype, quantization, group_size
        self.invariant = invariant
        self.device, self.device_name = device, "cpu, interpreted"
        self.compute_capability: tuple[int, int] | None = None
        self.processors = 1
        self._alibi: dict[AttentionSpec, Tensor] = {}
        self._tables: Any = WeakIdKeyDictionary()  # of _Table by the first tensor
        if not is_interpreted():
            properties = torch.cuda.get_device_properties(device)
            self.device_name, self.processors = properties.name, properties.multi_processor_count
            self.compute_capability = (properties.major, properties.minor)

    def describe(self) -> str:
        name = self.device_name
        if self.compute_capability is not None:
            name += " (compute capability {}.{})".format(*self.compute_capability)
        kept = choose_format(WeightRole.QKV, self.quantization, self.group_size)
        weights = "as activations" if kept is None else f"int{kept.bits}"
        if kept is not None and kept.group:
            weights += f" in groups of {kept.group}"
        cache = "as activations" if self.kv_dtype == "auto" else self.kv_dtype
        return f"Triton kernels: {name}; weights {weights}, KV cache {cache}" + (
            "; batch-invariant" if self.invariant else ""
        )

    # Keys and values

    def kv_bytes(self, spec: AttentionSpec, *, block_size: int, dtype: torch.dtype) -> int:
        if self.kv_dtype == "auto":
            return super().kv_bytes(spec, block_size=block_size, dtype=dtype)
        return 2 * block_size * spec.num_kv_heads * (spec.head_dim + 4)

    def allocate_kv(
        self, spec: AttentionSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        self.check_head_dim(spec.head_dim)
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        if self.kv_dtype == "auto":
            return super().allocate_kv(spec, **sizes, dtype=dtype, device=device)
        if spec.latent is not None:
            raise ConfigError(
                f"kv_cache_dtype={self.kv_dtype} is not supported with latent attention, whose cache is small already: "
                "use auto"
            )
        shape = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
        return ScaledStore(self.kv_dtype, **sizes, **shape, device=device)

    def attention_bytes(self, spec: AttentionSpec, sizes: StepSizes, dtype: torch.dtype) -> int:
        work = self._work(spec, itemsize=dtype.itemsize, block_size=1)
        rows = max(work.sizes.single_rows, work.sizes.chunk_rows)
        return 4 * work.most_partials(sizes) * spec.num_kv_heads * rows * (spec.value_dim + 2)

    def _work(self, spec: AttentionSpec, *, itemsize: int, block_size: int) -> AttentionWork:
        """Return what makes the work lists of a kind of attention."""
        return AttentionWork(
            attention_tiles(spec.head_dim, self.compute_capability, itemsize=itemsize),
            spec.num_heads // spec.num_kv_heads,
            spec.num_kv_heads,
            spec.window,
            spec.chunk,
            self.processors,
            block_size,
            FIXED_SPLIT if self.invariant else None,
        )

    def fill_kv(self, store: Store, byte: int) -> None:
        memory = store.memory if isinstance(store, ScaledStore) else store
        super().fill_kv(memory, byte)

    def read_block(self, store: Store, block: int, out: Tensor) -> None:
        if not isinstance(store, ScaledStore):
            return super().read_block(store, block, out)
        out.copy_(torch.cat([part.flatten().view(torch.uint8) for part in store.parts(block)]))
        return None

    def write_block(self, store: Store, block: int, data: Tensor) -> None:
        if not isinstance(store, ScaledStore):
            return super().write_block(store, block, data)
        begin = 0
        for part in store.parts(block):
            size = part.numel() * part.element_size()
            part.copy_(data[begin : begin + size].view(part.dtype).view(part.shape))
            begin += size
        return None

    # Weights

    def weight_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
        kept = choose_format(role, self.quantization, self.group_size)
        return super().weight_bytes(shape, role=role, dtype=dtype) if kept is None else kept.num_bytes(shape)

    def copy_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype, is_stored: bool = False) -> int:
        is_kept = is_stored or choose_format(role, self.quantization, self.group_size) is not None
        if not is_kept or self.invariant or role in NEVER_COPIED:
            return 0
        return math.prod(shape) * dtype.itemsize

    def pack(self, pieces: Sequence[Tensor], *, role: WeightRole, dtype: torch.dtype | None = None) -> Weight:
        weight = super().pack(pieces, role=role, dtype=dtype)
        kept = choose_format(role, self.quantization, self.group_size)
        return weight if kept is None else Quantized.of(weight, kept)

    def accepts(self, stored: QuantizedFormat, role: WeightRole) -> bool:
        if self.quantization is not None or role is WeightRole.GATES:  # states depend on gates exponentially
            return False
        kept = (role.linear and not role.by_head) or role is WeightRole.EMBED
        return kept and stored_format(stored, sys.maxsize) is not None

    def pack_quantized(
        self, pieces: Sequence[Tensor | QuantizedWeight], *, role: WeightRole, dtype: torch.dtype
    ) -> Weight:
        stored = [piece for piece in pieces if not isinstance(piece, Tensor)]
        device = torch.device(self.device)
        if len(stored) == len(pieces) and (weight := Quantized.stored(stored, dtype, device)) is not None:
            return weight
        dense = [piece if isinstance(piece, Tensor) else piece.dequantize(dtype) for piece in pieces]
        return self.pack([each.to(device) for each in dense], role=role, dtype=dtype)

    def quantized_weight_bytes(
        self,
        pieces: Sequence[tuple[QuantizedFormat | None, int]],
        *,
        columns: int,
        role: WeightRole,
        dtype: torch.dtype,
    ) -> int:
        shape = sum(rows for _, rows in pieces), columns
        formats = {None if stored is None else stored_format(stored, columns) for stored, _ in pieces}
        kept = formats.pop()
        if kept is None or formats:  # in several formats: as none of them
            return self.weight_bytes(shape, role=role, dtype=dtype)
        return kept.num_bytes(shape)

    def quantized(self, quantization: str) -> TritonBackend:
        return TritonBackend(device=self.device, quantization=quantization, group_size=self.group_size)

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        if isinstance(table, Quantized):
            return self.dequantize(table, table.dtype, ids)
        return super().embed(ids, table)

    # Products

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        if isinstance(weight, Quantized):
            if self.invariant or len(x) <= SMALL_STEP:
                return add_lora(self._quantized_linear(x, weight, bias), x, lora)
            weight = self.dequantize(weight, x.dtype)
        if not self.invariant:
            return super().linear(x, weight, bias, lora)
        return add_lora(self._fixed_linear(x, weight, bias), x, lora)

    def _fixed_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with a weight as it is, by tiles of one size whatever the number of rows."""
        x, (num_rows, depth), width = x.contiguous(), x.shape, len(weight)
        out = x.new_empty(num_rows, width)
        if out.numel():
            dense_kernel[(triton.cdiv(num_rows, PRODUCT_ROWS), triton.cdiv(width, PRODUCT_COLUMNS))](
                *(out, x, weight.contiguous(), x if bias is None else bias, num_rows, width, depth),
                HAS_BIAS=bias is not None,
                ROWS=PRODUCT_ROWS,
                COLUMNS=PRODUCT_COLUMNS,
                DEPTH=PRODUCT_DEPTH,
            )
        return out

    def _quantized_linear(self, x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
        x, (num_rows, depth), width = x.contiguous(), x.shape, len(weight)
        out = x.new_empty(num_rows, width)
        if out.numel():
            quantized_kernel[(triton.cdiv(num_rows, PRODUCT_ROWS), triton.cdiv(width, QUANTIZED_COLUMNS))](
                out,
                x,
                *_stored_parts(weight),
                x if bias is None else bias,
                num_rows,
                width,
                depth,
                weight.levels.shape[1],
                **_quantized_tiles(weight, PRODUCT_ROWS),
                HAS_ORDER=weight.order is not None,
                HAS_BIAS=bias is not None,
            )
        return out

    def dequantize(self, weight: Quantized, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return a weight, or some of its rows: what fp32 arithmetic makes of it, rounded to `dtype`."""
        num_rows, stored = len(weight if rows is None else rows), weight.levels.shape[1]
        out = torch.empty(num_rows, weight.columns, dtype=dtype, device=weight.levels.device)
        if out.numel():
            dequantize_kernel[(triton.cdiv(stored, DEQUANTIZED_BYTES), triton.cdiv(num_rows, DEQUANTIZED_ROWS))](
                out,
                *_stored_parts(weight),
                weight.levels if rows is None else rows,
                num_rows,
                weight.columns,
                stored,
                **_meaning(weight),
                HAS_ORDER=weight.order is not None,
                HAS_ROWS=rows is not None,
                ROWS=DEQUANTIZED_ROWS,
                COLUMNS=DEQUANTIZED_BYTES,
            )
        return out

    def linear_heads(self, x: Tensor, weight: Weight) -> Tensor:
        if not self.invariant:
            return super().linear_heads(x, weight)
        tokens, heads, depth = x.shape
        rows = torch.arange(tokens * heads, dtype=torch.int32, device=x.device)
        groups = self._groups(rows % heads, heads)
        y = self._grouped(x.reshape(-1, depth), weight, None, groups, width=weight.shape[1])
        return y.view(tokens, heads, -1)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, spec: MlpSpec, layer: LayerWeights) -> Tensor:
        first = layer.w13 if spec.gated else layer.w1
        k, groups = ids.shape[1], self._groups(ids.flatten(), len(layer.w2))
        biases = (layer.w1_bias, layer.w2_bias) if spec.bias else (None, None)
        inner = self._grouped(
            *(x, first, biases[0], groups),
            top_k=k,
            width=len(first[0]) // (1 + spec.gated),
            kind=ACTIVATIONS[spec.activation],
            gated=spec.gated,
        )
        outputs = self._grouped(inner, layer.w2, biases[1], groups, width=len(layer.w2[0]))
        weighted = outputs.view(-1, k, x.shape[1]).float() * weights.float().unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)

    def _groups(self, owners: Tensor, num_owners: int) -> tuple[Tensor, Tensor, int]:
        """Return rows by their owners [P], the weights that they are multiplied by, and tiles of them as
        `grouped_kernel` wants both, and the rows of a tile. Nothing is read back from the GPU: there are as many tiles
        as there can be.
        """
        num_rows = len(owners)
        is_many = not self.invariant and num_rows >= LARGE_ROWS // 2 * num_owners
        tile_rows = LARGE_ROWS if is_many else PRODUCT_ROWS
        owners, order = owners.sort(stable=True)
        count = num_rows // tile_rows + min(num_owners, num_rows)
        tiles = torch.empty(count, 3, dtype=torch.int32, device=owners.device)
        if count:
            tiles_kernel[(triton.cdiv(count, TILES_AT_ONCE),)](
                *(tiles, owners, num_rows, num_rows.bit_length(), count),
                ROWS=tile_rows,
                NUM_OWNERS=num_owners,
                OWNERS=triton.next_power_of_2(num_owners),
                TILES=TILES_AT_ONCE,
            )
        return order.int(), tiles, tile_rows

    def _grouped(
        self,
        x: Tensor,
        weights: Sequence[Weight] | Tensor,
        biases: Sequence[Tensor] | None,
        groups: tuple[Tensor, Tensor, int],
        *,
        width: int,
        top_k: int = 1,
        kind: int = -1,
        gated: bool = False,
    ) -> Tensor:
        """Return each row of a group times the weight of its owner, [rows, width]."""
        rows, tiles, tile_rows = groups
        x, out, first = x.contiguous(), x.new_empty(len(rows), width), weights[0]
        common = (rows if biases is None else self._addresses(biases).addresses, rows, tiles, top_k, width, x.shape[1])
        options = {"KIND": kind, "IS_GATED": gated, "HAS_BIAS": biases is not None}
        if not len(tiles):
            return out
        if isinstance(first, Quantized):
            table = self._quantized_addresses([*weights])
            grouped_quantized_kernel[(len(tiles), triton.cdiv(width, QUANTIZED_COLUMNS))](
                out,
                x,
                table.addresses,
                first.levels,
                first.scales,
                *(x if each is None else each for each in (first.offsets, first.table)),
                *common,
                first.levels.shape[1],
                **options,
                **_quantized_tiles(first, tile_rows),
                HAS_ORDER=table.order is not None,
                IS_ALIGNED=table.is_aligned,
            )
        else:
            table = self._addresses(weights)
            grouped_kernel[(len(tiles), triton.cdiv(width, PRODUCT_COLUMNS))](
                out,
                x,
                table.addresses,
                *common,
                **options,
                IS_ALIGNED=table.is_aligned,
                ROWS=tile_rows,
                COLUMNS=PRODUCT_COLUMNS,
                DEPTH=PRODUCT_DEPTH,
            )
        return out

    def _addresses(self, tensors: Sequence[Tensor] | Tensor) -> _Table:
        """Return where tensors lie, or the parts of one."""
        owner = tensors if isinstance(tensors, Tensor) else tensors[0]
        return self._table(owner, lambda: ([(each,) for each in tensors], None))

    def _quantized_addresses(self, weights: Sequence[Quantized]) -> _Table:
        """Return where the parts of weights lie, as `grouped_quantized_kernel` wants them."""

        def make() -> tuple[list[tuple[Tensor | None, ...]], Tensor | None]:
            order = None
            if any(each.order is not None for each in weights):  # those of other experts may be in theirs
                order = torch.arange(weights[0].columns, dtype=torch.int32, device=weights[0].levels.device)
            orders = [order if each.order is None else each.order for each in weights]
            parts = [(each.levels, each.scales, each.zeros, each.offsets) for each in weights]
            return [(*part, own) for part, own in zip(parts, orders, strict=True)], order

        return self._table(weights[0].levels, make)

    def _table(
        self, owner: Tensor, make: Callable[[], tuple[Sequence[Sequence[Tensor | None]], Tensor | None]]
    ) -> _Table:
        """Return the table of the addresses of tensors, of which `owner` is the first: made once, as weights stay."""
        known: _Table | None = self._tables.get(owner)
        if known is None:
            tensors, order = make()
            assert all(each is None or each.is_contiguous() for row in tensors for each in row)
            numbers = [[0 if each is None else each.data_ptr() for each in row] for row in tensors]
            addresses = torch.tensor(numbers, dtype=torch.int64)
            is_aligned = not bool((addresses % 16).any())
            known = self._tables[owner] = _Table(addresses.to(owner.device), is_aligned, order)
        return known

    # Rows

    def norm(self, x: Tensor, spec: NormSpec, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._norm(x, None, 1.0, spec, weight, bias)[1]

    def add_norm(
        self, x: Tensor, branch: Tensor, scale: float, spec: NormSpec, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._norm(x, branch, scale, spec, weight, bias)

    def _norm(
        self, x: Tensor, branch: Tensor | None, scale: float, spec: NormSpec, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x [T, C] with what a block gave, and the norm of that."""
        x = x.contiguous()
        summed, out, width = x if branch is None else torch.empty_like(x), torch.empty_like(x), x.shape[-1]
        if x.numel():
            columns = triton.next_power_of_2(width)
            norm_kernel[(x.numel() // width,)](
                out,
                summed,
                x,
                x if branch is None else branch.contiguous(),
                weight,
                weight if bias is None else bias,
                scale,
                width,
                spec.eps,
                HAS_BRANCH=branch is not None,
                IS_CENTERED=spec.centered,
                HAS_BIAS=bias is not None,
                COLUMNS=columns,
                num_warps=max(1, min(8, columns // 256)),
            )
        return summed, out

    def gated(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str, lora: LoraRows | None = None
    ) -> Tensor:
        gate_up = self.linear(x, weight, bias, lora)
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        if out.numel():
            columns = min(ELEMENTS, triton.next_power_of_2(width))
            gated_kernel[(rows, triton.cdiv(width, columns))](
                out, gate_up, width, KIND=ACTIVATIONS[activation], COLUMNS=columns
            )
        return out

    def topk(self, scores: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
        if k != 1 or scores.dtype != torch.float32 or not scores.numel():
            return super().topk(scores, k)
        out = torch.empty(len(scores), 2, dtype=torch.int32, device=scores.device)
        columns = min(SEARCHED_COLUMNS, triton.next_power_of_2(scores.shape[1]))
        best_kernel[(len(scores),)](out, scores.contiguous(), scores.shape[1], COLUMNS=columns, num_warps=8)
        found = out.cpu()  # the only copy from a GPU
        return found[:, :1].tolist(), found[:, 1:].contiguous().view(torch.float32).tolist()

    # Attention

    def rope_store(
        self,
        qkv: Tensor,
        store: Store,
        spec: AttentionSpec,
        batch: RaggedBatch,
        rope: RopeTable | None,
        weights: LayerWeights,
    ) -> Tensor:
        norms, scaling, v_norm = spec.qk_norm, spec.query_scaling, spec.v_norm
        if norms is not None and norms.whole_row:  # a sum over all heads: PyTorch takes it, and the kernel only writes
            q, *others = place_heads(qkv, spec, batch, rope, weights)
            if spec.kv_layer is not None:
                return q
            qkv = torch.cat((q, *others), dim=1).flatten(1)
            norms, rope, scaling, v_norm = None, None, None, None
        qkv = qkv.contiguous()
        num_tokens, width = qkv.shape
        q = qkv.new_empty(num_tokens, spec.num_heads, spec.head_dim)
        if not num_tokens:
            return q
        values, scales, levels, is_integer = _parts(store)
        cos, sin = (qkv, qkv) if rope is None else rope
        norm_kind = NO_NORM if norms is None else NORM_LAST if norms.after_rope else NORM_FIRST
        dim = max(16, triton.next_power_of_2(spec.head_dim))
        tokens = max(1, PLACED_ELEMENTS // dim)
        place_kernel[(triton.cdiv(num_tokens, tokens), width // spec.head_dim)](
            q,
            values,
            scales,
            qkv,
            batch.positions,
            batch.slot_mapping,
            cos,
            sin,
            *_of_one_type(weights, ("q_norm", "q_norm_bias", "k_norm", "k_norm_bias"), qkv),
            qkv if scaling is None else query_scales(scaling, batch.positions),
            num_tokens,
            values.shape[1] * values.shape[2],
            width,
            0.0 if norms is None else norms.norm.eps,
            0.0 if v_norm is None else v_norm.eps,
            HEADS=spec.num_heads,
            KV_HEADS=spec.num_kv_heads,
            HEAD_DIM=spec.head_dim,
            DIM=dim,
            HALF=0 if rope is None else cos.shape[1],
            TOKENS=tokens,
            NORM=norm_kind,
            IS_CENTERED=norms is not None and norms.norm.centered,
            OWN_WEIGHTS=int(norms is not None and norms.own_weights),
            HAS_WEIGHT=norms is not None and norms.weight,
            HAS_BIAS=norms is not None and norms.norm.bias,
            V_NORM=0 if v_norm is None else 1 + v_norm.centered,
            HAS_SCALES=scaling is not None,
            LEVELS=levels,
            IS_INTEGER=is_integer,
        )
        return q

    def attend(
        self, q: Tensor, store: Store, spec: AttentionSpec, batch: RaggedBatch, sinks: Tensor | None = None
    ) -> Tensor:
        starts = batch.host_query_start
        out = q.new_empty(*q.shape[:2], spec.value_dim)
        if batch.is_padded:  # any of its rows may be no request's when this is replayed
            out.zero_()
        elif starts[-1] < len(q):
            out[starts[-1] :] = 0  # rows of no request
        values, scales, levels, _ = _parts(store)
        value_dim, group = spec.value_dim, spec.num_heads // spec.num_kv_heads
        work = self._work(spec, itemsize=q.element_size(), block_size=values.shape[2])
        tiles, merges = batch.derived(work)
        if not len(tiles):
            return out
        num_partials, rows = len(tiles) if len(merges) else 0, work.rows(batch)
        partial = q.new_empty(num_partials, spec.num_kv_heads, rows, value_dim, dtype=torch.float32)
        partial_softmax = q.new_empty(num_partials, spec.num_kv_heads, rows, 2, dtype=torch.float32)
        sinks = None if sinks is None else sinks.contiguous()
        slopes = q if spec.alibi is None else self._slopes(spec, q.device)
        dim = max(16, triton.next_power_of_2(value_dim))
        common = {
            "KV_HEADS": spec.num_kv_heads,
            "GROUP": group,
            "DIM": dim,
            "ROWS": rows,
            "HAS_SINKS": sinks is not None,
        }
        attention_kernel[(len(tiles), spec.num_kv_heads)](
            out,
            partial,
            partial_softmax,
            q.contiguous(),
            values,
            scales,
            q if sinks is None else sinks,
            slopes,
            tiles,
            batch.block_tables,
            batch.block_tables.shape[1],
            values.shape[1] * values.shape[2],
            spec.score_scale,
            spec.softcap or 1.0,
            spec.window or 0,
            spec.chunk or 0,
            **common,
            HEAD_DIM=spec.head_dim,
            VALUE_FROM=spec.value_from,
            FRONT_DIM=max(16, triton.next_power_of_2(spec.value_from)),
            BLOCK=values.shape[2],
            KEYS=work.sizes.keys,
            HAS_CAP=spec.softcap is not None,
            HAS_WINDOW=spec.window is not None,
            HAS_CHUNK=spec.chunk is not None,
            HAS_SLOPES=spec.alibi is not None,
            IS_SCALED=levels > 0,
            num_warps=work.sizes.warps,
            num_stages=work.sizes.stages,
        )
        if len(merges):
            merge_kernel[(len(merges), spec.num_kv_heads)](
                out, partial, partial_softmax, q if sinks is None else sinks, merges, VALUE_DIM=value_dim, **common
            )
        return out

    # Recurrent states

    def delta(
        self, x: Tensor, gates: Tensor, states: Store, spec: DeltaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        heads, values = spec.num_value_heads, spec.num_value_heads * spec.value_dim
        y = self._matrices(x, gates, states, spec, batch, weights, spec.num_key_heads, heads)
        return self._gated_norm(y, x, spec, weights, groups=heads, width=values // heads)

    def mamba(
        self, x: Tensor, dt: Tensor, states: Store, spec: MambaSpec, batch: RaggedBatch, weights: LayerWeights
    ) -> Tensor:
        groups, values = spec.num_groups, spec.num_heads * spec.head_dim
        y = self._matrices(x, dt, states, spec, batch, weights, groups, spec.num_heads)
        return self._gated_norm(y, x, spec, weights, groups=groups, width=values // groups)

    def conv(self, x: Tensor, states: Store, spec: ConvSpec, batch: RaggedBatch, weights: LayerWeights) -> Tensor:
        return self._convolved(x, states, spec, batch, weights, dtype=x.dtype)

    def _convolved(
        self,
        x: Tensor,
        states: Tensor,
        spec: RecurrentSpec,
        batch: RaggedBatch,
        weights: LayerWeights,
        *,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return what a convolution gives of the channels of x: [T, C]. States have the newest inputs then."""
        weight, bias, x = weights.conv, weights.conv_bias, x.contiguous()
        assert weight is not None
        out = x.new_empty(len(x), spec.num_channels, dtype=dtype)
        if not len(x):
            return out
        columns = min(CONVOLVED_COLUMNS, triton.next_power_of_2(spec.num_channels))
        tokens, num_tiles = ELEMENTS // columns, triton.cdiv(spec.num_channels, columns)
        (origins,) = batch.derived(token_origins)
        shape = {"IS_GATED": isinstance(spec, ConvSpec), "SIZE": spec.conv_size, "COLUMNS": columns}
        convolve_kernel[(triton.cdiv(len(x), tokens), num_tiles)](
            out,
            x,
            states,
            origins,
            weight,
            weight if bias is None else bias,
            len(x),
            spec.num_channels,
            x.shape[1],
            states.shape[1],
            HAS_BIAS=bias is not None,
            TOKENS=tokens,
            **shape,
        )
        num_requests = len(batch.state_reads)
        tail_kernel[(num_requests, num_tiles)](
            x,
            states,
            batch.query_start,
            batch.state_reads,
            batch.state_writes,
            num_requests,
            spec.num_channels,
            x.shape[1],
            states.shape[1],
            ROWS=triton.next_power_of_2(max(spec.conv_size - 1, 1)),
            **shape,
        )
        return out

    def _matrices(
        self,
        x: Tensor,
        gates: Tensor,
        states: Tensor,
        spec: DeltaSpec | MambaSpec,
        batch: RaggedBatch,
        weights: LayerWeights,
        groups: int,
        heads: int,
    ) -> Tensor:
        """Return what the tokens read of their states, in fp32: [T, heads x size of a value]."""
        assert weights.decay is not None and weights.decay_bias is not None
        if isinstance(spec, DeltaSpec):
            key_dim, value_dim, limits = spec.key_dim, spec.value_dim, (0.0, 0.0)
        else:
            key_dim, value_dim = spec.state_dim, spec.head_dim
            limits = spec.dt_min, math.inf if spec.dt_max is None else spec.dt_max
        mixed = self._convolved(x, states, spec, batch, weights, dtype=torch.float32)
        make = torch.zeros if batch.is_padded else torch.empty  # rows of no request are finite
        out = make(len(x), heads * value_dim, dtype=torch.float32, device=x.device)
        if not len(x):
            return out
        gates, keys = gates.contiguous(), triton.next_power_of_2(key_dim)
        columns = min(max(1, MATRIX_ELEMENTS // keys), triton.next_power_of_2(value_dim))
        num_requests, has_chunks = len(batch.state_reads), not self.invariant and batch.num_tokens > batch.num_requests
        is_chunked, runs, chunks = batch.derived(state_chunks) if has_chunks else (batch.state_reads,) * 3
        of_heads = (weights.decay, weights.decay_bias)
        skip = weights.decay if weights.skip is None else weights.skip
        place = (states.shape[1], (spec.conv_size - 1) * spec.num_channels)
        numbers = (key_dim**-0.5, *limits)
        shape: dict[str, Any] = {
            "IS_DELTA": isinstance(spec, DeltaSpec),
            "HEADS": heads,
            "GROUPS": groups,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
        }
        matrix_kernel[(num_requests, heads, triton.cdiv(value_dim, columns))](
            *(out, mixed, gates, states, *of_heads, skip),
            *(batch.query_start, batch.state_reads, batch.state_writes, is_chunked, num_requests, *place, *numbers),
            **shape,
            KEYS=keys,
            HAS_CHUNKS=has_chunks,
            COLUMNS=columns,
            num_warps=2,
        )
        if not has_chunks or not len(runs):
            return out
        shape |= {"KEYS": max(16, keys), "CHUNK": CHUNK, "PRECISION": self._precision(x.dtype)}
        options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        factors, seen = (torch.empty(len(x), heads, count, **options) for count in (4, CHUNK))
        solved = torch.empty_like(seen) if isinstance(spec, DeltaSpec) else seen
        within_kernel[(len(chunks), heads)](
            *(factors, seen, solved, mixed, gates, *of_heads, chunks, *numbers),
            **shape,
            KEYS_AT_ONCE=min(KEYS_AT_ONCE, shape["KEYS"]),
            num_warps=8,
        )
        columns = max(16, min(CHUNK_COLUMNS, triton.next_power_of_2(value_dim)))
        between_kernel[(len(runs), heads, triton.cdiv(value_dim, columns))](
            *(
                out,
                factors,
                seen,
                solved,
                mixed,
                states,
                skip,
                batch.state_reads,
                batch.state_writes,
                runs,
                chunks,
                *place,
            ),
            **shape,
            COLUMNS=columns,
            num_warps=8,
            num_stages=2,
        )
        return out

    def _precision(self, dtype: torch.dtype) -> str:
        """Return how numbers in fp32 are multiplied where activations are in `dtype`: in fp32 what tells tokens apart
        may be in the last bits.
        """
        has_tf32 = self.compute_capability is not None and self.compute_capability >= OLDEST_WITH_TF32
        return "tf32x3" if has_tf32 and dtype != torch.float32 else "ieee"

    def _gated_norm(
        self,
        y: Tensor,
        x: Tensor,
        spec: DeltaSpec | MambaSpec,
        weights: LayerWeights,
        *,
        groups: int,
        width: int,
    ) -> Tensor:
        """Return groups [T, groups x width] of fp32, normed and gated by what follows the channels in x, in its dtype:
        those of a delta net are normed first.
        """
        out, x = x.new_empty(y.shape), x.contiguous()
        if len(x):
            columns, is_mamba = triton.next_power_of_2(width), isinstance(spec, MambaSpec)
            gated_norm_kernel[(len(x), groups)](
                out,
                y,
                x,
                weights.out_norm,
                spec.norm.eps,
                x.shape[1],
                spec.num_channels,
                width,
                GATE_FIRST=is_mamba,
                OWN_WEIGHTS=is_mamba,
                IS_CENTERED=spec.norm.centered,
                COLUMNS=columns,
                num_warps=max(1, min(8, columns // 256)),
            )
        return out

    def _slopes(self, spec: AttentionSpec, device: torch.device) -> Tensor:
        """Return the slopes of ALiBi, copied to the GPU once: a step that is captured copies nothing."""
        if spec not in self._alibi:
            self._alibi[spec] = alibi_slopes(spec).to(device)
        return self._alibi[spec]


@dataclass(frozen=True)
class _Table:
    """Holds the addresses [weights, parts] of tensors, int64 on their device, 0 where there is none."""

    addresses: Tensor
    is_aligned: bool  # all are multiples of 16
    order: Tensor | None  # of columns of weights that have no other, if some have one


def _stored_parts(weight: Quantized) -> list[Tensor]:
    """Return the tensors of a quantized weight in the order in which kernels want them, any in place of one that there
    is not.
    """
    parts = (weight.levels, weight.scales, weight.zeros, weight.offsets, weight.table, weight.order)
    return [weight.levels if each is None else each for each in parts]


def _meaning(weight: Quantized) -> dict[str, Any]:
    """Return what kernels must know of the format of a quantized weight when they are compiled."""
    kept = weight.format
    return {
        "IS_4_BIT": kept.bits == 4,
        "IS_FP8": kept.is_float,
        "GROUP": kept.group,
        "BIAS": kept.bias,
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_OFFSETS": weight.offsets is not None,
        "HAS_TABLE": weight.table is not None,
    }


def _quantized_tiles(weight: Quantized, rows: int) -> dict[str, Any]:
    """Return the same for products, with the sizes of their tiles."""
    group = weight.format.group
    depth = min(group, PRODUCT_DEPTH) if group else PRODUCT_DEPTH
    return {**_meaning(weight), "ROWS": rows, "COLUMNS": QUANTIZED_COLUMNS, "DEPTH": depth}


def _of_one_type(weights: LayerWeights, names: Sequence[str], other: Tensor) -> list[Tensor]:
    """Return weights by name, all in fp32: in place of one that a layer does not have any other, or `other`."""
    found = [getattr(weights, name) for name in names]
    stand_in = next((each for each in found if each is not None), other)
    return [stand_in if each is None else each for each in found]


def _parts(store: Store) -> tuple[Tensor, Tensor, int, bool]:
    """Return values, scales, largest number and whether it is an integer, of a store; 0: there are no scales."""
    if isinstance(store, ScaledStore):
        return store.values, store.scales, store.levels, store.is_integer
    return store, store, 0, False
