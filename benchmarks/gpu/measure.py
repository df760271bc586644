"""Defines what the stages share: where they run, how they time, and what the GPU can do."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch.autograd import DeviceType

from splitfuse.kernels.triton.backend import TritonBackend
from splitfuse.kernels.triton.capabilities import is_interpreted

REPEATS = 20
"""Number of times that a kernel is timed; the median counts."""
AHEAD_CYCLES = 4_000_000
"""Cycles of the GPU, some 2 ms, in which the host launches what is timed."""


@dataclass
class Setting:
    """Says where and in which dtype a stage runs, and whether that is a rehearsal."""

    device: str
    dtype: torch.dtype
    is_rehearsal: bool
    clients: str
    lengths: str
    cuda_graphs: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace, *, has_gpu: bool) -> Setting:
        """Return the setting of a command line. The interpreter's products of bf16 are wrong: it has fp32."""
        if arguments.rehearse:
            return cls("cpu", torch.float32, True, "1", "6/2")
        if not has_gpu:
            return cls("cpu", getattr(torch, arguments.dtype), True, "", "")
        given = arguments.clients, arguments.lengths, arguments.cuda_graphs
        return cls("cuda", getattr(torch, arguments.dtype), False, *given)

    def describe(self) -> str:
        """Return one line: the GPU, versions, and what it reaches."""
        versions = f"torch {torch.__version__}, triton {triton.__version__}, {str(self.dtype).removeprefix('torch.')}"
        if self.is_rehearsal:
            how = "in the interpreter: times mean nothing" if is_interpreted() else "where kernels are not run"
            return f"rehearsal on the CPU, {how}; {versions}"
        name = torch.cuda.get_device_name(self.device)
        return f"{name}, {versions}; copies {self.bandwidth / 1e9:.0f} GB/s, matrices {self.rate / 1e12:.0f} TFLOP/s"

    def backend(self, **options: Any) -> TritonBackend:
        """Return the Triton kernels here."""
        return TritonBackend(device=self.device, **options)

    def few(self, full: Sequence[Any], small: Sequence[Any]) -> Sequence[Any]:
        """Return the shapes of a stage: of a rehearsal the small ones."""
        return small if self.is_rehearsal else full

    @cached_property
    def bandwidth(self) -> float:
        """Return bytes a second of a copy, read and written bytes counted."""
        size = 2**16 if self.is_rehearsal else 2**31
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    @cached_property
    def rate(self) -> float:
        """Return floating-point operations a second of a product of large square matrices."""
        size = 64 if self.is_rehearsal else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the median time of `run`, by events of the GPU, after two runs that compile and warm up. The GPU is
        kept busy while the host launches: what is timed is the GPU alone.
        """
        if self.is_rehearsal:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        for _ in range(2):
            run()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            sleep: Any = torch.cuda._sleep  # which has no types
            sleep(AHEAD_CYCLES)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def wall_seconds(self, run: Callable[[], Any]) -> float:
        """Return the median time of `run` from its call until the GPU has done all, after two runs that warm up."""
        times = []
        for _ in range(1 if self.is_rehearsal else 2 + REPEATS):
            self.synchronize()
            begin = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:] or times)

    def kernel_seconds(self, run: Callable[[], Any]) -> float:
        """Return how long the GPU computes and copies for `run`, by PyTorch's profiler: 0 in a rehearsal."""
        activity = torch.profiler.ProfilerActivity.CPU if self.is_rehearsal else torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            run()
            self.synchronize()
        on_gpu = [each for each in profile.events() or () if each.device_type == DeviceType.CUDA]
        return sum(each.time_range.elapsed_us() for each in on_gpu) / 1e6

    def synchronize(self) -> None:
        """Wait until the GPU has done all."""
        if not self.is_rehearsal:
            torch.cuda.synchronize()


class Table:
    """Prints rows under a head as they come."""

    def __init__(self, *names: str) -> None:
        self._names = names
        print(" | ".join(names))
        print(" | ".join("-" * len(name) for name in names), flush=True)

    def row(self, *values: object) -> None:
        """Print one row."""
        texts = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        print(" | ".join(text.rjust(len(name)) for text, name in zip(texts, self._names, strict=True)), flush=True)
