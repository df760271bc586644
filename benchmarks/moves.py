"""Drains or kills one of two engines while it has streams, and says how long each of them paused (docs/engines.md).

    python -m benchmarks.moves [MODEL] --streams 16 --tokens 1000
    python -m benchmarks.moves [MODEL] --kill

The engines are processes with a core each. The pause of a stream is the time between its last output at the engine that
is drained or killed and its first at the other one. It is counted in usual gaps, the median between two outputs of a
stream from when all have begun, and in steps of the other engine. Of the longest pause of a drain these are printed,
with their times and tokens: what is not in them was waiting.

Drains are compared with runs without one; tokens that were computed again are those of all steps of both engines, less
those of the run without. Kills (SIGKILL) are compared without and with a memory tier, in turns; tokens that were
computed again are those that the other engine computes beyond one for each that it gives. The killed engine is
restarted meanwhile, on its own core. After each kill without a tier the other engine is sent as many tokens as new
prompts, all at once, with answers that go on as long: their times to the first token are what recomputing takes. What
of a pause is not that is finding out, the step that was lost, and trying some requests before others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from benchmarks import roles
from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import Add
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream

TIER = "1GiB"
"""Size of the memory tier that kills are compared with."""


@dataclass
class Answer:
    """Holds what a stream was given, and when."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    pause: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    """Seconds and tokens of the steps of the other engine that ended in the pause."""
    num_elsewhere: int = 0
    """Tokens that the other engine has given."""


@dataclass
class Run:
    """Holds the answers of a run."""

    answers: list[Answer]
    num_computed: int = 0
    """Number of tokens that both engines have computed."""
    num_computed_elsewhere: int = 0
    """Number of tokens that the other engine has computed."""
    seconds: float = 0.0
    """Time that the drain took, or until a kill was noticed."""
    began: float = 0.0
    """Time from which on gaps count: all streams had begun."""

    @property
    def moved(self) -> list[Answer]:
        """Return the answers that went on elsewhere."""
        return [answer for answer in self.answers if answer.pause]

    @property
    def gaps(self) -> list[float]:
        """Return the times between outputs of a stream, from when all have begun."""
        pairs = (pair for answer in self.answers for pair in pairwise(answer.times))
        return [after - before for before, after in pairs if before >= self.began]

    def num_equal(self, other: Run) -> int:
        """Return how many answers have the same tokens as in another run."""
        pairs = zip(self.answers, other.answers, strict=True)
        return sum(each.token_ids == again.token_ids for each, again in pairs)


async def read(stream: Stream, steps: list[tuple[float, int]]) -> Answer:
    """Read a stream to its end; `steps` are those of the other engine so far."""
    answer, num_resumed, num_steps = Answer(), 0, 0
    async with stream:
        async for output in stream:
            now = time.monotonic()
            if stream.num_resumed > num_resumed:
                num_resumed = stream.num_resumed
                answer.pause = now - answer.times[-1]
                answer.steps = steps[num_steps:]
            num_steps = len(steps)
            answer.token_ids += output.token_ids
            answer.num_elsewhere += len(output.token_ids) if num_resumed else 0
            answer.times.append(now)
    return answer


def make_requests(
    flags: argparse.Namespace, salt: str, *, num_prompt: int | None = None, most: int | None = None
) -> Iterator[Add]:
    """Yield requests that have `tokens` tokens when the engine is drained, or with prompts and answers of these
    lengths: half greedy, half with seeds.
    """
    rng = Random(0)
    for number in range(flags.streams):
        prompt = tuple(rng.randrange(5, 700) for _ in range(num_prompt or flags.tokens - flags.before))
        temperature = 0.9 if number % 2 else 0.0
        most = most or flags.before + flags.after
        params = SamplingParams(max_tokens=most, ignore_eos=True, temperature=temperature, seed=number)
        yield Add(f"{salt}-{number}", prompt, params, scheduling=SchedulingOptions(cache_salt=salt))


async def run(router: Router, flags: argparse.Namespace, salt: str, *, end: str = "") -> Run:
    """Return what streams are given that begin at the first engine, which is drained or killed."""
    first, second = router.replicas
    before, before_elsewhere = (
        sum(each.num_computed_tokens for each in router.stats),
        router.stats[1].num_computed_tokens,
    )
    second.is_drained = True
    streams = [router.open(request) for request in make_requests(flags, salt)]
    second.is_drained = False
    steps: list[tuple[float, int]] = []
    second.on_step = lambda stats: steps.append((stats.step_seconds, stats.step_tokens))
    reading = [asyncio.create_task(read(stream, steps)) for stream in streams]
    while min(stream.num_tokens for stream in streams) < flags.before:
        await asyncio.sleep(0.005)
    began, seconds = time.monotonic(), 0.0
    if end == "drain":
        await router.drain_engine(0)
        seconds = time.monotonic() - began
    elif end == "kill":
        assert isinstance(first, SupervisedEngine) and first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        first.is_drained = True  # all go to the other one, though it is restarted soon
        await first.wait_until(lambda: first.state is not EngineState.READY)
        seconds = time.monotonic() - began
    answers = await asyncio.gather(*reading)
    computed, elsewhere = num_computed(router)
    router.undrain_engine(0)
    await first.wait_until(lambda: first.state is EngineState.READY)
    return Run(answers, computed - before, elsewhere - before_elsewhere, seconds, began)


def num_computed(router: Router) -> tuple[int, int]:
    """Return how many tokens both engines have computed, and how many of them the second one."""
    numbers = [stats.num_computed_tokens for stats in router.stats]
    return sum(numbers), numbers[1]


async def recomputing(router: Router, flags: argparse.Namespace, salt: str, num_prompt: int) -> list[float]:
    """Return the seconds after which new prompts of that length, all sent at once to the second engine, have their
    first tokens. Their answers go on until all have one.
    """
    first, _ = router.replicas
    first.is_drained = True
    began = time.monotonic()
    streams = [router.open(request) for request in make_requests(flags, salt, num_prompt=num_prompt, most=flags.after)]
    seconds = await asyncio.gather(*(first_token(stream, began) for stream in streams))
    for stream in streams:
        stream.close()
    await router.replicas[1].wait_until(lambda: not router.replicas[1].num_open)
    first.is_drained = False
    return seconds


async def first_token(stream: Stream, began: float) -> float:
    """Return after how many seconds a stream has its first token."""
    async for output in stream:
        if output.token_ids:
            return time.monotonic() - began
    raise AssertionError("it has a token")


async def started(flags: argparse.Namespace, **settings: Any) -> Router:
    """Return two engines with a core each."""
    own = {"model": flags.model, "quantization": flags.quantization, "num_threads": 1}
    return await roles.started(EngineConfig.from_settings({**own, **settings}))


async def compare_drains(flags: argparse.Namespace) -> None:
    """Print what drains cost."""
    router = await started(flags)
    try:
        for number in range(flags.runs):
            whole = await run(router, flags, f"stay{number}")
            drained = await run(router, flags, f"move{number}", end="drain")
            usual, pauses = median(drained.gaps), [answer.pause for answer in drained.moved] or [0.0]
            longest = max(drained.moved, key=lambda answer: answer.pause, default=Answer())
            steps, stays = max((len(answer.steps) for answer in drained.moved), default=0), whole.gaps
            print(
                f"moved {len(drained.moved)} of {len(drained.answers)}, equal {drained.num_equal(whole)}, in "
                f"{drained.seconds:.2f} s; usual gap {1e3 * usual:.1f} ms; pauses: median {median(pauses) / usual:.1f} "
                f"and longest {max(pauses) / usual:.1f} usual gaps, at most {steps} steps; longest gap "
                f"{max(drained.gaps) / usual:.1f}, without a drain {max(stays) / median(stays):.1f}; "
                f"computed again: {drained.num_computed - whole.num_computed} tokens",
                flush=True,
            )
            of_longest = ", ".join(f"{1e3 * seconds:.1f} ms ({count} tokens)" for seconds, count in longest.steps)
            print(f"  steps in the longest pause, {1e3 * longest.pause:.1f} ms: {of_longest}", flush=True)
    finally:
        await router.close()


async def compare_kills(flags: argparse.Namespace) -> None:
    """Print how long streams pause at a kill, without and with a memory tier."""
    routers = {"without a tier": await started(flags)}
    pauses: dict[str, list[float]] = {}
    beyond: list[tuple[float, float]] = []  # seconds that the median and the longest pause of a kill are longer
    try:
        routers["with a tier"] = await started(flags, kv_memory_tier=TIER)
        whole = {name: await run(router, flags, "whole") for name, router in routers.items()}
        for number in range(flags.runs):
            for name, router in routers.items():
                killed = await run(router, flags, f"kill{number}", end="kill")
                found = [answer.pause for answer in killed.moved]
                pauses.setdefault(name, []).extend(found)
                again = killed.num_computed_elsewhere - sum(answer.num_elsewhere for answer in killed.answers)
                print(
                    f"{name}: went on {len(found)} of {len(killed.answers)}, equal {killed.num_equal(whole[name])}; "
                    f"noticed after {1e3 * killed.seconds:.1f} ms; pauses: median {median(found):.3f} s, longest "
                    f"{max(found):.3f} s; computed again: {again} tokens",
                    flush=True,
                )
                if name == "without a tier":
                    length = again // flags.streams
                    computed = await recomputing(router, flags, f"again{number}", length)
                    beyond.append((median(found) - median(computed), max(found) - max(computed)))
                    print(
                        f"  as new prompts of {length} tokens: first tokens after {median(computed):.3f} s (median), "
                        f"{max(computed):.3f} s (last)",
                        flush=True,
                    )
        without, with_tier = pauses["without a tier"], pauses["with a tier"]
        step = median(whole["without a tier"].gaps)
        for index, (which, figure) in enumerate((("median", median), ("longest", max))):
            steps = sorted(each[index] / step for each in beyond)
            print(
                f"{which} pause without a tier: longer than recomputing by {median(steps):.1f} steps of "
                f"{1e3 * step:.1f} ms ({steps[0]:.1f} to {steps[-1]:.1f}); with a tier / without: "
                f"{figure(with_tier) / figure(without):.3f}"
            )
    finally:
        for router in routers.values():
            await router.close()


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kill", action="store_true", help="kill the engine, with and without a memory tier")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of each stream when the engine is drained")
    parser.add_argument("--before", type=int, default=50, help="how many of them are generated")
    parser.add_argument("--after", type=int, default=600, help="tokens that each stream is given after that")
    parser.add_argument("--quantization")
    parser.add_argument("--runs", type=int, default=3)
    flags = parser.parse_args()
    asyncio.run(compare_kills(flags) if flags.kill else compare_drains(flags))


if __name__ == "__main__":
    main()
