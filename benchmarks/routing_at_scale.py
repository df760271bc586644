"""Measures the time of a choice among many replicas, and simulates how good the choices are.

    python -m benchmarks.routing_at_scale decisions [--replicas 16,100,1000,10000]
    python -m benchmarks.routing_at_scale fleet [--replicas N] [--per-replica N] [--load F] [--seeds N] [--fronts ...]
    python -m benchmarks.routing_at_scale check [--replicas 16,256] [--per-replica N]

Prompts begin with one of many prefixes, which are asked for by Zipf's law: the most popular of 50,000 comes with every
eleventh request. `decisions` prints the median processor time of a choice of the server's router (engine/router.py).
`fleet` lets the router's code choose among fluid replicas (splitfuse/simulator/fluid.py): `one` router for all;
`exact`, which looks at all that have anything of the prompt, and at all loads; `cells` of a hundred replicas each;
`gateways`, eight of them before such cells; and `random`, which looks at two replicas. `check` compares fluid replicas
with full ones, which have the real scheduler and cache, under the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from random import Random

from splitfuse.bench import metrics
from splitfuse.bench.workload import LoadRequest
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.limits import EngineLimits
from splitfuse.core.replicas.prefix_index import PrefixIndex
from splitfuse.core.request import Request
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.core.slo.work_times import WorkTimes
from splitfuse.engine.client import LocalClient
from splitfuse.engine.messages import Add, Command, EngineInfo
from splitfuse.engine.router import Router
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.fluid import CellsFront, Clock, FluidReplica, Front, RouterFront, Sent, best_of, run
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import SimulatedTarget

MACHINE = "a100-70b"
BLOCK = 64
PREFIX, OWN, ANSWER = 1024, 256, 64
"""Tokens of a prompt that others have too, of the rest of it, and of its answer."""
NUM_BLOCKS = 320
"""Blocks of a replica's cache: of sixteen whole prompts."""
PREFIXES = 5
"""Number of prefixes for each replica."""
LOAD = 0.6
CELL = 100
GATEWAYS = 8
WARM_UP = 0.4
"""Fraction of the requests, the first ones, which do not count: caches are empty at the start."""
PARAMS = SamplingParams(ignore_eos=True)


def engine() -> SimulationConfig:
    calibration = replace(MACHINES[MACHINE], block_size=BLOCK, num_blocks=NUM_BLOCKS)
    return SimulationConfig(calibration=calibration, scheduler=SchedulerConfig(max_num_seqs=128))


def rate(load: float) -> float:
    """Return the requests/s of each replica, relative to those that it could serve if it had all prefixes."""
    work_times = WorkTimes(StepTimes(MACHINES[MACHINE].cost))
    prompt = work_times.seconds_of(PREFIX, OWN)
    return load / (prompt + (ANSWER - 1) * work_times.seconds_of(PREFIX + OWN, 1))


def plan(replicas: int, count: int, load: float = LOAD, *, seed: int = 1) -> Iterator[tuple[float, int]]:
    """Yield the time and the prefix of each request."""
    random = Random(seed)
    number = PREFIXES * replicas
    weights = list(accumulate(1.0 / rank for rank in range(1, number + 1)))
    at = 0.0
    for _ in range(count):
        at += random.expovariate(rate(load) * replicas)
        yield at, random.choices(range(number), cum_weights=weights)[0]


