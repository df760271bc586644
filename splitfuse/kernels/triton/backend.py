"""Offers the Triton kernels as a backend. What they do not compute, the reference does with PyTorch: dense products by
cuBLAS, and layers with recurrent states.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.interface import (
    AttentionSpec,
    LayerWeights,
    MlpSpec,
    NormSpec,
    Role,
    RopeTable,
    Store,
    Weight,
)
from splitfuse.kernels.lora import LoraRows
from splitfuse.kernels.reference import ReferenceBackend, add_lora, alibi_slopes, place_heads, query_scales
from splitfuse.kernels.triton.attention import attention_kernel, merge_kernel
from splitfuse.kernels.triton.capabilities import CAPABILITIES, is_interpreted
from splitfuse.kernels.triton.products import grouped_kernel, quantized_kernel
from splitfuse.kernels.triton.quantized import Quantized, choose_format
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

ELEMENTS = 1024
"""Number of columns of a program that goes along rows."""
FIXED_SPLIT = 8192
"""Number of keys of a program, if bits must not depend on the other rows: partial results are few in usual contexts."""
SMALL_STEP = 64
"""Number of rows up to which weights in 8 or 4 bits are multiplied as they are; beyond, cuBLAS multiplies a copy in the
dtype of activations."""
PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_DEPTH = 16, 64, 64
"""Sizes of a tile of our own products."""
PLACED_ELEMENTS = 2048
"""Number of elements of a tile of `place_kernel`: a head of so many tokens."""


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
        choose_format(Role.QKV, quantization, group_size)  # raises, if there is none
        self.kv_dtype, self.quantization, self.group_size = kv_dtype, quantization, group_size
        self.invariant = invariant
        self.device, self.device_name = device, "cpu, interpreted"
        self.compute_capability: tuple[int, int] | None = None
        self.processors = 1
        self._alibi: dict[AttentionSpec, Tensor] = {}
        self._tables: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # of addresses, by that of the first
        if not is_interpreted():
            properties = torch.cuda.get_device_properties(device)
            self.device_name, self.processors = properties.name, properties.multi_processor_count
            self.compute_capability = (properties.major, properties.minor)

    def describe(self) -> str:
        name = self.device_name
        if self.compute_capability is not None:
            name += " (compute capability {}.{})".format(*self.compute_capability)
        kept = choose_format(Role.QKV, self.quantization, self.group_size)
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

    def weight_bytes(self, shape: Sequence[int], *, role: Role, dtype: torch.dtype) -> int:
        kept = choose_format(role, self.quantization, self.group_size)
        return super().weight_bytes(shape, role=role, dtype=dtype) if kept is None else kept.num_bytes(shape)

    def copy_bytes(self, shape: Sequence[int], *, role: Role, dtype: torch.dtype) -> int:
        kept = choose_format(role, self.quantization, self.group_size)
        if kept is None or self.invariant or role is Role.HEAD:  # which has few rows at a time
            return 0
        return kept.copy_bytes(shape, dtype)

    def pack(self, pieces: Sequence[Tensor], *, role: Role, dtype: torch.dtype | None = None) -> Weight:
        weight = super().pack(pieces, role=role, dtype=dtype)
        kept = choose_format(role, self.quantization, self.group_size)
        return weight if kept is None else Quantized.of(weight, kept)

    def quantized(self, quantization: str) -> TritonBackend:
        return TritonBackend(device=self.device, quantization=quantization, group_size=self.group_size)

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        if isinstance(table, Quantized):
            return table.dequantize(table.dtype, ids.long())
        return super().embed(ids, table)

    # Products

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, lora: LoraRows | None = None) -> Tensor:
        if isinstance(weight, Quantized):
            if self.invariant or len(x) <= SMALL_STEP:
                return add_lora(self._quantized_linear(x, weight, bias), x, lora)
            weight = weight.dequantize(x.dtype)
        if not self.invariant:
            return super().linear(x, weight, bias, lora)
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
        groups = self._groups(torch.zeros_like(rows), 1, rows)
        y = self._grouped(x, [weight], None if bias is None else [bias], groups, width=len(weight))
        return add_lora(y, x, lora)

    def _quantized_linear(self, x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
        x, (num_rows, depth), width = x.contiguous(), x.shape, len(weight.levels)
        out = x.new_empty(num_rows, width)
        if not out.numel():
            return out
        group, columns = weight.format.group, 32
        quantized_kernel[(triton.cdiv(num_rows, PRODUCT_ROWS), triton.cdiv(width, columns))](
            out,
            x,
            weight.levels,
            weight.scales,
            weight.scales if weight.offsets is None else weight.offsets,
            x if bias is None else bias,
            num_rows,
            width,
            depth,
            weight.padded,
            IS_4_BIT=weight.format.bits == 4,
            GROUP=group,
            HAS_OFFSETS=weight.offsets is not None,
            HAS_BIAS=bias is not None,
            ROWS=PRODUCT_ROWS,
            COLUMNS=columns,
            DEPTH=min(group, PRODUCT_DEPTH) if group else PRODUCT_DEPTH,
        )
        return out

    def linear_heads(self, x: Tensor, weight: Weight) -> Tensor:
        if not self.invariant:
            return super().linear_heads(x, weight)
        tokens, heads, depth = x.shape
        rows = torch.arange(tokens * heads, dtype=torch.int32, device=x.device)
        groups = self._groups(rows % heads, heads, rows)
        y = self._grouped(x.reshape(-1, depth), weight, None, groups, width=weight.shape[1])
        return y.view(tokens, heads, -1)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, spec: MlpSpec, layer: LayerWeights) -> Tensor:
        first = layer.w13 if spec.gated else layer.w1
        if any(isinstance(each, Quantized) for each in (*first, *layer.w2)):  # one expert after the other
            return super().experts(x, ids, weights, spec, layer)
        num_pairs, k = ids.numel(), ids.shape[1]
        flat = ids.flatten()
        pairs = torch.arange(num_pairs, dtype=torch.int32, device=x.device)
        groups = self._groups(flat, len(layer.w2), pairs)
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

    def _groups(self, owners: Tensor, num_owners: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows by their owners, the weights that they are multiplied by, and tiles of them as `grouped_kernel`
        wants both. Nothing is read back from the GPU: there are as many tiles as there can be.
        """
        owners, order = owners.long().sort(stable=True)
        numbers = torch.arange(num_owners + 1, device=owners.device)
        bounds = torch.searchsorted(owners, numbers)
        per_owner = -(-bounds.diff() // PRODUCT_ROWS)
        ends = per_owner.cumsum(0)
        count = len(rows) // PRODUCT_ROWS + min(num_owners, len(rows))
        index = torch.arange(count, device=owners.device)
        owner = torch.searchsorted(ends, index, right=True)
        known = owner.clamp_max(num_owners - 1)
        begin = bounds[known] + (index - (ends - per_owner)[known]) * PRODUCT_ROWS
        number = torch.where(owner < num_owners, owner, -1)
        return rows[order], torch.stack((number, begin, bounds[known + 1]), dim=1).int()

    def _grouped(
        self,
        x: Tensor,
        weights: Sequence[Tensor] | Tensor,
        biases: Sequence[Tensor] | None,
        groups: tuple[Tensor, Tensor],
        *,
        width: int,
        top_k: int = 1,
        kind: int = -1,
        gated: bool = False,
    ) -> Tensor:
        """Return each row of a group times the weight of its owner, [rows, width]."""
        rows, tiles = groups
        x, out = x.contiguous(), x.new_empty(len(rows), width)
        if len(tiles):
            grouped_kernel[(len(tiles), triton.cdiv(width, PRODUCT_COLUMNS))](
                out,
                x,
                self._addresses(weights),
                rows if biases is None else self._addresses(biases),
                rows,
                tiles,
                top_k,
                width,
                x.shape[1],
                KIND=kind,
                IS_GATED=gated,
                HAS_BIAS=biases is not None,
                ROWS=PRODUCT_ROWS,
                COLUMNS=PRODUCT_COLUMNS,
                DEPTH=PRODUCT_DEPTH,
            )
        return out

    def _addresses(self, tensors: Sequence[Tensor] | Tensor) -> Tensor:
        """Return where tensors lie, or the parts of one, int64 on their device. Made once, as weights stay."""
        owner = tensors if isinstance(tensors, Tensor) else tensors[0]
        known = self._tables.get(owner.data_ptr())
        if known is None or known[0]() is not owner or len(known[1]) != len(tensors):
            assert all(each.is_contiguous() for each in tensors)
            table = torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64).to(owner.device)
            known = self._tables[owner.data_ptr()] = weakref.ref(owner), table
        return known[1]

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
        columns = min(2 * ELEMENTS, triton.next_power_of_2(scores.shape[1]))
        best_kernel[(len(scores),)](out, scores.contiguous(), scores.shape[1], COLUMNS=columns)
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
            *(qkv if each is None else each for each in (weights.q_norm, weights.q_norm_bias)),
            *(qkv if each is None else each for each in (weights.k_norm, weights.k_norm_bias)),
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
        sizes = attention_tiles(spec.head_dim, self.compute_capability, itemsize=q.element_size())
        split = FIXED_SPLIT if self.invariant else None
        work = AttentionWork(
            sizes, group, spec.num_kv_heads, spec.window, spec.chunk, self.processors, values.shape[2], split
        )
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
            KEYS=sizes.keys,
            HAS_CAP=spec.softcap is not None,
            HAS_WINDOW=spec.window is not None,
            HAS_CHUNK=spec.chunk is not None,
            HAS_SLOPES=spec.alibi is not None,
            IS_SCALED=levels > 0,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
        if len(merges):
            merge_kernel[(len(merges), spec.num_kv_heads)](
                out, partial, partial_softmax, q if sinks is None else sinks, merges, VALUE_DIM=value_dim, **common
            )
        return out

    def _slopes(self, spec: AttentionSpec, device: torch.device) -> Tensor:
        """Return the slopes of ALiBi, copied to the GPU once: a step that is captured copies nothing."""
        if spec not in self._alibi:
            self._alibi[spec] = alibi_slopes(spec).to(device)
        return self._alibi[spec]


def _parts(store: Store) -> tuple[Tensor, Tensor, int, bool]:
    """Return values, scales, largest number and whether it is an integer, of a store; 0: there are no scales."""
    if isinstance(store, ScaledStore):
        return store.values, store.scales, store.levels, store.is_integer
    return store, store, 0, False
