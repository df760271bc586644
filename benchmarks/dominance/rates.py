"""The highest rate at which 90 % of the requests are on time, for the SLOs of DistServe's OPT-13B.

    python -m benchmarks.dominance.rates [--requests N] [--kv-tokens N] [--only TEXT]

Prompts of 700 tokens on average, at most 1,600, and answers of 200, lognormal; Poisson arrivals at a ladder of rates,
two seeds each. The SLOs are times to the first token and means of the time per output token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from benchmarks.dominance.compare import OTHERS, OUR_SYSTEM, Outcome, judge
from benchmarks.dominance.loop import System, drive
from benchmarks.dominance.points import WORKLOADS
from splitfuse.bench.workload import poisson
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator.machines import MACHINES

ROWS = ((0.2, 0.1), (0.25, 0.1), (0.25, 0.04), (0.5, 0.1), (1.0, 0.05))
"""Targets for the first token and for the mean time per output token, in seconds. DistServe's own are the second."""
MAX_NUM_SEQS = 256
ON_TIME = 0.9
LADDER = [0.25 * 1.02**step for step in range(170)]
"""Rates in requests/s, each 2 % above the one before."""
SEEDS = (1, 2)


class Rates:
    """Finds the rates of one machine. A policy that is told no SLO runs once at each rate for all of them."""

    def __init__(self, slos: Sequence[SloTargets], *, requests: int, kv_tokens: int) -> None:
        machine = MACHINES["opt-13b"]
        if kv_tokens:
            machine = replace(machine, num_blocks=kv_tokens // machine.block_size)
        self._machine = machine
        self._slos = slos
        self._requests = requests
        self._outcomes = cache(self._run)

    def highest(self, system: System, slo: SloTargets) -> float:
        """Return the highest rate of the ladder that a bisection finds; 0 if the lowest is too high."""
        low, high = -1, len(LADDER)  # LADDER[low] is sustained, LADDER[high] is not
        while high - low > 1:
            middle = (low + high) // 2
            if self._attained(system, LADDER[middle], slo) >= ON_TIME:
                low = middle
            else:
                high = middle
        return LADDER[low] if low >= 0 else 0.0

    def _attained(self, system: System, rate: float, slo: SloTargets) -> float:
        """Return the share of the requests that are on time."""
        told = slo if system.is_ours else None
        outcomes = [self._outcomes(system, rate, seed, told)[slo] for seed in SEEDS]
        return sum(outcome.met for outcome in outcomes) / sum(outcome.sent for outcome in outcomes)

    def _run(self, system: System, rate: float, seed: int, told: SloTargets | None) -> dict[SloTargets, Outcome]:
        sessions = WORKLOADS["sharegpt"].sessions(self._requests, seed)
        times = poisson(rate, seed=seed, stream="rates")
        records = drive(
            system.make_scheduler(self._machine, max_num_seqs=MAX_NUM_SEQS, caches_prefixes=False),
            self._machine,
            sessions,
            arrivals=[next(times) for _ in sessions],
            targets=[told] if told else [],
        )
        return {slo: judge(records, [slo], clients=0) for slo in ([told] if told else self._slos)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="requests of each run")
    parser.add_argument("--kv-tokens", type=int, default=0, help="tokens of the KV cache (default: of an A100-80GB)")
    parser.add_argument("--only", default="", help="only systems whose names begin so, such as ours or prefill-first")
    arguments = parser.parse_args()
    slos = [SloTargets(ttft=ttft, tpot=tpot) for ttft, tpot in ROWS]
    rates = Rates(slos, requests=arguments.requests, kv_tokens=arguments.kv_tokens)
    print(f"{'':20}" + "".join(f"{f'{ttft:g} s, {tpot:g} s':>16}" for ttft, tpot in ROWS), flush=True)
    for system in (each for each in (*OTHERS, OUR_SYSTEM) if str(each).startswith(arguments.only)):
        print(f"{system!s:20}", end="")
        for slo in slos:
            print(f"{rates.highest(system, slo):16.2f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
