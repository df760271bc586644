"""How much longer the slowest of equal steps take than the usual one, next to a loop in C of the same length, in turns.

    python -m benchmarks.server.step_jitter [--minutes 10] [--model FOLDER] [--requests 8] [--tokens 64]

Rounds of equal requests run in an engine of this process; the steps of one index are equal in all rounds. The loop is
one of dot products in registers, on as many threads as the kernels have: what it shows is the machine. Printed are the
99th and 99.9th percentiles and the maximum of a step's time over the median of its index, the same of the loop, and the
pauses of the garbage collector.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import splitfuse
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.kernels.cpu.backend import CpuBackend

FIRST_ROUNDS = 5  # rounds until caches and allocators have settled


def main() -> None:
    """Print a row for the steps and one for the loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default=None)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kernels", default="auto")
    arguments = parser.parse_args()
    pipe = splitfuse.pipeline(arguments.model, dtype="bfloat16", kernels=arguments.kernels, enable_prefix_caching=False)
    engine, pauses = pipe.engine, Pauses()
    for number in range(FIRST_ROUNDS):
        first = run_round(engine, f"first {number}", arguments.requests, arguments.tokens)
    loop = loop_of(statistics.quantiles(first, n=4)[0], engine)
    rounds: list[list[float]] = []
    loops: list[float] = []
    with pauses:
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            rounds.append(run_round(engine, str(len(rounds)), arguments.requests, arguments.tokens))
            loops += [timed(loop) for _ in rounds[-1]]
    medians = [statistics.median(steps) for steps in zip(*rounds, strict=True)]
    steps = [taken / median for each in rounds for taken, median in zip(each, medians, strict=True)]
    middle = statistics.median(loops)
    print(engine.model.decoder.backend.describe())
    print("| | number | median ms | 99 % | 99.9 % | largest |\n|---|---|---|---|---|---|")
    print_row("step", statistics.median(medians), steps)
    print_row("loop in C", middle, [taken / middle for taken in loops])
    print(f"garbage collections: {len(pauses.seconds)}, the longest {max(pauses.seconds, default=0) * 1e3:.2f} ms")


def run_round(engine: Engine, name: str, requests: int, tokens: int) -> list[float]:
    """Run equal requests from their first step to their last; return the seconds of each step."""
    for number in range(requests):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
        engine.add_request(f"{name} {number}", [5 + number, 6, 7], params)
    taken = []
    while engine.has_unfinished:
        taken.append(timed(engine.step))
    return taken


def loop_of(seconds: float, engine: Engine) -> Callable[[], object]:
    """Return a loop in C that usually takes so long."""
    backend = engine.model.decoder.backend
    threads = backend.num_threads if isinstance(backend, CpuBackend) else torch.get_num_threads()
    library = CpuBackend(num_threads=threads).library
    rounds = 1000
    taken = min(timed(lambda: library.dots_only(False, rounds)) for _ in range(100))
    rounds = max(1, round(rounds * seconds / taken))
    return lambda: library.dots_only(False, rounds)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def print_row(name: str, median: float, ratios: Sequence[float]) -> None:
    ordered = sorted(ratios)
    shown = [ordered[int(len(ordered) * share)] for share in (0.99, 0.999)] + ordered[-1:]
    print(f"| {name} | {len(ordered)} | {median * 1e3:.3f} | " + " | ".join(f"{each:.2f}" for each in shown) + " |")


class Pauses:
    """Times the collections of the garbage collector inside `with`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def __enter__(self) -> None:
        gc.callbacks.append(self._note)

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, _: object) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self._began)


if __name__ == "__main__":
    main()
