"""Counts the machines that Splitwise's evaluation needs: Llama-2 70B, 130 requests/s of Azure's code trace.

Patel et al., ISCA 2024 (arXiv 2311.18677). The counts are in their scripts/run_throughput.sh: baseline 113 DGX-A100 or
51 DGX-H100, Splitwise 54 + 10 and 23 + 10. It does not say for which model; by the measured times BLOOM-176B, the other
one, could not take 266,000 prompt tokens/s on 64 DGX-A100.

An SLO is a slowdown to a lone request on a DGX-A100: of TTFT 2, 3 and 6 at P50, P90 and P99, of the time per token and
of the whole 1.25, 1.5 and 5 (notebooks/plots.ipynb).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from benchmarks.papers.data import (
    Drawn,
    MeasuredTimes,
    TokenLineTimes,
    splitwise_times,
    token_line_times,
    workload,
)
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.bench.load import WARM_UP, open_loop
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import poisson
from splitfuse.config import Role, SchedulerConfig
from splitfuse.core.request import Request
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.rates import Criterion, Goal, sustains
from splitfuse.simulator.simulate import Replica, SimulatedTarget

RATE = 130.0
"""Requests/s of the paper's counts."""
SECONDS = 20.0
"""Length of the window by default, which a quarter as many requests precede."""
WHOLE_PROMPTS = 2048
"""Number of prompt tokens that are put together: theirs."""
LINK = Link(bytes_per_second=200 * 2**30)
"""Theirs: 200 GiB/s between machines."""
MAX_NUM_SEQS = 512
LONGEST = 16_384
SLOS = {50: (2.0, 1.25, 1.25), 90: (3.0, 1.5, 1.5), 99: (6.0, 5.0, 5.0)}
"""Largest slowdowns of TTFT, time per token and end-to-end latency, by percentile."""
WATTS = {"DGX-A100": 6500.0, "DGX-H100": 10_200.0}
"""Their configs/hardware_repo: the machines' rated power."""
PRICE = {"DGX-A100": 2.21, "DGX-H100": 4.76}
"""Their notebooks/utils.py: an hour of a machine's GPU."""
PAPER = {"DGX-A100": (113, 54, 10), "DGX-H100": (51, 23, 10)}
BUDGETS = (512, 2048)
AFTER = 10.0
"""Seconds for which requests come after those that are counted for an explanation: the longest answers take 85."""
MOST = 1.4
"""Largest number of machines that is tried, as a multiple of the paper's baseline."""
SYSTEMS = ("baseline", "split", "splitfuse")


Times = MeasuredTimes | TokenLineTimes


@dataclass(frozen=True)
class Reading:
    """Says how the figures are read: as we do, or in some respect as Splitwise's simulator does."""

    name: str
    per_token: bool = False
    """True if the time of all tokens but the first is divided by the number of tokens, not of gaps: scheduler.py."""
    token_lines: bool = False
    """True if steps take the times of TokenLineTimes: performance_model.py, notebooks/perf_model.py."""
    fewest_tokens: bool = False
    """True if a request goes where the fewest tokens wait, a running request counting as one: TokenJSQScheduler."""

    def times(self, name: str) -> Times:
        """Return the times of a kind of machine."""
        return token_line_times(name) if self.token_lines else splitwise_times(name)

    def target(self, deployment: Deployment) -> SimulatedTarget:
        """Return what a deployment is simulated by."""
        return (FewestTokens if self.fewest_tokens else SimulatedTarget)(deployment)


OURS = Reading("ours")
THEIRS = Reading("theirs", per_token=True, token_lines=True, fewest_tokens=True)
READINGS = {each.name: each for each in (OURS, THEIRS)}


class FewestTokens(SimulatedTarget):
    """Sends each request to the machine with the fewest tokens to compute, a running decode counting as one."""

    def _choose(self, copy: Request, names: list[bytes]) -> Replica:  # noqa: ARG002
        return min(self._replicas, key=_num_waiting_tokens)


