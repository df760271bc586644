"""Searches the request rates of DistServe's evaluation: OPT-13B and OPT-66B on A100-80GB, SLOs kept by 90 %.

Zhong et al., OSDI 2024 (arXiv 2401.09670). Placements and settings are those of the scripts that repeat its evaluation
(evaluation/ in its repository), SLOs and figures those of evaluation/2-benchmark-serving/plot.ipynb, whose outputs are
the paper's; step times are the fits of its simulator, for its own engine and for vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.papers.data import Engine, distserve_engine, workload
from benchmarks.papers.kept import Kept
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.config.engine import SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig
from splitfuse.simulator.rates import PRECISION, Criterion, Goal, largest_load, poisson_load, sustains
from splitfuse.simulator.simulate import SimulatedTarget

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
MORE_MEMORY = (1, 2, 4)
"""Multiples of the KV cache of machines that generate for which rates are explained."""
LONGER_TTFTS = (1.0, 1.1, 1.2, 1.4)
"""Multiples of a workload's TTFT target for which its rates are explained."""
VLLM_LOADS = {
    "chat-13b": ((0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0), (90.0, 90.0, 85.0, 81.0, 71.0, 70.0, 68.0, 55.0)),
    "code": (
        (0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875, 2.125),
        (91.5, 86.5, 79.5, 71.0, 65.0, 56.5, 38.0, 36.5, 28.0),
    ),
}
"""Requests/s for each GPU at which vLLM was measured, and the percentage that met the SLOs: plot.ipynb prints them."""


@dataclass(frozen=True)
class Case:
    """Holds a workload of the evaluation, and its figures: how many times the rate for each GPU of vLLM, and of
    DeepSpeed-MII.
    """

    model: str
    lengths: str
    ttft: float
    tpot: float
    to_vllm: float
    to_mii: float
    vllm_gpus: int
    prompt_gpus: int
    generation_gpus: int
    generation_stages: int = 1


WORKLOADS = {
    "chat-13b": Case("OPT-13B", "sharegpt", 0.25, 0.1, 4.6, 7.36, 1, 2, 1),
    "chat-66b": Case("OPT-66B", "sharegpt", 2.5, 0.15, 2.75, 1.57, 4, 4, 2, 2),
    "code": Case("OPT-66B", "humaneval", 0.125, 0.2, 5.72, 1.59, 4, 4, 2, 2),
    "summaries": Case("OPT-66B", "longbench", 15.0, 0.15, 4.24, 1.77, 4, 4, 2, 2),
}
STAGED_KV_TOKENS = 78_512
"""Tokens that OPT-66B's cache holds on two stages of two GPUs each: its simulator's table."""


def machine(
    engine: Engine, policy: str, budget: int, role: EngineRole = EngineRole.MIXED, *, stages: int = 1, **targets: str
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
        machine(prompts, "orca", 8192, EngineRole.PROMPT),
        machine(generation, "orca", 1024, EngineRole.GENERATION, stages=case.generation_stages),
    )
    return Deployment(
        machines=machines,
        link=NVLINK,
        kv_bytes_per_token=prompts.kv_bytes_per_token,
        long_queue=float("inf"),
    )


def alone(machine: Machine) -> Deployment:
    return Deployment(machines=(machine,))


@dataclass(frozen=True)
class Search:
    """Searches rates for each GPU, each once."""

    requests: int
    kept: Kept

    def goal(self, case: Case, *, ttft_times: float = 1.0) -> Goal:
        """Return the goal of a workload, with so many times its TTFT target."""
        return Goal.of(SloTargets(ttft=ttft_times * case.ttft, tpot=case.tpot), ATTAINMENT, self.requests)

    def rate(self, deployment: Deployment, lengths: str, goal: Goal, *what: object, above: float = 0.0) -> float:
        """Return the largest rate for each GPU that reaches the goal; 0 if it is not larger than `above`. `what` names
        the deployment and the goal.
        """

        def is_sustained(per_gpu: float) -> bool:
            requests = workload(lengths, longest=2047)
            return sustains(deployment, lambda _: requests, per_gpu * deployment.gpus, goal)

        def compute() -> float:
            if above and not is_sustained(above * PRECISION):
                return 0.0
            return largest_load(is_sustained, start=above * PRECISION or 0.5, least=LEAST)

        return self.kept.find("distserve", self.requests, *what, f"above {above:.3g}", compute=compute)

    def attainments(self, deployment: Deployment, lengths: str, goal: Goal, rates: Sequence[float]) -> list[float]:
        """Return the percentages of requests that meet an SLO at these rates for each GPU."""
        is_met, requests = goal.criteria[0].is_met, workload(lengths, longest=2047)

        def percentage(per_gpu: float) -> float:
            load = poisson_load(SimulatedTarget(deployment), requests, per_gpu * deployment.gpus, self.requests)
            return 100 * metrics.mean([is_met(each) for each in metrics.counted(virtual_time.run(load))])

        return [percentage(each) for each in rates]


def engines(case: Case) -> tuple[Deployment, Deployment, Deployment]:
    """Return vLLM, its policy with DistServe's engine, and DistServe."""
    vllm, theirs = (distserve_engine(each, case.model, case.vllm_gpus) for each in ("vLLM", "DistServe"))
    alike = (alone(machine(engine, "prefill-first", 16_384)) for engine in (vllm, theirs))
    return *alike, split(case)


SYSTEMS = ("vLLM", "prefill-first", "split")
"""Names of `engines` under which figures are kept."""


