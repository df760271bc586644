"""Chooses the device: a GPU where there is one with room, else the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ConfigError
from splitfuse.kernels.triton import capabilities as triton
from splitfuse.runtime.machine import GIB, available_memory

AUTO = "auto"
LEAST_FREE = 0.5
"""Fraction of a GPU's memory that must be free for it to have room: with less, others are at work on it."""


@dataclass(frozen=True)
class DeviceChoice:
    """Holds the name of a device, and why it was chosen; empty if the settings name it, or there is no GPU."""

    name: str
    why: str = ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return a line for the memory plan, if there was a choice."""
        return (f"device: {self.name}, as {self.why}",) if self.why else ()


def device_of(config: EngineConfig) -> str:
    """Return the device of an engine: the one that its settings name, or the one that is chosen for it.

    >>> device_of(EngineConfig.from_settings({"device": "cuda:1"}))
    'cuda:1'
    """
    return choose_device(config).name


def choose_device(config: EngineConfig) -> DeviceChoice:
    """Return the device of an engine, and why if it was chosen. In a process the choice for equal settings is made
    once: an engine that has filled a GPU stays on it.
    """
    model = config.model
    if model.device != AUTO:
        return DeviceChoice(model.device)
    if not torch.cuda.is_available():
        return DeviceChoice("cpu")
    needs_cpu = {
        f"kernels={model.kernels}": model.kernels not in ("auto", "triton"),
        f"num_threads={model.num_threads}": model.num_threads is not None,
        "kv_loans": config.cache.kv_loans,
    }
    if reason := next((name for name, needed in needs_cpu.items() if needed), None):
        return DeviceChoice("cpu", f"{reason} needs it")
    return _choose_gpu(config.cache.kv_cache_dtype, model.num_local_ranks)


def rank_devices(config: EngineConfig) -> tuple[str, ...]:
    """Return the devices of an engine's ranks on this machine. Each has a GPU of its own, the first the engine's, the
    others those behind it; on the CPU all are there. Raises ConfigError if there are not so many GPUs.

    >>> rank_devices(EngineConfig.from_settings({"device": "cpu", "tensor_parallel_size": 2}))
    ('cpu', 'cpu')
    """
    name, count = device_of(config), config.model.num_local_ranks
    device = torch.device(name)
    if device.type == "cpu" or count == 1:
        return (name,) * count
    first, num_gpus = device.index or 0, torch.cuda.device_count()
    if first + count > num_gpus:
        raise ConfigError(
            f"tensor_parallel_size={count} needs {count} GPUs from cuda:{first} on, and PyTorch finds "
            f"{num_gpus - first}: use at most that"
        )
    return tuple(f"cuda:{first + rank}" for rank in range(count))


def ranks_of_device(config: EngineConfig) -> int:
    """Return how many ranks of an engine share the memory of its device."""
    return config.model.num_local_ranks if torch.device(device_of(config)).type == "cpu" else 1


@functools.cache
def _choose_gpu(kv_dtype: str, count: int) -> DeviceChoice:
    """Return the GPU with most free memory, if the Triton kernels run on it and it has room. Of several ranks it is the
    first of `count` neighbours, which all have as much.
    """
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if len(names) < count:
        return DeviceChoice("cpu", f"tensor_parallel_size={count} needs as many GPUs, and there are {len(names)}")
    each = [available_memory(name) for name in names]
    free, first = max((min(each[first : first + count]), first) for first in range(len(names) - count + 1))
    chosen = names[first : first + count]
    total = max(torch.cuda.get_device_properties(name).total_memory for name in chosen)
    where = " to ".join(dict.fromkeys((chosen[0], chosen[-1])))
    sizes = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free on {where}"
    if obstacle := next(filter(None, (triton.obstacle(name, torch.float16, kv_dtype) for name in chosen)), None):
        return DeviceChoice("cpu", obstacle)
    if free < LEAST_FREE * total:
        return DeviceChoice("cpu", f"only {sizes}; --device {chosen[0]} takes it all the same")
    return DeviceChoice(chosen[0], sizes)
