"""Plans memory before anything is loaded: what a model needs, and what the machine has.

The plan settles `max_model_len` and `num_blocks` where they were left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from splitfuse.config.engine import CacheConfig, EngineConfig
from splitfuse.core.kv.fetching import INBOX_BYTES, MOVES_BYTES, MOVES_INBOX_BYTES, STAGED_BYTES, waiting_bytes
from splitfuse.core.limits import ceil_div
from splitfuse.core.step_budget import BUDGETS, FIRST_BUDGET
from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.kernels.group import WHOLE, Shard
from splitfuse.kernels.interface import Backend, StepSizes
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec, RecurrentSpec
from splitfuse.kernels.loans import TILE
from splitfuse.models.kv_cache import block_bytes, state_bytes
from splitfuse.models.sharding import check_ranks, rank_shard, rank_spec
from splitfuse.models.sources.source import WeightSource
from splitfuse.models.spec import LongRopeScaling, ModelSpec
from splitfuse.models.storage import may_be_quantized
from splitfuse.models.weights import copy_bytes, resolve_dtype, weight_bytes
from splitfuse.runtime.device import device_of, rank_devices, ranks_of_device
from splitfuse.runtime.machine import GIB, available_memory
from splitfuse.runtime.step_graphs import MAX_BYTES, round_up

INDEX_BYTES = 256
"""Bytes that each engine takes for a block in a tier: its entry in the file and in the index (241 were measured)."""
SHORTEST_MODEL_LEN = 2  # a token of prompt and one of output
LOGIT_BYTES = 20
"""Bytes of each logit while rows are sampled, about: in fp32, also in the kernels' own buffer, adjusted in fp64, and
what drawing adds."""
SUM_BYTES = 8
"""Bytes of each number that a rank receives of another one to add it up: in fp32, and in the library's own buffer."""
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


@dataclass(frozen=True)
class DraftSizes:
    """Holds what a draft model needs, in bytes. Its KV cache has as many blocks as the other, of as many tokens."""

    name: str
    weights: int
    activations: int
    block: int


