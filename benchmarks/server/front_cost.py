"""Cost of the HTTP front for an engine: the same requests through `pipeline` and over HTTP as 32 streams, in turns.

    python -m benchmarks.server.front_cost [--model FOLDER] [--streams N] [--prompt N] [--generate N] [FLAGS]

Both have the same model and settings (engine FLAGS as --name=value); one waits while the other runs. This process reads
the streams, on the same cores. Compared are the mean step time, by the engine's own clock, and the total time of all
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
from server_load import http_request, metrics, wait_until_idle
from server_process import server_process

from splitfuse.config.engine import EngineConfig


@dataclass(frozen=True)
class Turn:
    """One run of all requests."""

    seconds: float
    steps: int
    step_seconds: float
    front_seconds: float = 0.0  # processor time
    reader_seconds: float = 0.0

    @property
    def mean_step(self) -> float:
        return self.step_seconds / self.steps


def parsed(about: str | None, *, prompt: int, generate: int) -> tuple[argparse.Namespace, list[str]]:
    """Parse the load, with these default lengths, and the remaining flags of the engine."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=prompt)
    parser.add_argument("--generate", type=int, default=generate)
    parser.add_argument("--turns", type=int, default=5)
    arguments, flags = parser.parse_known_args()
    model = [] if arguments.model is None else [f"--model={arguments.model}"]
    return arguments, [*flags, "--no-enable-prefix-caching", *model]


def main() -> None:
    arguments, flags = parsed(__doc__, prompt=128, generate=64)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    with (
        alone(flags) as pipeline,
        server_process(folder, f"bench-{folder.name}", *flags) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=60, trust_env=False) as http,
    ):
        pairs = []
        for turn in range(-1, arguments.turns):
            prompts = make_prompts(turn, arguments.streams, arguments.prompt)
            inside = ask(pipeline, prompts, arguments.generate)
            over_http = stream(http, server.process.pid, prompts, arguments.generate)
            if turn >= 0:  # the first warms up
                pairs.append((inside, over_http))
                print(f"turn {turn}: pipeline {describe(inside)}; over HTTP {describe(over_http)}", flush=True)
    print(f"mean step over HTTP / pipeline: {ratios([b.mean_step / a.mean_step for a, b in pairs])}")
    print(f"total time over HTTP / pipeline: {ratios([b.seconds / a.seconds for a, b in pairs])}")


def describe(turn: Turn) -> str:
    return f"{turn.seconds:.2f} s, {turn.steps} steps of {1000 * turn.mean_step:.2f} ms" + (
        f", processor time of the front {turn.front_seconds:.2f} s, of the reader {turn.reader_seconds:.2f} s"
        if turn.front_seconds
        else ""
    )


def ratios(values: list[float]) -> str:
    return f"median {median(values):.3f}, {min(values):.3f} to {max(values):.3f}"


def make_prompts(turn: int, count: int, length: int) -> list[list[int]]:
    random = Random(turn)
    return [[random.randrange(100, 2000) for _ in range(length)] for _ in range(count)]


# Through pipeline, in a process of its own ----------------------------------------------------------------------------


@contextmanager
def alone(flags: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process with a pipeline, which waits on its standard input."""
    command = [sys.executable, "-m", "benchmarks.server.front_cost", "--alone", *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], prompts: list[list[int]], generate: int) -> Turn:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([prompts, generate]) + "\n")
    return Turn(**json.loads(process.stdout.readline()))


def run_alone(flags: list[str]) -> None:
    """Load a pipeline; run each line of prompts and print the times."""
    import splitfuse

    settings = settings_of(flags)
    pipe = splitfuse.pipeline(settings.pop("model", None), num_blocks=400, **settings)
    steps: list[float] = []
    step = pipe.engine.step

    def timed_step() -> Any:
        began = time.monotonic()
        outputs = step()
        steps.append(time.monotonic() - began)
        return outputs

    pipe.engine.step = timed_step  # type: ignore[method-assign]
    for line in sys.stdin:
        prompts, generate = json.loads(line)
        steps.clear()
        began = time.monotonic()
        for _ in pipe(prompts, stream=True, max_new_tokens=generate, ignore_eos=True):
            pass
        turn = {"seconds": time.monotonic() - began, "steps": len(steps), "step_seconds": sum(steps)}
        print(json.dumps(turn), flush=True)


def settings_of(flags: list[str]) -> dict[str, Any]:
    """Parse flags such as `--quantization=int8 --no-enable-prefix-caching` into settings."""
    settings: dict[str, Any] = {}
    for flag in flags:
        name, has_value, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if has_value:
            settings[name] = int(value) if value.isdigit() else value
        else:
            settings[name.removeprefix("no_")] = not name.startswith("no_")
    EngineConfig.from_settings(settings)
    return settings


# Over HTTP ------------------------------------------------------------------------------------------------------------


def stream(http: httpx.Client, front: int, prompts: list[list[int]], generate: int) -> Turn:
    before = metrics(http)
    began, front_began, reader_began = time.monotonic(), processor_seconds(front), time.process_time()
    asyncio.run(read_all((http.base_url.host, http.base_url.port or 0), prompts, generate))
    seconds, reader_seconds = time.monotonic() - began, time.process_time() - reader_began
    front_seconds = processor_seconds(front) - front_began
    wait_until_idle(http)
    after = metrics(http)
    names = ("splitfuse:steps_total", "splitfuse:step_seconds_sum")
    steps, step_seconds = (after[name] - before[name] for name in names)
    return Turn(seconds, int(steps), step_seconds, front_seconds, reader_seconds)


def processor_seconds(process: int) -> float:
    """Return the processor time of a process so far, user and system."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def read_all(address: tuple[str, int], prompts: list[list[int]], generate: int) -> None:
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            group.create_task(read_one(address, prompt, generate))


async def read_one(address: tuple[str, int], prompt: list[int], generate: int) -> None:
    body = {"prompt": prompt, "max_tokens": generate, "ignore_eos": True, "stream": True, "temperature": 0}
    reader, writer = await asyncio.open_connection(*address)
    writer.write(http_request("/v1/completions", body))
    last = b""
    while piece := await reader.read(65536):
        last = (last + piece)[-200:]
    writer.close()
    if b"data: [DONE]" not in last:
        raise RuntimeError(f"incomplete answer, ending in {last!r}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        run_alone(sys.argv[2:])
    else:
        main()