def _num_waiting_tokens(replica: Replica) -> int:
    return sum(max(request.num_unscheduled, 1) for request in replica.scheduler.queue.unfinished)


@dataclass(frozen=True)
class Kind:
    """Holds a kind of machine, and how long a lone request takes on it."""

    name: str
    times: Times

    @classmethod
    def of(cls, name: str, reading: Reading = OURS) -> Kind:
        return cls(name, reading.times(name))

    def machine(self, role: Role, policy: str, budget: int, **targets: str) -> Machine:
        """Return a machine of this kind with a scheduling policy."""
        calibration = MACHINES[f"splitwise-{self.name[-4:].lower()}"]
        scheduler = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=MAX_NUM_SEQS, **targets)  # type: ignore[arg-type]
        engine = SimulationConfig(
            calibration=calibration, scheduler=scheduler, policy=policy, enable_prefix_caching=False
        )
        return Machine(
            engine=engine,
            role=role,
            step_times=self.times,
            gpus=8,
            price=8 * PRICE[self.name],
            watts=WATTS[self.name],
        )


def goal(lone: Times, requests: int, reading: Reading = OURS) -> Goal:
    """Return the goal that all nine percentiles are within the SLOs: so many of the requests are."""

    def criterion(percent: int, which: int, most: float) -> Criterion:
        return Criterion(lambda record: slowdown(record, lone, reading)[which] <= most, percent / 100)

    criteria = (criterion(percent, *each) for percent, limits in SLOS.items() for each in enumerate(limits))
    return Goal(criteria=tuple(criteria), requests=requests)


def slowdown(record: MeasuredRequest, lone: Times, reading: Reading = OURS) -> tuple[float, float, float]:
    """Return TTFT, time per token and latency as multiples of a lone request's. One token has no time per token."""
    first, gap = lone.prompt_ms(record.num_prompt_tokens) / 1e3, lone.decode_ms(1, record.num_prompt_tokens) / 1e3
    gaps = metrics.gaps(record)
    whole = first + gap * len(gaps)
    between = sum(gaps) / (len(gaps) + 1) if reading.per_token else metrics.mean(gaps or [gap])
    return metrics.ttft(record) / first, between / gap, (record.done - record.sent) / whole


class Count:
    """Counts machines: the least number that meets the SLOs."""

    def __init__(self, requests: Drawn, rate: float, seconds: float, reading: Reading = OURS) -> None:
        self.requests, self.rate, self.reading = requests, rate, reading
        self.goal = goal(reading.times("DGX-A100"), round(rate * seconds), reading)

    def is_enough(self, deployment: Deployment) -> bool:
        """Return whether a deployment sustains the load."""
        began = time.process_time()
        enough = sustains(deployment, lambda _: self.requests, self.rate, self.goal, make_target=self.reading.target)
        seconds = time.process_time() - began
        print(f"    {len(deployment.machines)} machines: {enough} ({seconds:.0f} s)", flush=True)
        return enough

    def least(self, make: Callable[[int], Deployment], *, low: int, high: int) -> int:
        """Return the least number of machines above `low`, which are too few; `high` + 1 if not even those do."""
        if not self.is_enough(make(high)):
            return high + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_enough(make(middle)) else (middle, high)
        return high


def mixed(machine: Machine) -> Callable[[int], Deployment]:
    """Return deployments of so many equal machines."""
    return lambda count: Deployment(machines=(machine,) * count)


def split(prompts: Machine, generation: Machine, tokens: int) -> Callable[[int], Deployment]:
    """Return deployments of so many machines, `tokens` of which generate."""
    size = prompts.engine.calibration.kv_bytes_per_token

    def make(count: int) -> Deployment:
        machines = (prompts,) * (count - tokens) + (generation,) * tokens
        return Deployment(machines=machines, link=LINK, kv_bytes_per_token=size)

    return make


