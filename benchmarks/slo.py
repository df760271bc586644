"""What promises bring, in simulation: the same load with and without, on machines of two lines each.

    python -m benchmarks.slo [--machine int8] [--requests N] [--hours H] [--noise S]
        [--late-share P]

A step costs max(8 ms, 0.42 ms a token) + 1 ms ("int8") or max(15.5, 0.84) + 1 ("bf16"): the limits of two AVX-512 cores
on the shape of Qwen2.5-0.5B. Prompts Normal(512), answers Normal(64), closed loops; promised are a first token within
prompt/512 seconds, and 2, 4 or 6 tokens a second. Equal steps take equal times, or scatter by S (0.08 on a virtual
machine that we measured). Then a prompt of 4,000 tokens beside 8 streams, and hours at one and a half times what the
machine can do, with at most 128 requests let in.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from random import Random

from splitfuse.bench import metrics
from splitfuse.bench.measure import Loads
from splitfuse.bench.results import RequestRecord
from splitfuse.bench.workload import Independent, Lengths, LoadRequest
from splitfuse.config import TAIL_SHARE, SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import SloTargets
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.simulate import Bytes, Deployment, Replica, simulate

MACHINES = {
    "int8": CostModel(floor=0.009, per_token=0.0, knee=8 / 0.42, per_token_beyond=0.42e-3),
    "bf16": CostModel(floor=0.0165, per_token=0.0, knee=15.5 / 0.84, per_token_beyond=0.84e-3),
}
CLIENTS = (1, 4, 8, 16, 32)
LET_IN = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, action="append", help="only this one")
    parser.add_argument("--requests", type=int, default=500, help="that count at each point; 0 leaves those out")
    parser.add_argument("--hours", type=float, default=24.0, help="of overload; 0 leaves it out")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the logarithm of a step's time")
    parser.add_argument(
        "--late-share", type=float, default=TAIL_SHARE, help="of each step, for the oldest if it is late"
    )
    arguments = parser.parse_args()
    machines = [calibration(name, replace(cost, noise=arguments.noise)) for name, cost in MACHINES.items()]
    machines = [machine for machine in machines if machine.name in (arguments.machine or MACHINES)]
    for machine in machines if arguments.requests else ():
        effective(machine, arguments.requests, arguments.tail_share)
    for machine in machines:
        virtual_time.run(beside_streams(machine, arguments.tail_share))
    for machine in machines if arguments.hours else ():
        virtual_time.run(overload(machine, arguments.hours, arguments.tail_share))


def papers(tokens_per_second: float | None) -> dict[str, str]:
    """The targets of the paper, if any."""
    if tokens_per_second is None:
        return {}
    return {"ttft": f"{1 / metrics.PROMPT_TOKENS_PER_SECOND}s/token", "itl": f"{1 / tokens_per_second}s"}


def calibration(name: str, cost: CostModel) -> Calibration:
    return Calibration(name=name, cost=cost, num_blocks=4000, block_size=32, max_model_len=8192)


def deployment(machine: Calibration, targets: Mapping[str, str | None], tail_share: float) -> Deployment:
    return Deployment(
        calibration=machine, scheduler=SchedulerConfig(max_num_seqs=LET_IN, tail_share=tail_share, **targets)
    )


def effective(machine: Calibration, requests: int, tail_share: float) -> None:
    print(f"\n{machine.name}: requests/s on time (all requests/s; longest latency, s)")
    print(f"{'tokens/s':>8} {'':8}" + "".join(f"{clients:>22}" for clients in CLIENTS) + " clients")
    loads = Loads(clients=CLIENTS, requests=requests, repeat=1)
    for speed in metrics.SLAS:
        for promised in (None, speed):
            results = simulate(
                deployment(machine, papers(promised), tail_share),
                lambda target: Independent(Lengths(512, 64, room=target.room), target.vocabulary, seed=1),
                loads,
                system=machine.name,
                about={},
            )
            cells = []
            for point in results.points:
                longest = max(record.done - record.sent for record in metrics.counted(point))
                on_time = metrics.goodput(point, speed)
                cells.append(f"{on_time:10.2f} ({metrics.throughput(point):.2f}; {longest:.1f})".rjust(22))
            print(f"{speed:8g} {'by promise' if promised else 'by age':10}" + "".join(cells))


async def beside_streams(machine: Calibration, tail_share: float) -> None:
    """Gaps of 8 streams that were promised a token every 250 ms, while a prompt of 4,000 tokens is computed."""
    for itl in (None, "250ms"):
        replica, random = Replica(deployment(machine, {"itl": itl}, tail_share)), Random(1)

        async def ask(number: int, prompt: int, generate: int, replica: Replica = replica) -> list[float]:
            tokens = Bytes(256).draw(random, prompt)  # noqa: B023 - asked before the loop goes on
            return await replica.answer(str(number), LoadRequest("exam", number, 0, tokens, generate))

        streams = [asyncio.create_task(ask(number, 64, 200)) for number in range(8)]
        await asyncio.sleep(1.0)
        sent = asyncio.get_running_loop().time()
        (first,) = await ask(8, 4000, 1)
        gaps = [later - earlier for stream in streams for earlier, later in pairwise(await stream)]
        print(
            f"\n{machine.name}, {'by promise' if itl else 'by age'}: a prompt of 4,000 tokens beside 8 streams: of "
            f"{len(gaps)} gaps {sum(gap > 0.25 for gap in gaps)} above 250 ms, the longest {1000 * max(gaps):.0f} ms; "
            f"its own first token after {first - sent:.2f} s"
        )


async def overload(machine: Calibration, hours: float, tail_share: float) -> None:
    """Requests that come at 1.5 times the rate that can be served; more than `LET_IN` at once are refused."""
    promised = papers(4.0)
    replica, targets, random = (
        Replica(deployment(machine, promised, tail_share)),
        SloTargets.parse(**promised),
        Random(2),
    )
    loop = asyncio.get_running_loop()
    capacity = 1 / (machine.cost.per_token_beyond * (512 + 64))
    latencies: list[float] = []
    on_time = refused = 0
    running: set[asyncio.Task[None]] = set()

    async def ask(number: int) -> None:
        nonlocal on_time
        sent = loop.time()
        times = await replica.answer(str(number), LoadRequest("exam", number, 0, Bytes(256).draw(random, 512), 64))
        latencies.append(times[-1] - sent)
        on_time += metrics.meets_slo(RequestRecord(number, sent, 512, tuple(times)), targets)

    number = 0
    while loop.time() < hours * 3600:
        await asyncio.sleep(random.expovariate(1.5 * capacity))
        if len(running) >= LET_IN:
            refused += 1
            continue
        number += 1
        task = asyncio.create_task(ask(number))
        running.add(task)
        task.add_done_callback(running.discard)
    seconds = loop.time()
    await asyncio.gather(*running)
    bound = LET_IN / capacity / tail_share
    print(
        f"\n{machine.name}, {hours:g} h at 1.5 times {capacity:.2f} requests/s: "
        f"{len(latencies)} served, {refused} refused; {on_time / seconds:.2f} requests/s on time; "
        f"longest latency {max(latencies):.0f} s, bound {bound:.0f} s "
        f"({LET_IN} requests, one after the other, with {tail_share:.3g} of the machine)"
    )


if __name__ == "__main__":
    main()
