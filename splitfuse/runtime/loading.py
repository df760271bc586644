"""From settings to a model that is ready to run: resolve, plan the memory, load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError
from splitfuse.kernels.cpu.backend import CpuKernels
from splitfuse.kernels.cpu.memory import HUGE_PAGE, SharedWeights
from splitfuse.kernels.reference import Kernels
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.families import load_spec
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.sources.generation_config import read_eos_token_ids
from splitfuse.models.sources.hub import resolve_model
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import load_decoder, resolve_dtype, weight_bytes
from splitfuse.runtime.backend_choice import choose_kernels
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.memory_plan import MemoryPlan, available_memory, plan_memory


@dataclass(frozen=True)
class LoadedModel:
    """Weights on their device, and what those above must know of the model."""

    path: Path
    spec: ModelSpec
    plan: MemoryPlan
    eos_token_ids: tuple[int, ...]
    decoder: Decoder

    def make_executor(self) -> Executor:
        """Returns an executor with a KV cache of its own, as large as planned: each engine makes one.

        Raises MemoryPlanError.
        """
        cache = KVCache(
            self.spec,
            num_blocks=self.plan.num_blocks,
            block_size=self.plan.block_size,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            kernels=self.decoder.kernels,
        )
        return Executor(self.decoder, cache)


def load_model(
    config: EngineConfig,
    *,
    progress: bool = False,
    announce: Callable[[MemoryPlan], None] = lambda _: None,
    on_progress: Callable[[float], None] = lambda _: None,
    shared_weights: SharedWeights | None = None,
) -> LoadedModel:
    """Load the model that `config` names. `announce` is called with the memory plan before anything is loaded,
    `on_progress` with the fraction that is. The C++ kernels pack into `shared_weights`, or find theirs there.

    Raises ModelError, MemoryPlanError or ConfigError.
    """
    path = resolve_model(config.model.model, config.model.revision)
    spec = load_spec(path)
    device = parse_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, spec)
    kernels = choose_kernels(config, dtype)
    plan = _plan(spec, config, kernels, shared_weights)
    announce(plan)
    spec = replace(spec, max_position=plan.max_model_len)  # no larger tables than will be read
    decoder = load_decoder(
        path,
        spec,
        dtype=dtype,
        device=device,
        kernels=kernels,
        load_format=config.model.load_format,
        progress=progress,
        on_progress=on_progress,
    )
    if isinstance(kernels, CpuKernels) and kernels.shared_weights is not None:
        kernels.shared_weights.finish()
    return LoadedModel(path, spec, plan, read_eos_token_ids(path), decoder)


def _plan(spec: ModelSpec, config: EngineConfig, kernels: Kernels, shared_weights: SharedWeights | None) -> MemoryPlan:
    """The memory plan; shared weights are made ready, and those that are there already take nothing any more. What is
    free besides is divided among those who share them.
    """
    if shared_weights is None:
        return plan_memory(spec, config, kernels=kernels)
    free, sharers = available_memory(config.model.device), shared_weights.num_sharers
    if not isinstance(kernels, CpuKernels):  # each has weights of its own
        return plan_memory(spec, config, kernels=kernels, available=free // sharers)
    weights = weight_bytes(spec, torch.bfloat16, kernels)
    besides = free if shared_weights.filled else free - weights
    plan = plan_memory(spec, config, kernels=kernels, available=weights + besides // sharers)
    shared_weights.begin(weights + weights // 8 + HUGE_PAGE)  # each begins on a cache line of its own
    kernels.shared_weights = shared_weights
    return plan


def parse_device(name: str) -> torch.device:
    """A torch device that is there. Raises ConfigError."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; cpu always can") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} cannot be used: it must be cpu, cuda or one of several, such as cuda:1")
    return device
