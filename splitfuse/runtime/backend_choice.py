"""Chooses the backend: the best that the settings allow and the machine can run. Must not load a model.

The only module above `kernels` that makes a model's backend: BACKENDS has all that there are. `config.KERNELS` repeats
their names, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.library import VARIANTS
from splitfuse.kernels.cpu.network import uncovered
from splitfuse.kernels.interface import Backend, Capabilities, NetworkPlan
from splitfuse.kernels.layers import LayerSpec, NormSpec
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.triton import capabilities as triton
from splitfuse.kernels.weights import NetworkWeights, WeightRole
from splitfuse.runtime.device import device_of
from splitfuse.runtime.machine import usable_cores


@dataclass(frozen=True)
class Candidate:
    """Says what a backend can do, and how to make it from the settings and the reason why no faster one was chosen.

    `machine_obstacle` returns what rules a dtype out on this machine, beyond what the capabilities say. `auto_dtypes`
    are those for which "auto" takes it; None: all that it computes in.
    """

    capabilities: Capabilities
    make: Callable[[EngineConfig, str], Backend]
    machine_obstacle: Callable[[EngineConfig, torch.dtype], str | None] = lambda *_: None
    auto_dtypes: tuple[torch.dtype, ...] | None = None

    def obstacle(self, config: EngineConfig, dtype: torch.dtype) -> str | None:
        """Return what rules the backend out, in the settings or on this machine."""
        can, device = self.capabilities, device_of(config)
        if can.devices is not None and not self.runs_on(device):
            names = ["the CPU" if each == "cpu" else each for each in can.devices]
            return f"{can.name} run on {' or '.join(names)}, not on {device}"
        if can.dtypes is not None and dtype not in can.dtypes:
            names = [str(each).removeprefix("torch.") for each in (*can.dtypes, dtype)]
            return f"{can.name} compute in {' or '.join(names[:-1])}, not in {names[-1]}: set dtype={names[0]}"
        return self.machine_obstacle(config, dtype)

    def runs_on(self, device: str) -> bool:
        """Return whether the backend is for devices of this type."""
        devices = self.capabilities.devices
        return devices is None or torch.device(device).type in devices

    def unhonoured(self, config: EngineConfig) -> str | None:
        """Return a setting that the backend does not honour, such as `quantization=int8`."""
        can, threads = self.capabilities, config.model.num_threads
        for name, value, honoured in (
            ("quantization", config.model.quantization, can.quantizations),
            ("kv_cache_dtype", config.cache.kv_cache_dtype, ("auto", *can.kv_dtypes)),
            ("num_threads", threads, (threads,) if can.own_threads else ()),
            ("batch_invariant", config.model.batch_invariant or None, (True,) if can.invariant else ()),
        ):
            if value is not None and value not in honoured:
                return f"{name}={value}"
        return None


def in_cpp(layers: tuple[LayerSpec, ...]) -> str:
    """Return how the C++ kernels compute such layers, in a word or two: in one call, or not."""
    weights = NetworkWeights(embed=None, layers=(), norm=torch.empty(0), head=None)
    plan = NetworkPlan(layers=layers, weights=weights, ropes=(), norm=NormSpec(eps=1e-6))
    reason = uncovered(plan)
    return "fused" if reason is None else f"no: {reason}"


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
        named = BACKENDS[name]
        if named.unhonoured(config):
            raise _unhonourable(config, named, why)
        if obstacle := named.obstacle(config, dtype):
            raise ConfigError(f"{why} cannot be used: {obstacle}")
        return named.make(config, why)
    why = elsewhere = ""  # obstacles of the first backend for this device, and of the first for another
    for candidate in AUTO:
        if candidate.unhonoured(config) or (candidate.auto_dtypes and dtype not in candidate.auto_dtypes):
            continue
        try:
            if (obstacle := candidate.obstacle(config, dtype)) is None:
                return candidate.make(config, why or elsewhere)
        except KernelError as error:
            obstacle = str(error)
        if candidate.runs_on(device_of(config)):
            why = why or obstacle
        else:
            elsewhere = elsewhere or obstacle
    raise _unhonourable(config, AUTO[-1], why or elsewhere)


def _unhonourable(config: EngineConfig, candidate: Candidate, why: str) -> ConfigError:
    """Return the error for a setting that a candidate does not honour, and `why` none that honours it can be used."""
    setting = candidate.unhonoured(config)
    able = dict.fromkeys(each.capabilities.name for each in AUTO if each.unhonoured(config) != setting)
    return ConfigError(f"{setting} needs {' or '.join(able)}, which cannot be used: {why}")


def _onednn_obstacle(_config: EngineConfig, dtype: torch.dtype) -> str | None:
    """Return why PyTorch has no prepacked linears here: it knows which dtypes this CPU can multiply."""
    try:
        OneDnnBackend().pack([torch.zeros(1, 1, dtype=dtype)], role=WeightRole.O)
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN does not multiply {str(dtype).removeprefix('torch.')} here ({str(error).splitlines()[0]})"
    return None


def _cpu_backend(variant: str | None, config: EngineConfig, _why: str) -> CpuBackend:
    return CpuBackend(
        variant=variant,
        num_threads=config.model.num_threads or max(1, usable_cores() // config.model.num_local_ranks),
        quantization=config.model.quantization,
        group_size=config.model.quantization_group_size,
        kv_int8=config.cache.kv_cache_dtype == "int8",
    )


def _triton_obstacle(config: EngineConfig, dtype: torch.dtype) -> str | None:
    return triton.obstacle(device_of(config), dtype, config.cache.kv_cache_dtype)


def _triton_backend(config: EngineConfig, _why: str) -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend  # needs Triton, which may not be installed

    return TritonBackend(
        device=device_of(config),
        kv_dtype=config.cache.kv_cache_dtype,
        quantization=config.model.quantization,
        group_size=config.model.quantization_group_size,
        invariant=config.model.batch_invariant,
    )


BACKENDS = {
    **{name: Candidate(CpuBackend.capabilities, partial(_cpu_backend, name)) for name in VARIANTS},
    "triton": Candidate(triton.CAPABILITIES, _triton_backend, _triton_obstacle),
    "torch": Candidate(
        OneDnnBackend.capabilities, lambda _, why: OneDnnBackend(why), _onednn_obstacle, auto_dtypes=(torch.bfloat16,)
    ),
    "reference": Candidate(ReferenceBackend.capabilities, lambda _, why: ReferenceBackend(why)),
}
"""Backends by the names of the setting `kernels`, best first."""
AUTO = (
    Candidate(CpuBackend.capabilities, partial(_cpu_backend, None)),  # it knows the best variant for this CPU
    Candidate(triton.ON_GPUS, _triton_backend, _triton_obstacle),  # never interpreted
    *(candidate for name, candidate in BACKENDS.items() if name not in (*VARIANTS, "triton")),
)
"""Backends that `kernels=auto` tries, in this order; the last one runs everywhere."""
