"""Says what the Triton kernels can do, and what rules them out on a GPU, without importing Triton."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from splitfuse.kernels.interface import Capabilities
from splitfuse.kernels.triton.quantized import GROUP_SIZES

OLDEST = (7, 5)
"""Least compute capability of GPUs that the kernels run on (Turing). On others the reference does."""
OLDEST_OF_DTYPES = {torch.bfloat16: (8, 0)}
"""Least compute capability by dtype, where it is newer."""
OLDEST_OF_KV = {"fp8": (8, 9)}
"""Least compute capability by kv_cache_dtype: older GPUs do not convert FP8."""

ON_GPUS = Capabilities(
    name="the Triton kernels",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    quantizations=GROUP_SIZES,
    kv_dtypes=("int8", "fp8"),
    invariant=True,
    captures=True,
    max_head_dim=1024,
    head_rows=256,  # each time the head is read again, and the host waits
)
INTERPRETED = replace(ON_GPUS, devices=("cuda", "cpu"), dtypes=(torch.float16, torch.float32))
"""Capabilities in Triton's interpreter, whose products of bf16 are wrong."""


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


CAPABILITIES = INTERPRETED if is_interpreted() else ON_GPUS
"""Capabilities in this process."""


def obstacle(device: str, dtype: torch.dtype, kv_dtype: str = "auto") -> str | None:
    """Return what rules the kernels out on a device in these dtypes of activations and KV cache, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if is_interpreted() and torch.device(device).type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    have, names = torch.cuda.get_device_capability(device), (str(dtype).removeprefix("torch."), kv_dtype)
    for need, what in ((OLDEST_OF_DTYPES.get(dtype, OLDEST), names[0]), (OLDEST_OF_KV.get(kv_dtype, OLDEST), names[1])):
        if have < need:
            return (
                f"{what} with the Triton kernels needs compute capability {need[0]}.{need[1]}, and {device} has "
                f"{have[0]}.{have[1]}"
            )
    return launch_obstacle()


@functools.cache
def launch_obstacle() -> str | None:
    """Return why no kernel can be launched here, or None. Triton compiles what launches them once for each machine, in
    C: better missed now than in the first step.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # of any kind: no compiler, no headers, no libcuda.so.1
        return f"Triton cannot launch kernels, which needs gcc or clang and Python's headers (python3-dev): {error}"
    return None
