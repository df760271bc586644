"""What the machine gives in the second in which a kernel is timed, and how a kernel is timed against it.

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
TILES = {"avx512_bf16": (14, 32), "avx512": (13, 32), "avx2": (6, 16)}  # rows and columns of a full one
FORMATS: dict[str, tuple[str | None, int | None]] = {
    "bf16": (None, None),
    "int8": ("int8", None),
    "int8/128": ("int8", 128),
    "int4/64": ("int4", 64),
    "int4/128": ("int4", 128),
}


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Medians over several turns of the kernel and of the limits measured beside it."""

    seconds: float
    bytes_per_second: float
    operations_per_second: float
    share: float  # of the limit: the time that the machine needs at least, over the time it took

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:9.3f} ms  {self.share * 100:4.0f} %"


class Limits:
    """Read bandwidth, and dot products of bf16 or of int8, on as many threads as the kernels have."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend = backend
        self._memory = allocate(READ_BYTES)
        self._memory.fill_(1)

    def read(self) -> float:
        """Bytes a second."""
        library = self._backend.library
        taken = min(seconds(lambda: library.read_all(self._memory.data_ptr(), READ_BYTES)) for _ in range(3))
        return READ_BYTES / taken

    def dots(self, *, int8: bool) -> float:
        """Multiplications and additions a second."""
        backend = self._backend
        taken = min(seconds(lambda: backend.library.dots_only(int8, DOT_ROUNDS)) for _ in range(3))
        rows, columns = TILES[backend.variant]
        products = DOT_ROUNDS * rows * columns * (4 if int8 else 2) * backend.num_threads
        return 2 * products / taken

    def compare(
        self, run: Callable[[], object], *, num_bytes: float, operations: float, int8: bool, turns: int = 7
    ) -> Timing:
        """Times `run`, which must read `num_bytes` and do `operations`, in turns with the limits."""
        run()
        taken, reads, dots, shares = [], [], [], []
        for _ in range(turns):
            reads.append(self.read())
            dots.append(self.dots(int8=int8))
            taken.append(seconds(run))
            shares.append(max(num_bytes / reads[-1], operations / dots[-1]) / taken[-1])
        median = statistics.median
        return Timing(median(taken), median(reads), median(dots), median(shares))
