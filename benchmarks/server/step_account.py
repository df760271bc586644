"""Account of a step: how much of the time from step to step is spent in kernels, and where the rest goes.

    python -m benchmarks.server.step_account [--model FOLDER] [--streams N] [--prompt N] [--generate N]
        [--seconds S] [--temperature T] [--clock wall|processor] [FLAGS]

Engine FLAGS are given as --name=value. Requests follow one another, so that --streams of them run at any time. The
engine is a process as a server's, whose functions are timed from inside (timed_worker.py); the front is this process.
Kernels are all calls into the compiled library. Each part has the time within it and outside the parts that it calls,
summed over the steps of the middle of the run; with plans kept (--num-threads below the cores) the executor's parts are
those of another thread, each with what it calls. With --clock processor times are those of the processor, for a machine
with others on it: of the thread outside kernels, of all threads over their number within them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from itertools import count
from pathlib import Path

from benchmarks.server.front_cost import make_prompts, parsed, settings_of
from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.messages import Add
from splitfuse.engine.remote import launcher
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine

START_SECONDS = 60.0
"""Longest silence of the engine: on a machine with others on it, importing takes long, and it is silent meanwhile."""
WARM_SECONDS = 5.0
"""Time until requests end one by one and all is warm; what runs then is not counted."""


async def measure() -> None:
    """Print the account."""
    arguments, flags = parsed(__doc__, prompt=16, generate=64)
    own = argparse.ArgumentParser(allow_abbrev=False)
    own.add_argument("--seconds", type=float, default=30.0)
    own.add_argument("--temperature", type=float, default=0.0)
    own.add_argument("--clock", choices=("wall", "processor"), default="wall")
    mine, flags = own.parse_known_args(flags)
    os.environ["SPLITFUSE_ACCOUNT_CLOCK"] = mine.clock
    launcher.WORKER = "benchmarks.server.timed_worker"
    with tempfile.TemporaryDirectory() as folder:
        out = os.environ["SPLITFUSE_ACCOUNT"] = str(Path(folder, "account.json"))
        client = SupervisedEngine(
            SubprocessLauncher(EngineConfig.from_settings({"num_blocks": 1200, **settings_of(flags)}))
        )
        await client.start()
        async with asyncio.TaskGroup() as group:
            load = [
                group.create_task(ask_on(client, arguments, number, mine.temperature))
                for number in range(arguments.streams)
            ]
            await asyncio.sleep(WARM_SECONDS)
            Path(out + ".begin").touch()
            began, front = time.monotonic(), time.process_time()
            await asyncio.sleep(mine.seconds)
            Path(out + ".end").touch()
            front = (time.process_time() - front) / (time.monotonic() - began)
            while not Path(out).exists():
                await asyncio.sleep(0.05)
            for task in load:
                task.cancel()
        account = json.loads(Path(out).read_text())
        await client.close()
    show(account, front)


def show(account: dict[str, dict[str, float]], front: float) -> None:
    """Print a row for each part, the largest first."""
    parts, steps = account["seconds"], account["steps"]
    assert isinstance(steps, int)
    wall = sum(parts.values())
    print(f"{steps} steps of {1e3 * wall / steps:.3f} ms from step to step; the front has {front:.3f} of a core")
    print("| part | us a step | % |\n|---|---|---|")
    for name, seconds in sorted(parts.items(), key=lambda each: -each[1]):
        print(f"| {name} | {1e6 * seconds / steps:.0f} | {100 * seconds / wall:.2f} |")
    kernels = sum(seconds for name, seconds in parts.items() if name.startswith("kernels"))
    print(f"outside kernels: {1e6 * (wall - kernels) / steps:.0f} us a step, {100 * (1 - kernels / wall):.2f} %")


async def ask_on(client: SupervisedEngine, arguments: argparse.Namespace, number: int, temperature: float) -> None:
    """Ask for one answer after the other; the first ones have different lengths, so that they end one by one."""
    for each in count():
        (prompt,) = make_prompts(number + arguments.streams * each, 1, arguments.prompt)
        length = arguments.generate if each else max(1, arguments.generate * number // arguments.streams)
        params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=temperature)
        async with client.open(Add(f"{number}-{each}", tuple(prompt), params)) as stream:
            async for _ in stream:
                pass


if __name__ == "__main__":
    asyncio.run(measure())
