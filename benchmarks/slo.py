"""Goodput with and without SLO scheduling, in simulation, on machines whose cost model has two lines.

    python -m benchmarks.slo [--machine int8] [--requests N] [--hours H] [--noise S] [--tail-share F]

A step costs max(8 ms, 0.42 ms/token) + 1 ms ("int8") or max(15.5, 0.84) + 1 ("bf16"): the limits of two AVX-512 cores
on the shape of Qwen2.5-0.5B. Prompts Normal(512), answers Normal(64), closed loops; the SLO is a first token within
prompt/512 seconds, and 2, 4 or 6 tokens/s. Equal steps take equal times, or have noise S (0.08 on a virtual machine
that we measured). Then a prompt of 4,000 tokens concurrently with 8 decodes, and hours of overload at 1.5 times the
capacity, with at most 128 requests admitted.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from itertools import pairwise
from random import Random

from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import Independent, Lengths, Loads
from splitfuse.config.engine import TAIL_SHARE, SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import SloTargets
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Machine, SimulationConfig
from splitfuse.simulator.simulate import Bytes, Replica, simulate

MACHINES = {
    "int8": CostModel(floor=0.009, per_token=0.0, knee=8 / 0.42, per_token_beyond=0.42e-3),
    "bf16": CostModel(floor=0.0165, per_token=0.0, knee=15.5 / 0.84, per_token_beyond=0.84e-3),
}
CLIENTS = (1, 4, 8, 16, 32)
MAX_NUM_SEQS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, action="append", help="this machine only")
    parser.add_argument("--requests", type=int, default=500, help="requests that count at each point; 0 skips these")
    parser.add_argument("--hours", type=float, default=24.0, help="hours of overload; 0 skips it")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the logarithm of step times")
    parser.add_argument(
        "--tail-share", type=float, default=TAIL_SHARE, help="fraction of a step for the oldest request"
    )
    arguments = parser.parse_args()
    machines = [calibration(name, replace(cost, noise=arguments.noise)) for name, cost in MACHINES.items()]
    simulations = [
        SimulationConfig(
            calibration=machine,
            scheduler=SchedulerConfig(
                max_num_batched_tokens=256, max_num_seqs=MAX_NUM_SEQS, tail_share=arguments.tail_share
            ),
        )
        for machine in machines
        if machine.name in (arguments.machine or MACHINES)
    ]
    for simulation in simulations if arguments.requests else ():
        closed_loops(simulation, arguments.requests)
    for simulation in simulations:
        virtual_time.run(long_prompt(simulation))
    for simulation in simulations if arguments.hours else ():
        virtual_time.run(overload(simulation, arguments.hours))


def calibration(name: str, cost: CostModel) -> Calibration:
    """Return a calibration with room for all requests."""
    return Calibration(name=name, cost=cost, num_blocks=4000, block_size=32, max_model_len=8192)


def with_slo(simulation: SimulationConfig, ttft: str | None = None, itl: str | None = None) -> SimulationConfig:
    """Return the simulation with these targets."""
    return replace(simulation, scheduler=replace(simulation.scheduler, ttft=ttft, itl=itl))


def paper_slo(tokens_per_second: float) -> tuple[str, str]:
    """Return the TTFT and ITL targets of the paper."""
    return f"{1 / metrics.PROMPT_TOKENS_PER_SECOND}s/token", f"{1 / tokens_per_second}s"


def closed_loops(simulation: SimulationConfig, requests: int) -> None:
    name = simulation.calibration.name
    print(f"\n{name}: goodput, requests/s (throughput, requests/s; longest latency, s)")
    print(f"{'tokens/s':>8} {'':8}" + "".join(f"{clients:>22}" for clients in CLIENTS) + " clients")
    loads = Loads(clients=CLIENTS, requests=requests, repeat=1)
    for speed in metrics.SPEEDS:
        for policy, simulated in (("FCFS", simulation), ("SLO", with_slo(simulation, *paper_slo(speed)))):
            results = simulate(
                simulated,
                lambda target: Independent(Lengths(512, 64, room=target.room), target.vocabulary, seed=1),
                loads,
                system=name,
                about={},
            )
            cells = []
            for point in results.points:
                longest = max(record.done - record.sent for record in metrics.counted(point))
                goodput = metrics.goodput(point, speed)
                cells.append(f"{goodput:10.2f} ({metrics.throughput(point):.2f}; {longest:.1f})".rjust(22))
            print(f"{speed:8g} {policy:10}" + "".join(cells))


async def long_prompt(simulation: SimulationConfig) -> None:
    """Measure the gaps of 8 decodes with a target of 250 ms, while a prompt of 4,000 tokens is computed."""
    for policy, itl in (("FCFS", None), ("SLO", "250ms")):
        replica, random = Replica(Machine(engine=with_slo(simulation, itl=itl))), Random(1)

        async def ask(number: int, prompt: int, generate: int, replica: Replica = replica) -> list[float]:
            tokens = Bytes(256).draw(random, prompt)  # noqa: B023 - used before the loop goes on
            times: list[float] = []
            await replica.answer(str(number), tokens, generate, times, SloTargets.parse(itl=itl))  # noqa: B023
            return times

        decodes = [asyncio.create_task(ask(number, 64, 200)) for number in range(8)]
        await asyncio.sleep(1.0)
        sent = asyncio.get_running_loop().time()
        (first,) = await ask(8, 4000, 1)
        gaps = [later - earlier for decode in decodes for earlier, later in pairwise(await decode)]
        print(
            f"\n{simulation.calibration.name}, {policy}: a prompt of 4,000 tokens concurrently with 8 decodes: of "
            f"{len(gaps)} gaps {sum(gap > 0.25 for gap in gaps)} above 250 ms, the longest {1000 * max(gaps):.0f} ms; "
            f"TTFT of the prompt {first - sent:.2f} s"
        )


async def overload(simulation: SimulationConfig, hours: float) -> None:
    """Send requests at 1.5 times the rate that can be served; refuse those beyond `MAX_NUM_SEQS` at once."""
    ttft, itl = paper_slo(4.0)
    replica, targets, random = (
        Replica(Machine(engine=with_slo(simulation, ttft, itl))),
        SloTargets.parse(ttft, itl),
        Random(2),
    )
    loop = asyncio.get_running_loop()
    capacity = 1 / (simulation.calibration.cost.per_token_beyond * (512 + 64))
    latencies: list[float] = []
    met = refused = 0
    running: set[asyncio.Task[None]] = set()

    async def ask(number: int) -> None:
        nonlocal met
        sent = loop.time()
        prompt = Bytes(256).draw(random, 512)
        times: list[float] = []
        await replica.answer(str(number), prompt, 64, times, targets)
        latencies.append(times[-1] - sent)
        met += metrics.meets_slo(MeasuredRequest(number, sent, 512, tuple(times)), targets)

    number = 0
    while loop.time() < hours * 3600:
        await asyncio.sleep(random.expovariate(1.5 * capacity))
        if len(running) >= MAX_NUM_SEQS:
            refused += 1
            continue
        number += 1
        task = asyncio.create_task(ask(number))
        running.add(task)
        task.add_done_callback(running.discard)
    seconds = loop.time()
    await asyncio.gather(*running)
    tail_share = simulation.scheduler.tail_share
    print(
        f"\n{simulation.calibration.name}, {hours:g} h at 1.5 times {capacity:.2f} requests/s: "
        f"{len(latencies)} served, {refused} refused; goodput {met / seconds:.2f} requests/s; "
        f"longest latency {max(latencies):.0f} s, bound {MAX_NUM_SEQS / capacity / tail_share:.0f} s "
        f"({MAX_NUM_SEQS} requests, one after the other, with {tail_share:.3g} of the machine)"
    )


if __name__ == "__main__":
    main()
