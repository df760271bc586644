"""Searches the request rates of DistServe's evaluation: OPT-13B and OPT-66B on A100-80GB, SLOs kept by 90 %.

Zhong et al., OSDI 2024 (arXiv 2401.09670). Placements, SLOs and settings are those of the scripts that repeat its
evaluation (evaluation/ in its repository); step times are the fits of its simulator, for its own engine and for vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.papers.data import Engine, distserve_engine, workload
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.config import Role, SchedulerConfig
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig
from splitfuse.simulator.rates import PRECISION, Criterion, Goal, largest_load, sustains

REQUESTS = 200
ATTAINMENT = 0.9
LEAST = 1 / 64
"""Smallest rate for each GPU that is tried."""
STEP_OVERHEAD = 2e-3
"""Time between steps in its simulator, for all engines."""
NVLINK = Link(bytes_per_second=300e9)
"""Both parts are on one node: NVIDIA's data sheet of the A100, 600 GB/s both ways."""
MAX_NUM_SEQS = 1024
BUDGETS = (256, 512, 1024, 2048)
LONGER_TTFTS = (1.0, 1.1, 1.2, 1.4)
"""Multiples of a workload's TTFT target for which its rates are explained."""


@dataclass(frozen=True)
class Case:
    """Holds a workload of the evaluation, and its figure: how many times vLLM's rate for each GPU."""

    model: str
    lengths: str
    ttft: float
    tpot: float
    paper: str
    vllm_gpus: int
    prompt_gpus: int
    generation_gpus: int
    generation_stages: int = 1


WORKLOADS = {
    "chat-13b": Case("OPT-13B", "sharegpt", 0.25, 0.1, "2.0-4.6", 1, 2, 1),
    "chat-66b": Case("OPT-66B", "sharegpt", 0.4, 0.1, "2.0-4.6", 4, 4, 2, 2),
    "code": Case("OPT-66B", "humaneval", 0.125, 0.2, "5.7", 4, 4, 2, 2),
    "summaries": Case("OPT-66B", "longbench", 15.0, 0.15, "4.3", 4, 4, 2, 2),
}
STAGED_KV_TOKENS = 78_512
"""Tokens that OPT-66B's cache holds on two stages of two GPUs each: its simulator's table."""


def machine(
    engine: Engine, policy: str, budget: int, role: Role = Role.MIXED, *, stages: int = 1, **targets: str
) -> Machine:
    """Return a machine with an engine."""
    scheduler = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=MAX_NUM_SEQS, **targets)  # type: ignore[arg-type]
    config = SimulationConfig(
        calibration=engine.calibration,
        scheduler=scheduler,
        policy=policy,
        enable_prefix_caching=False,
        step_overhead=STEP_OVERHEAD,
    )
    return Machine(engine=config, role=role, step_times=engine.times, stages=stages, gpus=stages * engine.gpus)


def split(case: Case, engine: str = "DistServe") -> Deployment:
    """Return the placement of the evaluation: prompts on some GPUs, generation on others, the batches FCFS."""
    prompts = distserve_engine(engine, case.model, case.prompt_gpus)
    kv_tokens = STAGED_KV_TOKENS if case.generation_stages > 1 else None
    generation = distserve_engine(engine, case.model, case.generation_gpus, kv_tokens=kv_tokens)
    machines = (
        machine(prompts, "orca", 8192, Role.PROMPT),
        machine(generation, "orca", 1024, Role.GENERATION, stages=case.generation_stages),
    )
    return Deployment(
        machines=machines,
        link=NVLINK,
        kv_bytes_per_token=prompts.kv_bytes_per_token,
        long_queue=float("inf"),
    )


def alone(machine: Machine) -> Deployment:
    return Deployment(machines=(machine,))


def rate(deployment: Deployment, lengths: str, goal: Goal, *, above: float = 0.0) -> float:
    """Return the largest rate for each GPU that reaches the goal; 0 if it is not larger than `above`."""

    def is_sustained(per_gpu: float) -> bool:
        requests = workload(lengths, longest=2047)
        return sustains(deployment, lambda _: requests, per_gpu * deployment.gpus, goal)

    if above and not is_sustained(above * PRECISION):
        return 0.0
    return largest_load(is_sustained, start=above * PRECISION or 0.5, least=LEAST)


