"""Tensor parallel: steps of ranks of one thread each beside steps of one process with as many threads.

    python -m benchmarks.tensor_parallel MODEL [--ranks 2] [--turns 10] [FLAGS]

Both have the model loaded, and compute the same steps in turns A B A B, output head and greedy choice included; their
tokens are compared. On a machine with one memory bus both read the same bytes through it: ranks can at best be as fast.

MODEL is a folder, such as `python -m benchmarks.models 0.5b FOLDER` writes. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.steps import make_chunks
from splitfuse.config import EngineConfig
from splitfuse.core.plan import Chunk
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model

STEPS = {"1 decode": (1, True), "16 decodes": (16, True), "prompt of 256": (256, False)}
WINDOW = 0.5
"""Seconds of steps in a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=10)
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = {"model": str(arguments.model), "num_blocks": 600, "max_num_batched_tokens": 512}
    for flag in flags:
        name, _, text = flag.removeprefix("--").replace("-", "_").partition("=")
        settings[name] = int(text) if text.isdigit() else text
    threads = load(settings, num_threads=arguments.ranks)
    ranks = load(settings, num_threads=1, tensor_parallel_size=arguments.ranks)
    print(threads.plan.kernels, ranks.plan.kernels, sep="\n")
    executors = threads.make_executor(), ranks.make_executor()
    print(f"{'step':16} {'threads, ms':>12} {'ranks, ms':>12} {'speed of ranks':>16}")
    for name, (rows, generating) in STEPS.items():
        chunks = make_chunks(rows, generating)
        times: list[tuple[float, float]] = []
        for _ in range(arguments.turns):
            (one, tokens), (other, same) = (timed(executor, chunks) for executor in executors)
            assert tokens == same, "ranks choose other tokens"
            times.append((one, other))
        ratio = median(one / other for one, other in times)
        one, other = (median(each) for each in zip(*times, strict=True))
        print(f"{name:16} {1e3 * one:12.2f} {1e3 * other:12.2f} {ratio:16.3f}", flush=True)
    assert ranks.leader is not None
    ranks.leader.close()


def load(settings: dict[str, Any], **own: int) -> LoadedModel:
    return load_model(EngineConfig.from_settings({**settings, **own}))


def timed(executor: Executor, chunks: list[Chunk]) -> tuple[float, list[int]]:
    """Return the mean seconds of a step over a window, and the tokens that it chooses."""
    step(executor, chunks)
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < WINDOW:
        tokens = step(executor, chunks)
        count += 1
    return taken / count, tokens


def step(executor: Executor, chunks: list[Chunk]) -> list[int]:
    with torch.inference_mode():
        return executor.decoder.choose(executor.hidden(chunks))[0]


if __name__ == "__main__":
    main()
