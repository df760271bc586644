"""Chooses the backend: the best that the settings allow and the machine can run. Must not load a model.

The only module above `kernels` that makes a model's backend: BACKENDS has all that there are. `config.KERNELS` repeats
their names, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.bindings import VARIANTS
from splitfuse.kernels.interface import Backend, Capabilities, Role
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.runtime.machine import usable_cores


@dataclass(frozen=True)
class Candidate:
    """Says what a backend can do, and how to make it from the settings and the reason why no faster one was chosen.

    `machine_obstacle` returns what rules a dtype out on this machine, beyond what the capabilities say.
    """

    capabilities: Capabilities
    make: Callable[[EngineConfig, str], Backend]
    machine_obstacle: Callable[[torch.dtype], str | None] = lambda _: None

    def obstacle(self, config: EngineConfig, dtype: torch.dtype) -> str | None:
        """Return what rules the backend out, in the settings or on this machine."""
        can, device = self.capabilities, config.model.device
        if can.devices is not None and torch.device(device).type not in can.devices:
            names = ["the CPU" if each == "cpu" else each for each in can.devices]
            return f"{can.name} run on {' or '.join(names)}, not on {device}"
        if can.dtypes is not None and dtype not in can.dtypes:
            names = [str(each).removeprefix("torch.") for each in (*can.dtypes, dtype)]
            return f"{can.name} compute in {' or '.join(names[:-1])}, not in {names[-1]}: set dtype={names[0]}"
        return self.machine_obstacle(dtype)


def choose_backend(config: EngineConfig, dtype: torch.dtype) -> Backend:
    """Return the backend for a model that is computed in `dtype`.

        >>> choose_backend(EngineConfig.from_settings({"kernels": "reference"}), torch.float32).describe()
        'reference kernels in PyTorch: kernels=reference'

    Raises ConfigError for settings that contradict each other or this CPU, KernelError for named kernels that were not
    compiled.
    """
    name = config.model.kernels
    if name != "auto":
        why = f"kernels={name}"
        _check_honoured(config, BACKENDS[name].capabilities, why)
        if obstacle := BACKENDS[name].obstacle(config, dtype):
            raise ConfigError(f"{why} cannot be used: {obstacle}")
        return BACKENDS[name].make(config, why)
    obstacle = CPP.obstacle(config, dtype)
    if obstacle is None:
        try:
            return CPP.make(config, "")
        except KernelError as error:
            obstacle = str(error)
    name = "torch" if dtype == torch.bfloat16 and BACKENDS["torch"].obstacle(config, dtype) is None else "reference"
    _check_honoured(config, BACKENDS[name].capabilities, obstacle)
    return BACKENDS[name].make(config, obstacle)


def _check_honoured(config: EngineConfig, capabilities: Capabilities, why: str) -> None:
    """Raise ConfigError for a setting that only the C++ kernels honour, which cannot be used: `why`."""
    threads = config.model.num_threads
    for name, value, honoured in (
        ("quantization", config.model.quantization, capabilities.quantizations),
        ("kv_cache_dtype", config.cache.kv_cache_dtype, ("auto", *capabilities.kv_dtypes)),
        ("num_threads", threads, (threads,) if capabilities.own_threads else ()),
    ):
        if value is not None and value not in honoured:
            raise ConfigError(f"{name}={value} needs {CpuBackend.capabilities.name}, which cannot be used: {why}")


def _onednn_obstacle(dtype: torch.dtype) -> str | None:
    """Return why PyTorch has no prepacked linears here: it knows which dtypes this CPU can multiply."""
    try:
        OneDnnBackend().pack([torch.zeros(1, 1, dtype=dtype)], role=Role.O)
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN does not multiply {str(dtype).removeprefix('torch.')} here ({str(error).splitlines()[0]})"
    return None


def _cpu_backend(variant: str | None, config: EngineConfig, _why: str) -> CpuBackend:
    return CpuBackend(
        variant=variant,
        num_threads=config.model.num_threads or usable_cores(),
        quantization=config.model.quantization,
        group_size=config.model.quantization_group_size,
        kv_int8=config.cache.kv_cache_dtype == "int8",
    )


CPP = Candidate(CpuBackend.capabilities, partial(_cpu_backend, None))
"""C++ kernels in the best variant that this CPU can run."""
BACKENDS = {
    **{name: Candidate(CpuBackend.capabilities, partial(_cpu_backend, name)) for name in VARIANTS},
    "torch": Candidate(OneDnnBackend.capabilities, lambda _, why: OneDnnBackend(why), _onednn_obstacle),
    "reference": Candidate(ReferenceBackend.capabilities, lambda _, why: ReferenceBackend(why)),
}
"""Backends by the names of the setting `kernels`."""