@dataclass(frozen=True)
class MemoryPlan:
    """Holds what is needed and available, in bytes, and the sizes that follow. `str(plan)` is a table."""

    weights: int
    activations: int
    block: int  # one KV block over all layers; 0: the network has no cache
    block_size: int
    num_blocks: int
    max_model_len: int
    available: int
    kernels: str  # in a line
    model_len_lowered: bool  # the model allows longer requests, the cache cannot hold them
    max_num_seqs: int
    max_num_batched_tokens: int  # the most that a step may have; chosen budgets are at most this
    state: int = 0  # one recurrent state over all layers; 0: the network has none
    num_states: int = 0
    snapshot_interval: int = 0  # tokens of a prompt between snapshots of its state
    tiers: int = 0  # KV blocks behind the cache, in memory and on their way
    tiers_are_for: str = "behind the cache"
    draft: DraftSizes | None = None  # of the draft model, if there is one
    num_seqs_lowered: bool = False  # more running requests are allowed than there is memory for the states of
    remarks: tuple[str, ...] = ()  # lines at the end

    @property
    def kv_cache(self) -> int:
        """Return the size of the KV cache in bytes."""
        return self.num_blocks * self.block

    @property
    def draft_model(self) -> int:
        """Return the size of the draft model with its KV cache in bytes."""
        draft = self.draft
        return 0 if draft is None else draft.weights + draft.activations + self.num_blocks * draft.block

    @property
    def block_of_both(self) -> int:
        """Return the size of a KV block and one of the draft model in bytes."""
        return self.block + (0 if self.draft is None else self.draft.block)

    @property
    def states(self) -> int:
        """Return the size of all recurrent states in bytes."""
        return self.num_states * self.state

    @property
    def need(self) -> int:
        """Return the sum of all that is needed, in bytes."""
        return self.weights + self.activations + self.states + self.tiers + self.kv_cache + self.draft_model

    def __str__(self) -> str:
        sizes = f"{self.num_blocks} blocks of {self.block_size}: {self.num_blocks * self.block_size} tokens"
        lines = [
            self.kernels,
            f"weights      {self.weights / GIB:8.3f} GiB",
            f"activations  {self.activations / GIB:8.3f} GiB",
            *([f"states       {self.states / GIB:8.3f} GiB   {self._states_line}"] if self.state else ()),
            *([f"KV tiers     {self.tiers / GIB:8.3f} GiB   {self.tiers_are_for}"] if self.tiers else ()),
            *([f"KV cache     {self.kv_cache / GIB:8.3f} GiB   {sizes}"] if self.block else ()),
            *([f"draft model  {self.draft_model / GIB:8.3f} GiB   {self._draft_line}"] if self.draft else ()),
            f"need         {self.need / GIB:8.3f} GiB",
            f"have         {self.available / GIB:8.3f} GiB",
            f"longest request: {self.max_model_len} tokens"
            + (" (the model allows more: raise kv_cache_memory_gib)" if self.model_len_lowered else ""),
            *self.remarks,
        ]
        if self.num_seqs_lowered:
            lines.append(f"running requests: {self.max_num_seqs} at most, as there is no memory for more states")
        return "\n".join(lines)

    @property
    def _draft_line(self) -> str:
        assert self.draft is not None
        cache = self.num_blocks * self.draft.block / GIB
        return f"{self.draft.name}: weights {self.draft.weights / GIB:.3f}, KV cache {cache:.3f}"

    @property
    def _states_line(self) -> str:
        return f"{self.num_states} recurrent states, snapshots included, for {self.max_num_seqs} running requests"


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
    dtype = resolve_dtype(config.model.dtype, spec)
    size, num_ranks = config.cache.block_size, config.model.tensor_parallel_size
    check_ranks(spec, backend, num_ranks)
    backend.check_block_size(size)
    wanted_len = config.model.max_model_len or spec.max_position
    if wanted_len > spec.max_position:
        raise ConfigError(
            f"max_model_len is {wanted_len}, but the model has {spec.max_position} positions: use at most that"
        )
    shard = first_shard(config, backend)
    weight_size = weight_bytes(spec, dtype, backend, weights, shard=shard)
    devices = rank_devices(config)
    available = min(map(available_memory, set(devices))) if available is None else available
    available //= ranks_of_device(config)
    remarks: tuple[str, ...] = ()
    if (most := _gpu_share(config)) is not None:
        if (left := available - GPU_RESERVE) < most:
            share, where = config.cache.gpu_memory_share, " or ".join(dict.fromkeys((devices[0], devices[-1])))
            remarks = (
                f"{available / GIB:.3f} GiB are free on {where}, too few for gpu_memory_share={share:g}: of these "
                f"{GPU_RESERVE / GIB:.3f} GiB are left for PyTorch and its libraries",
            )
        available = min(left, most)
    free = available - weight_size - (0 if draft is None else draft.weights + draft.activations)
    token_size = token_bytes(spec, dtype, shard)
    budget = config.scheduler.max_num_batched_tokens or _largest_budget(token_size, free=free)
    block = block_bytes(rank_spec(spec, num_ranks), block_size=size, dtype=dtype, backend=backend)
    num_positions = max(available, 0) // max(block, 1) * size
    plan = MemoryPlan(
        weights=weight_size,
        activations=_activations(spec, config, backend, weights, num_tokens=budget, num_positions=num_positions),
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
        tiers=tier_bytes(config.cache) if tiers is None else tiers,
        draft=draft,
        remarks=remarks,
    )
    if plan.tiers and not config.cache.has_tiers:
        plan = replace(plan, tiers_are_for="for requests that go on at another engine")
        if plan.state or num_ranks > 1 or torch.device(device_of(config)).type != "cpu":  # not used, or elsewhere
            plan = replace(plan, tiers=0)
    if plan.state and config.cache.has_tiers:
        raise ConfigError(
            "kv_memory_tier and kv_disk_tier keep keys and values, and this model has layers with a recurrent state: "
            "leave them out"
        )
    if config.cache.kv_loans:
        check_loans(spec, backend, block_size=size)
    if num_ranks > 1:
        divided = "the model and the machine's memory" if ranks_of_device(config) > 1 else "the model"
        where = f" on {', '.join(devices)}" if devices[0] != devices[-1] else ""
        adding = "; they add up by torch.distributed" if shard.sums else ""
        plan = replace(plan, remarks=(*remarks, f"each of {num_ranks} ranks{where}, which divide {divided}{adding}"))
    plan = _with_tiers(plan, config)
    plan = _with_states(plan, config, free=plan.available - plan.need)
    free = plan.available - plan.need
    if free < plan.block_of_both:
        raise MemoryPlanError(
            f"the model does not fit into memory\n{plan}\n{_smaller_model(spec, config, backend, weights, plan)}"
        )
    plan = replace(plan, num_blocks=_num_blocks(config, plan, free))
    if plan.need > plan.available:
        fitting = _cache_of(free // plan.block_of_both, plan)
        raise MemoryPlanError(f"the KV cache does not fit into memory\n{plan}\n{fitting} would fit")
    longest = plan.num_blocks * size + 1  # the last token of a request is never attended to
    if longest >= wanted_len or config.cache.kv_loans:  # what this cache cannot hold, others may
        return replace(plan, remarks=(*plan.remarks, *_rope_remarks(spec, wanted_len)))
    if config.model.max_model_len is None and longest >= SHORTEST_MODEL_LEN:
        remarks = (*plan.remarks, *_rope_remarks(spec, longest))
        return replace(plan, max_model_len=longest, model_len_lowered=True, remarks=remarks)
    raise MemoryPlanError(
        f"the KV cache cannot hold one request of {wanted_len} tokens\n{plan}\n{_longer_cache(plan, free)}"
    )


def first_shard(config: EngineConfig, backend: Backend) -> Shard:
    """Return the part of the model that rank 0 has, which is that of an engine."""
    return rank_shard(backend, 0, config.model.tensor_parallel_size, elsewhere=bool(config.model.rank))


def tier_bytes(cache: CacheConfig, *, num_sharers: int = 1, filled: int = 0, for_moves: bool = False) -> int:
    """Return the memory that each of the engines which share KV tiers leaves for them; `filled` is taken already. Where
    no tier was asked for, there may be some for requests that move.
    """
    if not cache.has_tiers:
        return MOVES_BYTES + 2 * MOVES_INBOX_BYTES if for_moves else 0
    own = cache.memory_tier_bytes // num_sharers
    return max(cache.memory_tier_bytes - filled, 0) // num_sharers + sum(waiting_bytes(own))


def _with_tiers(plan: MemoryPlan, config: EngineConfig) -> MemoryPlan:
    """Return the plan with what each engine knows of the blocks in tiers. All is in the machine's memory: where the KV
    cache is elsewhere, it is compared with that alone. Raises MemoryPlanError.
    """
    if not config.cache.has_tiers:
        return plan
    num_bytes = config.cache.memory_tier_bytes + config.cache.disk_tier_bytes
    plan = replace(plan, tiers=plan.tiers + _index_bytes(num_bytes, plan))
    if torch.device(device_of(config)).type == "cpu":
        return plan
    if plan.tiers > (free := available_memory("cpu")):
        raise MemoryPlanError(
            f"kv_memory_tier and kv_disk_tier take {plan.tiers / GIB:.3f} GiB of the machine's memory, and "
            f"{free / GIB:.3f} GiB are free: choose a smaller size, or leave them out"
        )
    return replace(plan, tiers=0)


def _index_bytes(num_bytes: int, plan: MemoryPlan) -> int:
    """Return the memory that an engine takes to know the blocks in a tier of so many bytes."""
    return INDEX_BYTES * (num_bytes // max(plan.block, 1))


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


def _activations(
    spec: ModelSpec,
    config: EngineConfig,
    backend: Backend,
    weights: WeightSource | None,
    *,
    num_tokens: int,
    num_positions: int,
) -> int:
    """Return the bytes that steps of so many tokens take besides weights and caches, and the CUDA graphs of steps, if
    there are any.
    """
    dtype, shard = resolve_dtype(config.model.dtype, spec), first_shard(config, backend)
    size = step_bytes(spec, dtype, num_tokens, backend, weights, shard=shard)
    size += attention_bytes(spec, config, backend, num_tokens=num_tokens, num_positions=num_positions)
    return size + (graph_bytes(size) if config.model.cuda_graphs else 0)


def step_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    num_tokens: int,
    backend: Backend,
    weights: WeightSource | None = None,
    *,
    shard: Shard = WHOLE,
) -> int:
    """Return the bytes of the activations and logits of a rank's step of so many tokens, and of the copies of weights
    that `backend` makes for it, of those that are quantized in `weights` too.
    """
    token_size = token_bytes(spec, dtype, shard)
    copies = copy_bytes(spec, dtype, backend, weights, shard=shard)
    return num_tokens * token_size + backend.capabilities.head_rows * spec.vocab_size * LOGIT_BYTES + copies


def attention_bytes(
    spec: ModelSpec, config: EngineConfig, backend: Backend, *, num_tokens: int, num_positions: int
) -> int:
    """Return the bytes that attention takes for itself in a step of so many tokens, with at most `num_positions` in the
    KV cache. Those of CUDA graphs are padded.
    """
    is_padded, size = config.model.cuda_graphs, config.cache.block_size
    num_requests = min(config.scheduler.max_num_seqs, num_tokens)
    longest = config.model.max_model_len or spec.max_position
    if is_padded:
        num_requests, longest = round_up(num_requests), round_up(ceil_div(longest, size)) * size
        num_tokens = max(round_up(num_tokens), num_requests + 1)
    sizes = StepSizes(
        num_tokens=num_tokens,
        num_requests=num_requests,
        num_positions=num_positions,
        longest=longest,
        is_padded=is_padded,
    )
    dtype = resolve_dtype(config.model.dtype, spec)
    layers = rank_spec(spec, config.model.tensor_parallel_size).layers
    mixers = {layer.mixer for layer in layers if isinstance(layer.mixer, AttentionSpec)}
    return max((backend.attention_bytes(each, sizes, dtype) for each in mixers), default=0)


def graph_bytes(activations: int) -> int:
    """Return the most bytes that CUDA graphs keep, of steps that have so many bytes of activations."""
    return MAX_BYTES + activations


def token_bytes(spec: ModelSpec, dtype: torch.dtype, shard: Shard = WHOLE) -> int:
    """Return the bytes of one token at the widest moment of a rank's step, generously. Ranks that share memory have
    those of the whole network in it; others receive what all of them give of a hidden state.
    """
    layers = set(rank_spec(spec, shard.size).layers if shard.sums else spec.layers)
    token_inputs = 3 * spec.token_input_size * len(spec.layers)
    width = max(_layer_width(layer, spec.hidden_size) for layer in layers) + token_inputs
    sums = shard.size * spec.hidden_size * SUM_BYTES if shard.sums else 0
    return width * max(dtype.itemsize, 4) + sums


def _layer_width(layer: LayerSpec, hidden: int) -> int:
    """Return how many numbers one token takes in a layer at most: its heads, and inputs, outputs and gate of the MLP
    or of each expert it is routed to.
    """
    width, mixer, mlp = 4 * hidden, layer.mixer, layer.mlp
    if isinstance(mlp, ExpertsSpec):
        width += mlp.router.top_k * 2 * (hidden + mlp.expert.intermediate_size) + mlp.router.num_experts
        mlp = mlp.shared
    if mlp is not None:
        width += 4 * mlp.intermediate_size
    if isinstance(mixer, RecurrentSpec):
        width += 4 * mixer.num_channels
    elif mixer is not None:
        width += (3 + mixer.gate) * mixer.num_heads * mixer.head_dim
    return width


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


def _smaller_model(
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
    without = _activations(
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
            plan.tiers - _index_bytes(cache.disk_tier_bytes, plan),
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


def _longer_cache(plan: MemoryPlan, free: int) -> str:
    """Return settings with which the longest request would fit: a lower limit, or a larger cache."""
    longest = plan.num_blocks * plan.block_size + 1
    wanted, most = ceil_div(plan.max_model_len - 1, plan.block_size), free // plan.block_of_both
    options = [f"max_model_len={longest}"] if longest >= SHORTEST_MODEL_LEN else []
    if wanted <= most or not options:
        options.append(_cache_of(min(wanted, most), plan))
    return f"{' or '.join(options)} would fit"


def _cache_of(num_blocks: int, plan: MemoryPlan) -> str:
    gib = math.ceil(num_blocks * plan.block / GIB * 1e6) / 1e6
    return f"num_blocks={num_blocks} (kv_cache_memory_gib={gib:.12g})"