def example(requests: int) -> Table:
    """Return the example of the repository: OPT-13B, ShareGPT, 200 ms and 100 ms at P90 each."""
    table = Table("DistServe's example: OPT-13B, 2 + 1 GPUs", ("", "requests/s a GPU"))
    shares = (partial(metrics.meets_slo, targets=targets) for targets in (SloTargets(ttft=0.2), SloTargets(tpot=0.1)))
    goal = Goal(criteria=tuple(Criterion(is_met, ATTAINMENT) for is_met in shares), requests=requests)
    table.add("its repository", "1.56")
    table.add("simulated", f"{rate(split(WORKLOADS['chat-13b']), 'sharegpt', goal):.2f}")
    return table


def explain(name: str, *, requests: int) -> Table:
    """Return the rates of a workload with longer TTFT targets: how much of its ratio is the edge of one."""
    case = WORKLOADS[name]
    theirs = distserve_engine("DistServe", case.model, case.vllm_gpus)
    deployments = (
        alone(machine(distserve_engine("vLLM", case.model, case.vllm_gpus), "prefill-first", 16_384)),
        alone(machine(theirs, "prefill-first", 16_384)),
        split(case),
    )
    table = Table(
        f"Requests/s for each GPU of {name} by TTFT target",
        ("TTFT", "vLLM", "policy alone: vLLM's, DistServe's engine", "split, DistServe's engine", "ratio to vLLM"),
    )
    for times in LONGER_TTFTS:
        goal = Goal.of(SloTargets(ttft=times * case.ttft, tpot=case.tpot), ATTAINMENT, requests)
        found = [rate(deployment, case.lengths, goal) for deployment in deployments]
        ratio = f"{found[-1] / found[0]:.2f}" if found[0] else "-"
        table.add(f"{1e3 * times * case.ttft:g} ms", *(f"{each:.2f}" for each in found), ratio)
        print(table.rows[-1], flush=True)
    return table


def run(names: Sequence[str], *, requests: int) -> list[Table]:
    """Simulate the workloads and return their tables."""
    table = Table(
        "Requests/s for each GPU at 90 % SLO attainment",
        (
            *("workload", "vLLM", "policy alone: vLLM's, DistServe's engine", "split, DistServe's engine"),
            *(
                "ratio to vLLM",
                "paper",
                "of it policy",
                "of it engine",
                "SplitFuse, DistServe's engine",
                "its settings",
            ),
        ),
    )
    for name in names:
        case = WORKLOADS[name]
        goal = Goal.of(SloTargets(ttft=case.ttft, tpot=case.tpot), ATTAINMENT, requests)
        vllm = rate(
            alone(machine(distserve_engine("vLLM", case.model, case.vllm_gpus), "prefill-first", 16_384)),
            case.lengths,
            goal,
        )
        theirs = distserve_engine("DistServe", case.model, case.vllm_gpus)
        same = rate(alone(machine(theirs, "prefill-first", 16_384)), case.lengths, goal)
        phases = rate(split(case), case.lengths, goal)
        ours, how = 0.0, ""
        for budget in BUDGETS:
            for targets in ({}, {"ttft": f"{1e3 * case.ttft:g}ms", "tpot": f"{1e3 * case.tpot:g}ms"}):
                deployment = alone(machine(theirs, "splitfuse", budget, **targets))
                if found := rate(deployment, case.lengths, goal, above=ours):
                    ours, how = found, f"budget {budget}" + (", SLO scheduling" if targets else "")

        def ratio(over: float, under: float) -> str:
            return f"{over / under:.2f}" if under else "-"

        cells = (f"{each:.2f}" for each in (vllm, same, phases))
        parts = (ratio(phases, vllm), case.paper, ratio(phases, same), ratio(same, vllm))
        table.add(name, *cells, *parts, f"{ours:.2f}", how)
        print(table.rows[-1], flush=True)
    return [example(requests), table]
