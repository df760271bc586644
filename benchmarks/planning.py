"""Cost of planning: processor time that a scheduler takes in each step, by policy and by number of requests.

    python -m benchmarks.planning [--steps N] [--repeat N]

Steps are planned as an engine plans them, with its accounting of latencies; their results are made up. As many requests
decode as there are sequence slots, others wait: some can keep their TTFT target, some cannot any more. By age there is
no cost model, by deadline that of the 0.5B shape in int8 on two cores (simulator/machines.py), which the clock of the
schedulers follows too. Times are process times in microseconds: the median of the steps and of the repetitions, and the
least of all, which other processes distort least. The shares are the median's of a step of these decodes by the cost
models of two AVX-512 cores and of two AVX2 cores.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.latency.ledger import LatencyLedger
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import ChunkResult
from splitfuse.core.policy import Fcfs, SchedulingPolicy
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import StepFeatures, features_of
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.simulator.machines import MACHINES

COST = MACHINES["0.5b-int8"].cost
MODELS = COST, MACHINES["0.5b-int8-avx2"].cost
COUNTS = ((1, 0), (32, 0), (32, 100), (256, 0), (256, 100), (256, 1000))
"""Numbers of running and of waiting requests."""
PROMPT, LONGEST, BLOCK_SIZE, BUDGET = 256, 2048, 32, 512
TARGETS = SloTargets(ttft=30.0, itl=0.25)
WARM_STEPS = 8
"""Number of steps with all requests that are not timed."""


class Load:
    """Drives a scheduler all of whose sequence slots are taken by decodes, while other requests wait."""

    def __init__(self, policy: SchedulingPolicy, num_running: int, num_waiting: int) -> None:
        namer = BlockNamer(BLOCK_SIZE, key=b"planning")
        allocator = BlockAllocator(num_running * ceil_div(LONGEST, BLOCK_SIZE), BLOCK_SIZE, namer=namer)
        config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=num_running)
        self.scheduler = Scheduler(config, allocator, policy)
        cost = None if policy.predictor is None else policy.predictor.cost
        self._latencies = LatencyLedger(self.scheduler.events, cost=cost)
        self._targets = NO_SLO if cost is None else TARGETS
        self._now = 0.0
        for number in range(num_running):
            self._add(number)
        queue = self.scheduler.queue
        while queue.waiting or not all(request.output_token_ids for request in queue.running):
            self.step()
        for number in range(num_waiting):  # one after the other
            self._now += TARGETS.ttft_target(PROMPT) / num_waiting
            self._add(num_running + number)
        for _ in range(WARM_STEPS):
            self.step()

    def step(self) -> tuple[float, float]:
        """Plan a step and take in a result of it. Returns the seconds that each took."""
        began = time.process_time()
        plan = self.scheduler.schedule(self._now)
        planned = time.process_time() - began
        assert plan is not None
        self._now += COST.seconds(features_of(plan))
        result = {chunk.request_id: ChunkResult((7,) if chunk.samples else ()) for chunk in plan.chunks}
        began = time.process_time()
        self.scheduler.update(plan, result, self._now)
        return planned, time.process_time() - began

    def _add(self, number: int) -> None:
        prompt = tuple((number + 7 * position) % 1000 for position in range(PROMPT))
        options = SchedulingOptions(targets=self._targets, arrival_time=self._now)
        request = Request(
            str(number), prompt, SamplingParams(), max_tokens=LONGEST - PROMPT, seed=number, scheduling=options
        )
        self.scheduler.add(request, self._now)


def measured(
    policy: SchedulingPolicy, num_running: int, num_waiting: int, num_steps: int
) -> tuple[float, float, float]:
    """Return the median seconds of `schedule`, its least, and the median of `update`."""
    load = Load(policy, num_running, num_waiting)
    gc.collect()
    planned, updated = zip(*(load.step() for _ in range(num_steps)), strict=True)
    return median(planned), min(planned), median(updated)


def main() -> None:
    """Print a row for each policy and each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed of each load")
    parser.add_argument("--repeat", type=int, default=3, help="loads of each kind")
    arguments = parser.parse_args()
    print("| policy | running | waiting | schedule | least | update | % of a step, AVX-512 | AVX2 |")
    print(8 * "|---" + "|")
    for name in ("by age", "by deadline"):
        for num_running, num_waiting in COUNTS:
            found = []
            for _ in range(arguments.repeat):
                policy = Fcfs() if name == "by age" else DeadlinePolicy(LatencyPredictor(COST), token_budget=BUDGET)
                found.append(measured(policy, num_running, num_waiting, arguments.steps))
            schedules, least, updates = zip(*found, strict=True)
            micros = " | ".join(f"{1e6 * each:.0f}" for each in (median(schedules), min(least), median(updates)))
            step = StepFeatures(tokens=num_running, requests=num_running)
            shares = " | ".join(f"{100 * median(schedules) / model.seconds(step):.2f}" for model in MODELS)
            print(f"| {name} | {num_running} | {num_waiting} | {micros} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
