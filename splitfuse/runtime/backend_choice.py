"""Which kernels compute: the best that the settings allow and the machine can run. Must not load a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.cpu.backend import CpuKernels
from splitfuse.kernels.cpu.bindings import VARIANTS
from splitfuse.kernels.onednn import PrepackedKernels
from splitfuse.kernels.reference import Kernels
from splitfuse.runtime.control_groups import control_groups


def choose_kernels(config: EngineConfig, dtype: torch.dtype) -> Kernels:
    """Kernels for a model that is computed in `dtype`.

    Raises ConfigError for settings that contradict each other or this CPU, KernelError for named kernels that were not
    compiled.
    """
    wanted = config.model.kernels
    if wanted in VARIANTS:
        if obstacle := _obstacle(config, dtype):
            raise ConfigError(f"kernels={wanted} cannot be used: {obstacle}")
        return _cpu_kernels(config, wanted)
    if wanted == "auto" and (why := _obstacle(config, dtype)) is None:
        try:
            return _cpu_kernels(config, None)
        except KernelError as error:
            why = str(error)
    elif wanted != "auto":
        why = f"kernels={wanted}"
    for name, value in (
        ("quantization", config.model.quantization),
        ("kv_cache_dtype", config.cache.kv_cache_dtype),
        ("num_threads", config.model.num_threads),
    ):
        if value not in (None, "auto"):
            raise ConfigError(f"{name}={value} needs the C++ kernels, which cannot be used: {why}")
    if wanted == "reference" or (wanted == "auto" and dtype != torch.bfloat16):
        return Kernels(str(why))
    if missing := _onednn_obstacle(config, dtype):
        if wanted == "torch":
            raise ConfigError(f"kernels=torch cannot be used: {missing}")
        return Kernels(str(why))
    return PrepackedKernels(str(why))


def _obstacle(config: EngineConfig, dtype: torch.dtype) -> str | None:
    """What in the settings rules the C++ kernels out."""
    if torch.device(config.model.device).type != "cpu":
        return f"they run on the CPU, not on {config.model.device}"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, not in {str(dtype).removeprefix('torch.')}: set dtype=bfloat16"
    return None


def _onednn_obstacle(config: EngineConfig, dtype: torch.dtype) -> str | None:
    """Why PyTorch has no prepacked linears here: it knows which dtypes this CPU can multiply."""
    if torch.device(config.model.device).type != "cpu":
        return f"they run on the CPU, not on {config.model.device}"
    try:
        PrepackedKernels().pack([torch.zeros(1, 1, dtype=dtype)], role="o")
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN does not multiply {str(dtype).removeprefix('torch.')} here ({str(error).splitlines()[0]})"
    return None


def _cpu_kernels(config: EngineConfig, variant: str | None) -> CpuKernels:
    return CpuKernels(
        variant=variant,
        num_threads=config.model.num_threads or usable_cores(),
        quantization=config.model.quantization,
        group_size=config.model.quantization_group_size,
        kv_int8=config.cache.kv_cache_dtype == "int8",
    )


def usable_cores(root: Path = Path("/")) -> int:
    """The cores this process may keep busy: those it may run on (PyTorch asks for them), and no more than each of its
    control groups pays for. A thread too many costs more than it brings: all wait for the one that is not running.
    `root` is where proc and sys are.
    """
    return min([torch.get_num_threads(), *_paid_cores(root)])


def _paid_cores(root: Path) -> Iterator[int]:
    """Whole cores that each control group pays for, but at least one, where it sets a limit."""
    for version, group in control_groups("cpu", root):
        try:
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            cores = int(quota) // int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such group, or none that limits ("max")
            continue
        if int(quota) > 0:  # -1: no limit, in version 1
            yield max(1, cores)
