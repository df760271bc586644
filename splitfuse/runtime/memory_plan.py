"""What a model will need, and what there is, before a byte of it is loaded.

Decides `max_model_len` and `num_blocks` where they were left open. Must not load anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.kernels.reference import Kernels
from splitfuse.models.kv_cache import block_bytes
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import resolve_dtype, weight_bytes

GIB = 2**30
LARGEST_KV_SHARE = 0.5
"""Of what is free after weights and activations, for a KV cache whose size nobody gave: the machine has other users."""


@dataclass(frozen=True)
class MemoryPlan:
    """Need and have, in bytes, and the sizes that follow."""

    weights: int
    activations: int
    block: int  # one KV block over all layers
    block_size: int
    num_blocks: int
    max_model_len: int
    available: int
    model_len_lowered: bool  # the model could read more, the cache could not hold it

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block

    @property
    def need(self) -> int:
        return self.weights + self.activations + self.kv_cache

    def __str__(self) -> str:
        sizes = f"{self.num_blocks} blocks of {self.block_size}: {self.num_blocks * self.block_size} tokens"
        lines = [
            f"weights      {self.weights / GIB:8.3f} GiB",
            f"activations  {self.activations / GIB:8.3f} GiB",
            f"KV cache     {self.kv_cache / GIB:8.3f} GiB   {sizes}",
            f"need         {self.need / GIB:8.3f} GiB",
            f"have         {self.available / GIB:8.3f} GiB",
            f"longest request: {self.max_model_len} tokens"
            + (" (the model allows more: raise kv_cache_memory_gib)" if self.model_len_lowered else ""),
        ]
        return "\n".join(lines)


def plan_memory(spec: ModelSpec, config: EngineConfig, *, kernels: Kernels, available: int | None = None) -> MemoryPlan:
    """The plan for one model on one device; `available` bytes are measured if not given.

    Raises MemoryPlanError, with the setting that would fit, if weights, activations and cache do not; ConfigError if
    `max_model_len` is more than the model allows.
    """
    dtype = resolve_dtype(config.model.dtype, spec)
    size = config.cache.block_size
    kernels.check_block_size(size)
    wanted_len = config.model.max_model_len or spec.max_position
    if wanted_len > spec.max_position:
        raise ConfigError(
            f"max_model_len {wanted_len} is more than the {spec.max_position} tokens the model was made for"
        )
    plan = MemoryPlan(
        weights=weight_bytes(spec, dtype),
        activations=_activation_bytes(spec, config, dtype),
        block=block_bytes(spec, block_size=size, dtype=dtype, kernels=kernels),
        block_size=size,
        num_blocks=0,
        max_model_len=wanted_len,
        available=available_memory(config.model.device) if available is None else available,
        model_len_lowered=False,
    )
    free = plan.available - plan.need
    if free <= 0:
        raise MemoryPlanError(f"the model does not fit into memory\n{plan}\n{_smaller_dtype(spec, dtype, plan)}")
    plan = replace(plan, num_blocks=_num_blocks(config, plan, free))
    if plan.need > plan.available:
        fitting = free // plan.block
        raise MemoryPlanError(
            f"the KV cache does not fit into memory\n{plan}\n"
            f"num_blocks={fitting} (kv_cache_memory_gib={_floor(fitting * plan.block / GIB)}) would fit"
        )
    longest = plan.num_blocks * size + 1  # the last token of a request is never attended to
    if longest >= wanted_len:
        return plan
    if config.model.max_model_len is None and longest > 2:
        return replace(plan, max_model_len=longest, model_len_lowered=True)
    blocks = -(-(wanted_len - 1) // size)
    raise MemoryPlanError(
        f"the KV cache cannot hold one request of {wanted_len} tokens\n{plan}\n"
        f"max_model_len={longest} would fit, or num_blocks={blocks} "
        f"(kv_cache_memory_gib={blocks * plan.block / GIB:.3f})"
    )


def available_memory(device: str) -> int:
    """Bytes that can still be taken: on CPU what the machine and our control group leave, on others what is free."""
    if torch.device(device).type != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([machine, *_cgroup_headroom()])


def _cgroup_headroom() -> list[int]:
    """What a control group (version 2, then 1) leaves, where one sets a limit."""
    root = Path("/sys/fs/cgroup")
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (root / limit_file).read_text().strip(), (root / used_file).read_text().strip()
        except OSError:
            continue
        return [] if limit == "max" else [max(int(limit) - int(used), 0)]
    return []


def _activation_bytes(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype) -> int:
    """The widest moment of a pass, generously: the MLP's inputs, outputs and gate, and one block of logits in fp32."""
    widest = 4 * spec.hidden_size + 4 * spec.intermediate_size + 3 * spec.num_heads * spec.head_dim
    tokens = config.scheduler.max_num_batched_tokens
    return tokens * widest * max(dtype.itemsize, 4) + 64 * spec.vocab_size * 16


def _num_blocks(config: EngineConfig, plan: MemoryPlan, free: int) -> int:
    cache = config.cache
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.kv_cache_memory_gib is not None:
        return int(cache.kv_cache_memory_gib * GIB) // plan.block
    most_useful = config.scheduler.max_num_seqs * -(-plan.max_model_len // plan.block_size)
    return max(1, min(most_useful, int(free * LARGEST_KV_SHARE) // plan.block))


def _smaller_dtype(spec: ModelSpec, dtype: torch.dtype, plan: MemoryPlan) -> str:
    for name in ("bfloat16",):
        smaller = weight_bytes(spec, resolve_dtype(name, spec))
        if dtype.itemsize > 2 and smaller + plan.activations + plan.block < plan.available:
            return f"dtype={name} would need {smaller / GIB:.3f} GiB of weights, and fit"
    return "no setting makes it fit: choose a smaller model or a larger machine"


def _floor(gib: float) -> str:
    return f"{int(gib * 1000) / 1000:.3f}"
