"""Chooses the device: a GPU where there is one with room, else the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from splitfuse.config.engine import EngineConfig
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
        f"tensor_parallel_size={model.tensor_parallel_size}": model.tensor_parallel_size > 1,
        "kv_loans": config.cache.kv_loans,
    }
    if reason := next((name for name, needed in needs_cpu.items() if needed), None):
        return DeviceChoice("cpu", f"{reason} needs it")
    return _choose_gpu(config.cache.kv_cache_dtype)


@functools.cache
def _choose_gpu(kv_dtype: str) -> DeviceChoice:
    """Return the GPU with most free memory, if the Triton kernels run on it and it has room."""
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    free, name = max((available_memory(name), name) for name in names)
    total = torch.cuda.get_device_properties(name).total_memory
    sizes = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free on {name}"
    if obstacle := triton.obstacle(name, torch.float16, kv_dtype):
        return DeviceChoice("cpu", obstacle)
    if free < LEAST_FREE * total:
        return DeviceChoice("cpu", f"only {sizes}; --device {name} takes it all the same")
    return DeviceChoice(name, sizes)
