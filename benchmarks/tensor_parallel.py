"""Compares steps of tensor-parallel ranks of one thread each with those of one process with as many threads.

    python -m benchmarks.tensor_parallel MODEL [--ranks 2] [--turns 10] [--gloo] [FLAGS]

Both have the model loaded, and compute the same steps in turns A B A B, output head and greedy choice included; their
tokens are compared. On a machine with one memory bus both read the same bytes through it: ranks can at best be as fast.
With --gloo the ranks add up partial sums over TCP, as those of several machines do, here over loopback; their tokens
may be others.

MODEL is a folder, such as `python -m benchmarks.models 0.5b FOLDER` writes. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.steps import make_chunks
from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import Chunk
from splitfuse.runtime.batch import BatchBuilder
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
    parser.add_argument("--gloo", action="store_true", help="ranks that share no memory")
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = {"model": str(arguments.model), "num_blocks": 600, "max_num_batched_tokens": 512}
    for flag in flags:
        name, _, text = flag.removeprefix("--").replace("-", "_").partition("=")
        settings[name] = int(text) if text.isdigit() else text
    threads = load(settings, num_threads=arguments.ranks)
    own: dict[str, Any] = {"num_threads": 1, "tensor_parallel_size": arguments.ranks}
    if arguments.gloo:
        with ranks_elsewhere(arguments.ranks - 1) as (addresses, key_file):
            compare(threads, load(settings, **own, rank=addresses, rank_key_file=key_file), arguments)
    else:
        compare(threads, load(settings, **own), arguments)


def compare(threads: LoadedModel, ranks: LoadedModel, arguments: argparse.Namespace) -> None:
    print(threads.plan.kernels, ranks.plan.kernels, sep="\n")
    executors = threads.make_executor(), ranks.make_executor()
    print(f"{'step':16} {'threads, ms':>12} {'ranks, ms':>12} {'speed of ranks':>16}")
    for name, (rows, generating) in STEPS.items():
        chunks = make_chunks(rows, generating)
        times: list[tuple[float, float]] = []
        for _ in range(arguments.turns):
            (one, tokens), (other, same) = (timed(executor, chunks) for executor in executors)
            assert arguments.gloo or tokens == same, "ranks choose other tokens"
            times.append((one, other))
        ratio = median(one / other for one, other in times)
        one, other = (median(each) for each in zip(*times, strict=True))
        print(f"{name:16} {1e3 * one:12.2f} {1e3 * other:12.2f} {ratio:16.3f}", flush=True)
    assert ranks.leader is not None
    ranks.leader.close()


@contextmanager
def ranks_elsewhere(count: int) -> Iterator[tuple[list[str], str]]:
    """Run so many `splitfuse rank` on loopback; yield their addresses and the file with their secret."""
    addresses = [f"127.0.0.1:{9177 + number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "key"
        key_file.touch(mode=0o600)
        key_file.write_text(secrets.token_hex(32), encoding="ascii")
        command = [sys.executable, "-m", "splitfuse.cli", "rank", "--key-file", str(key_file), "--listen"]
        processes = [subprocess.Popen([*command, each], stderr=subprocess.PIPE, text=True) for each in addresses]
        try:
            for process in processes:
                assert process.stderr is not None and "listens on" in process.stderr.readline()
            yield addresses, str(key_file)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def load(settings: dict[str, Any], **own: Any) -> LoadedModel:
    return load_model(EngineConfig.from_settings({**settings, **own}))


def timed(executor: Executor, chunks: list[Chunk]) -> tuple[float, list[int]]:
    """Return the mean seconds of a step over a window, and the tokens that it chooses."""
    builder = BatchBuilder(executor.kv_cache.block_size, executor.decoder.device)
    step(executor, builder, chunks)
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < WINDOW:
        tokens = step(executor, builder, chunks)
        count += 1
    return taken / count, tokens


def step(executor: Executor, builder: BatchBuilder, chunks: list[Chunk]) -> list[int]:
    """Compute a step as executors do where all its requests are plain: in one call, unless ranks add up."""
    decoder = executor.decoder
    if decoder.chooses_at_once:
        return decoder.forward_and_choose(builder.build(chunks), executor.kv_cache)[0]
    with torch.inference_mode():
        return decoder.choose(executor.hidden(chunks))[0]


if __name__ == "__main__":
    main()
