"""Compares an engine for prompts and one for generation with two that do both, a core each (docs/server.md, Roles).

    python -m benchmarks.roles [MODEL] [--only gaps|hand-over]

gaps: streams generate while long prompts come, one after the other. The gaps between the tokens of the streams
meanwhile, in time and in work (tokens that their engine has computed), and the time to the first token of the prompts:
with roles, with SplitFuse, with SplitFuse and an SLO, and prefill-first (vLLM of 2023). The modes take turns.
Prefill-first does not serve, so it runs in two processes with a half of the load each. On a busy machine only work says
something.

hand-over: the time that a request is at neither engine, or waits for its blocks at the second one, by the length of its
prompt: what of the transfer is not hidden behind the prompt's chunks. The least of all turns is the one that others
have disturbed least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from splitfuse.bench.baselines import make_baseline
from splitfuse.config import EngineConfig, Role
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.thread import AsyncEngine

SPLIT = (Role.PROMPT, Role.GENERATION)
MODES = ("roles", "splitfuse", "slo", "prefill-first")
LENGTHS = (128, 500, 1000, 2000)


@dataclass
class Measured:
    """Holds seconds: gaps between tokens of streams while prompts come, and the prompts' times to their first token."""

    gaps: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    """The same gaps in tokens computed."""
    first_tokens: list[float] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Take in the measurements of another run."""
        self.gaps += other.gaps
        self.work += other.work
        self.first_tokens += other.first_tokens


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def make_config(flags: argparse.Namespace, **settings: Any) -> EngineConfig:
    """Return the configuration of an engine with a core."""
    own = {"model": flags.model, "quantization": flags.quantization, "num_threads": 1, "num_speculative_tokens": 0}
    own["max_num_batched_tokens"] = flags.budget
    return EngineConfig.from_settings({**own, **settings})


def request(name: str, rng: Random, num_prompt: int, max_tokens: int) -> Add:
    """Return a greedy request with a prompt at random."""
    prompt = tuple(rng.randrange(5, 700) for _ in range(num_prompt))
    return Add(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def run_load(client: EngineClient, flags: argparse.Namespace, *, share: int, name: str) -> Measured:
    """Run 1 / share of the load."""
    rng, measured = Random(name), Measured()
    times: list[list[tuple[float, float]]] = []
    began = asyncio.Event()

    async def stream(number: int) -> None:
        mine: list[tuple[float, float]] = []
        times.append(mine)
        async with client.open(request(f"{name} s{number}", rng, 32, 1500)) as opened:

            def note(output: RequestOutput) -> None:
                engine = next((each for each in client.engines if each.has(opened)), None)
                if output.token_ids and engine is not None:
                    mine.append((time.monotonic(), engine.stats[0].num_computed_tokens))

            opened.on_output = note
            async for _ in opened:
                if all(len(each) > 20 for each in times) and len(times) == flags.streams // share:
                    began.set()

    async def prompt(number: int) -> float:
        sent = time.monotonic()
        async with client.open(request(f"{name} p{number}", rng, flags.prompt, 2)) as opened:
            async for output in opened:
                if output.token_ids:
                    return time.monotonic() - sent
        raise AssertionError("a prompt without a token")

    streams = [asyncio.create_task(stream(number)) for number in range(flags.streams // share)]
    await began.wait()
    start = time.monotonic()
    coming = []
    for number in range(flags.prompts // share):
        coming.append(asyncio.create_task(prompt(number)))
        await asyncio.sleep(flags.interval * share)
    measured.first_tokens = list(await asyncio.gather(*coming))
    end = time.monotonic()
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    for each in times:
        for (before, computed_before), (after, computed) in pairwise(each):
            if start <= after <= end and computed > computed_before:
                measured.gaps.append(after - before)
                measured.work.append(computed - computed_before)
    return measured


async def in_two_engines(flags: argparse.Namespace, mode: str, name: str) -> Measured:
    """Measure a mode that serves."""
    settings = {"itl": flags.itl} if mode == "slo" else {}
    router = make_replicas(make_config(flags, **settings), replicas=2, roles=SPLIT if mode == "roles" else ())
    try:
        await router.start()
        return await run_load(router, flags, share=1, name=name)
    finally:
        await router.close()


async def in_this_process(flags: argparse.Namespace, mode: str, name: str) -> Measured:
    """Measure a half of the load with a policy that does not serve."""
    config = make_config(flags)
    engine = AsyncEngine(Engine.load(config, policy=make_baseline(mode, config.scheduler)))
    try:
        await engine.start()
        return await run_load(engine, flags, share=2, name=name)
    finally:
        await engine.close()


async def in_two_processes(mode: str, name: str) -> Measured:
    """Measure a policy that does not serve: two halves at once, on a core each."""
    measured, processes = Measured(), []
    for core in sorted(os.sched_getaffinity(0))[:2]:
        more = ["--half", mode, "--core", str(core), "--name", f"{name} {core}"]
        command = [sys.executable, "-m", "benchmarks.roles", *sys.argv[1:], *more]
        processes.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
    for process in processes:
        out, _ = await process.communicate()
        measured.add(Measured(**json.loads(out)))
    return measured


async def compare(flags: argparse.Namespace) -> None:
    """Print what the streams wait for in each mode, the modes in turns."""
    found = {mode: Measured() for mode in flags.mode or MODES}
    for turn in range(flags.turns):
        for mode, measured in found.items():
            serves, name = mode in ("roles", "splitfuse", "slo"), f"{mode} {turn}"
            measured.add(await (in_two_engines(flags, mode, name) if serves else in_two_processes(mode, name)))
    print(f"{flags.streams} streams, {flags.prompts} prompts of {flags.prompt}, {flags.turns} turns; milliseconds")
    print("mode            work P50     P99    most  gap P50      P99  longest  TTFT P50      P99")
    for mode, each in found.items():
        work = "".join(f"{percentile(each.work, share):8.0f}" for share in (0.5, 0.99, 1.0))
        gaps = "".join(f"{1e3 * percentile(each.gaps, share):9.1f}" for share in (0.5, 0.99, 1.0))
        firsts = "".join(f"{1e3 * percentile(each.first_tokens, share):9.0f}" for share in (0.5, 0.99))
        print(f"{mode:16}{work}{gaps} {firsts}", flush=True)


async def hand_over(flags: argparse.Namespace) -> None:
    """Print what is not hidden of the transfers of prompts of several lengths."""
    router = make_replicas(make_config(flags), replicas=2, roles=SPLIT)
    try:
        await router.start()
        rng = Random(0)
        print("prompt  unhidden ms   least  gap 1-2 ms   least  usual gap")
        waits: dict[int, list[tuple[float, float, float]]] = {length: [] for length in LENGTHS}
        for turn in range(flags.turns * 5):
            for length in LENGTHS:
                async with router.open(request(f"{turn} {length}", rng, length, 12)) as stream:
                    times = [time.monotonic() async for output in stream if output.token_ids]
                phases = (await stream.breakdown).phases
                away = sum(phases.get(phase, 0.0) for phase in (LatencyPhase.BETWEEN_ENGINES, LatencyPhase.FETCHING))
                gaps = [after - before for before, after in pairwise(times)]
                waits[length].append((away, gaps[0], median(gaps[1:])))
        for length, each in waits.items():
            away, first, usual = ([1e3 * value for value in values] for values in zip(*each, strict=True))
            print(
                f"{length:6}{median(away):13.2f}{min(away):8.2f}{median(first):12.2f}{min(first):8.2f}{median(usual):11.2f}"
            )
        assert router.num_resumed["hand_over"] == len(LENGTHS) * flags.turns * 5
    finally:
        await router.close()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--quantization")
    parser.add_argument("--only", choices=("gaps", "hand-over"))
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of each prompt")
    parser.add_argument("--interval", type=float, default=0.6, help="seconds between prompts")
    parser.add_argument("--itl", default="30ms", help="target of the mode slo")
    parser.add_argument("--budget", type=int, default=256, help="token budget of a step")
    parser.add_argument("--turns", type=int, default=2)
    for internal in ("--half", "--core", "--name"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.half:
        os.sched_setaffinity(0, {int(flags.core)})
        print(json.dumps(asdict(asyncio.run(in_this_process(flags, flags.half, flags.name)))))
        return
    if flags.only != "hand-over":
        asyncio.run(compare(flags))
    if flags.only != "gaps":
        asyncio.run(hand_over(flags))


if __name__ == "__main__":
    main()
