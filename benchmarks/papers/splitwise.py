"""Counts the machines that Splitwise's evaluation needs for Azure's code trace.

Patel et al., ISCA 2024 (arXiv 2311.18677). The counts are in their scripts/run_throughput.sh: baseline 113 DGX-A100 or
51 DGX-H100, Splitwise 54 + 10 and 23 + 10. That script runs them at 130 requests/s; what they were found for it does
not say. The search for the least machines that keep the SLOs is in notebooks/plots.ipynb ("provisioning sweep"): 70
requests/s, by BLOOM-176B, the model of all its figures. So both are simulated (CASES).

An SLO is a slowdown to a lone request on a DGX-A100: of TTFT 2, 3 and 6 at P50, P90 and P99, of the time per token and
of the whole 1.25, 1.5 and 5 (notebooks/plots.ipynb).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from benchmarks.papers.data import (
    BLOOM,
    LLAMA,
    Drawn,
    MeasuredTimes,
    TokenLineTimes,
    splitwise_calibration,
    splitwise_times,
    token_line_times,
    workload,
)
from benchmarks.papers.kept import Kept
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.bench.load import WARM_UP, open_loop
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import poisson
from splitfuse.config.engine import SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.request import Request
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Link, Machine, SimulationConfig
from splitfuse.simulator.rates import Criterion, Goal, sustains
from splitfuse.simulator.simulate import Replica, SimulatedTarget

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
"""Machines of the baseline, and of Splitwise for prompts and for generation."""
BUDGETS = (512, 2048)
GENERATING = (10, 5, 2, 20, 30, 40)
"""Numbers of machines that generate, of which the best is taken; the first is theirs."""
AFTER = 10.0
"""Seconds for which requests come after those that are counted for an explanation: the longest answers take 85."""
MOST = 1.4
"""Largest number of machines that is tried, as a multiple of the paper's baseline."""


@dataclass(frozen=True)
class Case:
    """Names a model and the load that its machines are counted for."""

    model: str
    rate: float
    """Requests/s."""


CASES = {"bloom": Case(BLOOM, 70.0), "llama": Case(LLAMA, 130.0)}


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
    """True if a request goes where the fewest tokens are pending: TokenJSQScheduler."""

    def times(self, machine: str, model: str) -> Times:
        """Return the times of a model on a kind of machine."""
        return (token_line_times if self.token_lines else splitwise_times)(machine, model)

    def target(self, deployment: Deployment) -> SimulatedTarget:
        """Return what a deployment is simulated by."""
        return (FewestTokens if self.fewest_tokens else SimulatedTarget)(deployment)


OURS = Reading("ours")
THEIRS = Reading("theirs", per_token=True, token_lines=True, fewest_tokens=True)
SYSTEMS = {
    "baseline": ("mixed batching", OURS),
    "split": ("phase splitting", OURS),
    "splitfuse": ("SplitFuse", OURS),
    "their-baseline": ("mixed batching, as their simulator has it", THEIRS),
    "their-split": ("phase splitting, as their simulator has it", THEIRS),
    "their-splitfuse": ("SplitFuse, as their simulator has it", THEIRS),
}
"""Rows of the table, and how the figures are read for them."""


class FewestTokens(SimulatedTarget):
    """Sends each request to the machine with the fewest tokens pending, as theirs are: a prompt counts whole until its
    first token has come, and each request one more until its end.
    """

    def _choose(self, copy: Request, names: list[bytes]) -> Replica:  # noqa: ARG002
        return min(self._replicas, key=_num_pending_tokens)


def _num_pending_tokens(replica: Replica) -> int:
    unfinished = replica.scheduler.queue.unfinished
    return sum(1 + (0 if each.output_token_ids else each.num_prompt_tokens) for each in unfinished)


