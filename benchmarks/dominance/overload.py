"""Overload for hours: how long the late wait, against how much goodput, by tail_share.

    python -m benchmarks.dominance.overload [--hours H] [--machine NAME] [--load 150%]
        [--tail-share F ...] [--only TEXT]

Poisson arrivals at 1.5 times the capacity, at most 128 unfinished requests, others refused at once; or a closed loop
(`--load "16 clients"`). Prompts Normal(512), answers Normal(64); the SLO is FastGen's at 4 tokens/s, or another
(`--ttft 10ms/token --gap "itl 170ms"`). The bound on a latency is that of all unfinished requests, one after the other,
with `tail_share` of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random

from benchmarks.dominance.compare import OUR_SYSTEM
from benchmarks.dominance.loop import OURS, PlannedRequest, System, drive
from benchmarks.dominance.points import FASTGEN, MAX_NUM_SEQS, WORKLOADS, Scenario, Slo
from splitfuse.bench import metrics
from splitfuse.config.engine import MAX_TAIL_SHARE, TAIL_SHARE

TAIL_SHARES = sorted({1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, TAIL_SHARE, MAX_TAIL_SHARE})
OTHERS = (System("splitfuse", 512), System("prefill-first", 2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--load", default="150%", help="of the capacity, or `16 clients`")
    parser.add_argument("--ttft", default=FASTGEN[1][0], help="target as in points.py (default: %(default)s)")
    parser.add_argument("--gap", default=FASTGEN[1][1], help="target as in points.py (default: %(default)s)")
    parser.add_argument("--machine", default="0.5b-int8")
    parser.add_argument("--tail-share", type=float, nargs="*", default=TAIL_SHARES)
    parser.add_argument("--only", default="", help="only systems whose names begin so, such as ours or splitfuse")
    arguments = parser.parse_args()
    scenario = Scenario(arguments.machine, "paper-small", arguments.load, (Slo(arguments.ttft, arguments.gap),))
    print(
        f"{scenario}, {arguments.hours:g} h, capacity {scenario.capacity:.2f} requests/s\n"
        f"{'':34}{'served':>9}{'refused':>9}{'goodput':>9}{'on time':>9}"
        f"{'TTFT P50':>10}{'P95':>8}{'P99':>8}{'longest':>9}{'latency':>9}{'bound':>8}",
        flush=True,
    )
    for system in (*OTHERS, *(System(OURS, OUR_SYSTEM.budget, share) for share in arguments.tail_share)):
        if str(system).startswith(arguments.only):
            print(row(scenario, system, arguments.hours), flush=True)


def row(scenario: Scenario, system: System, hours: float, *, seed: int = 1) -> str:
    """Return a line of the table."""
    machine, (slo,) = scenario.calibration, scenario.slos
    count = int(hours * 3600 * (scenario.capacity if scenario.clients else scenario.rate))
    ((_, lengths),) = WORKLOADS[scenario.workload].classes
    random = Random(f"{seed} lengths")
    prompts = {length: (0,) * length for length in range(1, 4 * lengths.prompt)}  # one object for all equal prompts
    sessions: list[Sequence[PlannedRequest]] = []
    for _ in range(count):
        prompt, generate = lengths.draw(random)
        sessions.append((PlannedRequest(prompts[prompt], generate),))
    records = drive(
        system.make_scheduler(machine, max_num_seqs=MAX_NUM_SEQS, caches_prefixes=False),
        machine,
        sessions,
        arrivals=scenario.arrivals(count, seed),
        clients=scenario.clients,
        spacing=scenario.spacing,
        targets=scenario.targets(slo) if system.is_ours else (),
        max_unfinished=0 if scenario.clients else MAX_NUM_SEQS,
    )
    seconds = records[-1][0].sent
    served = [record for record, _ in records if record.error is None]
    (targets,) = scenario.targets(slo)
    met = sum(metrics.meets_slo(record, targets) for record in served)
    first = sorted(metrics.ttft(record) for record in served)
    longest = max(record.done - record.sent for record in served)
    most = scenario.clients or MAX_NUM_SEQS
    bound = f"{most / scenario.capacity / system.tail_share:8.0f}" if system.is_ours else f"{'-':>8}"
    name = f"{system.policy}, tail_share {system.tail_share:.4f}" if system.is_ours else str(system)
    counts = f"{len(served):9}{len(records) - len(served):9}"
    goodput = f"{met / seconds:9.3f}{met / len(served):9.3f}"
    p50, p95, p99 = (metrics.percentile(first, each) for each in (50, 95, 99))
    waits = f"{p50:10.2f}{p95:8.1f}{p99:8.1f}{first[-1]:9.1f}{longest:9.1f}"
    return f"{name:34}{counts}{goodput}{waits}{bound}"


if __name__ == "__main__":
    main()
