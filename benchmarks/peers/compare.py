"""Drive engines in turns with the same prompts, and print medians and their ratios to the first engine.

    python -m benchmarks.peers.compare --model DIR --peers FOLDER --out FILE \\
        splitfuse,quantization=int8 vllm,checkpoint=w8a8 llama-server,type=Q8_0 llama-bench,type=Q8_0

All are loaded first; then A B A B, each standing still while another runs, so that what the machine does meanwhile
falls on all alike. Decides the order and the statistics; knows nothing of how an engine is run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers.contender import DRIVEN, Contender, Running
from benchmarks.peers.processes import end_in_order_when_told
from benchmarks.peers.workload import FIRST_SECONDS, WORKLOADS, Figures, Workload
from splitfuse.runtime.machine import processor

UNITS = {"seconds": "s", "ms_per_token": "ms a token"}
REFERENCE_BYTES = 512 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="+", metavar="ENGINE[,NAME=VALUE...]")
    parser.add_argument("--model", type=Path, required=True, help="a folder that benchmarks.models wrote")
    parser.add_argument("--peers", type=Path, required=True, help="where benchmarks.peers.install put them")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be repeated; left out, all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="append all figures, a JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        contenders = [Contender.parse(text, DRIVEN) for text in arguments.contenders]
    except ValueError as error:
        parser.error(str(error))
    workloads = [WORKLOADS[name] for name in arguments.workload or WORKLOADS]
    end_in_order_when_told()
    with ExitStack() as stack:
        running = [
            start(stack, contender, arguments.model.resolve(), arguments.peers.resolve(), arguments.threads)
            for contender in contenders
        ]
        samples = in_turns(running, workloads, arguments.warmup, arguments.rounds)
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": arguments.model.name,
            "threads": arguments.threads,
            "machine": processor(),
            "warmup": arguments.warmup,
            "contenders": [describe(one) for one in running],
            "samples": samples,
        }
    print_table(report, workloads)
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")


def start(stack: ExitStack, contender: Contender, model: Path, peers: Path, threads: int) -> Running:
    """Start an engine, load it and stop it; it ends with `stack`."""
    say(f"{contender.label}: loading")
    running = Running(contender, model, peers, threads)
    stack.callback(running.end)
    running.pause()
    say(f"{contender.label}: loaded in {running.start_seconds:.1f} s; {json.dumps(dict(running.facts))}")
    return running


def in_turns(
    running: Sequence[Running], workloads: Sequence[Workload], warmup: int, rounds: int
) -> list[dict[str, Any]]:
    """Yield every figure as it is measured; rounds before 0 are the warm-up."""
    samples = []
    buffer = torch.ones(REFERENCE_BYTES // 4)
    for workload in workloads:
        for round_number in range(-warmup, rounds):
            for one in running:
                bandwidth = read_bandwidth(buffer)
                figures = one.measure(workload, round_number)
                samples.append(
                    {
                        "workload": workload.name,
                        "round": round_number,
                        "contender": one.contender.label,
                        "read_gb_per_s": round(bandwidth, 1),
                        **figures,
                    }
                )
                say(json.dumps(samples[-1]))
    return samples


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Return the current read bandwidth of all threads in GB/s: the best of three sums."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / min(seconds) / 1e9


def describe(one: Running) -> dict[str, Any]:
    """A contender in the report."""
    return {
        "contender": one.contender.label,
        "start_seconds": round(one.start_seconds, 2),
        "resident_bytes": one.resident_bytes(),
        **one.facts,
    }


def medians(samples: Sequence[Mapping[str, Any]], contender: str, workload: Workload) -> Figures:
    """Return the median of each figure over the rounds that count; empty if the contender cannot run the workload."""
    counted = [
        sample
        for sample in samples
        if sample["round"] >= 0 and sample["contender"] == contender and sample["workload"] == workload.name
    ]
    names = (workload.headline, FIRST_SECONDS, "read_gb_per_s")
    return {name: median(sample[name] for sample in counted) for name in names if all(name in s for s in counted)}


def print_table(report: Mapping[str, Any], workloads: Sequence[Workload]) -> None:
    """Return a table of medians and their ratios to the first contender."""
    labels = [one["contender"] for one in report["contenders"]]
    width = max(map(len, labels))
    for workload in workloads:
        unit = UNITS[workload.headline]
        print(
            f"\n{report['model']}, {workload.name}: {workload.num_prompts} x {workload.prompt_tokens} tokens, "
            f"{workload.output_tokens} generated each; {unit}"
        )
        found = [medians(report["samples"], label, workload) for label in labels]
        first = found[0].get(workload.headline)
        for label, figures in zip(labels, found, strict=True):
            value = figures.get(workload.headline)
            if value is None:
                print(f"  {label:{width}}  -")
                continue
            ratio = "" if first is None else f"  x {value / first:.2f}"
            token = f"  first token {figures[FIRST_SECONDS]:.3f} s" if FIRST_SECONDS in figures else ""
            print(f"  {label:{width}}  {value:9.3f}{ratio}{token}  [{figures['read_gb_per_s']:.0f} GB/s read]")
    print("\nloading, and resident memory after the last round")
    for one in report["contenders"]:
        print(f"  {one['contender']:{width}}  {one['start_seconds']:6.1f} s  {one['resident_bytes'] / 1e9:6.2f} GB")


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
