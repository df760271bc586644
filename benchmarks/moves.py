"""Drains one of two engines while it has streams, and says how long each of them paused (docs/server.md, Draining).

    python -m benchmarks.moves [MODEL] --streams 16 --tokens 1000

The engines are processes with a core each. The pause of a stream is the time between its last output at the engine that
is drained and its first at the other one. It is counted in usual gaps, the median between two outputs of a stream
meanwhile, and in steps of the other engine. Tokens that were computed again are those of all steps of both engines,
less those of the same streams without a drain.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import median

from splitfuse.config import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.messages import Add
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream


@dataclass
class Answer:
    """Holds what a stream was given, and when."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    pause: float = 0.0
    num_steps: int = 0
    """Steps of the other engine in the pause."""


async def read(stream: Stream, router: Router) -> Answer:
    """Read a stream to its end."""
    answer, num_resumed, num_steps = Answer(), 0, 0
    async with stream:
        async for output in stream:
            now = time.monotonic()
            if stream.num_resumed > num_resumed:
                num_resumed = stream.num_resumed
                answer.pause = now - answer.times[-1]
                answer.num_steps = router.stats[1].num_steps - num_steps
            num_steps = router.stats[1].num_steps
            answer.token_ids += output.token_ids
            answer.times.append(now)
    return answer


def make_requests(flags: argparse.Namespace, salt: str) -> Iterator[Add]:
    """Yield requests that have `tokens` tokens when the engine is drained: half greedy, half with seeds."""
    rng = Random(0)
    for number in range(flags.streams):
        prompt = tuple(rng.randrange(5, 700) for _ in range(flags.tokens - flags.before))
        most, temperature = flags.before + flags.after, 0.9 if number % 2 else 0.0
        params = SamplingParams(max_tokens=most, ignore_eos=True, temperature=temperature, seed=number)
        yield Add(f"{salt}-{number}", prompt, params, scheduling=SchedulingOptions(cache_salt=salt))


async def run(router: Router, flags: argparse.Namespace, salt: str, *, drain: bool) -> tuple[list[Answer], int, float]:
    """Return what streams are given that begin at the first engine, how many tokens were computed for them, and how
    long the drain took.
    """
    before, seconds = sum(stats.num_computed_tokens for stats in router.stats), 0.0
    router.replicas[1].is_drained = True
    streams = [router.open(request) for request in make_requests(flags, salt)]
    router.replicas[1].is_drained = False
    reading = [asyncio.create_task(read(stream, router)) for stream in streams]
    if drain:
        while min(stream.num_tokens for stream in streams) < flags.before:
            await asyncio.sleep(0.005)
        began = time.monotonic()
        await router.drain_engine(0)
        seconds = time.monotonic() - began
    answers = await asyncio.gather(*reading)
    router.undrain_engine(0)
    return answers, sum(stats.num_computed_tokens for stats in router.stats) - before, seconds


async def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of each stream when the engine is drained")
    parser.add_argument("--before", type=int, default=50, help="how many of them are generated")
    parser.add_argument("--after", type=int, default=600, help="tokens that each stream is given after that")
    parser.add_argument("--quantization")
    parser.add_argument("--runs", type=int, default=3)
    flags = parser.parse_args()
    config = EngineConfig.from_settings({"model": flags.model, "quantization": flags.quantization, "num_threads": 1})
    router = make_replicas(config, replicas=2)
    try:
        await router.start()
        for number in range(flags.runs):
            whole, computed, _ = await run(router, flags, f"stay{number}", drain=False)
            answers, computed_again, seconds = await run(router, flags, f"move{number}", drain=True)
            moved = [answer for answer in answers if answer.pause]
            equal = sum(each.token_ids == other.token_ids for each, other in zip(answers, whole, strict=True))
            gaps = [after - before for each in answers for before, after in pairwise(each.times[flags.before :])]
            usual, pauses = median(gaps), [answer.pause for answer in moved]
            stays = [after - before for each in whole for before, after in pairwise(each.times[flags.before :])]
            print(
                f"moved {len(moved)} of {len(answers)}, equal {equal}, in {seconds:.2f} s; usual gap "
                f"{1e3 * usual:.1f} ms; pauses: median {median(pauses) / usual:.1f}, longest {max(pauses) / usual:.1f} "
                f"usual gaps, at most {max(answer.num_steps for answer in moved)} steps; longest gap "
                f"{max(gaps) / usual:.1f}, without a drain {max(stays) / median(stays):.1f}; "
                f"computed again: {computed_again - computed} tokens",
                flush=True,
            )
    finally:
        await router.close()


if __name__ == "__main__":
    asyncio.run(main())
