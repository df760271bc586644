"""Compares an engine for prompts and one for generation with two that do both, a core each (docs/engines.md, Roles).

    python -m benchmarks.roles [MODEL] [--quantization int8] [--only gaps|hand-over|simulation]

gaps: streams generate while long prompts come, one after the other. The gaps between the tokens of the streams while a
prompt is on its way, from when it is sent to its second token, in time and in work (tokens that their engine has
computed), and the time to the first token of the prompts: prefill-first (vLLM of 2023), with roles, with SplitFuse,
with SplitFuse and an SLO. Prefill-first does not serve, so it runs in two processes with a half of the load each.
Without --interval and --itl, a first run measures what a lone prompt and the streams alone take here: prompts then come
every 1.25 times as long as one takes, and the target is 2.5 times the gap of the streams alone. Each mode ends after
1.5 times --seconds at most, and its figures are printed then; prompts that have no token by then are counted. A mode
can be run alone, with the --interval and --itl that were printed. On a busy machine only work says something.

hand-over: the time that a request is at neither engine, or waits for its blocks at the second one, by the length of its
prompt: what of the transfer is not hidden behind the prompt's chunks. The least of all turns is the one that others
have disturbed least.

simulation: the pair with roles under clients that send again as soon as they are answered, measured, and simulated by
cost models that two processes measure at the same time, a core each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.load import closed_loop
from splitfuse.bench.results import Point
from splitfuse.bench.target import EngineTarget, Target
from splitfuse.bench.workload import Independent, Lengths
from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine import garbage
from splitfuse.engine.calibrate import run_calibration
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.engine.thread import AsyncEngine
from splitfuse.runtime.calibration import load, save
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget

SPLIT = (EngineRole.PROMPT, EngineRole.GENERATION)
MODES = ("prefill-first", "roles", "splitfuse", "slo")
LENGTHS = (128, 500, 1000, 2000)
STREAM_PROMPT, STREAM_TOKENS = 32, 600
"""Tokens of the prompt of a stream, and of its answer, after which another one takes its place."""
PAUSE, PATIENCE = 1.25, 2.5
"""Time between prompts by that of a lone one, and target by the usual gap of the streams."""
BEGUN = 10
"""Number of tokens after which a stream has begun."""
OVERTIME = 1.5
"""Longest time that a mode takes, by the time for which prompts come."""
SIMULATED_SECONDS = 45.0
"""Time in which an engine would compute the prompts of the simulation's load, about."""
MOST_REQUESTS = 48
"""Most requests that count in the simulation, unless a number is given."""


@dataclass
class Prompt:
    """Holds when a prompt was sent, when its first token came, and when its last one."""

    sent: float
    first: float = math.inf
    ended: float = math.inf


@dataclass
class Measured:
    """Holds seconds: gaps between tokens of streams while prompts are on their way, and these prompts' times to their
    first token.
    """

    gaps: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    """The same gaps in tokens computed."""
    first_tokens: list[float] = field(default_factory=list)
    num_prompts: int = 0
    """Number of prompts that were sent, also those that had no token at the end."""

    def add(self, other: Measured) -> None:
        """Take in the measurements of another run."""
        self.gaps += other.gaps
        self.work += other.work
        self.first_tokens += other.first_tokens
        self.num_prompts += other.num_prompts


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else math.nan


def make_config(flags: argparse.Namespace, **settings: Any) -> EngineConfig:
    """Return the configuration of an engine with a core."""
    own = {"model": flags.model, "quantization": flags.quantization, "num_threads": 1, "num_speculative_tokens": 0}
    own |= {"max_num_batched_tokens": flags.budget, "num_blocks": flags.blocks}
    return EngineConfig.from_settings({**own, **settings})


async def started(config: EngineConfig, *, roles: tuple[EngineRole, ...] = ()) -> Router:
    """Return two engines with a core each."""
    router = make_replicas(config, replicas=2, roles=roles)
    try:
        await router.start()
    except BaseException:
        await router.close()
        raise
    garbage.freeze()  # as a server does
    return router


