"""Finds settings with which a model that does not fit into memory would."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from splitfuse.config.engine import CacheConfig, EngineConfig
from splitfuse.core.kv.fetching import INBOX_BYTES, STAGED_BYTES
from splitfuse.core.limits import ceil_div
from splitfuse.kernels.group import Shard
from splitfuse.kernels.interface import Backend
from splitfuse.models.sources.source import WeightSource
from splitfuse.models.spec import ModelSpec
from splitfuse.models.storage import may_be_quantized
from splitfuse.models.weights import copy_bytes, resolve_dtype, weight_bytes
from splitfuse.runtime.machine import GIB
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.runtime.step_memory import activation_bytes, first_shard, token_bytes

SHORTEST_MODEL_LEN = 2
"""Number of tokens of the shortest request: one of prompt, and one of output."""


def smaller_model(
    spec: ModelSpec, config: EngineConfig, backend: Backend, weights: WeightSource | None, plan: MemoryPlan
) -> str:
    """Return settings with each of which weights, activations and one KV block would fit."""
    dtype = resolve_dtype(config.model.dtype, spec)
    missing = plan.need + plan.block_of_both - plan.available
    shard = first_shard(config, backend)
    token_size = token_bytes(spec, dtype, shard)
    budget = plan.max_num_batched_tokens - ceil_div(missing, token_size)
    options = [f"max_num_batched_tokens={budget}"] if budget >= 1 else []
    if plan.tiers >= missing:
        options.insert(0, _smaller_tiers(config.cache, plan, missing))
    if plan.draft is not None and plan.draft_model + plan.draft.block >= missing:
        options.append("leaving out draft_model")
    without = activation_bytes(
        *(spec, replace(config, model=replace(config.model, cuda_graphs=False)), backend, weights),
        num_tokens=plan.max_num_batched_tokens,
        num_positions=plan.available // max(plan.block, 1) * plan.block_size,
    )
    if config.model.cuda_graphs and plan.activations - without >= missing:
        options.append("leaving out cuda_graphs")
    if plan.weights - weight_bytes(spec, torch.bfloat16, backend, weights, shard=shard) >= missing:
        options.append("dtype=bfloat16")
    of_weights = plan.weights + copy_bytes(spec, dtype, backend, weights, shard=shard)
    quantization = _quantization(spec, backend, of_weights - missing, shard)
    if quantization and (weights is None or may_be_quantized(weights, quantization)):
        options.append(f"quantization={quantization}")
    if not options:
        return "no setting makes it fit: choose a smaller model or a larger machine"
    return f"{' or '.join(options)} would fit"


def _tier_alone(num_bytes: int) -> int:
    """Return how much of the bytes of a memory tier, and of blocks on their way, is the tier: see `waiting_bytes`."""
    return min(num_bytes - INBOX_BYTES - STAGED_BYTES, num_bytes * 32 // 35)


def _smaller_tiers(cache: CacheConfig, plan: MemoryPlan, missing: int) -> str:
    """Return a setting of tiers that takes so many bytes less."""
    if cache.kv_memory_tier is not None:
        size, all_bytes = (
            cache.memory_tier_bytes,
            plan.tiers - plan.index_bytes(cache.disk_tier_bytes),
        )  # of an engine
        share, kept = _tier_alone(all_bytes), _tier_alone(all_bytes - missing)
        mib = int(size * kept / share) // 2**20 if kept > 0 else 0
        if mib >= 1:
            return f"kv_memory_tier={mib}MiB"
    given = [name for name in ("kv_memory_tier", "kv_disk_tier") if getattr(cache, name) is not None]
    return f"leaving out {' and '.join(given)}"


def _quantization(spec: ModelSpec, backend: Backend, most: int, shard: Shard) -> str | None:
    """Return the quantization that loses least among those that leave at most `most` bytes of weights, copies of them
    included, and are smaller than the backend's own; None if there is none.
    """
    names = list(backend.capabilities.quantizations)
    begin = 0 if backend.quantization is None else names.index(backend.quantization) + 1
    for name in names[begin:]:
        other = backend.quantized(name)
        size = weight_bytes(spec, torch.bfloat16, other, shard=shard)
        size += copy_bytes(spec, torch.bfloat16, other, shard=shard)
        if size <= most:
            return name
    return None


def longer_cache(plan: MemoryPlan, free: int) -> str:
    """Return settings with which the longest request would fit: a lower limit, or a larger cache."""
    longest = plan.num_blocks * plan.block_size + 1
    wanted, most = ceil_div(plan.max_model_len - 1, plan.block_size), free // plan.block_of_both
    options = [f"max_model_len={longest}"] if longest >= SHORTEST_MODEL_LEN else []
    if wanted <= most or not options:
        options.append(cache_of(min(wanted, most), plan))
    return f"{' or '.join(options)} would fit"


def cache_of(num_blocks: int, plan: MemoryPlan) -> str:
    gib = math.ceil(num_blocks * plan.block / GIB * 1e6) / 1e6
    return f"num_blocks={num_blocks} (kv_cache_memory_gib={gib:.12g})"
