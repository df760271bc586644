"""Limits of the machine, measured in the same second as a kernel, and the timing of kernels against them.

A memory that flips between speeds, or a neighbour on the next core, moves both alike; their ratio stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.memory import allocate

READ_BYTES = 2**28
DOT_ROUNDS = 50_000
TILES = {"avx512_amx": (32, 32), "avx512_bf16": (14, 32), "avx512": (13, 32), "avx2": (6, 16)}
"""Rows and columns of a full tile of each variant."""
FORMATS: dict[str, tuple[str | None, int | None]] = {
    "bf16": (None, None),
    "int8": ("int8", None),
    "int8/128": ("int8", 128),
    "int4/64": ("int4", 64),
    "int4/128": ("int4", 128),
}


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Medians over several turns of a kernel and of the limits measured with it."""

    seconds: float
    bytes_per_second: float
    operations_per_second: float
    share: float  # of the limit: the time that the machine needs at least, over the time it took

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:9.3f} ms  {self.share * 100:4.0f} %"


class Limits:
    """Read bandwidth, and dot products in bf16 or int8, with the threads of the kernels."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend = backend
        self._memory = allocate(READ_BYTES)
        self._memory.fill_(1)

    def read(self) -> float:
        """Return the read bandwidth in bytes/s: the better of those into the first and into the second cache."""
        read, address = self._backend.library.read_all, self._memory.data_ptr()
        taken = min(seconds(lambda cache=cache: read(address, READ_BYTES, cache)) for cache in (0, 1) * 3)
        return READ_BYTES / taken

    def dots(self, *, int8: bool) -> float:
        """Return the multiplications and additions per second."""
        backend = self._backend
        taken = min(seconds(lambda: backend.library.dots_only(int8, DOT_ROUNDS)) for _ in range(3))
        rows, columns = TILES[backend.variant]
        products = DOT_ROUNDS * rows * columns * (4 if int8 else 2) * backend.num_threads
        return 2 * products / taken

    def compare(
        self, run: Callable[[], object], *, num_bytes: float, operations: float, int8: bool, turns: int = 7
    ) -> Timing:
        """Time `run`, which reads `num_bytes` and does `operations`, in turns with the limits."""
        run()
        taken, reads, dots, shares = [], [], [], []
        for _ in range(turns):
            reads.append(self.read())
            dots.append(self.dots(int8=int8))
            taken.append(seconds(run))
            shares.append(max(num_bytes / reads[-1], operations / dots[-1]) / taken[-1])
        median = statistics.median
        return Timing(median(taken), median(reads), median(dots), median(shares))