@dataclass(frozen=True)
class Kind:
    """Holds a kind of machine with a model."""

    name: str
    model: str
    times: Times

    @classmethod
    def of(cls, name: str, model: str = LLAMA, reading: Reading = OURS) -> Kind:
        return cls(name, model, reading.times(name, model))

    def machine(self, role: EngineRole, policy: str, budget: int, **targets: str) -> Machine:
        """Return a machine of this kind with a scheduling policy."""
        scheduler = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=MAX_NUM_SEQS, **targets)  # type: ignore[arg-type]
        engine = SimulationConfig(
            calibration=splitwise_calibration(self.name, self.model),
            scheduler=scheduler,
            policy=policy,
            enable_prefix_caching=False,
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


@dataclass(frozen=True)
class Count:
    """Counts machines: the least number that meets the SLOs of a case."""

    case: Case
    seconds: float
    reading: Reading
    kept: Kept

    def is_enough(self, deployment: Deployment, *what: object) -> bool:
        """Return whether a deployment, which `what` describes, sustains the load."""

        def compute() -> bool:
            requests, lone = azure_code(), self.reading.times("DGX-A100", self.case.model)
            wanted = goal(lone, round(self.case.rate * self.seconds), self.reading)
            return sustains(deployment, lambda _: requests, self.case.rate, wanted, make_target=self.reading.target)

        return self.kept.find(
            *("splitwise", self.case.model, self.case.rate, self.seconds, self.reading.name, *what), compute=compute
        )

    def least(
        self, make: Callable[[int], Deployment], *what: object, guess: int, low: int, high: int, above: int = 0
    ) -> int:
        """Return the least number of machines above `low`, which are too few; `high` + 1 if not even those do. `above`
        of them are named apart.
        """

        def is_enough(count: int) -> bool:
            return self.is_enough(make(count), *what, f"{count - above} + {above}" if above else count)

        if low < guess < high and is_enough(guess):
            high = guess
        elif not is_enough(high):
            return high + 1
        else:
            low = max(low, guess) if guess < high else low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return high


def azure_code() -> Drawn:
    """Return the requests of Azure's code trace."""
    return workload("azure_code", longest=LONGEST - 1)


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


def explain(name: str, case: Case, machines: int, *, seconds: float) -> Table:
    """Return the slowdowns with mixed batching, as we read the figures, and as their simulator does, step by step."""
    table = Table(
        f"Slowdowns of {case.model} with mixed batching on {machines} {name}, {case.rate:g}/s: P50 / P90 / P99",
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
        deployment = mixed(Kind.of(name, case.model, reading).machine(EngineRole.MIXED, "orca", WHOLE_PROMPTS))(
            machines
        )
        requests, lone = azure_code(), reading.times("DGX-A100", case.model)
        target = reading.target(deployment)
        count = round(case.rate * seconds)
        arrivals = islice(
            poisson(case.rate, seed=0, stream="explain"), count + math.ceil(WARM_UP * count + AFTER * case.rate)
        )
        point = virtual_time.run(open_loop(target, requests, rate=None, arrivals=arrivals, requests=count))
        found = [slowdown(each, lone, reading) for each in metrics.counted(point)]
        cells = [
            " / ".join(f"{metrics.percentile([each[which] for each in found], percent):.2f}" for percent in SLOS)
            for which in range(3)
        ]
        table.add(reading.name, *cells)
        print(table.rows[-1], flush=True)
    return table


def run(kinds: Sequence[str], cases: Sequence[str], systems: Sequence[str], *, seconds: float, kept: Kept) -> Table:
    """Simulate all systems and return their table."""
    table = Table(
        "Machines for Azure's code trace",
        ("model, requests/s", "machine", "system", "paper", "simulated", "machines", "to it", "kW", "price an hour"),
    )
    for case in (CASES[each] for each in cases):
        for name in kinds:
            for system in systems:
                title, reading = SYSTEMS[system]
                count = Count(case, seconds, reading, kept)
                paper, simulated, machines, published = _row(name, system, count)
                ratio = f"{machines / published:.2f}" if published else ""
                watts, price = machines * WATTS[name] / 1e3, machines * 8 * PRICE[name]
                cells = [str(machines), ratio, f"{watts:.0f}", f"{price:.0f}"]
                if simulated.startswith("more"):
                    cells = [""] * len(cells)
                table.add(f"{case.model}, {case.rate:g}", name, title, paper, simulated, *cells)
                print(table.rows[-1], flush=True)
    return table


def _row(name: str, system: str, count: Count) -> tuple[str, str, int, int]:
    """Return what the paper says, what was found, and the numbers of machines found and published."""
    kind = Kind.of(name, count.case.model, count.reading)
    baseline, prompts, tokens = PAPER[name]
    least = math.floor(count.case.rate * kind.times.prompt_ms(2048) / 1e3)  # as fast as prompts can be
    high = math.ceil(MOST * baseline)
    if "baseline" in system:
        machine = kind.machine(EngineRole.MIXED, "orca", WHOLE_PROMPTS)
        found = count.least(mixed(machine), name, "mixed", guess=baseline, low=least, high=high)
        return str(baseline), _most(found, high), found, baseline
    if system.endswith("split"):
        both = [kind.machine(role, "orca", WHOLE_PROMPTS) for role in (EngineRole.PROMPT, EngineRole.GENERATION)]
        best, chosen = high + 1, 0
        for generating in GENERATING:  # if they are few, the mixed pool helps out
            make, fewer = split(both[0], both[1], generating), best - 1 - generating
            if best <= high and (fewer < 1 or not count.is_enough(make(best - 1), name, f"{fewer} + {generating}")):
                continue
            top = min(best, high + 1) - 1
            guess = prompts + tokens if best > high else top
            low = max(least, generating)
            found = count.least(make, name, guess=guess, low=low, high=top, above=generating)
            if found <= top:
                best, chosen = found, generating
        how = f"{best - chosen} + {chosen}" if best <= high else f"more than {high}"
        return f"{prompts} + {tokens}", how, best, prompts + tokens
    best, how = high + 1, f"more than {high}"
    lone = count.reading.times("DGX-A100", count.case.model)
    ttft, _, tpot = SLOS[50]
    slo = {
        "ttft": f"{ttft * lone.prompt_ms(2048) / 2048:.3g}ms/token",
        "tpot": f"{tpot * lone.decode_ms(1, 2048):.3g}ms",
    }
    for budget in BUDGETS:
        for targets in ({}, slo):
            machine = kind.machine(EngineRole.MIXED, "splitfuse", budget, **targets)
            what = f"budget {budget}" + (", SLO scheduling" if targets else "")
            if count.is_enough(mixed(machine)(best - 1), name, what, best - 1):
                best = count.least(mixed(machine), name, what, guess=best - 1, low=least, high=best - 1)
                how = what
    return "", how, best, 0


def _most(found: int, high: int) -> str:
    return f"more than {high}" if found > high else str(found)
