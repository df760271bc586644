"""Simulate the headline figures of DeepSpeed-FastGen (arXiv 2401.08671): `python -m benchmarks.paper`.

Llama-2 70B on four A100-80GB (splitfuse/simulator/machines.py), prompts of 2600 tokens, answers of 60, closed loops of
1 to 32 clients. vLLM is simulated twice: as prefill-first on the same machine, where only the policy differs, and with
the attention kernel and the loop of vLLM 0.2. Nothing was fitted to the paper's figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from splitfuse.bench.results import Results
from splitfuse.bench.summary import Row, rows
from splitfuse.bench.workload import Independent, Lengths, Loads
from splitfuse.config.engine import SchedulerConfig
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.simulate import simulate

CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
PROMPT, GENERATE = 2600, 60
BUDGET = 512  # at which the paper's engine saturates
WHOLE_PROMPTS = 4096  # vLLM's of 2023: the context length
MAX_NUM_SEQS = 256
SPEED = 4.0
REPLICAS = 16
TOKEN_CLIENTS = (4, 8, 16)
"""Numbers of clients for token latencies; the paper does not state its own."""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, and the same from the simulator."""

    name: str
    paper: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.paper


def curve(calibration: Calibration, policy: str, *, clients: Sequence[int], replicas: int = 1) -> list[Row]:
    """Return the rows of a closed loop, for each number of clients."""
    budget = BUDGET if policy == "splitfuse" else WHOLE_PROMPTS
    simulation = SimulationConfig(
        calibration=calibration,
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=MAX_NUM_SEQS),
        policy=policy,
        enable_prefix_caching=False,
    )
    loads = Loads(clients=tuple(clients), requests=512 * replicas, repeat=1)
    results: Results = simulate(
        Deployment.of(simulation, replicas=replicas),
        lambda target: Independent(Lengths(PROMPT, GENERATE, room=target.room), target.vocabulary),
        loads,
        system=policy,
        about={},
    )
    return rows(results)


def throughput_at(latency: float, curve: Sequence[Row]) -> float:
    """Return the requests/s at which the curve first reaches a mean latency, by linear interpolation."""
    return _where(latency, curve, lambda row: row.latency, lambda row: row.throughput.mean)


def latency_at(throughput: float, curve: Sequence[Row]) -> float:
    """Return the mean latency at which the curve first reaches a throughput; of the last point if it never does."""
    return _where(throughput, curve, lambda row: row.throughput.mean, lambda row: row.latency)


def _where(wanted: float, curve: Sequence[Row], of: Callable[[Row], float], give: Callable[[Row], float]) -> float:
    for before, after in pairwise(curve):
        if of(before) <= wanted <= of(after):
            share = (wanted - of(before)) / (of(after) - of(before))
            return give(before) + share * (give(after) - give(before))
    return give(curve[-1])


def figures(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Figure]:
    """Return the paper's headline figures of its engine and of vLLM."""

    def best(curve: Sequence[Row]) -> float:
        return max(row.goodput[SPEED].mean for row in curve)

    return [
        Figure("requests/s at 9 s, SplitFuse", 1.36, throughput_at(9.0, ours)),
        Figure("requests/s at 9 s, vLLM", 0.67, throughput_at(9.0, theirs)),
        Figure("latency at 1.2 requests/s, SplitFuse, s", 7.0, latency_at(1.2, ours)),
        Figure("latency at 1.2 requests/s, vLLM, s", 14.0, latency_at(1.2, theirs)),
        Figure("effective throughput at SLO 4, SplitFuse", 1.42, best(ours)),
        Figure("effective throughput at SLO 4, vLLM", 0.63, best(theirs)),
    ]


def token_latencies(clients: int, ours: Sequence[Row], theirs: Sequence[Row]) -> list[Figure]:
    """Return percentiles of the inter-token latency, at one number of clients."""
    made = []
    for name, curve, paper in (("SplitFuse", ours, (0.072, 0.186, 0.188)), ("vLLM", theirs, (0.077, 0.385, 0.695))):
        row = next(row for row in curve if row.clients == clients)
        made += [
            Figure(f"P{percent}, {name}, s", figure, row.itl[percent])
            for percent, figure in zip((50, 90, 95), paper, strict=True)
        ]
    return [
        *made,
        Figure("P95, SplitFuse / vLLM", made[2].paper / made[5].paper, made[2].simulated / made[5].simulated),
    ]


def ratios(made: Sequence[Figure]) -> list[Figure]:
    """Return the ratios of SplitFuse to vLLM, in the paper and here."""
    pairs = (("requests/s at 9 s", 0, 1), ("latency at 1.2 requests/s", 2, 3), ("effective throughput at SLO 4", 4, 5))
    return [
        Figure(f"{name}, SplitFuse / vLLM", made[a].paper / made[b].paper, made[a].simulated / made[b].simulated)
        for name, a, b in pairs
    ]


def print_table(title: str, made: Sequence[Figure]) -> None:
    """Print each figure, the simulated one, and their ratio; * if it is beyond a factor of 1.5."""
    print(f"\n{title}\n{'':50} {'paper':>8} {'simulated':>10} {'ratio':>7}")
    for figure in made:
        far = "" if 1 / 1.5 <= figure.ratio <= 1.5 else " *"
        print(f"{figure.name:50} {figure.paper:8.3f} {figure.simulated:10.3f} {figure.ratio:7.2f}{far}")
    near = sum(1 / 1.5 <= figure.ratio <= 1.5 for figure in made)
    print(f"{near} of {len(made)} within a factor of 1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    began = time.perf_counter()
    machine = MACHINES["a100-70b"]
    print(f"{machine.name}: {machine.cost}")
    ours = curve(machine, "splitfuse", clients=CLIENTS)
    same = curve(machine, "prefill-first", clients=CLIENTS)
    theirs = curve(MACHINES["a100-70b-vllm-0.2"], "prefill-first", clients=CLIENTS)
    for title, other in (("Policy alone: prefill-first on the same machine", same), ("vLLM 0.2's kernel too", theirs)):
        made = figures(ours, other)
        print_table(title, [*made, *ratios(made)])
    for clients in TOKEN_CLIENTS:
        print_table(
            f"Token latency at {clients} clients, vLLM 0.2's kernel too", token_latencies(clients, ours, theirs)
        )
    scaled = curve(machine, "splitfuse", clients=[REPLICAS * 32], replicas=REPLICAS)[0].throughput.mean
    one = next(row for row in ours if row.clients == 32).throughput.mean
    scaling = [
        Figure("queries/s of 1 replica, 32 clients", 1.46, one),
        Figure(f"queries/s of {REPLICAS} replicas, {REPLICAS * 32} clients", 23.7, scaled),
        Figure("times as many", 23.7 / 1.46, scaled / one),
    ]
    print_table("Replicas", scaling)
    print(f"\nsimulated in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
