"""Plans memory before anything is loaded: what a model needs, and what the machine has.

The plan settles `max_model_len` and `num_blocks` where they were left open.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from splitfuse.config.engine import CacheConfig, EngineConfig
from splitfuse.core.kv.fetching import MOVES_BYTES, MOVES_INBOX_BYTES, waiting_bytes
from splitfuse.core.limits import ceil_div
from splitfuse.core.step_budget import BUDGETS, FIRST_BUDGET
from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.loans import TILE
from splitfuse.models.kv_cache import block_bytes, state_bytes
from splitfuse.models.sharding import check_ranks, rank_spec
from splitfuse.models.sources.source import WeightSource
from splitfuse.models.spec import LongRopeScaling, ModelSpec
from splitfuse.models.weights import resolve_dtype, weight_bytes
from splitfuse.runtime.device import device_of, rank_devices, ranks_of_device
from splitfuse.runtime.machine import GIB, available_memory
from splitfuse.runtime.memory_advice import SHORTEST_MODEL_LEN, cache_of, longer_cache, smaller_model
from splitfuse.runtime.memory_plan import DraftSizes, MemoryPlan
from splitfuse.runtime.step_memory import activation_bytes, first_shard, token_bytes

GPU_RESERVE = GIB
"""Bytes of the free memory of a GPU that no plan takes: for PyTorch's libraries, compiled kernels, what is there for an
operation alone, and NCCL's buffers. An estimate. If no other process uses the GPU, `gpu_memory_share` leaves more."""
LARGEST_KV_SHARE = 0.5
"""Fraction of the memory left by weights and activations that a KV cache takes by default; the rest is for others."""
LARGEST_STATE_SHARE = 0.25
"""Fraction of the memory left by weights and activations that recurrent states take."""
LARGEST_ACTIVATION_SHARE = 1 / 16
"""Fraction of the memory left by the weights that the activations of a step take, if the token budget is open."""
STATE_SLOTS = 2
"""Number of slots for recurrent states that a running request needs in a step: it may read a snapshot, and write."""
SLOTS_WITH_SNAPSHOTS = 4
"""Number of slots for each of max_num_seqs requests with a prefix cache: their own, and for snapshots that stay."""
FOR_MOVES = "for requests that go on at another engine"
"""Purpose of KV tiers that no setting asks for."""


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    backend: Backend,
    weights: WeightSource | None = None,
    available: int | None = None,
    tiers: int | None = None,
    draft: DraftSizes | None = None,
) -> MemoryPlan:
    """Return the plan for one model on one device; `available` bytes are measured if not given, and `tiers` are those
    that the settings ask for. `draft` is what the draft model needs that they name. Without `weights` those of a
    quantized checkpoint count as dense ones.

    Raises MemoryPlanError, with settings that would fit, if weights, activations and cache do not fit; ConfigError if
    `max_model_len` exceeds what the model allows, or for tiers or loans that the model or the backend does not have.
    """
    check_ranks(spec, backend, config.model.tensor_parallel_size)
    backend.check_block_size(config.cache.block_size)
    if config.cache.kv_loans:
        check_loans(spec, backend, block_size=config.cache.block_size)
    available, remarks = _memory_of_engine(config, available)
    plan = _without_cache(spec, config, backend, weights, available=available, draft=draft)
    plan = _with_tiers(plan, config, tier_bytes(config.cache) if tiers is None else tiers)
    plan = replace(plan, remarks=(*remarks, *_rank_remarks(config, backend)))
    plan = _with_states(plan, config, free=plan.available - plan.need)
    free = plan.available - plan.need
    if free < plan.block_of_both:
        raise MemoryPlanError(
            f"the model does not fit into memory\n{plan}\n{smaller_model(spec, config, backend, weights, plan)}"
        )
    plan = replace(plan, num_blocks=_num_blocks(config, plan, free))
    if plan.need > plan.available:
        fitting = cache_of(free // plan.block_of_both, plan)
        raise MemoryPlanError(f"the KV cache does not fit into memory\n{plan}\n{fitting} would fit")
    return _with_longest_request(plan, spec, config, free)


def _memory_of_engine(config: EngineConfig, available: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a rank may take of its device, of those that are free, and a line where these are fewer
    than the settings allow on a GPU.
    """
    devices = rank_devices(config)
    available = min(map(available_memory, set(devices))) if available is None else available
    available //= ranks_of_device(config)
    if (most := _gpu_share(config)) is None:
        return available, ()
    if (left := available - GPU_RESERVE) >= most:
        return most, ()
    share, where = config.cache.gpu_memory_share, " or ".join(dict.fromkeys((devices[0], devices[-1])))
    remark = (
        f"{available / GIB:.3f} GiB are free on {where}, too few for gpu_memory_share={share:g}: of these "
        f"{GPU_RESERVE / GIB:.3f} GiB are left for PyTorch and its libraries"
    )
    return left, (remark,)


def _without_cache(
    spec: ModelSpec,
    config: EngineConfig,
    backend: Backend,
    weights: WeightSource | None,
    *,
    available: int,
    draft: DraftSizes | None,
) -> MemoryPlan:
    """Return the plan for weights and activations, with the size of a block and of none of them. Raises ConfigError."""
    dtype, shard = resolve_dtype(config.model.dtype, spec), first_shard(config, backend)
    size = config.cache.block_size
    wanted_len = config.model.max_model_len or spec.max_position
    if wanted_len > spec.max_position:
        raise ConfigError(
            f"max_model_len is {wanted_len}, but the model has {spec.max_position} positions: use at most that"
        )
    weight_size = weight_bytes(spec, dtype, backend, weights, shard=shard)
    free = available - weight_size - (0 if draft is None else draft.weights + draft.activations)
    budget = config.scheduler.max_num_batched_tokens or _largest_budget(token_bytes(spec, dtype, shard), free=free)
    rank = rank_spec(spec, config.model.tensor_parallel_size)
    block = block_bytes(rank, block_size=size, dtype=dtype, backend=backend)
    num_positions = max(available, 0) // max(block, 1) * size
    return MemoryPlan(
        weights=weight_size,
        activations=activation_bytes(spec, config, backend, weights, num_tokens=budget, num_positions=num_positions),
        block=block,
        block_size=size,
        num_blocks=0,
        max_model_len=wanted_len,
        available=available,
        kernels=backend.describe(),
        model_len_lowered=False,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=budget,
        state=state_bytes(spec, backend),
        draft=draft,
    )


def _rank_remarks(config: EngineConfig, backend: Backend) -> tuple[str, ...]:
    """Return a line that says what ranks divide, if there are any."""
    if (num_ranks := config.model.tensor_parallel_size) == 1:
        return ()
    devices = rank_devices(config)
    divided = "the model and the machine's memory" if ranks_of_device(config) > 1 else "the model"
    where = f" on {', '.join(devices)}" if devices[0] != devices[-1] else ""
    adding = "; they add up by torch.distributed" if first_shard(config, backend).sums else ""
    return (f"each of {num_ranks} ranks{where}, which divide {divided}{adding}",)


def _with_longest_request(plan: MemoryPlan, spec: ModelSpec, config: EngineConfig, free: int) -> MemoryPlan:
    """Return the plan with the length of the longest request that the cache can hold, where that was left open. Raises
    MemoryPlanError where it was not, and the cache is too small.
    """
    wanted = plan.max_model_len
    longest = plan.num_blocks * plan.block_size + 1  # the last token of a request is never attended to
    if longest >= wanted or config.cache.kv_loans:  # what this cache cannot hold, others may
        return replace(plan, remarks=(*plan.remarks, *_rope_remarks(spec, wanted)))
    if config.model.max_model_len is None and longest >= SHORTEST_MODEL_LEN:
        remarks = (*plan.remarks, *_rope_remarks(spec, longest))
        return replace(plan, max_model_len=longest, model_len_lowered=True, remarks=remarks)
    raise MemoryPlanError(
        f"the KV cache cannot hold one request of {wanted} tokens\n{plan}\n{longer_cache(plan, free)}"
    )


def tier_bytes(cache: CacheConfig, *, num_sharers: int = 1, filled: int = 0, for_moves: bool = False) -> int:
    """Return the memory that each of the engines which share KV tiers leaves for them; `filled` is taken already. Where
    no tier was asked for, there may be some for requests that move.
    """
    if not cache.has_tiers:
        return MOVES_BYTES + 2 * MOVES_INBOX_BYTES if for_moves else 0
    own = cache.memory_tier_bytes // num_sharers
    return max(cache.memory_tier_bytes - filled, 0) // num_sharers + sum(waiting_bytes(own))


def _with_tiers(plan: MemoryPlan, config: EngineConfig, tiers: int) -> MemoryPlan:
    """Return the plan with so many bytes of tiers, and what each engine knows of the blocks in them. All is in the
    machine's memory: where the KV cache is elsewhere, it is compared with that alone. Raises ConfigError for a model
    whose blocks no tier keeps, MemoryPlanError.
    """
    on_cpu = torch.device(device_of(config)).type == "cpu"
    if not config.cache.has_tiers:
        is_used = not plan.state and config.model.tensor_parallel_size == 1 and on_cpu
        return replace(plan, tiers=tiers, tiers_are_for=FOR_MOVES) if tiers and is_used else plan
    if plan.state:
        raise ConfigError(
            "kv_memory_tier and kv_disk_tier keep keys and values, and this model has layers with a recurrent state: "
            "leave them out"
        )
    num_bytes = config.cache.memory_tier_bytes + config.cache.disk_tier_bytes
    plan = replace(plan, tiers=tiers + plan.index_bytes(num_bytes))
    if on_cpu:
        return plan
    if plan.tiers > (free := available_memory("cpu")):
        raise MemoryPlanError(
            f"kv_memory_tier and kv_disk_tier take {plan.tiers / GIB:.3f} GiB of the machine's memory, and "
            f"{free / GIB:.3f} GiB are free: choose a smaller size, or leave them out"
        )
    return replace(plan, tiers=0)


def check_loans(spec: ModelSpec, backend: Backend, *, block_size: int) -> None:
    """Raise ConfigError unless another engine can hold leading keys and values of this model's requests."""
    if not backend.capabilities.lends:
        raise ConfigError(f"kv_loans needs the C++ kernels, and here are {backend.capabilities.name}: leave it out")
    if any(not isinstance(layer.mixer, AttentionSpec) for layer in spec.layers):
        raise ConfigError(
            "kv_loans lends keys and values, and this model has layers with a recurrent state: leave it out"
        )
    if TILE % block_size:
        raise ConfigError(
            f"kv_loans lends tiles of {TILE} tokens, which blocks of {block_size} do not divide: set block_size to 32"
        )


def _rope_remarks(spec: ModelSpec, max_model_len: int) -> tuple[str, ...]:
    """Return a line where requests of any length are rotated as long ones are (LongRoPE)."""
    lengths = {rope.scaling.original_max_position for rope in spec.ropes if isinstance(rope.scaling, LongRopeScaling)}
    return tuple(
        f"rope: as in texts of more than {length} tokens, for all requests (max_model_len={length}: as in shorter ones)"
        for length in sorted(lengths)
        if max_model_len > length
    )


def _largest_budget(token_size: int, *, free: int) -> int:
    """Return the largest token budget whose activations take no more than their share of the memory that the weights
    leave, and FIRST_BUDGET in any case.
    """
    most = int(free * LARGEST_ACTIVATION_SHARE) // token_size
    return max([FIRST_BUDGET, *(budget for budget in BUDGETS if budget <= most)])


def _with_states(plan: MemoryPlan, config: EngineConfig, *, free: int) -> MemoryPlan:
    """Return the plan with slots for recurrent states, and with no more running requests than they do for.

    Between two snapshots of a prompt are about as many bytes of keys and values as one has, in whole token budgets: of
    small states too, a step keeps one.
    """
    if not plan.state:
        return plan
    per_request = SLOTS_WITH_SNAPSHOTS if config.cache.enable_prefix_caching else STATE_SLOTS
    affordable = max(int(free * LARGEST_STATE_SHARE) // plan.state, STATE_SLOTS)
    most = min(plan.max_num_seqs, affordable // STATE_SLOTS)
    blocks_of_budget = ceil_div(config.scheduler.max_num_batched_tokens or FIRST_BUDGET, plan.block_size)
    return replace(
        plan,
        snapshot_interval=max(1, round(plan.state / plan.block / blocks_of_budget))
        * blocks_of_budget
        * plan.block_size,
        num_states=min(per_request * most, affordable),
        max_num_seqs=most,
        num_seqs_lowered=most < plan.max_num_seqs,
    )


def _num_blocks(config: EngineConfig, plan: MemoryPlan, free: int) -> int:
    cache = config.cache
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.kv_cache_memory_gib is not None:
        return int(cache.kv_cache_memory_gib * GIB) // plan.block
    most_useful = plan.max_num_seqs * ceil_div(plan.max_model_len, plan.block_size)
    return max(1, min(most_useful, int(free * _kv_share(config)) // plan.block_of_both))


def _kv_share(config: EngineConfig) -> float:
    """Return the fraction of the memory left by weights and activations that a KV cache takes: on a GPU all of it, as
    what is for others is left out already.
    """
    return LARGEST_KV_SHARE if torch.device(device_of(config)).type == "cpu" else 1.0


def _gpu_share(config: EngineConfig) -> int | None:
    """Return the most bytes of a GPU's memory that an engine takes; None on the CPU."""
    device = torch.device(device_of(config))
    if device.type == "cpu" or not torch.cuda.is_available():
        return None
    sizes = [torch.cuda.get_device_properties(each).total_memory for each in rank_devices(config)]
    return int(config.cache.gpu_memory_share * min(sizes))
