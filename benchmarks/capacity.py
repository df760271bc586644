"""The number of replicas that arrivals need, as core/replicas/capacity.py says, against simulations with so many.

    python -m benchmarks.capacity [--points TEXT] [--seconds S]

Poisson arrivals at a rate, for some minutes. Prints the number that is said to be needed, the smallest with which 99 %
of the requests of every minute are in time in simulation, and the share of the worst minute around it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from benchmarks.dominance.points import MAX_NUM_SEQS, Scenario, Slo
from benchmarks.routing import drive
from splitfuse.bench import metrics
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.replicas.capacity import IN_TIME, PART, Arrival, replicas_needed
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget

MACHINE = "0.5b-int8"
LOADS = ("50%", "150%", "250%", "350%")
POINTS = (
    ("paper-small", Slo("3", "itl 3")),
    ("paper-small", Slo("10", "tpot 3")),
    ("two-classes", Slo("3", "itl 10")),
    ("azure-code", Slo("3", "itl 10")),
)
"""Workloads and SLOs, as of benchmarks.dominance; loads are of the capacity of one replica."""


def worst_minute(scenario: Scenario, replicas: int, requests: int) -> tuple[float, list[Arrival]]:
    """Return the share of the requests in time in the worst minute of a simulation, and its arrivals."""
    config = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, enable_slo=True)
    engine = SimulationConfig(calibration=scenario.calibration, scheduler=config, enable_prefix_caching=False)
    target = SimulatedTarget(Deployment.of(engine, replicas=replicas))
    targets = scenario.targets(scenario.slos[0])
    records = drive(target, scenario, requests=requests, seed=1, faster=1.0, targets=targets)
    sent, met = Counter[int](), Counter[int]()
    arrivals = []
    for record, kind in records:
        part = int(record.sent // PART)
        sent[part] += 1
        met[part] += metrics.meets_slo(record, targets[kind])
        answer = len(record.token_times)
        arrivals.append(
            Arrival(record.sent, record.num_prompt_tokens, answer, targets[kind], num_generated=answer, has_ended=True)
        )
    return min(met[part] / count for part, count in sent.items()), arrivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="", help="only points whose names contain all of these words")
    parser.add_argument("--seconds", type=float, default=180.0, help="seconds of arrivals")
    arguments = parser.parse_args()
    for workload, slo in POINTS:
        for load in LOADS:
            scenario = Scenario(MACHINE, workload, load, (slo,))
            name = f"{scenario}/{slo}"
            if not all(word in name for word in arguments.points.split()):
                continue
            requests = round(scenario.rate * arguments.seconds)
            shares: dict[int, float] = {}
            shares[1], arrivals = worst_minute(scenario, 1, requests) if load == LOADS[0] else (0.0, [])
            if not arrivals:
                shares[8], arrivals = worst_minute(scenario, 8, requests)
            began = time.process_time()
            needed = replicas_needed(arrivals, StepTimes(scenario.calibration.cost), now=arrivals[-1].at)
            took = time.process_time() - began
            enough = needed
            while True:
                if enough not in shares:
                    shares[enough], _ = worst_minute(scenario, enough, requests)
                if shares[enough] < IN_TIME:
                    enough += 1
                elif enough > 1 and shares.get(enough - 1, 1.0) >= IN_TIME:
                    if enough - 1 not in shares:
                        shares[enough - 1], _ = worst_minute(scenario, enough - 1, requests)
                    if shares[enough - 1] < IN_TIME:
                        break
                    enough -= 1
                else:
                    break
            around = ", ".join(f"{count}: {share:.1%}" for count, share in sorted(shares.items()) if share)
            print(
                f"{name:52}{requests:6} requests  needed {needed}  simulated {enough}  {took:6.3f} s  {around}",
                flush=True,
            )


if __name__ == "__main__":
    main()
