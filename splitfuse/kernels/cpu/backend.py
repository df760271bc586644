"""The C++ kernels as a backend: activations in bf16, the residual stream and logits in fp32.

What a row gives depends on nothing but that row and its request, bit for bit: not on the other rows, the chunk, the
block size or the number of threads (csrc/multiply.h and csrc/attention.h say why). Bits differ between variants. Knows
no request, model or setting.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu import bindings
from splitfuse.kernels.cpu.arguments import KVStore, Mixture, PackedWeight, Step, address, check, heads_of, int32
from splitfuse.kernels.cpu.bindings import ACTIVATIONS, Library, choose_variant
from splitfuse.kernels.cpu.memory import OwnWeights, SharedWeights, allocate
from splitfuse.kernels.cpu.network import FusedNetwork
from splitfuse.kernels.cpu.quantization import LEVELS, choose_format
from splitfuse.kernels.reference import Kernels, NetworkWeights

PIECE = 32  # tokens that the KV layout keeps together
MOST_HEAD_DIM = 512
"""Both stand in csrc/kv_store.h too."""


class CpuKernels(Kernels):
    """C++ on any x86-64 CPU with AVX2 or better.

    `quantization` is None (bf16), "int8" or "int4", `group_size` the columns that share a scale (None: int8 a whole
    row, int4 the default of quantization.py), `kv_int8` whether keys and values are kept in 8 bits. Raises KernelError
    without a compiled library or such a CPU, ConfigError for settings that cannot be.
    """

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
        self.shared_weights: SharedWeights | None = None
        """Where `pack` puts weights, if not into memory of their own."""
        self._own_weights = OwnWeights()
        choose_format("qkv", quantization, group_size)  # raises, if there is none
        self.library = Library(self.variant, self.num_threads)

    def describe(self) -> str:
        weights = self.quantization or "bf16"
        if (group := choose_format("qkv", self.quantization, self.group_size).group) is not None:
            weights += f" in groups of {group}"
        cache = "int8" if self.kv_int8 else "bf16"
        name = {"avx512_bf16": "AVX-512 (VNNI, bf16)", "avx512": "AVX-512 (VNNI)", "avx2": "AVX2"}[self.variant]
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return f"C++ kernels: {name}, {threads}; weights {weights}, KV cache {cache}"

    # Keys and values

    def check_block_size(self, block_size: int) -> None:
        if block_size < PIECE or block_size % PIECE:
            raise ConfigError(f"block_size must be a multiple of {PIECE} for the CPU kernels, not {block_size}")

    def kv_bytes(self, *, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        del dtype  # what is kept is decided by kv_int8
        return int(self.library.store_bytes(ctypes.byref(self._store(1, block_size, num_kv_heads, head_dim))))

    def allocate_kv(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVStore:
        del dtype, device
        struct = self._store(num_blocks, block_size, num_kv_heads, head_dim)
        memory = allocate(int(self.library.store_bytes(ctypes.byref(struct))))
        struct.data = memory.data_ptr()
        return KVStore(struct, memory)

    def _store(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> bindings.Store:
        self.check_block_size(block_size)
        if head_dim > MOST_HEAD_DIM:
            raise ConfigError(f"heads of {head_dim} are too large for the CPU kernels, which take {MOST_HEAD_DIM}")
        return bindings.Store(None, num_blocks, block_size, num_kv_heads, head_dim, self.kv_int8)

    # Weights

    def weight_bytes(self, shape: Sequence[int], *, role: str, dtype: torch.dtype) -> int:
        if role == "plain":
            return super().weight_bytes(shape, role=role, dtype=dtype)
        rows, columns = shape
        return int(self.library.weight_bytes(ctypes.byref(self._weight(rows, columns, role))))

    def pack(self, pieces: Sequence[Tensor], *, role: str, dtype: torch.dtype | None = None) -> Any:
        if role == "plain":
            return self._keep(pieces, dtype or pieces[0].dtype)
        columns = pieces[0].shape[1]
        assert all(piece.shape[1] == columns for piece in pieces)
        struct = self._weight(sum(len(piece) for piece in pieces), columns, role)
        num_bytes, shared = int(self.library.weight_bytes(ctypes.byref(struct))), self.shared_weights
        memory = (shared or self._own_weights).take(num_bytes)
        struct.data = memory.data_ptr()
        if shared is not None and shared.filled:
            return PackedWeight(struct, memory)
        first, rows_at_once = 0, max(1, 2**23 // columns)
        for piece in pieces:
            for begin in range(0, len(piece), rows_at_once):  # what is converted exists twice
                source = piece[begin : begin + rows_at_once].to(torch.bfloat16).contiguous()
                self.library.pack(ctypes.byref(struct), source.data_ptr(), first, len(source))
                first += len(source)
        return PackedWeight(struct, memory)

    def _keep(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What is not packed, in memory that others share if there is such."""
        shared = self.shared_weights
        if shared is None:
            weight: Tensor = super().pack(pieces, role="plain", dtype=dtype)
            return weight
        shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
        kept = shared.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        if not shared.filled:
            torch.cat(tuple(piece.to(dtype) for piece in pieces), out=kept)
        return kept

    def _weight(self, rows: int, columns: int, role: str) -> bindings.Weight:
        chosen = choose_format(role, self.quantization, self.group_size)
        gated = role in ("gate_up", "w13")
        return bindings.Weight(chosen.number, gated, rows, columns, chosen.group or 0, None, LEVELS)

    # Once a step

    def embed(self, ids: Tensor, table: Tensor | PackedWeight) -> Tensor:
        ids = int32(ids)
        if isinstance(table, PackedWeight):
            rows, columns, plain, packed = table.rows, table.columns, None, table.address
        else:
            check(table, torch.bfloat16)
            (rows, columns), plain, packed = table.shape, table.data_ptr(), None
        if self.library.check_ids(ids.data_ptr(), len(ids), rows):
            raise IndexError(f"a token id is no row of the embedding table of {rows}")
        out = torch.empty(len(ids), columns)
        self.library.embed(ids.data_ptr(), len(ids), plain, packed, columns, out.data_ptr())
        return out

    def argmax(self, scores: Tensor) -> tuple[list[int], list[float]]:
        check(scores, torch.float32)
        rows, columns = scores.shape
        ids, peaks = (ctypes.c_int32 * rows)(), (ctypes.c_float * rows)()
        self.library.argmax(scores.data_ptr(), rows, columns, ids, peaks)
        return list(ids), list(peaks)

    # Layers, one operation at a time

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        check(x, torch.float32)
        check(weight, torch.bfloat16)
        out = torch.empty_like(x, dtype=torch.bfloat16)
        rows, columns = x.shape
        assert len(weight) == columns
        self.library.norm(x.data_ptr(), rows, columns, weight.data_ptr(), eps, out.data_ptr())
        return out

    def linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        check(x, torch.bfloat16)
        assert x.shape[1] == weight.columns and not weight.struct.gated
        out = torch.empty(len(x), weight.rows)
        if residual is not None:
            check(residual, torch.float32)
            assert residual.shape == out.shape
        self.library.linear(
            weight.address,
            x.data_ptr(),
            len(x),
            address(bias, weight.rows),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
        )
        return out

    def gated(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, kind: str) -> Tensor:
        check(x, torch.bfloat16)
        assert x.shape[1] == weight.columns and weight.struct.gated
        out = torch.empty(len(x), weight.rows // 2, dtype=torch.bfloat16)
        self.library.gated(
            weight.address,
            x.data_ptr(),
            len(x),
            address(bias, weight.rows),
            ACTIVATIONS[kind],
            out.data_ptr(),
        )
        return out

    def rope_store(
        self,
        qkv: Tensor,
        *,
        positions: Tensor,
        slot_mapping: Tensor,
        cos: Tensor,
        sin: Tensor,
        store: KVStore,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        check(qkv, torch.float32)
        tokens = len(qkv)
        assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and 2 * cos.shape[1] <= head_dim
        assert (num_kv_heads, head_dim) == (store.struct.num_kv_heads, store.struct.head_dim)
        step = Step(positions=positions, slot_mapping=slot_mapping, num_tokens=tokens)
        step.check(self.library, store.struct, max_position=len(cos))
        heads = heads_of(num_heads, cos, sin, eps=eps)
        q = torch.empty(tokens, num_heads, head_dim, dtype=torch.bfloat16)
        self.library.rope_store(
            step.address,
            ctypes.byref(heads),
            store.address,
            qkv.data_ptr(),
            address(q_norm, head_dim),
            address(k_norm, head_dim),
            q.data_ptr(),
        )
        return q

    def attend(
        self,
        q: Tensor,
        store: KVStore,
        *,
        query_start: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        check(q, torch.bfloat16)
        num_heads = q.shape[1]
        assert num_heads % store.struct.num_kv_heads == 0 and q.shape[2] == store.struct.head_dim
        assert sinks is None or len(sinks) == num_heads
        step = Step(query_start=query_start, seq_lens=seq_lens, block_tables=block_tables, num_tokens=len(q))
        step.check(self.library, store.struct, max_position=0)
        heads = bindings.Heads(num_heads, 0, 0, None, None, 0.0, scale, softcap or 0.0)
        wide_sinks = None if sinks is None else sinks.float().contiguous()
        out = torch.empty_like(q)
        self.library.attend(
            step.address,
            ctypes.byref(heads),
            store.address,
            q.data_ptr(),
            None if wide_sinks is None else wide_sinks.data_ptr(),
            window or 0,
            out.data_ptr(),
        )
        return out

    def route(self, scores: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        check(scores, torch.float32)
        tokens, num_experts = scores.shape
        assert 1 <= top_k <= num_experts
        ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
        self.library.route(
            scores.data_ptr(), tokens, num_experts, top_k, renormalize, ids.data_ptr(), weights.data_ptr()
        )
        return ids, weights

    def experts(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        *,
        w13: Sequence[PackedWeight],
        w2: Sequence[PackedWeight],
        kind: str,
    ) -> Tensor:
        check(x, torch.bfloat16)
        ids, weights = int32(expert_ids), expert_weights.float().contiguous()
        top_k = ids.shape[1]
        mixture = Mixture(w13, w2, top_k=top_k, activation=ACTIVATIONS[kind])
        assert ids.shape == weights.shape == (len(x), top_k) and x.shape[1] == mixture.hidden
        assert all(len(set(each)) == top_k for each in ids.tolist())
        if self.library.check_ids(ids.data_ptr(), ids.numel(), mixture.num_experts):
            raise IndexError(f"an expert id is none of {mixture.num_experts}")
        out = torch.empty(x.shape)
        self.library.experts(mixture.address, x.data_ptr(), len(x), ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        return out

    # All of them in one call

    def fuse(
        self,
        weights: NetworkWeights,
        *,
        windows: Sequence[int | None],
        activation: str,
        norm_eps: float,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        scale: float,
        softcap: float | None,
        top_k: int,
        renormalize: bool,
    ) -> FusedNetwork:
        heads = heads_of(num_heads, cos, sin, eps=norm_eps, scale=scale, softcap=softcap or 0.0)
        return FusedNetwork(
            self.library,
            weights,
            windows=windows,
            activation=ACTIVATIONS[activation],
            heads=heads,
            top_k=top_k,
            renormalize=renormalize,
        )