def explain(name: str, machines: int, *, rate: float, seconds: float) -> Table:
    """Return the slowdowns with mixed batching, as we read the figures, and as their simulator does, step by step."""
    table = Table(
        f"Slowdowns with mixed batching on {machines} {name}, {rate:g} requests/s: P50 / P90 / P99",
        ("reading", "TTFT", "time per token", "latency"),
    )
    readings = (
        OURS,
        Reading("time by tokens, not by gaps", per_token=True),
        Reading("their lines of times", token_lines=True),
        Reading("their routing", fewest_tokens=True),
        THEIRS,
    )
    for reading in readings:
        deployment = mixed(Kind.of(name, reading).machine(Role.MIXED, "orca", WHOLE_PROMPTS))(machines)
        requests, lone = workload("azure_code", longest=LONGEST - 1), reading.times("DGX-A100")
        target = reading.target(deployment)
        count = round(rate * seconds)
        arrivals = islice(poisson(rate, seed=0, stream="explain"), count + math.ceil(WARM_UP * count + AFTER * rate))
        point = virtual_time.run(open_loop(target, requests, rate=None, arrivals=arrivals, requests=count))
        found = [slowdown(each, lone, reading) for each in metrics.counted(point)]
        cells = [
            " / ".join(f"{metrics.percentile([each[which] for each in found], percent):.2f}" for percent in SLOS)
            for which in range(3)
        ]
        table.add(reading.name, *cells)
        print(table.rows[-1], flush=True)
    return table


def run(kinds: Sequence[str], systems: Sequence[str], *, rate: float, seconds: float, reading: Reading = OURS) -> Table:
    """Simulate all systems and return their table. `paper` are the counts for RATE requests/s."""
    table = Table(
        f"Machines for {rate:g} requests/s of Azure's code trace, Llama-2 70B",
        ("machine", "system", f"paper, {RATE:g} requests/s", "simulated", "machines", "kW", "price an hour"),
    )
    for name in kinds:
        kind = Kind.of(name, reading)
        count = Count(workload("azure_code", longest=LONGEST - 1), rate, seconds, reading)
        baseline, prompts, tokens = PAPER[name]
        tokens = max(round(tokens * rate / RATE), 1)
        least = math.floor(rate * kind.times.prompt_ms(2048) / 1e3)  # as fast as prompts can be

        def add(system: str, paper: str, simulated: str, machines: int, kind: Kind = kind) -> None:
            watts, price = machines * WATTS[kind.name] / 1e3, machines * 8 * PRICE[kind.name]
            table.add(kind.name, system, paper, simulated, str(machines), f"{watts:.0f}", f"{price:.0f}")
            print(table.rows[-1], flush=True)

        high = math.ceil(MOST * baseline * rate / RATE)
        if "baseline" in systems:
            found = count.least(mixed(kind.machine(Role.MIXED, "orca", WHOLE_PROMPTS)), low=least, high=high)
            add("mixed batching", str(baseline), str(found), found)
        if "split" in systems:
            both = [kind.machine(role, "orca", WHOLE_PROMPTS) for role in (Role.PROMPT, Role.GENERATION)]
            best, chosen = count.least(split(both[0], both[1], tokens), low=least + tokens, high=high), tokens
            # fewer that generate, where the mixed pool helps out
            for fewer in sorted({max(tokens // 2, 1), max(tokens // 4, 1)}, reverse=True):
                if count.is_enough(split(both[0], both[1], fewer)(best - 1)):
                    best, chosen = count.least(split(both[0], both[1], fewer), low=least, high=best - 1), fewer
            add("phase splitting", f"{prompts} + {PAPER[name][2]}", f"{best - chosen} + {chosen}", best)
        if "splitfuse" in systems:
            best = high
            how = ""
            for budget in BUDGETS:
                for targets in ({}, {"ttft": "0.3ms/token", "tpot": "55ms"}):
                    machine = kind.machine(Role.MIXED, "splitfuse", budget, **targets)
                    if count.is_enough(mixed(machine)(best - 1)):
                        best = count.least(mixed(machine), low=least, high=best - 1)
                        how = f"budget {budget}" + (", SLO scheduling" if targets else "")
            add("SplitFuse", "", how, best)
    return table
