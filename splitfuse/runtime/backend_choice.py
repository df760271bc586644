"""Chooses the backend: the best that the settings allow and the machine can run. Must not load a model.

The only module above `kernels` that knows which backends there are.
"""

from __future__ import annotations

import torch

from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.bindings import VARIANTS
from splitfuse.kernels.interface import Backend, Capabilities, Role
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.runtime.machine import usable_cores


def choose_backend(config: EngineConfig, dtype: torch.dtype) -> Backend:
    """Return the backend for a model that is computed in `dtype`.

        >>> choose_backend(EngineConfig.from_settings({"kernels": "reference"}), torch.float32).describe()
        'reference kernels in PyTorch: kernels=reference'

    Raises ConfigError for settings that contradict each other or this CPU, KernelError for named kernels that were not
    compiled.
    """
    wanted = config.model.kernels
    if wanted in VARIANTS:
        if obstacle := _obstacle(CpuBackend.capabilities, config, dtype):
            raise ConfigError(f"kernels={wanted} cannot be used: {obstacle}")
        return _cpu_backend(config, wanted)
    if wanted == "auto" and (why := _obstacle(CpuBackend.capabilities, config, dtype)) is None:
        try:
            return _cpu_backend(config, None)
        except KernelError as error:
            why = str(error)
    elif wanted != "auto":
        why = f"kernels={wanted}"
    plain = wanted == "reference" or (wanted == "auto" and dtype != torch.bfloat16)
    fallback = ReferenceBackend if plain else OneDnnBackend
    _check_honoured(config, fallback.capabilities, why)
    if not plain and (obstacle := _obstacle(fallback.capabilities, config, dtype) or _onednn_obstacle(dtype)):
        if wanted == "torch":
            raise ConfigError(f"kernels=torch cannot be used: {obstacle}")
        fallback = ReferenceBackend
    return fallback(str(why))


def _check_honoured(config: EngineConfig, capabilities: Capabilities, why: str | None) -> None:
    """Raise ConfigError for a setting that only the C++ kernels honour, which cannot be used: `why`."""
    threads = config.model.num_threads
    for name, value, honoured in (
        ("quantization", config.model.quantization, capabilities.quantizations),
        ("kv_cache_dtype", config.cache.kv_cache_dtype, ("auto", *capabilities.kv_dtypes)),
        ("num_threads", threads, (threads,) if capabilities.own_threads else ()),
    ):
        if value is not None and value not in honoured:
            raise ConfigError(f"{name}={value} needs {CpuBackend.capabilities.name}, which cannot be used: {why}")


def _obstacle(capabilities: Capabilities, config: EngineConfig, dtype: torch.dtype) -> str | None:
    """Return what in the settings rules a backend out."""
    device = config.model.device
    if capabilities.devices is not None and torch.device(device).type not in capabilities.devices:
        names = ["the CPU" if each == "cpu" else each for each in capabilities.devices]
        return f"they run on {' or '.join(names)}, not on {device}"
    if capabilities.dtypes is not None and dtype not in capabilities.dtypes:
        names = [str(each).removeprefix("torch.") for each in (*capabilities.dtypes, dtype)]
        return f"they compute in {' or '.join(names[:-1])}, not in {names[-1]}: set dtype={names[0]}"
    return None


def _onednn_obstacle(dtype: torch.dtype) -> str | None:
    """Return why PyTorch has no prepacked linears here: it knows which dtypes this CPU can multiply."""
    try:
        OneDnnBackend().pack([torch.zeros(1, 1, dtype=dtype)], role=Role.O)
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN does not multiply {str(dtype).removeprefix('torch.')} here ({str(error).splitlines()[0]})"
    return None


def _cpu_backend(config: EngineConfig, variant: str | None) -> CpuBackend:
    return CpuBackend(
        variant=variant,
        num_threads=config.model.num_threads or usable_cores(),
        quantization=config.model.quantization,
        group_size=config.model.quantization_group_size,
        kv_int8=config.cache.kv_cache_dtype == "int8",
    )