def request(name: str, rng: Random, num_prompt: int, max_tokens: int) -> Add:
    """Return a greedy request with a prompt at random."""
    prompt = tuple(rng.randrange(5, 700) for _ in range(num_prompt))
    return Add(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


class Load:
    """Keeps streams on a client, and sends it prompts."""

    def __init__(self, client: EngineClient, *, num_streams: int, name: str) -> None:
        self._client, self._name, self._rng = client, name, Random(name)
        self._times: list[list[tuple[float, float]]] = []
        self._prompts: list[Prompt] = []
        self._begun = [asyncio.Event() for _ in range(num_streams)]
        self._streams = [asyncio.create_task(self._keep_on(each)) for each in range(num_streams)]

    async def begin(self) -> None:
        """Return once all streams have some tokens. Raises what a stream fails of."""
        waiting = asyncio.gather(*(each.wait() for each in self._begun))
        await asyncio.wait((waiting, *self._streams), return_when=asyncio.FIRST_COMPLETED)
        for task in self._streams:
            if task.done():
                task.result()

    async def prompt(self, num_tokens: int) -> float:
        """Send a prompt, read two tokens, and return the time to the first one."""
        prompt = Prompt(time.monotonic())
        self._prompts.append(prompt)
        asked = request(f"{self._name} p{len(self._prompts)}", self._rng, num_tokens, 2)
        async with self._client.open(asked) as opened:
            async for output in opened:
                if output.token_ids:
                    prompt.first = min(prompt.first, time.monotonic())
        prompt.ended = time.monotonic()
        return prompt.first - prompt.sent

    def between(self, start: float, end: float) -> Measured:
        """Return the gaps that end between two times."""
        return self._gaps(lambda _, after: start <= after <= end)

    def while_prompts(self) -> Measured:
        """Return the gaps while a prompt was on its way, and the times to the first token of the prompts."""
        prompts = self._prompts
        measured = self._gaps(lambda before, after: any(before < each.ended and after > each.sent for each in prompts))
        measured.first_tokens = [each.first - each.sent for each in prompts if each.first < math.inf]
        measured.num_prompts = len(prompts)
        return measured

    def _gaps(self, counts: Callable[[float, float], bool]) -> Measured:
        measured = Measured()
        for each in self._times:
            for (before, computed_before), (after, computed) in pairwise(each):
                if computed > computed_before and counts(before, after):
                    measured.gaps.append(after - before)
                    measured.work.append(computed - computed_before)
        return measured

    async def end(self) -> None:
        """End the streams."""
        for task in self._streams:
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def _keep_on(self, number: int) -> None:
        for turn in count():
            mine: list[tuple[float, float]] = []
            self._times.append(mine)
            name = f"{self._name} s{number} {turn}"
            async with self._client.open(request(name, self._rng, STREAM_PROMPT, STREAM_TOKENS)) as opened:
                async for output in opened:
                    engine = next((each for each in self._client.engines if each.has(opened)), None)
                    if output.token_ids and engine is not None:
                        mine.append((time.monotonic(), engine.stats[0].num_computed_tokens))
                    if len(mine) >= BEGUN:
                        self._begun[number].set()


async def run_load(client: EngineClient, flags: argparse.Namespace, *, share: int, name: str) -> Measured:
    """Run 1 / share of the load."""
    load = Load(client, num_streams=flags.streams // share, name=name)
    coming: list[asyncio.Task[float]] = []
    try:
        await load.begin()
        start, interval = time.monotonic(), flags.interval * share
        while not coming or time.monotonic() - start < flags.seconds - interval / 2:
            coming.append(asyncio.create_task(load.prompt(flags.prompt)))
            await asyncio.sleep(interval)
        await asyncio.wait(coming, timeout=max(start + OVERTIME * flags.seconds - time.monotonic(), 0.0))
        measured = load.while_prompts()
        for task in coming:
            if task.done():
                task.result()  # raises what it failed of
        return measured
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        await load.end()


async def settle(flags: argparse.Namespace) -> None:
    """Settle the time between prompts and the target of the SLO by what this machine takes."""
    router = await started(make_config(flags))
    load = Load(router, num_streams=flags.streams, name="before")
    try:
        await load.begin()
        began = time.monotonic()
        await asyncio.sleep(2.0)
        gap = median(load.between(began, time.monotonic()).gaps)
        await load.end()
        await load.prompt(flags.prompt)  # memory that is touched first, and what is imported late
        alone = await load.prompt(flags.prompt)
    finally:
        await router.close()
    flags.interval = PAUSE * alone if flags.interval is None else flags.interval
    flags.itl = flags.itl or f"{1e3 * PATIENCE * gap:.0f}ms"
    print(
        f"a lone prompt of {flags.prompt} takes {alone:.2f} s, a step of the streams alone {1e3 * gap:.0f} ms; load "
        f"averages {load_averages()}",
        flush=True,
    )


async def in_two_engines(flags: argparse.Namespace, mode: str, name: str) -> Measured:
    """Measure a mode that serves."""
    settings = {"itl": flags.itl} if mode == "slo" else {}
    router = await started(make_config(flags, **settings), roles=SPLIT if mode == "roles" else ())
    try:
        return await run_load(router, flags, share=1, name=name)
    finally:
        await router.close()


async def in_this_process(flags: argparse.Namespace, mode: str, name: str) -> Measured:
    """Measure a half of the load with a policy that does not serve."""
    config = make_config(flags)
    engine = AsyncEngine(Engine.load(config, policy=make_baseline(mode, config.scheduler)))
    try:
        await engine.start()
        garbage.freeze()
        return await run_load(engine, flags, share=2, name=name)
    finally:
        await engine.close()


async def in_two_processes(*arguments: str) -> list[bytes]:
    """Run this module twice at once, on a core each, and return what it prints."""
    processes = []
    for core in sorted(os.sched_getaffinity(0))[:2]:
        command = [sys.executable, "-m", "benchmarks.roles", *sys.argv[1:], "--core", str(core), *arguments]
        processes.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
    outs = [out for out, _ in await asyncio.gather(*(process.communicate() for process in processes))]
    if any(process.returncode for process in processes):
        sys.exit("a process has failed")
    return outs


async def half_each(flags: argparse.Namespace, mode: str, name: str) -> Measured:
    """Measure a policy that does not serve: two halves at once, on a core each."""
    measured = Measured()
    for out in await in_two_processes("--half", mode, "--name", name, "--interval", str(flags.interval)):
        measured.add(Measured(**json.loads(out)))
    return measured


async def compare(flags: argparse.Namespace) -> None:
    """Print what the streams wait for in each mode, the modes in turns, each once it has ended."""
    began = time.monotonic()
    if flags.interval is None or flags.itl is None:
        await settle(flags)
    print(
        f"{flags.streams} streams, prompts of {flags.prompt} for {flags.seconds:g} s: --interval {flags.interval:.2f} "
        f"--itl {flags.itl}; milliseconds, and 99th percentiles by those of prefill-first"
    )
    print(
        "mode            gaps work P50      P99     most    by  gap P50      P99  longest    by"
        "  prompts TTFT P50      P99"
    )
    found = {mode: Measured() for mode in flags.mode or MODES}
    for turn in range(flags.turns):
        for mode, measured in found.items():
            serves, name = mode in ("roles", "splitfuse", "slo"), f"{mode} {turn}"
            own = await (in_two_engines(flags, mode, name) if serves else half_each(flags, mode, name))
            measured.add(own)
            print(row(mode, own, found.get("prefill-first")), flush=True)
    if flags.turns > 1:
        print(f"all {flags.turns} turns:")
        for mode, measured in found.items():
            print(row(mode, measured, found.get("prefill-first")))
    print(f"in {time.monotonic() - began:.0f} s; load averages {load_averages()}")


def row(mode: str, measured: Measured, worst: Measured | None) -> str:
    """Return the figures of a mode, beside the worst one."""

    def part(values: list[float], others: list[float], places: int, factor: float = 1.0) -> str:
        figures = "".join(f"{factor * percentile(values, share):9.{places}f}" for share in (0.5, 0.99, 1.0))
        return f"{figures}{percentile(values, 0.99) / percentile(others, 0.99) if others else math.nan:6.2f}"

    work = part(measured.work, worst.work if worst else [], 0)
    gaps = part(measured.gaps, worst.gaps if worst else [], 1, 1e3)
    firsts = "".join(f"{1e3 * percentile(measured.first_tokens, share):9.0f}" for share in (0.5, 0.99))
    prompts = f"{len(measured.first_tokens)} of {measured.num_prompts}"
    return f"{mode:14}{len(measured.gaps):6}{work}{gaps}{prompts:>9} {firsts}"


def load_averages() -> str:
    """Return how much runs on this machine."""
    return ", ".join(f"{each:.1f}" for each in os.getloadavg())


async def away(router: Router, asked: Add) -> tuple[float, list[float]]:
    """Return the time that a request is at neither engine or waits for its blocks, and those of its tokens."""
    async with router.open(asked) as stream:
        times = [time.monotonic() async for output in stream if output.token_ids]
    phases = (await stream.breakdown).phases
    return sum(phases.get(phase, 0.0) for phase in (LatencyPhase.BETWEEN_ENGINES, LatencyPhase.FETCHING)), times


async def hand_over(flags: argparse.Namespace) -> None:
    """Print what is not hidden of the transfers of prompts of several lengths."""
    router = await started(make_config(flags), roles=SPLIT)
    try:
        rng = Random(0)
        print("prompt  unhidden ms   least  gap 1-2 ms   least  usual gap")
        waits: dict[int, list[tuple[float, float, float]]] = {length: [] for length in LENGTHS}
        for turn in range(flags.turns * 5):
            for length in LENGTHS:
                unhidden, times = await away(router, request(f"{turn} {length}", rng, length, 12))
                gaps = [after - before for before, after in pairwise(times)]
                waits[length].append((unhidden, gaps[0], median(gaps[1:])))
        for length, each in waits.items():
            unhidden_ms, first, usual = ([1e3 * value for value in values] for values in zip(*each, strict=True))
            print(
                f"{length:6}{median(unhidden_ms):13.2f}{min(unhidden_ms):8.2f}{median(first):12.2f}{min(first):8.2f}"
                f"{median(usual):11.2f}"
            )
        assert router.num_resumed["hand_over"] == len(LENGTHS) * flags.turns * 5
    finally:
        await router.close()


class Pair(EngineTarget):
    """Runs an engine for prompts and one for generation."""

    latency = 0.0
    """Median time that a lone request is at neither engine, or waits for its blocks, in seconds."""
    prompt_seconds = 0.0
    """Time to the first token of a lone prompt, in seconds."""

    def __init__(self, config: EngineConfig, *, prompt: int) -> None:
        """`prompt` is the number of tokens of the prompt that `prompt_seconds` is of."""
        super().__init__(config)
        self._prompt = prompt

    def _make_client(self) -> EngineClient:
        return make_replicas(self._config, replicas=2, roles=SPLIT)

    async def start(self) -> None:
        """Start the engines, and measure how long a hand-over and a prompt take."""
        await super().start()
        garbage.freeze()
        assert isinstance(self._client, Router)
        rng = Random(0)
        found = [(await away(self._client, request(f"alone {number}", rng, 64, 8)))[0] for number in range(6)]
        self.latency = median(found[1:])
        sent = time.monotonic()
        _, times = await away(self._client, request("prompt", rng, self._prompt, 2))
        self.prompt_seconds = times[0] - sent


async def drive(target: Target, flags: argparse.Namespace) -> Point:
    """Return the requests of a closed loop. How many count, if that is not given, is chosen by what a prompt takes."""
    await target.start()
    try:
        if isinstance(target, Pair) and flags.requests is None:
            most = int(SIMULATED_SECONDS / target.prompt_seconds) - 2 * flags.clients  # without those before and after
            flags.requests = min(max(most, flags.clients), MOST_REQUESTS)
        lengths = Lengths(flags.prompt, flags.generate, room=target.room)
        workload = Independent(lengths, target.vocabulary, 0)
        return await closed_loop(target, workload, clients=flags.clients, requests=flags.requests)
    finally:
        await target.close()


def simulate(flags: argparse.Namespace) -> None:
    """Print what a pair with roles does under a load, measured and simulated."""
    began = time.monotonic()
    config = make_config(flags, enable_prefix_caching=True)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(in_two_processes("--calibrate", folder))
        prompts, generation = (load(path) for path in sorted(Path(folder).iterdir()))
    print(f"cost models were measured in {time.monotonic() - began:.0f} s", flush=True)
    pair = Pair(config, prompt=flags.prompt)
    measured = asyncio.run(drive(pair, flags))
    print(f"the pair was measured, in {time.monotonic() - began:.0f} s in all", flush=True)
    machines = [
        Machine(engine=SimulationConfig.of(each, config), role=role)
        for each, role in zip((prompts, generation), SPLIT, strict=True)
    ]
    deployment = Deployment(
        machines=tuple(machines),
        link=Link(FIRST_BANDWIDTH, pair.latency),
        kv_bytes_per_token=prompts.kv_bytes_per_token,
        long_queue=math.inf,
    )
    simulated = virtual_time.run(drive(SimulatedTarget(deployment), flags))
    print(
        f"{flags.clients} clients, {flags.requests} requests, prompts of {flags.prompt} and answers of "
        f"{flags.generate} on average; hand-over {1e3 * pair.latency:.1f} ms; load averages {load_averages()}"
    )
    print("                              measured  simulated  simulated / measured")
    figures: dict[str, Callable[[Point], float]] = {
        "requests/s": metrics.throughput,
        "generated tokens/s": metrics.token_throughput,
        "request, mean, s": lambda point: metrics.mean([each.done - each.sent for each in metrics.answered(point)]),
        "first token, mean, s": lambda point: metrics.mean([metrics.ttft(each) for each in metrics.answered(point)]),
        "gap, mean, ms": lambda point: 1e3 * metrics.mean(gaps_of(point)),
        "gap, P95, ms": lambda point: 1e3 * metrics.percentile(gaps_of(point), 95),
    }
    for name, figure in figures.items():
        real, predicted = figure(measured), figure(simulated)
        print(f"{name:28}{real:10.3f}{predicted:11.3f}{predicted / real:14.3f}")


def gaps_of(point: Point) -> list[float]:
    """Return the gaps between tokens of all requests that count."""
    return [gap for each in metrics.answered(point) for gap in metrics.gaps(each)]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--quantization")
    parser.add_argument("--only", choices=("gaps", "hand-over", "simulation"))
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt, of gaps and simulation")
    parser.add_argument("--interval", type=float, help="seconds between prompts")
    parser.add_argument(
        "--seconds", type=float, default=16.0, help="seconds for which prompts come, and of calibration"
    )
    parser.add_argument("--itl", help="target of the mode slo")
    parser.add_argument("--budget", type=int, default=256, help="token budget of a step")
    parser.add_argument("--blocks", type=int, default=800, help="KV blocks of an engine")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6, help="of the simulation")
    parser.add_argument("--requests", type=int, help="of the simulation (default: by the time of a lone prompt)")
    parser.add_argument("--generate", type=int, default=48, help="tokens of an answer in the simulation")
    for internal in ("--half", "--core", "--name", "--calibrate"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.core is not None:
        os.sched_setaffinity(0, {int(flags.core)})
    if flags.calibrate:
        calibration, _ = run_calibration(make_config(flags), seconds=flags.seconds, progress=False)
        save(calibration, Path(flags.calibrate) / f"{flags.core}.json")
        return
    if flags.half:
        print(json.dumps(asdict(asyncio.run(in_this_process(flags, flags.half, flags.name)))))
        return
    if flags.only in (None, "gaps"):
        asyncio.run(compare(flags))
    if flags.only in (None, "hand-over"):
        asyncio.run(hand_over(flags))
    if flags.only in (None, "simulation"):
        simulate(flags)


if __name__ == "__main__":
    main()
