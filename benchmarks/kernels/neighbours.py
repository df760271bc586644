"""Step times next to busy loops on the same cores, in turns with the same steps alone."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from benchmarks.kernels.steps import forward, make_chunks
from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import Chunk
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import load_model

KERNELS = {"auto": "bfloat16", "torch": "bfloat16", "reference": "float32"}  # and the dtype of each
ROWS = (8, 256)  # decodes, and a prompt
WINDOW = 1.0  # seconds over which steps are averaged
SETTLE = 0.3  # seconds after the loops start or stop


class BusyLoops:
    """Runs busy loops in processes of their own, one for each core; they are stopped except inside `running`."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        self._loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
        self._signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        for loop in self._loops:
            loop.wait()

    def _signal(self, number: signal.Signals) -> None:
        for loop in self._loops:
            loop.send_signal(number)


def neighbours(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time steps of each backend alone and next to as many busy loops as there are cores: a fair share is half."""
    loops = BusyLoops()
    try:
        for name, dtype in KERNELS.items():
            settings = {
                "model": str(arguments.model) if arguments.model else None,
                "kernels": name,
                "dtype": dtype,
                "num_blocks": 2048,
                "max_num_batched_tokens": 1024,
            }
            executor = load_model(EngineConfig.from_settings(settings)).make_executor()
            for rows in arguments.rows or ROWS:
                chunks = make_chunks(rows, rows <= 32)
                alone, contended = [], []
                for _ in range(arguments.turns):
                    alone.append(mean_ms(executor, chunks))
                    with loops.running():
                        contended.append(mean_ms(executor, chunks))
                yield {
                    "kernels": name,
                    "rows": rows,
                    "ms alone": median(alone),
                    "ms with loops": median(contended),
                    "times": median(b / a for a, b in zip(alone, contended, strict=True)),
                }
    finally:
        loops.end()


def mean_ms(executor: Executor, chunks: list[Chunk]) -> float:
    """Return the mean milliseconds of a step over a window."""
    time.sleep(SETTLE)
    forward(executor, chunks)
    steps, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < WINDOW:
        forward(executor, chunks)
        steps += 1
    return taken / steps * 1e3