def fluid_requests(
    replicas: int, count: int, load: float = LOAD, *, seed: int = 1
) -> Iterator[tuple[float, Request, list[bytes]]]:
    """Yield requests whose prompts are zeros and whose blocks have names as if they were not."""
    prompt = (0,) * (PREFIX + OWN)
    for number, (at, prefix) in enumerate(plan(replicas, count, load, seed=seed)):
        names = [b"p%d %d" % (prefix, block) for block in range(PREFIX // BLOCK)]
        names += [b"o%d %d" % (number, block) for block in range(OWN // BLOCK)]
        yield at, new_request(str(number), prompt, at), names


def new_request(name: str, prompt: tuple[int, ...], at: float, targets: SloTargets = NO_SLO) -> Request:
    scheduling = SchedulingOptions(targets=targets, arrival_time=at)
    return Request(name, prompt, PARAMS, ANSWER, seed=0, scheduling=scheduling)


class ExactFront:
    """Looks at every replica that has anything of a prompt, and at all to find the least loaded."""

    def __init__(self, replicas: Sequence[FluidReplica]) -> None:
        self._replicas = replicas
        self._index = PrefixIndex()
        for number, each in enumerate(replicas):
            each.memory.join(self._index, number)

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        least = min(self._replicas, key=lambda each: each.load(now))
        picked = [(self._replicas[number], count) for number, count in self._index.holders(names)]
        return best_of([*picked, (least, least.memory.cached_blocks(names))], request, now)


class RandomFront:
    """Takes the better of two replicas at random."""

    def __init__(self, replicas: Sequence[FluidReplica]) -> None:
        self._replicas, self._random = replicas, Random(1)

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        picked = self._random.sample(self._replicas, 2)
        return best_of([(each, each.memory.cached_blocks(names)) for each in picked], request, now)


class TimedFront:
    """Measures the processor time of each choice of another front."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.seconds: list[float] = []

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        began = time.process_time()
        replica = self._front.choose(request, names, now)
        self.seconds.append(time.process_time() - began)
        return replica


def make_front(kind: str, replicas: Sequence[FluidReplica]) -> Front:
    match kind:
        case "one":
            return RouterFront(replicas)
        case "cells":
            return CellsFront(replicas, size=CELL)
        case "gateways":
            return CellsFront(replicas, size=CELL, gateways=GATEWAYS)
        case "exact":
            return ExactFront(replicas)
        case "random":
            return RandomFront(replicas)
    raise SystemExit(f"--fronts {kind} is unknown: choose from one, exact, cells, gateways, random")


def summary(sent: Sequence[Sent], loads: Sequence[int]) -> str:
    counted = sent[int(WARM_UP * len(sent)) :]
    hits = sum(each.num_cached for each in counted) / sum(each.num_prompt for each in counted)
    ttfts = [each.ttft for each in counted]
    return figures(hits, ttfts, loads)


def figures(hits: float, ttfts: list[float], loads: Sequence[int]) -> str:
    balance = max(loads) / metrics.mean([float(each) for each in loads])
    return (
        f"cached {hits:6.1%}  most/mean {balance:5.2f}  TTFT mean {metrics.mean(ttfts):6.3f}  "
        f"P50 {metrics.percentile(ttfts, 50):6.3f}  P99 {metrics.percentile(ttfts, 99):6.3f} s"
    )


def fleet(replicas: int, per_replica: int, load: float, kinds: Sequence[str], seed: int = 1) -> None:
    for kind in kinds:
        clock = Clock()
        members = [FluidReplica(engine(), clock) for _ in range(replicas)]
        front = TimedFront(make_front(kind, members))
        loads: list[int] = []

        def requests(members: list[FluidReplica] = members, loads: list[int] = loads) -> Iterator:  # type: ignore[type-arg]
            count = replicas * per_replica
            for number, each in enumerate(fluid_requests(replicas, count, load, seed=seed)):
                if number == int(WARM_UP * count):
                    loads += [member.num_tokens for member in members]
                yield each

        sent = run(requests(), members, front, clock)
        counted = [member.num_tokens - before for member, before in zip(members, loads, strict=True)]
        counted_seconds = front.seconds[int(WARM_UP * len(front.seconds)) :]
        print(
            f"{replicas:6} replicas, seed {seed}, {kind:8}{summary(sent, counted)}  decision mean "
            f"{1e3 * metrics.mean(counted_seconds):6.3f}  P99 {1e3 * metrics.percentile(counted_seconds, 99):6.3f} ms",
            flush=True,
        )


def full_replicas(replicas: int, per_replica: int, load: float) -> str:
    """Return the figures of full replicas."""
    target = SimulatedTarget(Deployment.of(engine(), replicas=replicas))
    count = replicas * per_replica
    counted_from = int(WARM_UP * count)
    random = Random(7)
    before: list[tuple[int, int]] = []

    async def send(number: int, at: float, prefix: int) -> float:
        await asyncio.sleep(at)
        if number == counted_from:
            before.extend((each.num_tokens, each.num_cached_tokens) for each in target._replicas)
        prompt = (*Random(prefix).randbytes(PREFIX), *random.randbytes(OWN))
        answer = await target.ask(LoadRequest("", number, 0, prompt, ANSWER))
        return answer.token_times[0] - at

    async def send_all() -> list[float]:
        planned = enumerate(plan(replicas, count, load))
        return await asyncio.gather(*(send(number, at, prefix) for number, (at, prefix) in planned))

    ttfts = virtual_time.run(send_all())[counted_from:]
    after = [(each.num_tokens, each.num_cached_tokens) for each in target._replicas]
    loads = [now[0] - then[0] for now, then in zip(after, before, strict=True)]
    cached = sum(now[1] - then[1] for now, then in zip(after, before, strict=True))
    return figures(cached / (len(ttfts) * (PREFIX + OWN)), ttfts, loads)


class Idle(LocalClient):
    """Stands for an engine of a router, and is sent nothing."""

    def _send(self, command: Command) -> None:
        del command

    async def start(self) -> None:
        cost = MACHINES[MACHINE].cost
        info = EngineInfo(
            model="none",
            limits=EngineLimits(max_model_len=4096, vocab_size=256, num_blocks=1000, block_size=16),
            max_num_batched_tokens=512,
            memory_plan="",
            max_num_seqs=128,
            step_times=StepTimes(cost),
        )
        self._take(info)

    async def close(self) -> None:
        """Do nothing."""


async def decisions(count: int, targets: SloTargets) -> None:
    """Print what the server's router takes to choose among engines that have eight decodes and a prompt each."""
    engines = [Idle() for _ in range(count)]
    router = Router(engines)
    await router.start()
    namer, random = BlockNamer(16, key=router.name_key), Random(1)
    prefixes = [random.randbytes(1024) for _ in range(100)]
    options = SchedulingOptions(targets=targets)
    for each, engine_client in enumerate(engines):
        view = engine_client.view
        assert view is not None
        lengths = []
        for number in range(9):
            prompt = (*random.choice(prefixes)[:512], *random.randbytes(random.randrange(100)))
            names: list[bytes] = []
            namer.extend(names, prompt)
            lengths.append(len(prompt))
            view.add(new_request(f"{each} {number}", prompt, time.monotonic(), targets), names)
        outputs = [
            RequestOutput(f"{each} {number}", (7,), num_computed=length) for number, length in enumerate(lengths[:8])
        ]
        view.take(outputs, view.times, available_blocks=600, now=time.monotonic())
    params = SamplingParams(max_tokens=ANSWER)
    named, chosen = [], []
    for number in range(301):
        prompt = (*random.choice(prefixes), *random.randbytes(1024))
        request = Add(f"new {number}", prompt, params, scheduling=options)
        began = time.process_time()
        router._chooser.name_blocks(request)
        between = time.process_time()
        choice = router._chooser.choose(request, router.replicas)
        ended = time.process_time()
        assert choice is not None
        named.append(between - began)
        chosen.append(ended - between)
    naming, choosing = 1e3 * metrics.percentile(named, 50), 1e3 * metrics.percentile(chosen, 50)
    print(
        f"{count:6} engines, {'no SLO' if targets == NO_SLO else 'SLO   '}: {choosing:6.3f} ms, of which the names of "
        f"2,048 tokens {naming:6.3f} ms, and the choice {choosing - naming:6.3f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decisions", "fleet", "check"))
    parser.add_argument("--replicas", default="", help="numbers of replicas, separated by commas")
    parser.add_argument("--per-replica", type=int, default=30, help="requests for each replica")
    parser.add_argument("--load", type=float, default=LOAD, help="of what a replica serves that has all prefixes")
    parser.add_argument("--fronts", default="one,exact,cells,random")
    parser.add_argument("--seeds", type=int, default=1, help="number of simulations, each of other requests")
    arguments = parser.parse_args()
    default = {"decisions": "16,100,1000,10000", "fleet": "10000", "check": "16,256"}[arguments.what]
    numbers = [int(each) for each in (arguments.replicas or default).split(",")]
    if arguments.what == "decisions":
        for count in numbers:
            asyncio.run(decisions(count, NO_SLO))
            asyncio.run(decisions(count, SloTargets(ttft=5.0, itl=1.0)))
    for count in numbers if arguments.what == "fleet" else ():
        for seed in range(1, arguments.seeds + 1):
            fleet(count, arguments.per_replica, arguments.load, arguments.fronts.split(","), seed)
    for count in numbers if arguments.what == "check" else ():
        fleet(count, arguments.per_replica, arguments.load, ["one"])
        print(f"{count:6} replicas, full   {full_replicas(count, arguments.per_replica, arguments.load)}", flush=True)


if __name__ == "__main__":
    main()
