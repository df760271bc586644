"""Cost of a recording: the steps of 32 running requests, recorded and not, in many short turns of one engine process.

    python -m benchmarks.server.recording_cost [--console] [--model FOLDER] [--streams N] [--prompt N] [--generate N]
        [--turns N] [FLAGS]

Engine FLAGS are given as --name=value. Requests follow one another, so that their number does not change, and go on
while tracing is switched on and off. The front is this process, which records as a server does; with --console it makes
the frames of a console and encodes them for one reader, too. Compared are the mean step time by the engine's own clock,
the time from step to step, in which what is between steps counts, and processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import median, quantiles

from benchmarks.server.front_cost import make_prompts, parsed, settings_of
from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.messages import Add, EngineStats
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.trace import TraceLevel
from splitfuse.recording.recorder import Recorder
from splitfuse.server.console.store import ConsoleStore, Viewer
from splitfuse.server.traces import EngineRecords, TraceEvent, TraceHub

STEPS = 16
"""Number of steps that a turn takes, after those in which it begins."""
STEPS_AT_BEGIN = 3
"""Number of steps until tracing has been switched, and the engine has told of the requests that run."""


@dataclass(frozen=True)
class Turn:
    """Sums up the steps of a turn."""

    gaps: tuple[float, ...]
    """Time from step to step."""
    steps: tuple[float, ...]
    """Time of each step by the engine's clock."""
    engine_seconds: float
    """Processor time of the engine."""
    front_seconds: float


async def measure() -> None:
    """Print each pair of turns, and the ratios of all."""
    arguments, flags = parsed(__doc__, prompt=16, generate=64)
    has_console = "--console" in flags
    flags = [flag for flag in flags if flag != "--console"]
    config = EngineConfig.from_settings({"num_blocks": 400, **settings_of(flags)})
    path = Path(tempfile.mkdtemp(prefix="bench-")) / "engine.rec"
    client, recorder = SupervisedEngine(SubprocessLauncher(config)), Recorder(path, config, max_mib=1024)
    hub, num_sent = TraceHub(client.engines), 0

    def take(event: TraceEvent) -> None:
        if isinstance(event, EngineRecords):
            recorder.take(event.engine, event.records)

    async def send(store: ConsoleStore, viewer: Viewer) -> None:
        nonlocal num_sent
        while True:
            while viewer.is_late:
                num_sent += len(viewer.take())
            store.look()
            await store.wait(viewer, 1.0)

    @contextmanager
    def recorded() -> Iterator[None]:
        unsubscribe = hub.subscribe(take, TraceLevel.PLANS)
        if has_console:
            store = ConsoleStore(hub, lambda: {"model": "", "has_chat": False, "generates": True})
            sender = asyncio.create_task(send(store, store.open()))
        yield
        unsubscribe()
        if has_console:
            store.unsubscribe()
            sender.cancel()

    await client.start()
    recorder.start_engine(0, client.info)  # which begins the file
    word = "recorded, with a console" if has_console else "recorded"
    await compare(client, arguments, word, recorded)
    await client.close()
    recorder.close()
    print(f"{recorder.num_bytes} bytes recorded, {num_sent} bytes of frames sent")


async def compare(
    client: SupervisedEngine,
    arguments: argparse.Namespace,
    word: str,
    watched: Callable[[], AbstractContextManager[None]],
) -> int:
    """Print the ratios of pairs of turns, a plain one and one within `watched()`, called `word`. Returns the number of
    watched steps.
    """
    meter, pairs = Meter(client), list[tuple[Turn, Turn]]()
    async with asyncio.TaskGroup() as group:
        load = [group.create_task(ask_on(client, arguments, number)) for number in range(arguments.streams)]
        await meter.run(2 * arguments.generate)  # until requests end one by one, and all is warm
        for turn in range(arguments.turns):
            found: dict[bool, Turn] = {}
            for watches in (True, False) if turn % 2 else (False, True):
                with watched() if watches else nullcontext():
                    await meter.run(STEPS_AT_BEGIN)
                    found[watches] = await meter.run(STEPS)
            pairs.append((found[False], found[True]))
        for task in load:
            task.cancel()
    plain, other = ([pair[index] for pair in pairs] for index in (0, 1))
    print(f"{len(pairs)} pairs of turns of {STEPS} steps, plain and {word}:")
    for name in ("steps", "gaps"):
        a, b = (1e3 * median(each for turn in turns for each in getattr(turn, name)) for turns in (plain, other))
        ratios = [sum(getattr(b, name)) / sum(getattr(a, name)) for a, b in pairs]
        print(
            f"{name}: median {a:.3f} and {b:.3f} ms, {b / a:.4f}; ratio of pairs, median and quartiles {spread(ratios)}"
        )
    for name in ("engine_seconds", "front_seconds"):
        a, b = (1e3 * sum(getattr(turn, name) for turn in turns) / (STEPS * len(pairs)) for turns in (plain, other))
        print(f"{name}: {a:.3f} and {b:.3f} ms a step, {b / a:.4f}")
    return STEPS * len(pairs)


class Meter:
    """Counts the steps of an engine, and the time that they take."""

    def __init__(self, client: SupervisedEngine) -> None:
        self._client = client
        self._wanted = 0
        self._steps: list[tuple[float, float]] = []
        self._reached = asyncio.Event()
        client.on_step = self._take

    def _take(self, stats: EngineStats) -> None:
        self._steps.append((time.monotonic(), stats.step_seconds))
        if len(self._steps) > self._wanted:
            self._reached.set()

    async def run(self, steps: int) -> Turn:
        """Return what the next steps take."""
        self._wanted, self._steps, before = steps, self._steps[-1:] or [(time.monotonic(), 0.0)], self._processor()
        self._reached.clear()
        await self._reached.wait()
        times, seconds = zip(*self._steps, strict=True)
        spent = (b - a for a, b in zip(before, self._processor(), strict=True))
        return Turn(tuple(b - a for a, b in pairwise(times)), seconds[1:], *spent)

    def _processor(self) -> tuple[float, float]:
        threads = Path(f"/proc/{self._client.pid}/task").glob("*/schedstat")
        return sum(int(each.read_text().split()[0]) for each in threads) / 1e9, time.process_time()


async def ask_on(client: SupervisedEngine, arguments: argparse.Namespace, number: int) -> None:
    """Ask for one answer after the other; the first ones have different lengths, so that they end one by one."""
    for each in count():
        (prompt,) = make_prompts(number + arguments.streams * each, 1, arguments.prompt)
        length = arguments.generate if each else max(1, arguments.generate * number // arguments.streams)
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        async with client.open(Add(f"{number}-{each}", tuple(prompt), params)) as stream:
            async for _ in stream:
                pass


def spread(values: list[float]) -> str:
    """Return the median and the quartiles."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.4f}, {low:.4f} to {high:.4f}"


if __name__ == "__main__":
    asyncio.run(measure())
