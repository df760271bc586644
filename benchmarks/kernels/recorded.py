"""Compare the steps of a recording with what the machine needs for them at least: where the time of serving goes.

    python -m benchmarks.kernels.recorded FILE [--model DIR]

FILE is what `splitfuse serve --record FILE` wrote on this machine, of a model of attention and dense MLPs. Steps are
told apart by how many tokens of prompts they have. A step is counted from the end of the one before, or from its own
start if that is later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.kernels.limits import Limits
from benchmarks.kernels.steps import step_bytes, step_operations
from splitfuse.core.plan import Chunk
from splitfuse.engine.trace import PLAIN, ChunkTrace, StepTrace
from splitfuse.errors import SplitfuseError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.structs import GROUPED, INT4, INT8
from splitfuse.recording.format import Recording, Records
from splitfuse.recording.replay import config_of
from splitfuse.runtime.loading import LoadedModel, load_model

BOUNDS = (0, 64, 128, 256, 512, 1024)
"""Most tokens of prompts in a step of each kind; more than the last are of a kind with their own number."""
IN_INT8 = (INT8, INT4, GROUPED)
"""Formats of weights whose products are of whole numbers of 8 bits."""
COLUMNS = ("tokens of prompts", "steps", "decodes", "% of the time", "% of the limit", "lost, % of all time")


class TimedStep(NamedTuple):
    """Describes a step: how many tokens it has, the seconds that it took, and those that the machine needs at least."""

    num_decodes: int
    num_prompt_tokens: int
    seconds: float
    limit: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="the folder of the model, if it is not where it was")
    arguments = parser.parse_args()
    recording = Recording.open(arguments.file)
    config = config_of(recording, {"model": arguments.model} if arguments.model else {})
    model = load_model(config)
    backend = model.decoder.backend
    if not isinstance(backend, CpuBackend):
        sys.exit(f"{arguments.file} is of {type(backend).__name__}: record an engine with the CPU kernels")
    limits, in_int8 = Limits(backend), model.decoder.weights.layers[0].qkv.format in IN_INT8
    read = median(limits.read() for _ in range(5))
    dots = median(limits.dots(int8=in_int8) for _ in range(5))
    print(f"{arguments.file}: {read / 1e9:.1f} GB/s, {dots / 1e12:.3f} T operations/s")
    steps = list(timed_steps(recorded_steps(recording), model, read, dots))
    if not steps:
        sys.exit(f"{arguments.file} has fewer than two steps of engine 0: record some requests")
    whole = sum(step.seconds for step in steps)
    print("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", sep="\n")
    for kind, each in (*by_kind(steps).items(), ("all", steps)):
        seconds, limit = sum(step.seconds for step in each), sum(step.limit for step in each)
        decodes = sum(step.num_decodes for step in each) / len(each)
        shares = (f"{100 * share:.1f}" for share in (seconds / whole, limit / seconds, (seconds - limit) / whole))
        print("| " + " | ".join((kind, str(len(each)), f"{decodes:.1f}", *shares)) + " |")


def recorded_steps(recording: Recording) -> list[StepTrace]:
    """Return the steps of the first engine of a recording, in their order."""
    frames = (frame for frame in recording.frames() if isinstance(frame, Records) and frame.engine == 0)
    return [record for frame in frames for record in frame.records if isinstance(record, StepTrace)]


def timed_steps(steps: Sequence[StepTrace], model: LoadedModel, read: float, dots: float) -> Iterator[TimedStep]:
    """Yield all steps but the first one, on a machine that reads and computes so much a second."""
    for before, step in pairwise(steps):
        chunks = [chunk_of(trace) for trace in step.chunks]
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        num_decodes = sum(len(chunk.token_ids) for chunk in chunks if chunk.num_logits == len(chunk.token_ids))
        limit = max(step_bytes(model, chunks) / read, step_operations(model.spec, chunks) / dots)
        seconds = step.end_time - max(before.end_time, step.start_time)
        yield TimedStep(num_decodes, num_tokens - num_decodes, seconds, limit)


def chunk_of(trace: ChunkTrace) -> Chunk:
    """Return a chunk of the size of one that was recorded."""
    num_logits = (trace.detail or PLAIN).num_logits
    return Chunk(str(trace.number), trace.start, (0,) * trace.num_tokens, (), num_logits, bool(trace.token_ids))


def by_kind(steps: Iterable[TimedStep]) -> dict[str, list[TimedStep]]:
    """Return steps by how many tokens of prompts they have, the fewest first."""
    kinds: dict[str, list[TimedStep]] = {}
    for step in sorted(steps, key=lambda step: step.num_prompt_tokens):
        most = next((bound for bound in BOUNDS if step.num_prompt_tokens <= bound), step.num_prompt_tokens)
        kinds.setdefault(f"up to {most}" if most else "none", []).append(step)
    return kinds


if __name__ == "__main__":
    try:
        main()
    except SplitfuseError as error:
        sys.exit(f"benchmarks.kernels.recorded: {error}")