def example(search: Search) -> Table:
    """Return the example of the repository: OPT-13B, ShareGPT, 200 ms and 100 ms at P90 each."""
    table = Table("DistServe's example: OPT-13B, 2 + 1 GPUs", ("", "requests/s a GPU"))
    shares = (partial(metrics.meets_slo, targets=targets) for targets in (SloTargets(ttft=0.2), SloTargets(tpot=0.1)))
    goal = Goal(criteria=tuple(Criterion(is_met, ATTAINMENT) for is_met in shares), requests=search.requests)
    table.add("its repository", "1.56")
    table.add("simulated", f"{search.rate(split(WORKLOADS['chat-13b']), 'sharegpt', goal, 'example'):.2f}")
    return table


def explain(name: str, search: Search) -> Table:
    """Return the rates of a workload with longer TTFT targets: how much of its ratio is the edge of one."""
    case = WORKLOADS[name]
    table = Table(
        f"Requests/s for each GPU of {name} by TTFT target",
        ("TTFT", "vLLM", "policy alone: vLLM's, DistServe's engine", "split, DistServe's engine", "ratio to vLLM"),
    )
    for times in LONGER_TTFTS:
        goal = search.goal(case, ttft_times=times)
        found = [
            search.rate(deployment, case.lengths, goal, name, system, *([f"TTFT x {times:g}"] if times > 1 else []))
            for system, deployment in zip(SYSTEMS, engines(case), strict=True)
        ]
        ratio = f"{found[-1] / found[0]:.2f}" if found[0] else "-"
        table.add(f"{1e3 * times * case.ttft:g} ms", *(f"{each:.2f}" for each in found), ratio)
        print(table.rows[-1], flush=True)
    return table


def with_more_memory(deployment: Deployment, times: int) -> Deployment:
    """Return a deployment whose machines that generate have so many times the KV cache."""

    def larger(machine: Machine) -> Machine:
        calibration = machine.engine.calibration
        calibration = replace(calibration, num_blocks=times * calibration.num_blocks)
        return replace(machine, engine=replace(machine.engine, calibration=calibration))

    machines = (each if each.role is EngineRole.PROMPT else larger(each) for each in deployment.machines)
    return replace(deployment, machines=tuple(machines))


def explain_memory(name: str, search: Search) -> Table:
    """Return the rates of a workload with more KV memory: how much of its ratio is the room for answers."""
    case = WORKLOADS[name]
    goal, (vllm, _, phases) = search.goal(case), engines(case)
    table = Table(
        f"Requests/s for each GPU of {name} by KV memory where answers are generated",
        ("memory", "vLLM", "split, DistServe's engine", "ratio to vLLM"),
    )
    for times in MORE_MEMORY:
        found = [
            search.rate(
                with_more_memory(deployment, times),
                *(case.lengths, goal, name, system),
                *([f"KV x {times}"] if times > 1 else []),
            )
            for system, deployment in (("vLLM", vllm), ("split", phases))
        ]
        ratio = f"{found[1] / found[0]:.2f}" if found[0] else "-"
        table.add(f"x {times}", *(f"{each:.2f}" for each in found), ratio)
        print(table.rows[-1], flush=True)
    return table


def measured(name: str, search: Search) -> Table:
    """Return how many requests met the SLOs with vLLM, by the loads at which it was measured, and simulated."""
    case, (rates, percentages) = WORKLOADS[name], VLLM_LOADS[name]

    def compute() -> list[float]:
        return search.attainments(engines(case)[0], case.lengths, search.goal(case), rates)

    found = search.kept.find("distserve", search.requests, name, "vLLM, % in time", compute=compute)
    table = Table(f"Requests of {name} that meet the SLOs with vLLM, %", ("requests/s a GPU", "measured", "simulated"))
    for rate, percentage, simulated in zip(rates, percentages, found, strict=True):
        table.add(f"{rate:g}", f"{percentage:.1f}", f"{simulated:.1f}")
    return table


def run(names: Sequence[str], search: Search) -> list[Table]:
    """Simulate the workloads and return their tables."""
    table = Table(
        "Requests/s for each GPU at 90 % SLO attainment",
        (
            *("workload", "vLLM", "policy alone: vLLM's, DistServe's engine", "split, DistServe's engine"),
            *("ratio to vLLM", "paper", "to the paper", "of it policy", "of it engine"),
            *("SplitFuse, DistServe's engine", "its settings", "split to it", "split to MII in the paper"),
        ),
    )
    for name in names:
        case = WORKLOADS[name]
        goal = search.goal(case)
        vllm, same, phases = (
            search.rate(deployment, case.lengths, goal, name, system)
            for system, deployment in zip(SYSTEMS, engines(case), strict=True)
        )
        ours, how = 0.0, ""
        theirs = distserve_engine("DistServe", case.model, case.vllm_gpus)
        for budget in BUDGETS:
            for targets in ({}, {"ttft": f"{1e3 * case.ttft:g}ms", "tpot": f"{1e3 * case.tpot:g}ms"}):
                deployment = alone(machine(theirs, "splitfuse", budget, **targets))
                what = f"budget {budget}" + (", SLO scheduling" if targets else "")
                if found := search.rate(deployment, case.lengths, goal, name, what, above=ours):
                    ours, how = found, what

        def ratio(over: float, under: float) -> str:
            return f"{over / under:.2f}" if under else "-"

        cells = (f"{each:.2f}" for each in (vllm, same, phases))
        parts = (ratio(phases, vllm), f"{case.to_vllm:g}", ratio(phases / case.to_vllm, vllm))
        shares = (ratio(phases, same), ratio(same, vllm))
        table.add(name, *cells, *parts, *shares, f"{ours:.2f}", how, ratio(phases, ours), f"{case.to_mii:g}")
        print(table.rows[-1], flush=True)
    curves = [measured(name, search) for name in names if name in VLLM_LOADS]
    return [example(search), table, *curves]
