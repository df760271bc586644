"""Goodput of several replicas by the rule that routes requests to them, in simulation.

    python -m benchmarks.routing [--points TEXT] [--replicas N] [--requests N] [--seeds N]

The rules see the same arrivals and lengths. `tokens` sends a request to the replica with the fewest tokens still to be
computed, prompts and answers, less those of its prompt that are cached there; `seconds` is the router's
(core/replicas/routing.py). Prints the requests/s that met their SLO with each, and the median and P99 of the time to
the first token, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

from benchmarks.dominance.compare import WARM_UP
from benchmarks.dominance.points import MAX_NUM_SEQS, Scenario, Slo
from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import LoadRequest
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.replicas.routing import Candidate, choose_replica
from splitfuse.core.request import Request
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator import simulate, virtual_time
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.simulate import SimulatedTarget

LOADS = ("60%", "90%", "110%")
POINTS = (
    ("two-classes", Slo("2", "itl 3")),
    ("two-classes", Slo("5/token", "tpot 3")),
    ("two-classes-long", Slo("2", "p95 3")),
    ("two-classes-long", Slo("5", "itl 10")),
    ("azure-conv", Slo("5", "itl 3")),
    ("prefix", Slo("5", "itl 3")),
    ("two-classes", None),
    ("prefix", None),
)
"""Workloads and SLOs, as of benchmarks.dominance; None: first come, first served."""
MACHINE = "0.5b-int8"


def outstanding_tokens(view: ReplicaView) -> int:
    """Return the most tokens that are still to be computed."""
    open_requests = (*view.running, *view.waiting)
    return sum(each.num_prompt_tokens + each.max_tokens - len(each.output_token_ids) for each in open_requests)


def by_tokens(replicas: Sequence[Candidate | None], request: Request, now: float) -> int | None:
    """Choose as the router did before: the fewest outstanding tokens, less those that are cached."""
    del request, now
    loads = [
        (outstanding_tokens(each.view) - each.cached, index) for index, each in enumerate(replicas) if each is not None
    ]
    return min(loads)[1]


RULES = {"tokens": by_tokens, "seconds": choose_replica}


def drive(
    target: SimulatedTarget,
    scenario: Scenario,
    *,
    requests: int,
    seed: int,
    faster: float,
    targets: Sequence[SloTargets] | None,
) -> list[tuple[MeasuredRequest, int]]:
    """Return the requests of a scenario with the times of their tokens and their kinds, whose targets they have.

    They come so many times faster than the scenario says, which is of one machine.
    """
    sessions = scenario.requests_of.sessions(requests, seed)
    arrivals = scenario.arrivals(len(sessions), seed)
    assert arrivals is not None

    async def send(number: int, at: float) -> tuple[MeasuredRequest, int]:
        (planned,) = sessions[number]
        await asyncio.sleep(at)
        asked = LoadRequest("", number, 0, planned.prompt, planned.max_tokens)
        answer = await (target.answer(asked, targets[planned.kind]) if targets else target.ask(asked))
        assert answer.error is None, answer.error
        return MeasuredRequest(number, at, len(planned.prompt), answer.token_times), planned.kind

    async def send_all() -> list[tuple[MeasuredRequest, int]]:
        return await asyncio.gather(*(send(number, at / faster) for number, at in enumerate(arrivals)))

    return virtual_time.run(send_all())


@dataclass(frozen=True)
class Result:
    """Holds what one run came to."""

    goodput: float
    ttft: float
    slow_ttft: float


def run(scenario: Scenario, *, rule: str, replicas: int, requests: int, seed: int) -> Result:
    """Simulate a scenario, whose load is of as many machines as there are replicas."""
    slo = scenario.slos[0] if scenario.slos else None
    config = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, enable_slo=slo is not None)
    workload = scenario.requests_of
    simulation = SimulationConfig(
        calibration=scenario.calibration,
        scheduler=config,
        enable_prefix_caching=workload.caches_prefixes,
    )
    target = SimulatedTarget(Deployment.of(simulation, replicas=replicas))
    targets = scenario.targets(slo) if slo is not None else None
    with patch.object(simulate, "choose_replica", RULES[rule]):
        records = drive(target, scenario, requests=requests, seed=seed, faster=replicas, targets=targets)
    counted = records[int(WARM_UP * len(records)) :]
    seconds = counted[-1][0].sent - counted[0][0].sent
    judged = targets or [None] * 9
    met = sum(1 for record, kind in counted if judged[kind] is None or metrics.meets_slo(record, judged[kind]))
    ttfts = [metrics.ttft(record) for record, _ in counted]
    return Result(met / seconds, metrics.percentile(ttfts, 50), metrics.percentile(ttfts, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="", help="only points whose names contain all of these words")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1000, help="requests of each run")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    heads = (f"{rule} {what}" for rule in RULES for what in ("goodput", "ttft", "p99"))
    print(f"{'':56}" + "".join(f"{head:>17}" for head in heads), flush=True)
    for workload, slo in POINTS:
        for load in LOADS:
            scenario = Scenario(MACHINE, workload, load, (slo,) if slo else ())
            name = f"{scenario}/{slo or 'no SLO'}"
            if not all(word in name for word in arguments.points.split()):
                continue
            print(f"{name:56}", end="", flush=True)
            for rule in RULES:
                results = [
                    run(scenario, rule=rule, replicas=arguments.replicas, requests=arguments.requests, seed=seed)
                    for seed in range(1, arguments.seeds + 1)
                ]
                for what in ("goodput", "ttft", "slow_ttft"):
                    print(f"{metrics.mean([getattr(each, what) for each in results]):17.4g}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
