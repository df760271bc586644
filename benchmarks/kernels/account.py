"""Measures one step operator by operator, each against its own limit: it shows where the rest of a step goes.

Each operator runs for all layers, one after the other, as often as a step has it, with a call into the library for
each; its weights come from memory, since the limits are measured in between. A step is one call, so what the operators
take alone can be more than the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.limits import Limits
from benchmarks.kernels.steps import forward
from splitfuse.core.plan import Chunk
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.layer_structs import ACTIVATIONS, Heads, Norm
from splitfuse.kernels.cpu.structs import Step, Weight, vector_address
from splitfuse.kernels.layers import AttentionSpec, MlpSpec
from splitfuse.kernels.weights import LayerWeights
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.executor import Executor


@dataclass(frozen=True)
class Operator:
    """Describes a part of a step: what it does for all layers, and how much it reads and computes."""

    name: str
    run: Callable[[], object]
    num_bytes: float = 0.0
    operations: float = 0.0
    in_bf16: bool = False
    """Whether it multiplies bf16 whatever the weights are, as attention does."""


def account(executor: Executor, chunks: Sequence[Chunk], limits: Limits, *, int8: bool, turns: int) -> Iterator[Any]:
    """Yield for each operator its milliseconds, its share of the step, and its share of its own limit in percent."""
    chunks = list(chunks)
    whole = limits.compare(lambda: forward(executor, chunks), num_bytes=1, operations=0, int8=int8, turns=turns)
    total = 0.0
    for operator in operators(executor, chunks):
        timing = limits.compare(
            operator.run,
            num_bytes=operator.num_bytes,
            operations=operator.operations,
            int8=int8 and not operator.in_bf16,
            turns=turns,
        )
        total += timing.seconds
        limited = operator.num_bytes or operator.operations
        yield row(operator.name, timing.seconds, whole.seconds, timing.share * 100 if limited else None)
    yield row("all of these", total, whole.seconds, None)
    yield row("the step", whole.seconds, whole.seconds, None)


def row(name: str, seconds: float, of: float, share: float | None) -> dict[str, Any]:
    return {
        "operator": name,
        "ms": seconds * 1e3,
        "% of the step": 100 * seconds / of,
        "% of its limit": "" if share is None else share,
    }


def operators(executor: Executor, chunks: Sequence[Chunk]) -> Iterator[Operator]:
    """Yield the operators of a step of attention and gated MLPs, in their order."""
    decoder = executor.decoder
    backend, layers, spec = decoder.backend, decoder.weights.layers, decoder.spec.layers[0]
    attention, mlp = spec.mixer, spec.mlp
    assert isinstance(backend, CpuBackend) and isinstance(attention, AttentionSpec) and isinstance(mlp, MlpSpec)
    library, stores = backend.library, executor.kv_cache.layers
    batch = BatchBuilder(executor.kv_cache.block_size, decoder.device).build(chunks)
    rows, hidden = batch.num_tokens, decoder.spec.hidden_size

    def product(name: str, weight_of: Callable[[LayerWeights], Weight], bias: str | None = None) -> Operator:
        weights = [weight_of(layer) for layer in layers]
        biases: list[int | None] = [None] * len(layers)
        if bias is not None:
            biases = [vector_address(getattr(layer, bias), w.rows) for layer, w in zip(layers, weights, strict=True)]
        x, y = torch.randn(rows, weights[0].columns).bfloat16(), torch.empty(rows, weights[0].rows)
        read = float(sum(w.memory.nbytes for w in weights))
        computed = 2.0 * rows * sum(w.rows * w.columns for w in weights)

        def run() -> None:
            for weight, address in zip(weights, biases, strict=True):
                library.linear(weight.address, x.data_ptr(), rows, address, None, None, 0, y.data_ptr())

        def run_gated() -> None:
            kind = ACTIVATIONS[mlp.activation]
            for weight in weights:
                library.activated(weight.address, x.data_ptr(), rows, None, kind, None, 0, y.data_ptr())

        return Operator(name, run_gated if weights[0].gated else run, read, computed)

    x, normed = torch.randn(rows, hidden), torch.empty(rows, hidden, dtype=torch.bfloat16)
    norms = [Norm.of(decoder.spec.norm, w, None, hidden) for each in layers for w in (each.attn_norm, each.mlp_norm)]

    def norm_all() -> None:
        for norm in norms:
            library.norm(x.data_ptr(), rows, hidden, norm.address, normed.data_ptr())

    rope = None if attention.rope is None else decoder.ropes[attention.rope]
    heads = [Heads.of(attention, rope=rope, weights=layer) for layer in layers]
    places = Step.of(rows, positions=batch.positions, slot_mapping=batch.slot_mapping)
    arrays = Step.of(rows, query_start=batch.query_start, seq_lens=batch.seq_lens, block_tables=batch.block_tables)
    qkv = torch.randn(rows, (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim)
    q = torch.empty(rows, attention.num_heads, attention.head_dim, dtype=torch.bfloat16)
    out = torch.empty_like(q)

    def store_all() -> None:
        for each, store in zip(heads, stores, strict=True):
            library.rope_store(places.address, each.address, store.address, qkv.data_ptr(), q.data_ptr())

    def attend_all() -> None:
        for each, store in zip(heads, stores, strict=True):
            library.attend(arrays.address, each.address, store.address, q.data_ptr(), out.data_ptr())

    token_bytes = stores[0].memory.nbytes / (stores[0].num_blocks * stores[0].block_size)
    seen = [sum(chunk.start + i + 1 for i in range(len(chunk.token_ids))) for chunk in chunks]
    ends = [chunk.start + len(chunk.token_ids) for chunk in chunks]
    pairs = 4.0 * sum(seen) * attention.num_heads * attention.head_dim * len(layers)
    last, head = torch.randn(len(chunks), hidden).bfloat16(), decoder.weights.head

    yield Operator("norms", norm_all)
    yield product("qkv", lambda layer: layer.qkv, "qkv_bias")
    yield Operator("rotate and store", store_all)
    yield Operator("attention", attend_all, sum(ends) * token_bytes * len(layers), pairs, in_bf16=True)
    yield product("o", lambda layer: layer.o)
    yield product("gate and up", lambda layer: layer.mlp.gate_up if layer.mlp is not None else None)
    yield product("down", lambda layer: layer.mlp.down if layer.mlp is not None else None)
    computed = 2.0 * len(chunks) * head.rows * head.columns
    yield Operator("head", lambda: decoder.logits(last), head.memory.nbytes, computed)
